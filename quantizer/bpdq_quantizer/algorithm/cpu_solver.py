"""The solver's loops over columns on a CPU: cpu_solver.cpp, compiled for this machine at first use.

Same signatures and, but for the order of sums in fp32, same results as `grid.quantize_group`, `grid.descend_group` and
`equations.normal_matrix`, which are the readable form and run where there is no compiler (`groups`).
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bpdq_kernels.compiled import library_or_none, load_library
from bpdq_quantizer.algorithm.grid import Start, paper_start, range_start, residual_start

_SOURCE = Path(__file__).with_name("cpu_solver.cpp")
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum Dtype
_STARTS = {paper_start: 0, range_start: 1, residual_start: 2}  # enum Start


def open_library(isa: str) -> ctypes.CDLL:
    """The library for an instruction set. Raises as `bpdq_kernels.compiled.compile_library`."""
    library = load_library(_SOURCE, isa)
    integer, rows, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    for function in (library.bpdq_quantize_group, library.bpdq_descend_group, library.bpdq_normal_matrix):
        function.restype = None
    library.bpdq_quantize_group.argtypes = [integer, rows, integer, *[pointer] * 5, integer, ctypes.c_float, integer]
    library.bpdq_quantize_group.argtypes += [pointer, integer, *[pointer] * 3]
    library.bpdq_descend_group.argtypes = [integer, rows, integer, *[pointer] * 7]
    library.bpdq_normal_matrix.argtypes = [integer, integer, rows, integer, *[pointer] * 4]
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library for this machine; None, after one line in the log, where there can be none."""
    return library_or_none(open_library, "quantizing is some ten times slower on this CPU, as its loops")


def supports(starts: Sequence[Start]) -> bool:
    """Whether all of `starts` are compiled."""
    return all(start in _STARTS for start in starts)


def quantize_group(
    W: Tensor,
    U: Tensor,
    bits: int,
    iterations: int,
    alpha: float,
    dtype: torch.dtype,
    starts: Sequence[Start] = (paper_start,),
) -> tuple[Tensor, Tensor, Tensor]:
    """As `grid.quantize_group`, for what `supports` allows where there is a `library`."""
    g, N = W.shape
    W = W.contiguous()
    diagonal = U.diagonal()
    spread = (U / diagonal.unsqueeze(1)).contiguous()
    whiten = torch.linalg.solve_triangular(U, torch.eye(g), upper=True).contiguous()  # V^T
    ones, weight = whiten.sum(0), 1 / diagonal
    codes, c, E = torch.empty(g, N, dtype=torch.uint8), torch.empty(bits + 1, N), torch.empty(g, N)
    kinds = (ctypes.c_int * len(starts))(*(_STARTS[start] for start in starts))
    tensors = [tensor.data_ptr() for tensor in (W, spread, whiten, ones, weight)]
    outputs = [tensor.data_ptr() for tensor in (codes, c, E)]
    solve = library().bpdq_quantize_group
    solve(g, N, bits, *tensors, iterations, alpha, _DTYPES[dtype], kinds, len(starts), *outputs)
    return codes, c, E


def descend_group(W_hat: Tensor, V: Tensor, H: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """As `grid.descend_group`, where there is a `library`."""
    g, N = W_hat.shape
    W_hat, V, c = W_hat.contiguous(), V.contiguous(), c.contiguous()
    diagonal = H.diagonal()
    spread, inverse = (H / diagonal).contiguous(), 1 / diagonal
    codes, change = torch.empty(g, N, dtype=torch.uint8), torch.empty(g, N)
    tensors = [tensor.data_ptr() for tensor in (spread, inverse, V, c, W_hat, codes, change)]
    library().bpdq_descend_group(g, N, len(c) - 1, *tensors)
    return codes, change


def normal_matrix(codes: Tensor, H: Tensor, group_size: int, bits: int) -> Tensor:
    """As `equations.normal_matrix`, where there is a `library`."""
    K, N = codes.shape
    codes, H = codes.contiguous(), H.contiguous()
    sums = torch.stack([part.sum(1) for part in H.split(group_size, dim=1)])
    n = len(sums) * (bits + 1)
    A = torch.empty(N, n, n)
    tensors = [tensor.data_ptr() for tensor in (codes, H, sums, A)]
    library().bpdq_normal_matrix(group_size, K, N, bits, *tensors)
    return A
