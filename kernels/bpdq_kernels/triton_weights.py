"""Weights of a tile made in registers from the bits of a word, in the operand of the tensor cores, and multiplied.

Turned to a run, a word has the bits of its eight inputs where `and pair_mask(i)` leaves a pair of fp16 numbers
that are 0 or 2^(2^(i+1) - 15) (bits 11..14 belong to the exponent). With each c_p divided by that power once
a unit, a pair of weights is one AND and one FMA per plane, w = (bits * c_p') + w, rounded to 16 bits in each. bf16
activations get bf16 weights by the same instructions, so they can't overflow; coefficients are stored within 1, so
that c_p' stays in range. Coefficients of 8 bits become such numbers by one FMA more (`byte_steps`), exactly where their
ratios are powers of two.
"""

import triton
import triton.language as tl

from bpdq_kernels.triton_layout import coefficient_pair, load_coefficients, pair_mask
from bpdq_kernels.warp import fma_pair, mma


@triton.jit
def coefficient_steps(c: tl.tuple, PLANES: tl.constexpr, BF16: tl.constexpr) -> tl.tuple:
    """Pairs (rows r, r + 8): at 4p + i, i = 0..3, c_p over the number that is `pair_mask(i)`; after them c_0."""
    steps = ()
    for p in tl.static_range(PLANES + 1):
        pair = c[p]
        if p == PLANES:
            steps = steps + (pair,)
        else:
            for i in tl.static_range(4):
                # 2^(127 - 2^(i+4)) in bf16, 2^(15 - 2^(i+1)) in fp16
                factor = tl.full(
                    [], (((254 - (16 << i)) << 7) if BF16 else ((30 - (2 << i)) << 10)) * 0x10001, tl.int32
                )
                minus_zero = tl.full([], -0x7FFF8000, tl.int32)
                steps = steps + (fma_pair(pair, factor, minus_zero, 2, 2, BF16),)
    return steps


@triton.jit
def byte_factors(
    ptr: tl.tensor,
    stride: tl.tensor,
    live: tl.tensor,
    PLANES: tl.constexpr,
    TILES: tl.constexpr,
    BF16: tl.constexpr,
) -> tl.tuple:
    """For `byte_steps`, of each pair of ratios at ptr, those of tiles `stride` pairs apart: what a byte, read as a
    number, is multiplied with, and what is added, for byte - 128 times the ratio over 2^10 (planes) or 2^9 (c_0)."""
    ratios = load_coefficients(ptr, stride, live, 1, PLANES, TILES)
    minus_zero = tl.full([], -0x7FFF8000, tl.int32)
    # 2^123, -2^-3 in bf16, 2^14, -2^-3 in fp16; of c_0 twice that
    ONE: tl.constexpr = 0x00800080 if BF16 else 0x04000400
    TIMES: tl.constexpr = (250 if BF16 else 29) * ONE
    PLUS: tl.constexpr = (124 if BF16 else 12) * ONE - 0x7FFF8000
    found = ()
    for i in tl.static_range(TILES * (PLANES + 1)):
        times = tl.full([], TIMES + ONE if i % (PLANES + 1) == PLANES else TIMES, tl.int32)
        plus = tl.full([], PLUS + ONE if i % (PLANES + 1) == PLANES else PLUS, tl.int32)
        found = found + (fma_pair(ratios[i], times, minus_zero, 2, 2, BF16),)
        found = found + (fma_pair(ratios[i], plus, minus_zero, 2, 2, BF16),)
    return found


@triton.jit
def byte_steps(c: tl.tuple, factors: tl.tuple, r: tl.tensor, PLANES: tl.constexpr, BF16: tl.constexpr) -> tl.tuple:
    """As `coefficient_steps`, over 512, of coefficients of 8 bits; factors: of the tile, by `byte_factors`.

    The halves' lowest 8 bits are subnormal numbers (of bf16 the next ones too): the byte times 2^-24, 2^-133 in bf16.
    One FMA takes 128 off, which the sign bit turned over added, and multiplies by the ratio and by what the last of a
    plane's four numbers needs; the others are powers of two of that."""
    positive = ()
    for w in tl.static_range(len(c)):
        positive = positive + (c[w] ^ -0x7F7F7F80,)
    minus_zero = tl.full([], -0x7FFF8000, tl.int32)
    steps = ()
    for p in tl.static_range(PLANES + 1):
        last = fma_pair(coefficient_pair(positive, p, r, PLANES), factors[2 * p], factors[2 * p + 1], 2, 2, BF16)
        if p < PLANES:
            for i in tl.static_range(3):
                # over that of i = 3: 2^(128 - 2^(i+4)) in bf16, 2^(16 - 2^(i+1)) in fp16
                factor = tl.full(
                    [], (((255 - (16 << i)) << 7) if BF16 else ((31 - (2 << i)) << 10)) * 0x10001, tl.int32
                )
                steps = steps + (fma_pair(last, factor, minus_zero, 2, 2, BF16),)
        steps = steps + (last,)
    return steps


@triton.jit
def multiply(
    words: tl.tuple,
    steps: tl.tuple,
    x: tl.tuple,
    acc: tl.tuple,
    H: tl.constexpr,
    PLANES: tl.constexpr,
    TOKENS: tl.constexpr,
    BF16: tl.constexpr,
) -> tl.tuple:
    """Add one MMA step of a tile, 16 inputs, to acc: pairs 2H and 2H + 1 of the eight inputs in the words' bits."""
    a0 = weights(words, steps, 2 * H, 0, PLANES, BF16)
    a1 = weights(words, steps, 2 * H, 1, PLANES, BF16)
    a2 = weights(words, steps, 2 * H + 1, 0, PLANES, BF16)
    a3 = weights(words, steps, 2 * H + 1, 1, PLANES, BF16)
    sums = ()
    for n in tl.static_range(TOKENS // 8):
        b0 = x[n][2 * H]
        b1 = x[n][2 * H + 1]
        sums = sums + mma(a0, a1, a2, a3, b0, b1, acc[4 * n], acc[4 * n + 1], acc[4 * n + 2], acc[4 * n + 3], BF16)
    return sums


@triton.jit
def weights(
    words: tl.tuple, steps: tl.tuple, PAIR: tl.constexpr, HALF: tl.constexpr, PLANES: tl.constexpr, BF16: tl.constexpr
) -> tl.tensor:
    """The weights of output r + 8 HALF for the two inputs of PAIR in the words' bits."""
    w = steps[4 * PLANES]
    for p in tl.static_range(PLANES):
        bits = words[2 * p + HALF] & pair_mask(PAIR)
        w = fma_pair(bits, steps[4 * p + PAIR], w, HALF, HALF if p == 0 else 2, BF16)
    return w
