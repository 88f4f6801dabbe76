"""y = W x for one token on CUDA: bit-planes of the weights times bit-planes of the activation.

A group's dot product is  sum_p c_p sum_i bit_p[i] x[i]  +  c0 sum_i x[i].  Written in fixed point, x[i] is itself
a sum of bit-planes, x[i] = 2^s sum_j 2^j bit_j(x[i]), so that the inner sums are counts of common ones:

    sum_i bit_p[i] x[i]  =  2^s sum_j 2^j popcount(plane p of the weights & plane j of x)

which is what the binary tensor cores compute (mma m16n8k128 b1 and.popc, sm_80 to sm_90). No weight is ever
dequantized: the stored words are the operand.

    unit = 128 inputs                          16 bits of x in fixed point, two MMAs of 8
   .------------------------------.      .-----------------.
   | 16 outputs (rows r, r + 8)   |      | bits 0..7       |  lane 4r + q: bit r (bit 8 + r) of the inputs of word q,
   | lane 4r + q: word q of both  |  x   | bits 8..15      |  of which it loads four: transposed in the warp
   '------------------------------'      '-----------------'

    counts: lane 4r + q holds bits 2q, 2q + 1 (and 8 higher) of rows r, r + 8; weighed by 2^j in integers, times c_p
    and 2^s in fp32; the factor 4^q and the sum over q and over the warps, which take units in turn, come at the end.

Fixed point: per unit, 16 bits relative to the power of two above its largest |x|, rounded to nearest: an error of at
most 2^-15 of that largest, where a weight rounded to fp16 is off by up to 2^-11 of itself. bf16 can't overflow.
Infinity and NaN in x give NaN.

Coefficients of 8 bits multiply the counts as integers, and each plane is summed by itself: its ratio comes once at the
end. Of trellis-coded planes the first word becomes two in registers, by four instructions for 32 weights.

Budget, RTX 3090, k = 2, G = 128 (sm_86 SASS): 1.1 thread instructions a weight with 64 outputs per block, 1.7 with
16, where 5.6 fit into the time DRAM needs for it: the schedulers take 0.19 to 0.30 of it, every pipe less. With
coefficients of 8 bits there are as many instructions, and DRAM needs less time: 0.21 to 0.32; G = 64: 0.32 to 0.40.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels import layout
from bpdq_kernels.dispatch import Gemv
from bpdq_kernels.layout import Tiles, cdiv
from bpdq_kernels.triton_layout import (
    TILE_ROWS,
    UNIT,
    coefficient_of,
    first_pair,
    group_pairs,
    groups_in_unit,
    lane_words,
    load_coefficients,
    load_planes,
    multiplied_planes,
    reload_coefficients,
    reload_planes,
    row_pairs,
    row_words,
    unit_words,
    words_beside,
)
from bpdq_kernels.triton_slices import first_input, load_inputs, slice_bits
from bpdq_kernels.warp import (
    mma_bits,
    prefetch,
    stack,
    sum_last,
    unpack_pair,
)


@triton.jit(do_not_specialize_on_alignment=["x_ptr"])
def gemv_kernel(
    x_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ratios_ptr: tl.tensor,  # None: coefficients in 16 bits
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    PLANES: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE: tl.constexpr,  # UNIT divides K
) -> None:
    thread = tl.arange(0, 32 * WARPS)
    tile = (tl.program_id(0) * TILES).to(tl.int64)
    # misses at the end would be waited for
    first_row = tile * TILE_ROWS
    prefetch(scales_ptr + first_row + thread, (thread < TILES * TILE_ROWS) & (first_row + thread < N))
    y = dot_tiles(
        x_ptr,
        planes_ptr,
        coefficients_ptr,
        ratios_ptr,
        tile,
        1,
        K,
        PLANES,
        STORED,
        GROUP,
        BF16,
        TILES,
        WARPS,
        WHOLE,
    )
    row = first_row + 8 * tl.arange(0, 2 * TILES)[None, :] + tl.arange(0, 8)[:, None]
    y *= tl.load(scales_ptr + row, row < N, 0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, row < N, 0).to(tl.float32)
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), row < N)


@triton.jit
def dot_tiles(
    x_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    ratios_ptr: tl.tensor,
    tile: tl.tensor,
    stride: tl.tensor,
    K: tl.tensor,
    PLANES: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """[8, 2 TILES] fp32: W x over the outputs' scales, for rows r and r + 8 of TILES tiles, by a whole block: `tile`
    (int64) and the following ones, every `stride`-th."""
    thread = tl.arange(0, 32 * WARPS)
    warp = thread // 32
    lane = thread % 32
    q = lane % 4
    units = tl.cdiv(K, UNIT)
    PARTS: tl.constexpr = groups_in_unit(GROUP)
    BYTES: tl.constexpr = ratios_ptr is not None
    SUMS: tl.constexpr = 2 * PLANES + (2 if PARTS == 4 else 1) if BYTES else 2  # of a tile
    CS: tl.constexpr = PARTS * (row_words(PLANES) if BYTES else PLANES + 1)
    planes_stride = units * unit_words(STORED)
    c_stride = tl.cdiv(units * UNIT, GROUP) * group_pairs(PLANES)
    planes_ptr += tile * planes_stride + warp * unit_words(STORED) + lane * lane_words(STORED)
    coefficients_ptr += tile * c_stride + warp * UNIT // GROUP * group_pairs(PLANES)
    coefficients_ptr += first_pair(lane // 4, PLANES, BYTES)
    BESIDE: tl.constexpr = words_beside(GROUP, STORED != PLANES)
    x_ptr += warp * UNIT + first_input(lane, BESIDE)
    units_left = units - warp
    inputs_left = K - warp * UNIT - (0 if WHOLE else first_input(lane, BESIDE))
    c_step: tl.constexpr = WARPS * UNIT // GROUP * group_pairs(PLANES)  # 256 divides UNIT x WARPS
    planes_stride *= stride
    c_stride *= stride
    if BYTES:  # misses at the end would be waited for
        which = (tile + thread // (PLANES + 1) * stride) * group_pairs(PLANES) + thread % (PLANES + 1) * 8
        prefetch(ratios_ptr + which, thread < TILES * (PLANES + 1))
    sign = tl.where(q == 3, -2, 2)  # bit 15 counts negative
    acc = (tl.zeros([32 * WARPS], tl.float32),) * (SUMS * TILES)
    live = units_left > 0
    next_words = load_planes(planes_ptr, planes_stride, live, STORED, TILES)
    next_c = load_coefficients(coefficients_ptr, c_stride, live, PARTS, PLANES, TILES, BYTES)
    next_x = load_inputs(x_ptr, live, inputs_left, BESIDE, WHOLE, BF16)
    for unit in range(WARPS, units + WARPS, WARPS):
        words = multiplied_planes(next_words, PLANES, STORED, TILES)
        c = next_c
        x = next_x
        planes_ptr += WARPS * unit_words(STORED)
        coefficients_ptr += c_step
        x_ptr += WARPS * UNIT
        # past the end zeros of x take what is left there
        live = unit < units_left
        next_words = reload_planes(planes_ptr, planes_stride, live, next_words, STORED, TILES)
        next_c = reload_coefficients(coefficients_ptr, c_stride, live, next_c, PARTS, PLANES, TILES, BYTES)
        next_x = load_inputs(x_ptr, live, inputs_left - unit * UNIT, BESIDE, WHOLE, BF16)
        low, high, total, scale = slice_bits(x, lane, PARTS)
        sums_of_products = ()
        for t in tl.static_range(TILES):
            t_words = words[2 * PLANES * t : 2 * PLANES * (t + 1)]
            t_c = c[CS * t : CS * (t + 1)]
            if BYTES:
                part = acc[SUMS * t : SUMS * (t + 1)]
                part = add_unit_of_bytes(part, t_words, t_c, low, high, total, scale, lane, sign, PLANES, PARTS)
                sums_of_products = sums_of_products + part
            else:
                z, z8 = dot_unit(t_words, t_c, low, high, total, q, sign, PLANES, PARTS, BF16)
                sums_of_products = sums_of_products + (acc[2 * t] + scale * z, acc[2 * t + 1] + scale * z8)
        acc = sums_of_products
    if BYTES:
        ratios_ptr += tile * group_pairs(PLANES) + lane // 4 * row_pairs(PLANES)
        acc = sums_over_planes(acc, ratios_ptr, stride * group_pairs(PLANES), q, PLANES, PARTS, TILES, BF16)
    y = tl.reshape(stack(acc), [WARPS, 8, 4, 2 * TILES])
    four_to_the_q = (1 << (2 * tl.arange(0, 4))).to(tl.float32)
    y = tl.permute(y * four_to_the_q[None, None, :, None], 1, 3, 0, 2)
    return sum_last(tl.reshape(y, [8, 2 * TILES, 4 * WARPS]), 8, 2 * TILES, 4 * WARPS)


@triton.jit
def dot_unit(
    words: tl.tuple,
    c: tl.tuple,
    low: tl.tensor,
    high: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    sign: tl.tensor,
    PLANES: tl.constexpr,
    PARTS: tl.constexpr,
    BF16: tl.constexpr,
) -> tl.tuple:
    """This lane's part, over 4^q, of one unit's dot products with rows r and r + 8."""
    c_0, c_08 = unpack_pair(of_own_part(c[PLANES :: PLANES + 1], q, PARTS), BF16)
    once = tl.where(q % (4 // PARTS) == 0, total.to(tl.float32) * four_to_the_minus(q), 0.0)
    z = c_0 * once
    z8 = c_08 * once
    for part in tl.static_range(PARTS):
        low_part = low if PARTS == 1 else tl.where(q // (4 // PARTS) == part, low, 0)
        high_part = high if PARTS == 1 else tl.where(q // (4 // PARTS) == part, high, 0)
        for p in tl.static_range(PLANES):
            d0, d1, d2, d3 = mma_bits(words[2 * p], words[2 * p + 1], low_part)
            e0, e1, e2, e3 = mma_bits(words[2 * p], words[2 * p + 1], high_part)
            dot = d0 + 2 * d1 + 256 * (e0 + sign * e1)
            dot8 = d2 + 2 * d3 + 256 * (e2 + sign * e3)
            c_p, c_p8 = unpack_pair(c[part * (PLANES + 1) + p], BF16)
            z += c_p * dot.to(tl.float32)
            z8 += c_p8 * dot8.to(tl.float32)
    return z, z8


@triton.jit
def of_own_part(values: tl.tuple, q: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    """Of one value for each group that the unit has a part of, that of the group of word q."""
    own = values[0]
    for part in tl.static_range(1, PARTS):
        own = tl.where(q // (4 // PARTS) == part, values[part], own)
    return own


@triton.jit
def four_to_the_minus(q: tl.tensor) -> tl.tensor:
    return ((127 - 2 * q) << 23).to(tl.float32, bitcast=True)


@triton.jit
def add_unit_of_bytes(
    acc: tl.tuple,
    words: tl.tuple,
    c: tl.tuple,
    low: tl.tensor,
    high: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    lane: tl.tensor,
    sign: tl.tensor,
    PLANES: tl.constexpr,
    PARTS: tl.constexpr,
) -> tl.tuple:
    """Add a unit's dot products to acc, for each plane by itself: rows r and r + 8 over 4^q in turn; last c_0 times the
    sum of x over the lane's group, of row r in lanes with an even q and of row r + 8 in the others, or of both where
    each q has a group of its own. Products of counts or sums and coefficients of 8 bits fit 30 bits with their sign, so
    they are summed in integers."""
    WORDS: tl.constexpr = row_words(PLANES)
    r = lane // 4
    q = lane % 4
    added = ()
    for p in tl.static_range(PLANES):
        z = tl.zeros_like(low)
        z8 = z
        for part in tl.static_range(PARTS):
            low_part = low if PARTS == 1 else tl.where(q // (4 // PARTS) == part, low, 0)
            high_part = high if PARTS == 1 else tl.where(q // (4 // PARTS) == part, high, 0)
            d0, d1, d2, d3 = mma_bits(words[2 * p], words[2 * p + 1], low_part)
            e0, e1, e2, e3 = mma_bits(words[2 * p], words[2 * p + 1], high_part)
            row = c[WORDS * part : WORDS * (part + 1)]
            z += coefficient_of(row, p, 0, r, PLANES) * (d0 + 2 * d1 + 256 * (e0 + sign * e1))
            z8 += coefficient_of(row, p, 1, r, PLANES) * (d2 + 2 * d3 + 256 * (e2 + sign * e3))
        added = added + (acc[2 * p] + scale * z.to(tl.float32), acc[2 * p + 1] + scale * z8.to(tl.float32))
    last = (of_own_part(c[WORDS - 1 :: WORDS], q, PARTS),) * WORDS  # the word that has c_0
    for half in tl.static_range(2 if PARTS == 4 else 1):
        z = coefficient_of(last, PLANES, half if PARTS == 4 else q % 2, r, PLANES) * total
        added = added + (acc[2 * PLANES + half] + scale * z.to(tl.float32),)
    return added


@triton.jit
def sums_over_planes(
    acc: tl.tuple,
    ratios_ptr: tl.tensor,
    stride: tl.tensor,
    q: tl.tensor,
    PLANES: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    BF16: tl.constexpr,
) -> tl.tuple:
    """This lane's part, over 4^q, of the sums of rows r and r + 8 of each tile, of what `add_unit_of_bytes` summed;
    ratios of tiles are `stride` pairs apart."""
    SUMS: tl.constexpr = len(acc) // TILES
    y = ()
    for t in tl.static_range(TILES):
        part = acc[SUMS * t : SUMS * (t + 1)]
        c_0, c_08 = unpack_pair(tl.load(ratios_ptr + t * stride + PLANES), BF16)
        y_t = c_0 * four_to_the_minus(q) * part[2 * PLANES]
        y_t8 = c_08 * four_to_the_minus(q) * part[SUMS - 1]
        if PARTS < 4:
            y_t = tl.where(q % (4 // PARTS) == 0, y_t, 0.0)
            y_t8 = tl.where(q % (4 // PARTS) == 1, y_t8, 0.0)
        for p in tl.static_range(PLANES):
            ratio, ratio8 = unpack_pair(tl.load(ratios_ptr + t * stride + p), BF16)
            y_t += ratio * part[2 * p]
            y_t8 += ratio8 * part[2 * p + 1]
        y = y + (y_t, y_t8)
    return y


def options(config: Gemv) -> dict[str, int]:
    """Compiler options: registers for two blocks of eight warps or three of four on a multiprocessor. Left to itself,
    ptxas would rather spill one than take more than 80 (one tile of k = 3 at G = 64)."""
    return {"num_warps": config.warps, "maxnreg": 128 if config.warps == 8 else 168, "enable_fp_fusion": True}


def launch(
    x: Tensor,
    tiles: Tiles,
    group_size: int,
    bias: Tensor | None,
    y: Tensor,
    config: Gemv,
    compile_only: bool = False,
) -> None:
    """Write W x + bias into y [N]: x [K] contiguous, from a multiple of 4 bytes on, fp16 or bf16; tiles: W.
    `compile_only`: make the kernel and don't run it."""
    in_features, out_features = x.numel(), y.numel()
    gemv_kernel.run(
        x,
        tiles.planes,
        tiles.pairs,
        tiles.scales,
        tiles.ratio_pairs,
        bias,
        y,
        out_features,
        in_features,
        PLANES=tiles.multiplied,
        STORED=tiles.stored,
        GROUP=group_size,
        BF16=tiles.dtype == torch.bfloat16,
        TILES=config.tiles,
        WARPS=config.warps,
        WHOLE=in_features % layout.UNIT == 0,
        grid=(cdiv(out_features, layout.TILE_ROWS * config.tiles),),
        warmup=compile_only,
        **options(config),
    )
