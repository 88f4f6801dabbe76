"""The grid of each row of a group, for kernels of `triton_solver`: levels, fits, starts, as in `grid`.

A tile [G, R] holds G inputs of R rows, what belongs to a row is [R]. Coefficients, levels and equations are tuples of
such tensors, unrolled: they stay in registers, and a row needs no other.
"""

import torch
import triton
import triton.language as tl

from bpdq_quantizer.algorithm.grid import CLUSTER_ROUNDS

FP32, FP16, BF16 = 0, 1, 2
DTYPES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}

_FP32 = tl.constexpr(FP32)
_FP16 = tl.constexpr(FP16)
_CLUSTER_ROUNDS = tl.constexpr(CLUSTER_ROUNDS)
_CLUSTER_ALPHA = tl.constexpr(1e-6)
BIG = 1.5 * 2.0**23  # x + BIG - BIG rounds x to an integer, half to even, for |x| < 2^22
_BIG = tl.constexpr(BIG)
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def rounded(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """x rounded to the dtype in which coefficients are stored."""
    if DTYPE == _FP32:
        return x
    if DTYPE == _FP16:
        return x.to(tl.float16).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)  # by hand: the interpreter truncates to bf16
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, up.to(tl.float32, bitcast=True), x)


@triton.jit
def level_of(code: tl.tensor, c: tl.tuple, BITS: tl.constexpr) -> tl.tensor:
    level = c[BITS]
    for p in tl.static_range(BITS):
        level = tl.where(((code >> p) & 1) != 0, level + c[p], level)
    return level


@triton.jit
def sorted_grid(c: tl.tuple, BITS: tl.constexpr) -> tl.tuple:
    """The midpoints between levels in ascending order, and the levels' codes in that order, 4 bits each."""
    levels = (c[BITS],)
    codes = (tl.zeros_like(c[BITS]).to(tl.int32),)
    for j in tl.static_range(1, 2**BITS):
        code = tl.full(c[BITS].shape, j, tl.int32)
        level = level_of(code, c, BITS)
        more_levels = ()
        more_codes = ()
        for i in tl.static_range(j):  # insert it
            below = level < levels[i]
            more_levels = more_levels + (tl.where(below, level, levels[i]),)
            more_codes = more_codes + (tl.where(below, code, codes[i]),)
            level = tl.where(below, levels[i], level)
            code = tl.where(below, codes[i], code)
        levels = more_levels + (level,)
        codes = more_codes + (code,)
    midpoints = ()
    order = codes[0].to(tl.int64 if BITS == 4 else tl.int32)
    for j in tl.static_range(1, 2**BITS):
        midpoints = midpoints + ((levels[j - 1] + levels[j]) / 2,)
        order = order | (codes[j].to(order.dtype) << (4 * j))
    return midpoints, order


@triton.jit
def nearest(w: tl.tensor, midpoints: tl.tuple, order: tl.tensor) -> tl.tensor:
    """Code of the level nearest to w [R], or [G, R] with midpoints and order [1, R]."""
    index = (w > midpoints[0]).to(tl.int32)
    for j in tl.static_range(1, len(midpoints)):
        index += (w > midpoints[j]).to(tl.int32)
    return ((order >> (4 * index).to(order.dtype)) & 15).to(tl.int32)


@triton.jit
def solve(gram: tl.tuple, target: tl.tuple, ridge: tl.tensor, BITS: tl.constexpr, DTYPE: tl.constexpr) -> tl.tuple:
    """(gram + ridge I)^-1 target by LDL^T; gram: rows of the lower triangle."""
    left = ()  # rows of the lower triangle of L D
    L = ()  # of L, D in the diagonal
    z = ()
    for p in tl.static_range(BITS + 1):
        right = target[p]
        for q in tl.static_range(p + 1):
            value = gram[p * (p + 1) // 2 + q] + (ridge if q == p else 0.0)
            for r in tl.static_range(q):
                value -= left[p * (p + 1) // 2 + r] * L[q * (q + 1) // 2 + r]
            left = left + (value,)
            if q < p:
                value = value / L[q * (q + 3) // 2]
                right -= value * z[q]
            L = L + (value,)
        z = z + (right,)
    c = ()
    for i in tl.static_range(BITS + 1):
        value = z[BITS - i] / L[(BITS - i) * (BITS - i + 3) // 2]
        for q in tl.static_range(i):
            value -= L[(BITS - q) * (BITS - q + 1) // 2 + BITS - i] * c[i - 1 - q]
        c = (value,) + c
    coefficients = ()
    for p in tl.static_range(BITS + 1):
        coefficients = coefficients + (rounded(c[p], DTYPE),)
    return coefficients


@triton.jit
def fit(X: tl.tuple, y: tl.tensor, alpha: tl.tensor, BITS: tl.constexpr, DTYPE: tl.constexpr) -> tl.tuple:
    """Coefficients of the ridge least squares of y [G, R] on k + 1 features X [G, R]; alpha: share of the diagonal's
    mean."""
    gram = ()
    target = ()
    diagonal = tl.zeros([y.shape[1]], tl.float32)
    for p in tl.static_range(BITS + 1):
        target = target + (tl.sum(X[p] * y, 0),)
        for q in tl.static_range(p + 1):
            gram = gram + (tl.sum(X[p] * X[q], 0),)
        diagonal += gram[p * (p + 3) // 2]
    return solve(gram, target, alpha / (BITS + 1) * diagonal, BITS, DTYPE)


@triton.jit
def range_planes(W: tl.tensor, spread: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """`grid.most_significant_planes`."""
    low = tl.minimum(tl.min(W, 0), 0.0) * spread
    high = tl.maximum(tl.max(W, 0), 0.0) * spread
    scale = tl.maximum((high - low) / 255, _TINY)
    zero = (-low / scale + _BIG) - _BIG
    q = ((W / scale[None, :] + _BIG) - _BIG) + zero[None, :]
    return tl.minimum(tl.maximum(q, 0.0), 255.0).to(tl.int32) >> (8 - BITS)


@triton.jit
def residual_planes(W: tl.tensor, inside: tl.tensor, g: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """`grid.residual_planes`; inside [G, 1]: inputs that there are."""
    left = tl.where(inside, W - (tl.sum(W, 0) / g)[None, :], 0.0)
    codes = tl.zeros_like(W).to(tl.int32)
    for i in tl.static_range(BITS):
        positive = left > 0
        scale = (tl.sum(tl.abs(left), 0) / g)[None, :]
        codes = tl.where(positive, codes | (1 << (BITS - 1 - i)), codes)
        left = tl.where(inside, left - tl.where(positive, scale, -scale), 0.0)
    return codes


@triton.jit
def clustered(codes: tl.tensor, W: tl.tensor, weights: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """`grid.clustered`; weights [G, R]: what errors weigh."""
    for _ in range(_CLUSTER_ROUNDS):
        X = ()
        for p in tl.static_range(BITS):
            X = X + (tl.where(((codes >> p) & 1) != 0, weights, 0.0),)
        c = fit(X + (weights,), W * weights, _CLUSTER_ALPHA, BITS, _FP32)
        midpoints, order = sorted_grid(c, BITS)
        wide = ()
        for j in tl.static_range(len(midpoints)):
            wide = wide + (midpoints[j][None, :],)
        codes = nearest(W, wide, order[None, :])
    return codes
