"""Weights in 16 bits from tiles on CUDA: with many tokens, `torch.matmul` with them is faster than any fused kernel.

Dequantizing costs the same for any number of tokens, 2 bytes written and read again a weight; the library's
multiplication is then as fast as for a 16-bit layer. A program writes 16 outputs x some units of 128 inputs, in fp32
until one rounding:

    unit u of tile t:  words of lanes 4r + q, halves h      ->      rows 16t + 8h + r, inputs 128u .. 128u + 127,
                       (`bpdq_kernels.layout.Tiles`)                16 bytes (a run of 8 inputs) a store
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels import layout
from bpdq_kernels.dispatch import Dense
from bpdq_kernels.layout import Tiles, cdiv
from bpdq_kernels.triton_layout import (
    RUN,
    TILE_ROWS,
    UNIT,
    bit_of_input,
    group_pairs,
    input_of_word,
    lane_words,
    multiplied_plane,
    plane_in_store,
    plane_start,
    row_pairs,
    run_step,
    unit_words,
    words_beside,
)

UNITS = 4  # of a program


@triton.jit(do_not_specialize=["first_tile", "N"])
def dequantize_kernel(
    planes_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ratios_ptr: tl.tensor,
    w_ptr: tl.tensor,
    first_tile: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    PLANES: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    UNITS: tl.constexpr,
) -> None:
    # axes, in the order of the weights in memory: row, words of other groups, run, words beside, input of the run
    BESIDE: tl.constexpr = words_beside(GROUP, STORED != PLANES)
    row = tl.arange(0, TILE_ROWS)[:, None, None, None, None]
    other = tl.arange(0, 4 // BESIDE)[None, :, None, None, None]
    run = tl.arange(0, 4)[None, None, :, None, None]
    beside = tl.arange(0, BESIDE)[None, None, None, :, None]
    number = tl.arange(0, RUN)[None, None, None, None, :]
    bit = bit_of_input(run, number)
    tile = tl.program_id(0)
    units = tl.cdiv(K, UNIT)
    groups = tl.cdiv(units * UNIT, GROUP)
    q = other * BESIDE + beside
    words_ptr = planes_ptr + (first_tile + tile).to(tl.int64) * units * unit_words(STORED)
    words_ptr += (row % 8 * 4 + q) * lane_words(STORED) + row // 8
    c_ptr = coefficients_ptr + (first_tile + tile).to(tl.int64) * groups * (2 * group_pairs(PLANES))
    c_ptr += row % 8 * (2 * row_pairs(PLANES)) + row // 8
    n = (first_tile + tile) * TILE_ROWS + row
    scale = tl.load(scales_ptr + n, n < N, 0)
    ratio = ()
    for p in tl.static_range(PLANES + 1):
        if ratios_ptr is not None:
            ratio_ptr = ratios_ptr + (first_tile + tile).to(tl.int64) * (2 * group_pairs(PLANES))
            ratio_ptr += row % 8 * (2 * row_pairs(PLANES)) + row // 8
            ratio = ratio + (tl.load(ratio_ptr + 2 * p, n < N, 0).to(tl.float32),)
    for i in tl.static_range(UNITS):
        unit = tl.program_id(1) * UNITS + i
        here = n < tl.where(unit < units, N, 0)
        group_ptr = c_ptr + (unit * UNIT + other * (32 * BESIDE)) // GROUP * (2 * group_pairs(PLANES))
        w = tl.load(group_ptr + 2 * PLANES, here, 0).to(tl.float32)
        if ratios_ptr is not None:
            w *= ratio[PLANES]
        for p in tl.static_range(PLANES):
            stored_ptr = words_ptr + unit * unit_words(STORED)
            stored_ptr += plane_start(plane_in_store(p, PLANES, STORED), STORED)
            words = multiplied_plane(tl.load(stored_ptr, here, 0), p, PLANES, STORED)
            c_p = tl.load(group_ptr + 2 * p, here, 0).to(tl.float32)
            if ratios_ptr is not None:
                c_p *= ratio[p]
            w = tl.where((words >> bit) & 1 != 0, w + c_p, w)
        inputs = input_of_word(unit * UNIT, other * BESIDE, BESIDE) + run * run_step(BESIDE)
        inputs = input_of_word(inputs, beside, BESIDE) + number
        w_row = w_ptr + (tile * TILE_ROWS + row).to(tl.int64) * K
        tl.store(w_row + inputs, (w * scale).to(w_ptr.dtype.element_ty), here & (inputs < K))


def options() -> dict[str, Any]:
    """Compiler options."""
    return {"num_warps": 4, "enable_fp_fusion": True}


def dequantize(
    tiles: Tiles,
    group_size: int,
    first_output: int,
    weight: Tensor,
    compile_only: bool = False,
) -> None:
    """Write the weights of outputs `first_output` (16 divides it) and following into weight [n, K], contiguous, fp16 or
    bf16. compile_only: compile the kernel, write nothing."""
    outputs, in_features = weight.shape
    dequantize_kernel.run(
        *tiles,
        weight,
        first_output // layout.TILE_ROWS,
        min(first_output + outputs, tiles.scales.numel()),
        in_features,
        PLANES=tiles.multiplied,
        STORED=tiles.stored,
        GROUP=group_size,
        UNITS=UNITS,
        grid=(cdiv(outputs, layout.TILE_ROWS), cdiv(in_features, UNITS * layout.UNIT)),
        warmup=compile_only,
        **options(),
    )


def launch(
    rows: Tensor,
    tiles: Tiles,
    group_size: int,
    bias: Tensor | None,
    y: Tensor,
    config: Dense,
    compile_only: bool = False,
) -> None:
    """Write X W^T + bias into y [M, N] by `torch.matmul`: rows [M, K] fp16 or bf16; tiles: W.
    compile_only: compile the kernel that dequantizes, write nothing."""
    in_features, out_features = rows.shape[1], y.shape[1]
    weight = rows.new_empty((min(config.outputs, out_features), in_features))
    if compile_only:
        dequantize(tiles, group_size, 0, weight, compile_only)
        return
    for start in range(0, out_features, config.outputs):
        end = min(start + config.outputs, out_features)
        part = weight[: end - start]
        dequantize(tiles, group_size, start, part)
        if bias is None:
            torch.mm(rows, part.T, out=y[:, start:end])
        else:
            torch.addmm(bias[start:end].to(rows.dtype), rows, part.T, out=y[:, start:end])
