"""`rounding.nearest_plane` on CUDA: a program for each row and try, its equations' rest in registers.

left  [n]   y, less what the coefficients rounded so far account for; row m of L is read when coefficient m is next
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_quantizer.algorithm.rounding import MOST
from bpdq_quantizer.algorithm.triton_grid import BIG, DTYPES, FP32, rounded

_MOST = tl.constexpr(float(MOST))
_BIG = tl.constexpr(BIG)


@triton.jit(do_not_specialize=["n", "N"])
def nearest_plane_kernel(
    L_ptr: tl.tensor,
    y_ptr: tl.tensor,
    steps_ptr: tl.tensor,
    c_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    n: tl.tensor,
    N: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    BLOCK: tl.constexpr,  # at least n
    DTYPE: tl.constexpr,
) -> None:
    i = tl.arange(0, BLOCK)
    r = tl.program_id(0).to(tl.int64)
    out = (tl.program_id(1) * N + r) * n
    L_ptr += r * n * n
    left = tl.load(y_ptr + r * n + i, i < n, 0.0)
    loss = 0.0
    for k in range(n):
        m = n - 1 - k
        pivot = tl.load(L_ptr + m * (row + column))
        exact = tl.sum(tl.where(i == m, left, 0.0), 0) / pivot
        if steps_ptr is None:
            value = rounded(exact, DTYPE)
        else:
            step = tl.load(steps_ptr + out + m)
            value = tl.minimum(tl.maximum((exact / step + _BIG) - _BIG, -_MOST), _MOST) * step
        tl.store(c_ptr + out + m, value)
        loss += (pivot * (exact - value)) * (pivot * (exact - value))
        left -= tl.load(L_ptr + m * row + i * column, i < m, 0.0) * value
    tl.store(loss_ptr + tl.program_id(1) * N + r, loss)


def options(n: int) -> dict[str, int]:
    """Compiler options: 32 values a thread at most."""
    return {"num_warps": min(16, max(1, triton.next_power_of_2(n) // 1024)), "enable_fp_fusion": True}


def nearest_plane(L: Tensor, y: Tensor, steps: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `rounding.nearest_plane`, for each L [n, n] in rows or columns that follow each other, in one launch."""
    N, n = y.shape
    tries = 1 if steps is None else len(steps)
    c, loss = y.new_empty(tries, N, n), y.new_empty(tries, N)
    with torch.cuda.device_of(y):
        nearest_plane_kernel.run(
            L,
            y.contiguous(),
            None if steps is None else steps.contiguous(),
            c,
            loss,
            n,
            N,
            L.stride(1),
            L.stride(2),
            BLOCK=triton.next_power_of_2(n),
            DTYPE=DTYPES.get(dtype, FP32),
            grid=(N, tries),
            warmup=False,
            **options(n),
        )
    return c, loss
