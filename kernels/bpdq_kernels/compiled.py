"""C++ sources compiled for this machine at first use, with a C interface, no part of Python in them, and of torch at
most what is stable.

So they compile in seconds and outlive both. A library sits in the user's cache folder, with its digest at the end, or
is compiled by every process where there is none.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
_BF16 = (*_AVX512, "-mavx512bf16")
_VBMI = (*_BF16, "-mavx512vbmi", "-mavx512vnni")
FLAGS = {
    "avx512_amx": (*_VBMI, "-mamx-tile", "-mamx-bf16"),
    "avx512_vbmi": _VBMI,
    "avx512_bf16": _BF16,
    "avx512": _AVX512,
    "avx2": _AVX2,
    "portable": (),
}
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}  # enum Dtype of the sources
_DIGEST = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


def instruction_set() -> str:
    """The best of FLAGS that this machine has and torch may use (ATEN_CPU_CAPABILITY lowers it)."""
    level = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    if level != "avx512" or not torch.cpu._is_avx512_bf16_supported():
        return level
    # torch 2.8 can't tell
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if not (found.get("avx512_vbmi") and found.get("avx512_vnni")):
        return "avx512_bf16"
    has_tiles = found.get("amx_tile") and found.get("amx_bf16")
    return "avx512_amx" if has_tiles and torch.cpu._init_amx() else "avx512_vbmi"  # which Linux may refuse


@contextmanager
def compile_library(source: Path, isa: str, macros: Sequence[str] = (), links: Sequence[str] = ()) -> Iterator[Path]:
    """Path, for as long as the context lasts, of `source` for one of FLAGS, with `macros` (`-DNAME=VALUE`, or where
    other headers are) and, as the linker takes them, `links`: that of the cache folder if it is whole. The headers
    beside a source are a part of it.

    Raises OSError, ValueError (CXX) or CalledProcessError; PermissionError for a cache that others can write. Of
    processes that start together, one compiles and the others wait.
    """
    # vectors are explicit in the source. No OpenMP library is linked: GOMP_parallel is that of torch, whose threads
    # and settings are then ours
    flags = ["-O3", "-fno-tree-vectorize", "-std=c++17", "-fPIC", "-fopenmp", *FLAGS[isa], *macros]
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    headers = sorted(source.parent.glob("*.h"))
    content = b"".join(file.read_bytes() for file in (source, *headers))
    key = hashlib.sha256(content + shlex.join([*compiler, *flags, *links]).encode()).hexdigest()[:16]
    with ExitStack() as stack:
        folder = _cache_folder() or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        library = folder / f"{source.stem}-{isa}-{key}.so"
        if not _is_whole(library):
            stack.enter_context(_locked(folder))
            if not _is_whole(library):
                scratch = stack.enter_context(tempfile.TemporaryDirectory())
                library = _stored(_compiled(source, compiler, flags, links, Path(scratch)), library)
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


def _compiled(source: Path, compiler: list[str], flags: list[str], links: Sequence[str], scratch: Path) -> Path:
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"{compiler[0]} is not found: install g++, or set CXX")
    linked, compiled = scratch / "linked.so", str(scratch / "compiled.o")
    compile_object = [*compiler, *flags, "-c", str(source), "-o", compiled]
    for command in (compile_object, [*compiler, "-shared", compiled, *links, "-o", str(linked)]):
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


def load_library(source: Path, isa: str, macros: Sequence[str] = (), links: Sequence[str] = ()) -> ctypes.CDLL:
    """`source` for one of FLAGS, with `macros` and `links` as of `compile_library`, which says what is raised."""
    with compile_library(source, isa, macros, links) as path:
        return ctypes.CDLL(str(path))


def library_or_none(open_library: Callable[[str], ctypes.CDLL], consequence: str) -> ctypes.CDLL | None:
    """`open_library` of this machine's instruction set; None, after one line in the log that begins with `consequence`,
    where there can be none."""
    try:
        return open_library(instruction_set())
    except subprocess.CalledProcessError as e:
        lines = [line for line in e.stderr.splitlines() if line.strip()] or [str(e)]
        reason = next((line for line in lines if "error" in line.lower()), lines[0])
    except (OSError, ValueError) as e:
        reason = str(e)
    _log.warning("%s can't be compiled or loaded: %s", consequence, reason)
    return None
