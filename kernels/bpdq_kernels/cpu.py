"""y = x @ W.T + bias on a CPU: cpu_linear.cpp, compiled once for this machine's instruction set at first use.

Where there is no compiler, or others can write the cache, layers stay as stored and `reference` multiplies.
"""

import ctypes
import functools
import mmap
from pathlib import Path

import torch
from torch import Tensor

from bpdq_kernels import reference
from bpdq_kernels.compiled import DTYPE_CODES, library_or_none, load_library
from bpdq_kernels.layout import CPU_TILE, GROUP_SIZES, WORD, Stored, rows_of_cpu_tiles, to_cpu_tiles

SOURCE = Path(__file__).with_name("cpu_linear.cpp")
MACROS = (f"-DBPDQ_WORD={WORD}", f"-DBPDQ_TILE={CPU_TILE}", f"-DBPDQ_MAX_GROUP={max(GROUP_SIZES)}")


def open_library(isa: str) -> ctypes.CDLL:
    """The library for an instruction set, with `pairs`: whether it multiplies bf16 in pairs. Raises as
    `compiled.compile_library`."""
    library = load_library(SOURCE, isa, MACROS)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.bpdq_linear.restype = None
    library.bpdq_linear.argtypes = [pointer, pointer, ctypes.c_int, pointer, *[integer] * 4]
    library.bpdq_linear.argtypes += [pointer, ctypes.c_bool, integer, integer, pointer, pointer, ctypes.c_bool]
    library.pairs = isa == "avx512_bf16"
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library for this machine; None, after one line in the log, where there can be none."""
    return library_or_none(open_library, "BPDQ layers run slowly on this CPU, as their kernel")


def prepare(B: Tensor, c: Tensor, group_size: int, s: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """B [ceil(K/32), k, N], c [ceil(K/G), k+1, N] and s [k+1, N] in the order of `bpdq_kernels.layout.to_cpu_tiles`.

    Returns planes int32, coefficients in c's dtype and scales fp32 or None, with N padded to tiles; the sizes of the
    first two are kept, but say nothing of the order inside. Without a library, B, c and s themselves.
    """
    if library() is None:
        return B.contiguous(), c.contiguous(), None if s is None else s.contiguous()
    padding = -B.shape[2] % CPU_TILE
    B, c = (torch.nn.functional.pad(tensor, (0, padding)) for tensor in (B, c))
    s = None if s is None else torch.nn.functional.pad(s, (0, padding))
    planes = huge_pages(B.shape)
    return planes, *to_cpu_tiles(B, c, group_size, planes, s)


def huge_pages(shape: torch.Size) -> Tensor:
    """An int32 tensor that Linux may hold in pages of 2 MiB: a token reads it once, and small pages stall each time."""
    tensor = torch.empty(shape, dtype=torch.int32)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - start
        if length > 0:  # advice: where it is refused, nothing is lost
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


def stored_rows(planes: Tensor, coefficients: Tensor, scales: Tensor | None, group_size: int, rows: Tensor) -> Stored:
    """The tensors of the outputs `rows` [R] from what `prepare` returned, as they were stored, but s in fp32."""
    if library() is None:
        return Stored(planes, coefficients, scales).outputs(rows)
    return rows_of_cpu_tiles(planes, coefficients, scales, group_size, rows)


def is_few(tokens: int, pairs: bool) -> bool:
    """Whether look-ups beat multiplications, in pairs of bf16 or in fp32."""
    return tokens <= (4 if pairs else 8)


def linear(
    x: Tensor,
    planes: Tensor,
    coefficients: Tensor,
    scales: Tensor | None,
    group_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias in x.dtype; planes, coefficients and scales from `prepare`.

    Sums are fp32. W is exact, or rounded to bf16 where bf16 x is multiplied in bf16.
    """
    compiled = library()
    if compiled is None:
        return reference.linear(x, planes, coefficients, group_size, bias, scales)
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
        DTYPE_CODES[coefficients.dtype],
        None if scales is None else scales.data_ptr(),
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
