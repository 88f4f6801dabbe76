"""The solver's loops over columns on a CPU: cpu_solver.cpp and its headers, compiled for this machine at first use.

Same signatures and, but for the order of sums in fp32, same results as `grid.quantize_group` and
`equations.solve_jointly`, and as `refine.descend_in_torch`, which are the readable form and run where there is no
compiler (`groups`).
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from bpdq_kernels.compiled import DTYPE_CODES, library_or_none, load_library
from bpdq_quantizer.algorithm.grid import Start, paper_start, range_start, residual_start

_SOURCE = Path(__file__).with_name("cpu_solver.cpp")
_ROUNDED = {**DTYPE_CODES, torch.int8: 3}  # enum Dtype
_STARTS = {paper_start: 0, range_start: 1, residual_start: 2}  # enum Start


def open_library(isa: str) -> ctypes.CDLL:
    """The library for an instruction set. Raises as `bpdq_kernels.compiled.compile_library`."""
    library = load_library(_SOURCE, isa)
    integer, rows, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    for function in (library.bpdq_quantize_group, library.bpdq_descend, library.bpdq_solve_jointly):
        function.restype = None
    library.bpdq_quantize_group.argtypes = [
        integer,
        rows,
        *[integer] * 2,
        *[pointer] * 5,
        integer,
        ctypes.c_float,
        integer,
    ]
    library.bpdq_quantize_group.argtypes += [pointer, integer, *[pointer] * 3]
    library.bpdq_descend.argtypes = [integer, integer, rows, *[integer] * 3, *[pointer] * 5]
    library.bpdq_solve_jointly.argtypes = [integer, integer, rows, integer, *[pointer] * 3, ctypes.c_float, integer]
    library.bpdq_solve_jointly.argtypes += [pointer, pointer]
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
    trellis: bool = False,
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
    solve(g, N, bits, trellis, *tensors, iterations, alpha, DTYPE_CODES[dtype], kinds, len(starts), *outputs)
    return codes, c, E


def descend(
    codes: Tensor, V: Tensor, c: Tensor, H: Tensor, group_size: int, sweeps: int, trellis: bool = False
) -> tuple[Tensor, Tensor]:
    """As `refine.descend` from V [N, K] = (W - W_hat)^T H, where there is a `library`: the new codes [K, N], and by how
    much each row's loss falls, [N]."""
    K, N = codes.shape
    codes, gain = codes.clone(memory_format=torch.contiguous_format), torch.empty(N)
    V, c, H = V.contiguous(), c.contiguous(), H.contiguous()
    pointers = [tensor.data_ptr() for tensor in (V, H, c, codes, gain)]
    library().bpdq_descend(group_size, K, N, c.shape[1] - 1, trellis, sweeps, *pointers)
    return codes, gain


def solve_jointly(
    codes: Tensor, b: Tensor, H: Tensor, group_size: int, bits: int, alpha: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """As `equations.solve_jointly`, where there is a `library`."""
    K, N = codes.shape
    codes, H, b = codes.contiguous(), H.contiguous(), b.contiguous()
    c, steps = torch.empty_like(b), torch.empty(bits + 1, N)
    pointers = [tensor.data_ptr() for tensor in (codes, H, b)]
    results = c.data_ptr(), steps.data_ptr()
    library().bpdq_solve_jointly(group_size, K, N, bits, *pointers, alpha, _ROUNDED[dtype], *results)
    return c, steps if dtype == torch.int8 else None
