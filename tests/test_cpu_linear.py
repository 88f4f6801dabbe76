"""The CPU kernels give the oracle's product on every instruction set, and are compiled once, or not at all."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpdq_kernels import cpu, dequantize, layout, linear, prepare
from products import assert_product

ISAS = list(cpu.FLAGS)[list(cpu.FLAGS).index(cpu.instruction_set()) :]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = ["lookup", "multiply"]

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")


@functools.cache
def opened(isa: str):
    return cpu.open_library(isa)


@contextmanager
def using(isa: str, kernel: str):
    """Multiply on the instruction set `isa` with `kernel`."""
    with mock.patch.multiple(cpu, library=lambda: opened(isa), is_few=lambda tokens, pairs: kernel == "lookup"):
        yield


def random_layer(k: int, group: int, n: int, in_features: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    """B of any bit pattern, past K too, and random coefficients."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randint(-(2**31), 2**31, layout.plane_shape(in_features, n, k), dtype=torch.int32, generator=generator)
    return B, torch.randn(layout.coefficient_shape(in_features, n, k, group), generator=generator).to(dtype)


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The values of x [M, K] with other strides."""
    if how == "columns apart":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if how == "rows apart":
        return torch.cat([x, x + 1], dim=-1)[:, : x.shape[1]]
    return x.T.contiguous().T if how == "transposed" else x


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_products_are_the_oracles(isa, data):
    k, group = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(layout.GROUP_SIZES))
    n, in_features = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 700))
    tokens = data.draw(st.sampled_from([*range(1, 10), 17, 64, 100]))
    x_dtype, c_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(DTYPES))
    B, c = random_layer(k, group, n, in_features, c_dtype, seed=data.draw(st.integers(0, 9)))
    x = torch.randn(tokens, in_features).to(x_dtype)
    x = strided(x, data.draw(st.sampled_from(["contiguous", "columns apart", "rows apart", "transposed"])))
    bias = torch.randn(n).to(x_dtype) if data.draw(st.booleans()) else None
    with using(isa, data.draw(st.sampled_from(KERNELS))):
        y = linear(x, prepare(B, c, group, in_features), bias)
    assert_product(y, x, dequantize(B, c, group, in_features), bias)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa, kernel):
    B, c = random_layer(2, 128, 1000, 500)
    x = torch.randn(5, 500)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with using(isa, kernel):
            results.append(linear(x, prepare(B, c, 128, 500)))
    torch.set_num_threads(1)
    assert all(torch.equal(y, results[0]) for y in results[1:])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_past_the_last_input_are_ignored(isa, kernel):
    B, c = random_layer(3, 64, 20, 70)
    zeroed = B.clone()
    zeroed[-1] &= (1 << 70 % 32) - 1
    x = torch.randn(3, 70)
    with using(isa, kernel):
        assert torch.equal(linear(x, prepare(B, c, 64, 70)), linear(x, prepare(zeroed, c, 64, 70)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
def test_identity_gives_the_exact_weights(isa, kernel):
    """More tokens than a block of either kernel, more outputs than a block of tiles."""
    B, c = random_layer(2, 32, 1100, 96)
    with using(isa, kernel):
        W = linear(torch.eye(96), prepare(B, c, 32, 96)).T
    torch.testing.assert_close(W, dequantize(B, c, 32, 96), rtol=0, atol=0 if kernel == "multiply" else 1e-6)


def test_infinite_and_nan_activations_stay_in_their_token():
    B, c = random_layer(2, 64, 40, 128)
    x = torch.randn(4, 128)
    x[1, 5], x[2, 100] = float("nan"), float("inf")
    for kernel in KERNELS:
        with using(cpu.instruction_set(), kernel):
            y = linear(x, prepare(B, c, 64, 128))
        assert torch.isfinite(y[[0, 3]]).all()
        assert not torch.isfinite(y[1]).any()
        assert not torch.isfinite(y[2]).any()


@pytest.mark.parametrize(("n", "in_features"), [(24, 40), (16, 576), (1000, 29568 // 16)])
@pytest.mark.parametrize("group", layout.GROUP_SIZES)
def test_packed_layers_are_the_size_of_stored_ones(n, in_features, group):
    B, c = random_layer(2, group, n, in_features, torch.float16)
    packed = prepare(B, c, group, in_features)
    rows = -(-n // 32) * 32 / n  # outputs come in tiles of 32
    assert packed.planes.nbytes == B.nbytes * rows
    assert packed.coefficients.nbytes == c.nbytes * rows
    assert packed.coefficients.dtype == c.dtype


@pytest.mark.parametrize(("k", "group", "n", "in_features"), [(1, 32, 17, 33), (2, 128, 40, 300), (4, 256, 64, 500)])
def test_rows_can_be_read_back_as_stored(k, group, n, in_features):
    """For embeddings, which pick rows."""
    B, c = random_layer(k, group, n, in_features)
    rows = torch.randint(0, n, (9,))
    B_rows, c_rows = cpu.stored_rows(*cpu.prepare(B, c, group), group, rows)
    assert torch.equal(B_rows, B[:, :, rows])
    assert torch.equal(c_rows, c[:, :, rows])


PROGRAM = """
import torch
from bpdq_kernels import linear, prepare
B, c = torch.full((1, 1, 4), -1, dtype=torch.int32), torch.ones(1, 2, 4)
for _ in range(3):
    print(linear(torch.ones(1, 32), prepare(B, c, 32, 32)).tolist())
"""


def start(cache, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_one_line_says_so_and_the_results_are_right(tmp_path, compiler):
    err = run(tmp_path, CXX=compiler)
    assert len(err.splitlines()) == 1
    assert "BPDQ layers run slowly on this CPU" in err
    assert compiler in err


RIGHT = ["[[64.0, 64.0, 64.0, 64.0]]"] * 3


def run(cache, **env: str) -> str:
    """What a process that uses the kernel prints to stderr; its products are right."""
    process = start(cache, **env)
    out, err = process.communicate()
    assert (process.returncode, out.splitlines()) == (0, RIGHT)
    return err


def refused(cache) -> str:
    (line,) = run(cache).splitlines()
    assert "BPDQ layers run slowly on this CPU" in line
    return line


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache folder with the library."""
    folder = tmp_path_factory.mktemp("built")
    assert run(folder) == ""
    return folder


@pytest.fixture
def cached(built, tmp_path):
    """The library in a cache folder of the test's own."""
    (library,) = shutil.copytree(built, tmp_path / "cache").glob("vllm-bpdq/*.so")
    return library


def is_whole(library) -> bool:
    content = library.read_bytes()
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def test_only_the_user_can_write_the_cache_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        assert run(tmp_path / "open") == ""
    finally:
        os.umask(before)
    (library,) = (tmp_path / "open" / "vllm-bpdq").glob("*.so")
    assert is_whole(library)
    assert [path.stat().st_mode & 0o022 for path in (library, library.parent)] == [0, 0]
    built = library.stat().st_mtime_ns
    assert run(tmp_path / "open") == ""
    assert library.stat().st_mtime_ns == built


def test_a_cache_that_cannot_be_written_costs_the_compiling_only(tmp_path, cached):
    (tmp_path / "file").touch()
    assert run(tmp_path / "file") == ""
    cached.unlink()
    cached.mkdir()  # nothing can take its place, as on a full disk
    assert run(tmp_path / "cache") == ""
    assert {path.name for path in cached.parent.iterdir()} == {cached.name, "lock"}, "nothing is left behind"


def test_a_user_without_a_home_has_the_kernel(tmp_path, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cpu.Path, "home", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cpu.open_library("portable").pairs is False
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [0, 31, 4096, -1])
def test_a_damaged_library_is_compiled_again(tmp_path, cached, left):
    """After a crash or on a full disk; loading what is left of one kills the process."""
    content = cached.read_bytes()
    cached.write_bytes(content[:left])
    assert run(tmp_path / "cache") == ""
    assert is_whole(cached)


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("which", ["library", "folder"])
def test_code_that_others_can_write_is_not_loaded(tmp_path, cached, which, mode):
    path = cached if which == "library" else cached.parent
    path.chmod(path.stat().st_mode | mode)
    assert f"{path} can be written by others" in refused(tmp_path / "cache")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("which", ["library", "folder"])
def test_code_of_another_user_is_not_loaded(tmp_path, cached, which):
    path = cached if which == "library" else cached.parent
    os.chown(path, 12345, -1)
    assert f"{path} belongs to another user" in refused(tmp_path / "cache")


def test_a_compiler_may_have_words(tmp_path):
    assert run(tmp_path, CXX="env LC_ALL=C g++") == ""
    assert len(list(tmp_path.glob("vllm-bpdq/*.so"))) == 1


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("echo 'x.cpp: In function f:' >&2; echo 'x.cpp:1: error: no such thing' >&2", "x.cpp:1: error: no such thing"),
        ("echo >&2; echo 'out of disk' >&2; echo more >&2", "out of disk"),
        ("echo >&2", "returned non-zero exit status 1"),
    ],
)
def test_a_compiler_that_fails_is_quoted(tmp_path, script, line):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\nexit 1\n")
    compiler.chmod(0o755)
    (logged,) = run(tmp_path, CXX=str(compiler)).splitlines()
    assert line in logged


def test_quotes_that_do_not_close_in_the_compilers_name_are_told(tmp_path):
    assert "No closing quotation" in run(tmp_path, CXX="'g++")


def test_processes_that_start_together_share_one_library(tmp_path):
    """As tensor-parallel ranks do."""
    for process in [start(tmp_path) for _ in range(2)]:
        out, err = process.communicate()
        assert (out.splitlines(), err) == (RIGHT, "")
    (library,) = (tmp_path / "vllm-bpdq").glob("*.so")
    built = library.stat().st_mtime_ns
    assert start(tmp_path).wait() == 0
    assert library.stat().st_mtime_ns == built
