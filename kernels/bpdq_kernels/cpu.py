"""y = x @ W.T + bias on a CPU: cpu_linear.cpp, compiled once for this machine's instruction set at first use.

The library has a C interface and no part of torch or Python in it, so it compiles in seconds and outlives both. It
sits in the user's cache folder, with its digest at the end, or is compiled by every process where there is none; where
there is no compiler, or others can write the cache, layers stay as stored and `reference` multiplies.
"""

import ctypes
import fcntl
import functools
import hashlib
import logging
import mmap
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from bpdq_kernels import reference
from bpdq_kernels.layout import WORD

_SOURCE = Path(__file__).with_name("cpu_linear.cpp")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
FLAGS = {"avx512_bf16": (*_AVX512, "-mavx512bf16"), "avx512": _AVX512, "avx2": _AVX2, "portable": ()}
_TILE = 32
_DIGEST = hashlib.sha256().digest_size
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Dtype
_log = logging.getLogger(__name__)


def instruction_set() -> str:
    """The best of FLAGS that this machine has and torch may use (ATEN_CPU_CAPABILITY lowers it)."""
    level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    return "avx512_bf16" if level == "avx512" and torch.cpu._is_avx512_bf16_supported() else level


@contextmanager
def compile_library(isa: str) -> Iterator[Path]:
    """Path, for as long as the context lasts, of the library for one of FLAGS: that of the cache folder if it is whole.

    Raises OSError, ValueError (CXX) or CalledProcessError; PermissionError for a cache that others can write. Of
    processes that start together, one compiles and the others wait.
    """
    # vectors are explicit in the source. No OpenMP library is linked: GOMP_parallel is that of torch, whose threads
    # and settings are then ours
    flags = ["-O3", "-fno-tree-vectorize", "-std=c++17", "-fPIC", "-fopenmp", *FLAGS[isa]]
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    key = hashlib.sha256(_SOURCE.read_bytes() + shlex.join([*compiler, *flags]).encode()).hexdigest()[:16]
    with ExitStack() as stack:
        folder = _cache_folder() or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        library = folder / f"cpu_linear-{isa}-{key}.so"
        if not _is_whole(library):
            stack.enter_context(_locked(folder))
            if not _is_whole(library):
                scratch = stack.enter_context(tempfile.TemporaryDirectory())
                library = _stored(_compiled(compiler, flags, Path(scratch)), library)
        yield library


def _cache_folder() -> Path | None:
    """None where there is no home or no folder can be made."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-bpdq"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    _check_ours(folder)
    return folder


def _check_ours(path: Path) -> None:
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise PermissionError(
            f"{path} belongs to another user, whose code it may hold: remove it, or set XDG_CACHE_HOME"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{path} can be written by others, whose code it may hold: remove it")


def _is_whole(library: Path) -> bool:
    """Whether it ends in its own digest: one that is cut short kills the process that loads it."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    _check_ours(library)
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among processes, or not, where there are no locks."""
    with ExitStack() as stack:
        with suppress(OSError):
            fcntl.flock(stack.enter_context((folder / "lock").open("w")), fcntl.LOCK_EX)
        yield


def _compiled(compiler: list[str], flags: list[str], scratch: Path) -> Path:
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"{compiler[0]} is not found: install g++, or set CXX")
    linked, compiled = scratch / "linear.so", str(scratch / "linear.o")
    compile_object = [*compiler, *flags, "-c", str(_SOURCE), "-o", compiled]
    for command in (compile_object, [*compiler, "-shared", compiled, "-o", str(linked)]):
        subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")
    return linked


def _stored(linked: Path, library: Path) -> Path:
    """`library`, now `linked` and its digest, or `linked` where it can't be written."""
    code = linked.read_bytes()
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            whole = Path(scratch) / "whole.so"
            with whole.open("xb") as file:
                os.fchmod(file.fileno(), 0o644)  # whatever the umask
                file.write(code + hashlib.sha256(code).digest())
                file.flush()
                os.fsync(file.fileno())
            whole.rename(library)
    except OSError:
        return linked
    return library


def open_library(isa: str) -> ctypes.CDLL:
    """The library for one of FLAGS, with `pairs`: whether it multiplies bf16 in pairs. Raises as `compile_library`."""
    with compile_library(isa) as path:
        library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.bpdq_linear.restype = None
    library.bpdq_linear.argtypes = [pointer, pointer, ctypes.c_int, *[integer] * 4]
    library.bpdq_linear.argtypes += [pointer, ctypes.c_bool, integer, integer, pointer, pointer, ctypes.c_bool]
    library.pairs = isa == "avx512_bf16"
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library for this machine; None, after one line in the log, where there can be none."""
    try:
        return open_library(instruction_set())
    except subprocess.CalledProcessError as e:
        lines = [line for line in e.stderr.splitlines() if line.strip()] or [str(e)]
        reason = next((line for line in lines if "error" in line.lower()), lines[0])
    except (OSError, ValueError) as e:
        reason = str(e)
    _log.warning("BPDQ layers run slowly on this CPU, as their kernel can't be compiled or loaded: %s", reason)
    return None


def prepare(B: Tensor, c: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """B [ceil(K/32), k, N] and c [ceil(K/G), k+1, N] in tiles of 32 outputs, as drawn in cpu_linear.cpp.

    Returns planes int32 and coefficients in c's dtype, with N padded to tiles; their other sizes are kept, but say
    nothing of the order inside. Without a library, B and c themselves.
    """
    if library() is None:
        return B.contiguous(), c.contiguous()
    padding = -B.shape[2] % _TILE
    B, c = (torch.nn.functional.pad(tensor, (0, padding)) for tensor in (B, c))
    planes = huge_pages(B.shape)
    start = 0
    for group in B.unflatten(2, (-1, _TILE)).split(group_size // WORD):  # [words of the group, k, tiles, 32]
        group = group.permute(2, 0, 1, 3)
        planes.view(-1)[start : start + group.numel()].view(group.shape).copy_(group)
        start += group.numel()
    return planes, c.unflatten(2, (-1, _TILE)).transpose(1, 2).contiguous().view_as(c)


def huge_pages(shape: torch.Size) -> Tensor:
    """An int32 tensor that Linux may hold in pages of 2 MiB: a token reads it once, and small pages stall each time."""
    tensor = torch.empty(shape, dtype=torch.int32)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        if length > 0:  # advice: where it is refused, nothing is lost
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


def stored_rows(planes: Tensor, coefficients: Tensor, group_size: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """B [ceil(K/32), k, R] and c [ceil(K/G), k+1, R] of the outputs `rows` [R], from what `prepare` returned."""
    if library() is None:
        return planes[:, :, rows], coefficients[:, :, rows]
    words, k, n = planes.shape
    word, tile, lane = torch.arange(words).view(-1, 1, 1), rows // _TILE, rows % _TILE
    start = word // (group_size // WORD) * (group_size // WORD)  # of the word's group
    length = (words - start).clamp_max(group_size // WORD)
    plane = torch.arange(k).view(-1, 1)
    B = planes.view(-1)[start * k * n + ((tile * length + word - start) * k + plane) * _TILE + lane]
    return B, coefficients.view(-1, n // _TILE, k + 1, _TILE)[:, tile, :, lane].permute(1, 2, 0)


def is_few(tokens: int, pairs: bool) -> bool:
    """Whether look-ups beat multiplications, in pairs of bf16 or in fp32."""
    return tokens <= (4 if pairs else 8)


def linear(
    x: Tensor, planes: Tensor, coefficients: Tensor, group_size: int, out_features: int, bias: Tensor | None
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias in x.dtype; planes and coefficients from `prepare`.

    Sums are fp32. W is exact, or rounded to bf16 where bf16 x is multiplied in bf16.
    """
    compiled = library()
    if compiled is None:
        return reference.linear(x, planes, coefficients, group_size, bias)
    in_features = x.shape[-1]
    rows = x.reshape(-1, in_features)
    tokens = rows.shape[0]
    pairs = compiled.pairs and x.dtype == torch.bfloat16
    few = is_few(tokens, pairs)
    bfloat = x.dtype == torch.bfloat16 and (few or pairs)
    if not bfloat:
        rows = rows.float()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    bias = None if bias is None else bias.float()
    y = torch.empty(*x.shape[:-1], out_features)
    compiled.bpdq_linear(
        planes.data_ptr(),
        coefficients.data_ptr(),
        _DTYPES[coefficients.dtype],
        in_features,
        out_features,
        group_size,
        planes.shape[1],
        rows.data_ptr(),
        bfloat,
        rows.stride(0),
        tokens,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        few,
    )
    return y.to(x.dtype)
