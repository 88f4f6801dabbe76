"""The CPU kernel's library is compiled once, is whole and nobody else's code; or there is none, and a line says why."""

import hashlib
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import pytest
import torch

from bpdq_kernels import cpu
from bpdq_kernels.compiled import compile_library, instruction_set, load_library

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")

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


RIGHT = ["[[64.0, 64.0, 64.0, 64.0]]"] * 3


def run(cache, **env: str) -> str:
    """What a process that uses the kernel prints to stderr; its products are right."""
    process = start(cache, **env)
    out, err = process.communicate()
    assert (process.returncode, out.splitlines()) == (0, RIGHT)
    return err


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_one_line_says_so_and_the_results_are_right(tmp_path, compiler):
    err = run(tmp_path, CXX=compiler)
    assert len(err.splitlines()) == 1
    assert "BPDQ layers run slowly on this CPU" in err
    assert compiler in err


def compiled() -> Path:
    """Where the library is, or was while it could be loaded."""
    with compile_library(cpu.SOURCE, instruction_set(), cpu.MACROS) as path:
        assert path.stat().st_size > 10_000
    return path


@pytest.mark.parametrize("wrong", ["-DBPDQ_WORD=64", "-DBPDQ_TILE=20"])
def test_sizes_of_a_layout_that_the_kernel_does_not_walk_do_not_compile(tmp_path, monkeypatch, wrong):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = [wrong if macro.startswith(wrong.partition("=")[0]) else macro for macro in cpu.MACROS]
    with pytest.raises(subprocess.CalledProcessError) as raised, compile_library(cpu.SOURCE, "portable", macros):
        pass
    assert "static assertion failed" in raised.value.stderr


def logged(caplog) -> str:
    """Why there is no library, in one line."""
    assert cpu.library.__wrapped__() is None
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    return record.getMessage()


def is_whole(library: Path) -> bool:
    content = library.read_bytes()
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache folder with the library."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        compiled()
    return folder


@pytest.fixture
def cached(built, tmp_path, monkeypatch):
    """The library in a cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (library,) = shutil.copytree(built, tmp_path / "cache").glob("vllm-bpdq/*.so")
    return library


def test_only_the_user_can_write_the_cache_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "open"))
    before = os.umask(0)
    try:
        library = compiled()
    finally:
        os.umask(before)
    assert library.parent == tmp_path / "open" / "vllm-bpdq"
    assert [path.stat().st_mode & 0o022 for path in (library, library.parent)] == [0, 0]
    written = library.stat().st_mtime_ns
    assert compiled().stat().st_mtime_ns == written


def test_a_cache_that_cannot_be_written_costs_the_compiling_only(tmp_path, monkeypatch, cached):
    cached.unlink()
    cached.mkdir()  # nothing can take its place, as on a full disk
    assert not compiled().exists()
    assert {path.name for path in cached.parent.iterdir()} == {cached.name, "lock"}, "nothing is left behind"
    (tmp_path / "file").touch()
    assert run(tmp_path / "file") == ""


def test_a_user_without_a_home_has_the_kernel(tmp_path, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert cpu.library.__wrapped__() is not None
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize("left", [0, 31, 4096, -1])
def test_a_damaged_library_is_compiled_again(cached, left):
    """After a crash or on a full disk."""
    cached.write_bytes(cached.read_bytes()[:left])
    assert compiled() == cached
    assert is_whole(cached)


def test_a_library_cut_in_half_kills_no_process(tmp_path, cached):
    cached.write_bytes(cached.read_bytes()[: cached.stat().st_size // 2])
    assert run(tmp_path / "cache") == ""


@pytest.mark.parametrize("mode", [0o020, 0o002])
@pytest.mark.parametrize("which", ["library", "folder"])
def test_code_that_others_can_write_is_not_loaded(caplog, cached, which, mode):
    path = cached if which == "library" else cached.parent
    path.chmod(path.stat().st_mode | mode)
    assert f"{path} can be written by others" in logged(caplog)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("which", ["library", "folder"])
def test_code_of_another_user_is_not_loaded(caplog, cached, which):
    path = cached if which == "library" else cached.parent
    os.chown(path, 12345, -1)
    assert f"{path} belongs to another user" in logged(caplog)


def test_without_the_right_to_the_cache_results_are_right_and_one_line_says_so(tmp_path, cached):
    cached.parent.chmod(0o777)
    (line,) = run(tmp_path / "cache").splitlines()
    assert "BPDQ layers run slowly on this CPU" in line


def test_a_compiler_may_have_words(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "env LC_ALL=C g++")
    assert compiled().parent == tmp_path / "vllm-bpdq"


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("echo 'x.cpp: In function f:' >&2; echo 'x.cpp:1: error: no such thing' >&2", "x.cpp:1: error: no such thing"),
        ("echo >&2; echo 'out of disk' >&2; echo more >&2", "out of disk"),
        ("echo >&2", "returned non-zero exit status 1"),
    ],
)
def test_a_compiler_that_fails_is_quoted(tmp_path, monkeypatch, caplog, script, line):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler))
    assert line in logged(caplog)


def test_quotes_that_do_not_close_in_the_compilers_name_are_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "'g++")
    assert "No closing quotation" in logged(caplog)


def test_processes_that_start_together_share_one_library(tmp_path):
    """As tensor-parallel ranks do; and one op that calls it."""
    for process in [start(tmp_path) for _ in range(2)]:
        out, err = process.communicate()
        assert (out.splitlines(), err) == (RIGHT, "")
    libraries = sorted((tmp_path / "vllm-bpdq").glob("*.so"))
    names = ["cpu_linear", "cpu_op"] if cpu.op_library() else ["cpu_linear"]
    assert [library.name.partition("-")[0] for library in libraries] == names
    built = [library.stat().st_mtime_ns for library in libraries]
    assert start(tmp_path).wait() == 0
    assert [library.stat().st_mtime_ns for library in libraries] == built


IS_COMPILED = """
print(torch._C._dispatch_has_kernel_for_dispatch_key("bpdq::linear", "CPU"))
"""


@pytest.mark.parametrize("oldest", ["(2, 10)", "(99, 0)"])
def test_a_torch_without_a_stable_interface_calls_the_kernels_from_python(tmp_path, oldest):
    program = f"from bpdq_kernels import cpu\ncpu.OP_TORCH = {oldest}\n{PROGRAM}\n{IS_COMPILED}"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    is_compiled = cpu.op_library() is not None and oldest == "(2, 10)"
    assert process.stdout.splitlines() == [*RIGHT, str(is_compiled)]
    assert process.stderr == ""


def test_an_op_that_does_not_compile_is_one_line(tmp_path, monkeypatch, caplog):
    """It stays what it is in Python."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "OP_SOURCE", tmp_path / "op.cpp")
    cpu.OP_SOURCE.write_text("#include <torch/csrc/stable/none.h>\n")
    monkeypatch.setattr(cpu, "OP_TORCH", (2, 0))
    assert cpu.op_library.__wrapped__() is None
    (record,) = caplog.records
    assert "take 10 us more to call" in record.getMessage()
    assert "none.h" in record.getMessage()


@pytest.mark.parametrize(
    ("found", "allowed", "isa"),
    [
        ({}, True, "avx512_bf16"),
        ({"avx512_vbmi": True}, True, "avx512_bf16"),
        ({"avx512_vbmi": True, "avx512_vnni": True}, True, "avx512_vbmi"),
        ({"avx512_vbmi": True, "avx512_vnni": True, "amx_tile": True}, True, "avx512_vbmi"),
        ({"avx512_vbmi": True, "avx512_vnni": True, "amx_tile": True, "amx_bf16": True}, False, "avx512_vbmi"),
        ({"avx512_vbmi": True, "avx512_vnni": True, "amx_tile": True, "amx_bf16": True}, True, "avx512_amx"),
    ],
)
def test_tiles_are_used_where_the_cpu_has_them_and_linux_allows_it(monkeypatch, found, allowed, isa):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: allowed)
    assert instruction_set() == isa


TDPBF16PS = rb"\xc4\xe2[\x42\x4a\x52\x5a\x62\x6a\x72\x7a]\x5c[\xc0-\xff]"  # VEX.128.F3.0F38.W0 5C of any tiles


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of other compilers")
@pytest.mark.parametrize(("isa", "has_tiles"), [("avx512_amx", True), ("avx512_vbmi", False)])
def test_machines_without_amx_compile_it_too(isa, has_tiles):
    """Though they can't run it."""
    with compile_library(cpu.SOURCE, isa, cpu.MACROS) as path:
        assert bool(re.search(TDPBF16PS, path.read_bytes())) == has_tiles


def test_a_changed_header_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "sum.cpp").write_text('#include "sum_two.h"\nextern "C" int two() { return TWO; }\n')
    for value in (2, 3):
        (tmp_path / "sum_two.h").write_text(f"#define TWO {value}\n")
        assert load_library(tmp_path / "sum.cpp", "portable").two() == value


def test_planes_share_memory_that_is_freed_with_them(monkeypatch):
    monkeypatch.setattr(cpu, "SLAB", 4096)
    pages = cpu.Pages()
    shapes = [(3,), (2, 5, 7), (0, 4), (1000,), (16,), (9, 9, 9), (1,)]
    tensors = [pages.tensor(shape).fill_(i) for i, shape in enumerate(shapes)]
    for i, (shape, tensor) in enumerate(zip(shapes, tensors, strict=True)):
        assert tensor.shape == shape
        assert tensor.dtype == torch.int32
        assert tensor.data_ptr() % cpu.LINE == 0
        assert (tensor == i).all()
    slab = weakref.ref(pages._slab)
    after = pages.tensor((2000,))  # does not fit beside the last ones
    assert slab() is not None
    del tensor, tensors
    assert slab() is None
    assert after.data_ptr() % cpu.LINE == 0


def test_memory_without_large_pages_does(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert cpu.Pages().tensor((2, 3)).fill_(1).tolist() == [[1, 1, 1], [1, 1, 1]]
