"""Rows of a bit-plane weight on CUDA: the embedding look-up, from the same tiles that the LM head multiplies with.

A program gathers one row: for each unit of 128 inputs its four words per plane, dequantized in fp32 and rounded once.

    unit u of row 16t + 8h + r:  words of lanes 4r .. 4r + 3, half h, each with the bits of 32 inputs in the order of
                                 `bpdq_kernels.layout.Tiles`
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels.layout import MAX_PLANES, Tiles
from bpdq_kernels.triton_layout import (
    TILE_ROWS,
    UNIT,
    group_pairs,
    input_of_bit,
    input_of_word,
    lane_words,
    multiplied_plane,
    plane_in_store,
    plane_start,
    row_pairs,
    unit_words,
    words_beside,
)


@triton.jit(do_not_specialize_on_alignment=["ids_ptr"])
def embedding_kernel(
    ids_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ratios_ptr: tl.tensor,
    y_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    PLANES: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,  # at a time
) -> None:
    number = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64)
    row = tl.minimum(tl.maximum(number, 0), N - 1)
    units = tl.cdiv(K, UNIT)
    groups = tl.cdiv(units * UNIT, GROUP)
    word = tl.arange(0, 4 * UNITS)[:, None]
    bit = tl.arange(0, 32)[None, :]
    BESIDE: tl.constexpr = words_beside(GROUP, STORED != PLANES)
    inputs = input_of_word(input_of_bit(bit, BESIDE), word % 4, BESIDE)
    tile = row // TILE_ROWS
    half = row % TILE_ROWS // 8
    tile_ptr = planes_ptr + tile * units * unit_words(STORED) + (row % 8 * 4 + word % 4) * lane_words(STORED) + half
    c_ptr = coefficients_ptr + (tile * groups * 8 + row % 8) * (2 * row_pairs(PLANES)) + half
    scale = tl.where(number == row, tl.load(scales_ptr + row), 0)
    ratio = ()
    for p in tl.static_range(PLANES + 1):
        if ratios_ptr is not None:
            ratio_ptr = ratios_ptr + (tile * 8 + row % 8) * (2 * row_pairs(PLANES)) + half
            ratio = ratio + (tl.load(ratio_ptr + 2 * p).to(tl.float32),)
    for first in range(0, units, UNITS):
        unit = first + word // 4
        here = unit < units
        group_ptr = c_ptr + (unit * UNIT + word % 4 * 32) // GROUP * (2 * group_pairs(PLANES))
        w = tl.load(group_ptr + 2 * PLANES, here, 0).to(tl.float32)
        if ratios_ptr is not None:
            w *= ratio[PLANES]
        for p in tl.static_range(PLANES):
            stored_ptr = tile_ptr + unit * unit_words(STORED)
            stored_ptr += plane_start(plane_in_store(p, PLANES, STORED), STORED)
            words = multiplied_plane(tl.load(stored_ptr, here, 0), p, PLANES, STORED)
            c_p = tl.load(group_ptr + 2 * p, here, 0).to(tl.float32)
            if ratios_ptr is not None:
                c_p *= ratio[p]
            w = tl.where((words >> bit) & 1 != 0, w + c_p, w)
        i = unit * UNIT + inputs
        tl.store(y_ptr + tl.program_id(0).to(tl.int64) * K + i, (w * scale).to(y_ptr.dtype.element_ty), i < K)


def options(planes: int) -> dict[str, Any]:
    """Compiler options. Left to itself, ptxas spills some of four planes for the sake of one more block."""
    return {"num_warps": 4, "enable_fp_fusion": True} | ({"maxnreg": 128} if planes == MAX_PLANES else {})


def launch(ids: Tensor, tiles: Tiles, group_size: int, y: Tensor) -> None:
    """Write rows `ids` [M] (int32 or int64; zeros for those not in 0..N-1) of the weight into y [M, K]."""
    embedding_kernel[(ids.numel(),)](
        ids.contiguous(),
        *tiles,
        y,
        tiles.scales.numel(),
        y.shape[1],
        PLANES=tiles.multiplied,
        STORED=tiles.stored,
        GROUP=group_size,
        UNITS=8,
        **options(tiles.multiplied),
    )
