"""Y = X W^T for two tokens and more on CUDA: weights made in registers, in the operand of the tensor cores.

    unit = 128 inputs                              8 tokens
   .-------------------------------.          .---------------.
   | 16 outputs (rows r, r + 8)    |    128   | lane 4r + q:  |     16 x 8 fp32 sums, mma m16n8k16
   | lane 4r + q: word q of each   |  inputs  | token r, the  |
   | plane and row                 |          | inputs of q   |
   '-------------------------------'          '---------------'

The weights are on the MMA's 16-row side: with few tokens that halves the tensor-core time. Which of the 128 inputs
an MMA step calls its k-th is free as long as weights and activations agree. So a lane multiplies the 32 inputs of its
own word, q, which share one group's coefficients for every G: four runs of 8 inputs, 16 bytes of X each, from G = 128
on next to those of the row's other lanes, so that a load's rows are read in whole sectors with few bank conflicts. A
block's warps split inputs and tiles between them; only their sums pass through shared memory, once. `triton_weights`
makes the weights; `scales` multiplies the sums in fp32.

Budget, RTX 3090, k = 2, G = 128 (sm_86 SASS): 3.0 thread instructions a weight up to 8 tokens, where 5.6 fit into
the time DRAM needs for it; tensor cores, at the rate of fp32 accumulation, take 0.71 of DRAM time, the schedulers
0.52; with coefficients of 8 bits 3.1 instructions, 0.77 and 0.60. Above 16 tokens the tensor cores are the bound; at
64, no other pipe has a sixth of their work.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels import layout
from bpdq_kernels.dispatch import Gemm
from bpdq_kernels.layout import Tiles, cdiv
from bpdq_kernels.triton_layout import (
    TILE_ROWS,
    UNIT,
    first_pair,
    group_pairs,
    input_of_word,
    lane_words,
    load_coefficients,
    load_planes,
    multiplied_planes,
    row_pairs,
    row_words,
    run_step,
    turn,
    unit_words,
    words_beside,
)
from bpdq_kernels.triton_weights import byte_factors, byte_steps, coefficient_steps, multiply
from bpdq_kernels.warp import load4, prefetch, rotate_left, stack, sum_last

# Of a thread, where ptxas, left to itself, stops a few short for the sake of one more block, and spills one or two.
REGISTERS = {
    (Gemm(8, 1, 16, 16), 4): 80,
    (Gemm(16, 1, 8, 8), 1): 64,
    (Gemm(16, 1, 8, 8), 3): 80,
    (Gemm(16, 2, 4, 4), 2): 128,
    (Gemm(16, 1, 16, 16), 3): 80,
    (Gemm(32, 2, 4, 4), 1): 168,
    (Gemm(32, 2, 4, 4), 3): 192,
    (Gemm(32, 2, 4, 4), 4): 232,
    (Gemm(32, 2, 8, 8), 1): 168,
}
REGISTERS_TRELLIS = REGISTERS | {(Gemm(8, 2, 4, 4), 3): 128}
REGISTERS_8_BITS = {
    (Gemm(8, 1, 16, 16), 2): 96,
    (Gemm(8, 2, 4, 4), 2): 128,
    (Gemm(16, 1, 16, 16), 2): 80,  # one block to a multiprocessor at most
    (Gemm(16, 2, 4, 4), 2): 128,
    (Gemm(16, 2, 4, 4), 3): 144,
    (Gemm(32, 2, 4, 4), 4): 232,
    (Gemm(32, 2, 8, 8), 1): 168,
    (Gemm(64, 2, 4, 4), 2): 255,
}
REGISTERS_8_BITS_TRELLIS = REGISTERS_8_BITS | {
    (Gemm(8, 1, 8, 8), 2): 80,
    (Gemm(16, 1, 8, 8), 4): 96,
    (Gemm(16, 2, 4, 4), 4): 192,
    (Gemm(32, 2, 4, 4), 3): 192,
}


@triton.jit(do_not_specialize=["M", "stride_x"])
def gemm_kernel(
    x_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ratios_ptr: tl.tensor,  # None: coefficients in 16 bits
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride_x: tl.tensor,
    PLANES: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,  # UNIT divides K
) -> None:
    thread = tl.arange(0, 32 * WARPS)
    TEAMS: tl.constexpr = WARPS // SPLIT
    first_tile = tl.program_id(1) * (TEAMS * TILES)
    # misses at the end would be waited for
    first_row = first_tile * TILE_ROWS
    prefetch(scales_ptr + first_row + thread, (thread < TEAMS * TILES * TILE_ROWS) & (first_row + thread < N))
    tile = first_tile + thread // 32 % TEAMS * TILES
    tokens = ()
    for n in tl.static_range(TOKENS // 8):
        # rows past M: computed, never stored
        tokens = tokens + (tl.minimum(tl.program_id(0) * TOKENS + n * 8 + thread % 32 // 4, M - 1),)
    y = dot_rows(
        x_ptr,
        planes_ptr,
        coefficients_ptr,
        ratios_ptr,
        tokens,
        tile.to(tl.int64),
        tile * TILE_ROWS < N,
        1,
        K,
        stride_x,
        PLANES,
        STORED,
        GROUP,
        BF16,
        TOKENS,
        TILES,
        WARPS,
        SPLIT,
        WHOLE,
    )
    thread = tl.arange(0, TEAMS * 32)[:, None]
    s = tl.arange(0, TILES * TOKENS // 2)[None, :]
    row = (first_tile + thread // 32 * TILES + tile_of_sum(s, TOKENS)) * TILE_ROWS + row_of_sum(s, thread)
    token = token_of_sum(s, thread, TOKENS)
    y *= tl.load(scales_ptr + row, row < N, 0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, row < N, 0).to(tl.float32)
    first_token = tl.program_id(0) * TOKENS
    y_ptr += first_token.to(tl.int64) * N
    tl.store(y_ptr + token * N + row, y.to(y_ptr.dtype.element_ty), (row < N) & (token < M - first_token))


@triton.jit
def tile_of_sum(s: tl.tensor, TOKENS: tl.constexpr) -> tl.tensor:
    """Which of its tiles a warp's sum s is of. Slowest first, sums are of: tile, eight tokens, row r or r + 8, token 2q
    or 2q + 1."""
    return s // (TOKENS // 2)


@triton.jit
def row_of_sum(s: tl.tensor, thread: tl.tensor) -> tl.tensor:
    """Which row of its tile a thread's sum s is of."""
    return s // 2 % 2 * 8 + thread % 32 // 4


@triton.jit
def token_of_sum(s: tl.tensor, thread: tl.tensor, TOKENS: tl.constexpr) -> tl.tensor:
    """Which token of the block a thread's sum s is of."""
    return s % (TOKENS // 2) // 4 * 8 + thread % 4 * 2 + s % 2


@triton.jit
def dot_rows(
    x_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    ratios_ptr: tl.tensor,
    tokens: tl.tuple,
    tile: tl.tensor,
    inside: tl.tensor,
    stride: tl.tensor,
    K: tl.tensor,
    stride_x: tl.tensor,
    PLANES: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """[32 TEAMS, TILES TOKENS / 2] fp32: X W^T over the outputs' scales, by a whole block; which they are of,
    `tile_of_sum`, `row_of_sum` and `token_of_sum` tell. A team is SPLIT warps that share the inputs of the same tiles.

    tokens: of each eight of the block, the row of x that is token r. tile (int64): the warp's first; the others are
    `stride` tiles apart; only those `inside` are read."""
    thread = tl.arange(0, 32 * WARPS)
    lane = thread % 32
    r = lane // 4
    TEAMS: tl.constexpr = WARPS // SPLIT
    BYTES: tl.constexpr = ratios_ptr is not None
    units = tl.cdiv(K, UNIT)
    u = thread // 32 // TEAMS
    planes_stride = units * unit_words(STORED)
    c_stride = tl.cdiv(units * UNIT, GROUP) * group_pairs(PLANES)
    planes_ptr += tile * planes_stride + u * unit_words(STORED) + lane * lane_words(STORED)
    coefficients_ptr += tile * c_stride + first_pair(r, PLANES, BYTES)
    planes_stride *= stride
    c_stride *= stride
    BESIDE: tl.constexpr = words_beside(GROUP, STORED != PLANES)
    i = input_of_word(u * UNIT, lane % 4, BESIDE)
    # of registers: a pointer takes two, a count of runs one; of three planes ptxas then spills some
    SHORT: tl.constexpr = TOKENS == 64 and PLANES == 2
    x_rows = ()
    for n in tl.static_range(TOKENS // 8):
        start = tokens[n].to(tl.int64) * stride_x + i
        x_rows = x_rows + ((start >> 3).to(tl.int32) if SHORT else x_ptr + start,)
    CS: tl.constexpr = row_words(PLANES) if BYTES else PLANES + 1
    if BYTES:
        ratios_ptr += tile * group_pairs(PLANES) + r * row_pairs(PLANES)
        factors = byte_factors(ratios_ptr, stride * group_pairs(PLANES), inside, PLANES, TILES, BF16)
    acc = (tl.zeros([32 * WARPS], tl.float32),) * (TILES * TOKENS // 2)
    # with many tokens, other warps' multiplications hide the latency, and registers are short
    AHEAD: tl.constexpr = TOKENS < 64
    X_AHEAD: tl.constexpr = TOKENS == 8 and PLANES <= 2
    if X_AHEAD:
        next_x = ()
        for j in tl.static_range(4):
            next_x = next_x + (load_run(x_ptr, x_rows, u, units, i, K, 0, j, BESIDE, TOKENS, WHOLE, SHORT),)
    if AHEAD:
        live = inside & (u < units)
        next_words = load_planes(planes_ptr, planes_stride, live, STORED, TILES)
        c_ptr = coefficients_ptr + i // GROUP * group_pairs(PLANES)
        next_c = load_coefficients(c_ptr, c_stride, live, 1, PLANES, TILES, BYTES)
    for _ in range(0, units, SPLIT):
        if AHEAD:
            words = multiplied_planes(next_words, PLANES, STORED, TILES)
            c = next_c
            planes_ptr += SPLIT * unit_words(STORED)
            live = inside & (u + SPLIT < units)
            next_words = load_planes(planes_ptr, planes_stride, live, STORED, TILES)
            c_ptr = coefficients_ptr + (i + SPLIT * UNIT) // GROUP * group_pairs(PLANES)
            next_c = load_coefficients(c_ptr, c_stride, live, 1, PLANES, TILES, BYTES)
        else:
            live = inside & (u < units)
            words = load_planes(planes_ptr, planes_stride, live, STORED, TILES)
            words = multiplied_planes(words, PLANES, STORED, TILES)
            c_ptr = coefficients_ptr + i // GROUP * group_pairs(PLANES)
            c = load_coefficients(c_ptr, c_stride, live, 1, PLANES, TILES, BYTES)
            planes_ptr += SPLIT * unit_words(STORED)
        if X_AHEAD:
            x_runs = next_x
            next_x = ()
            for j in tl.static_range(4):
                next_x = next_x + (load_run(x_ptr, x_rows, u, units, i, K, SPLIT, j, BESIDE, TOKENS, WHOLE, SHORT),)
        steps = ()
        for t in tl.static_range(TILES):
            t_c = c[CS * t : CS * (t + 1)]
            if BYTES:
                t_factors = factors[2 * (PLANES + 1) * t : 2 * (PLANES + 1) * (t + 1)]
                steps = steps + (byte_steps(t_c, t_factors, r, PLANES, BF16),)
            else:
                steps = steps + (coefficient_steps(t_c, PLANES, BF16),)
        for j in tl.static_range(4):
            x = x_runs[j] if X_AHEAD else load_run(x_ptr, x_rows, u, units, i, K, 0, j, BESIDE, TOKENS, WHOLE, SHORT)
            sums = ()
            for t in tl.static_range(TILES):
                turned = ()
                for w in tl.static_range(2 * PLANES):
                    word = words[2 * PLANES * t + w]
                    turned = turned + (word if j == 0 else rotate_left(word, turn(j)),)
                part = acc[t * (TOKENS // 2) : (t + 1) * (TOKENS // 2)]
                for h in tl.static_range(2):
                    part = multiply(turned, steps[t], x, part, h, PLANES, TOKENS, BF16)
                sums = sums + part
            acc = sums
        u += SPLIT
        i += SPLIT * UNIT
        next_rows = ()
        for n in tl.static_range(TOKENS // 8):
            next_rows = next_rows + (x_rows[n] + (SPLIT * UNIT // 8 if SHORT else SPLIT * UNIT),)
        x_rows = next_rows
    y = tl.permute(tl.reshape(stack(acc), [SPLIT, TEAMS * 32, TILES * TOKENS // 2]), 1, 2, 0)
    y = sum_last(y, TEAMS * 32, TILES * TOKENS // 2, SPLIT)
    return y * 512.0 if BYTES else y


@triton.jit
def load_run(
    x_ptr: tl.tensor,
    x_rows: tl.tuple,
    u: tl.tensor,
    units: tl.tensor,
    i: tl.tensor,
    K: tl.tensor,
    AHEAD: tl.constexpr,
    J: tl.constexpr,
    BESIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    SHORT: tl.constexpr,
) -> tl.tuple:
    """Activations of each eight tokens for the lane's run J of 8 inputs, in unit u + AHEAD; zeros past K. x_rows:
    pointers to the lane's first run of unit u, or if SHORT that run's number from x_ptr."""
    start: tl.constexpr = AHEAD * UNIT + run_step(BESIDE) * J
    live = u + AHEAD < units if WHOLE else i + start < K
    x = ()
    for n in tl.static_range(TOKENS // 8):
        run = x_ptr + x_rows[n].to(tl.uint32, bitcast=True).to(tl.int64) * 8 if SHORT else x_rows[n]
        x = x + (load4(run, live, 2 * start),)
    return x


def options(config: Gemm, planes: int, coefficient_bits: int, trellis: bool = False) -> dict[str, Any]:
    """Compiler options."""
    found: dict[str, Any] = {"num_warps": config.warps, "enable_fp_fusion": True}
    plain, coded = REGISTERS, REGISTERS_TRELLIS
    if coefficient_bits == 8:
        plain, coded = REGISTERS_8_BITS, REGISTERS_8_BITS_TRELLIS
    limit = (coded if trellis else plain).get((config, planes))
    return found | {"maxnreg": limit} if limit else found


def launch(
    x: Tensor,
    tiles: Tiles,
    group_size: int,
    bias: Tensor | None,
    y: Tensor,
    config: Gemm,
    compile_only: bool = False,
) -> None:
    """Write X W^T + bias into y [M, N]: x [M, K] fp16 or bf16, rows contiguous and 16-byte aligned (8 divides K);
    tiles: W. `compile_only`: make the kernel and don't run it."""
    (tokens, in_features), out_features = x.shape, y.shape[1]
    tiles_per_block = config.tiles * config.warps // config.split
    gemm_kernel.run(
        x,
        tiles.planes,
        tiles.pairs,
        tiles.scales,
        tiles.ratio_pairs,
        bias,
        y,
        tokens,
        out_features,
        in_features,
        x.stride(0),
        PLANES=tiles.multiplied,
        STORED=tiles.stored,
        GROUP=group_size,
        BF16=x.dtype == torch.bfloat16,
        TOKENS=config.tokens,
        TILES=config.tiles,
        WARPS=config.warps,
        SPLIT=config.split,
        WHOLE=in_features % layout.UNIT == 0,
        grid=(cdiv(tokens, config.tokens), cdiv(out_features, layout.TILE_ROWS * tiles_per_block)),
        warmup=compile_only,
        **options(config, tiles.multiplied, tiles.coefficient_bits, tiles.has_trellis),
    )
