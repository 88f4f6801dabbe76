"""Rows of a bit-plane weight on CUDA: the embedding look-up, from the same tiles that the LM head multiplies with.

A program gathers one row: for each unit of 128 inputs its four words per plane, dequantized in fp32 and rounded once.

    unit u of row 16t + 8h + r:  words of lanes 4r .. 4r + 3, half h, each with the bits of 32 inputs in the order of
                                 `bpdq_kernels.layout.Tiles`
"""

import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels.layout import Tiles
from bpdq_kernels.warp import input_of_bit


@triton.jit(do_not_specialize_on_alignment=["ids_ptr"])
def embedding_kernel(
    ids_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    y_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,  # at a time
) -> None:
    number = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)
    row = tl.minimum(tl.maximum(number, 0), N - 1)
    units = tl.cdiv(K, 128)
    groups = tl.cdiv(units * 128, GROUP)
    word = tl.arange(0, 4 * UNITS)[:, None]
    bit = tl.arange(0, 32)[None, :]
    BESIDE: tl.constexpr = 4 if GROUP >= 128 else GROUP // 32  # words_beside
    inputs = input_of_bit(bit, BESIDE) + word % 4 // BESIDE * (32 * BESIDE) + word % BESIDE * 8
    V: tl.constexpr = 1 if PLANES % 2 else 2
    tile_ptr = planes_ptr + row // 16 * units * (64 * PLANES) + (row % 8 * 4 + word % 4) * (2 * V) + row % 16 // 8
    c_ptr = coefficients_ptr + (row // 16 * groups * 8 + row % 8) * (2 * (PLANES + 1)) + row % 16 // 8
    scale = tl.where(number == row, tl.load(scales_ptr + row), 0)
    for first in range(0, units, UNITS):
        unit = first + word // 4
        here = unit < units
        group_ptr = c_ptr + (unit * 128 + word % 4 * 32) // GROUP * (16 * (PLANES + 1))
        w = tl.load(group_ptr + 2 * PLANES, here, 0).to(tl.float32)
        for p in tl.static_range(PLANES):
            words = tl.load(tile_ptr + unit * (64 * PLANES) + p // V * (64 * V) + p % V * 2, here, 0)
            c_p = tl.load(group_ptr + 2 * p, here, 0).to(tl.float32)
            w = tl.where((words >> bit) & 1 != 0, w + c_p, w)
        i = unit * 128 + inputs
        tl.store(y_ptr + tl.program_id(0).to(tl.int64) * K + i, (w * scale).to(y_ptr.dtype.element_ty), i < K)


def launch(ids: Tensor, tiles: Tiles, group_size: int, y: Tensor) -> None:
    """Write rows `ids` [M] (int32 or int64; zeros for those not in 0..N-1) of the weight into y [M, K]."""
    embedding_kernel[(ids.numel(),)](
        ids.contiguous(),
        *tiles,
        y,
        tiles.scales.numel(),
        y.shape[1],
        PLANES=tiles.coefficients.shape[3] - 1,
        GROUP=group_size,
        UNITS=8,
        num_warps=4,
        enable_fp_fusion=True,
    )
