"""Paths of trellis-coded planes on CUDA: what `chains` does, for kernels of `triton_solver` and `triton_descent`.

In a chain of 32 inputs each of the four states holds what its best path has done so far, in registers: a tile [32, R]
of errors, a cost [R], and for each stored plane, of the path's bits x and of free ones, a word [R] with the chain's
bits in order. States are numbered last + 2 second, by a chain's bit of the input before and of the one before that.
State s that follows has x = s % 2, and its second bit was the last one of two states, s // 2 and s // 2 + 2: of their
paths the better is gone on with, by a level of z0 = s // 2 and z1 = x from the first, z1 = 1 - x from the second.
"""

import triton
import triton.language as tl

from bpdq_kernels.layout import WORD
from bpdq_kernels.trellis import CODED, STATES
from bpdq_quantizer.algorithm.triton_grid import level_of
from bpdq_quantizer.algorithm.triton_tiles import STAGES, zeros

CHAIN = tl.constexpr(WORD)
_STATES = tl.constexpr(STATES)
_SUBSETS = tl.constexpr(2**CODED)


@triton.jit
def all_levels(c: tl.tuple, BITS: tl.constexpr) -> tl.tuple:
    """The 2^k levels by their codes."""
    levels = ()
    for code in tl.static_range(2**BITS):
        levels = levels + (level_of(tl.full(c[BITS].shape, code, tl.int32), c, BITS),)
    return levels


@triton.jit
def choice(
    w: tl.tensor, levels: tl.tuple, now: tl.tensor, scale: tl.tensor, SUBSET: tl.constexpr, DESCENT: tl.constexpr
) -> tl.tuple:  # fmt: skip
    """Cost, error and free bits [R] of the level nearest to w [R] among those with z0 + 2 z1 = SUBSET.

    scale: in an assignment 1 / U[t, t], in a descent H[t, t]; now: in a descent W_hat[t].
    """
    level = levels[SUBSET]
    free = tl.zeros(w.shape, tl.int32)
    for j in tl.static_range(1, len(levels) // _SUBSETS):
        other = levels[SUBSET + _SUBSETS * j]
        nearer = tl.abs(w - other) < tl.abs(w - level)
        level = tl.where(nearer, other, level)
        free = tl.where(nearer, j, free)
    if DESCENT:
        e = level - now
        cost = scale * e * (e - 2 * (w - now))
    else:
        e = w - level
        cost = e * scale * (e * scale)
    return cost, e, free


@triton.jit
def best_path(
    before: tl.tensor, levels: tl.tuple, first: tl.tensor, target_ptr: tl.tensor, now_ptr: tl.tensor,
    factor_ptr: tl.tensor, stride: tl.tensor, scale_ptr: tl.tensor, scale_stride: tl.tensor, g: tl.tensor,
    N: tl.tensor, n: tl.tensor, BITS: tl.constexpr, DESCENT: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Errors [32, R] of the chain from input `first` on, words [R] of the stored planes, and costs [R].

    before [G / 32, 32, R]: errors of earlier chains. target: W, in a descent V; now: in a descent W_hat. Column t of S,
    in a descent of H, begins at `factor` + t stride; what `choice` calls scale is at `scale` + t scale_stride.
    """
    R: tl.constexpr = n.shape[0]
    STORED: tl.constexpr = BITS - 1
    i = tl.arange(0, CHAIN)
    all_inputs = tl.arange(0, before.shape[0])[:, None] * CHAIN + i[None, :]
    errors = zeros(CHAIN, R, _STATES)
    words = ()
    costs = ()
    for state in tl.static_range(_STATES):
        costs = costs + (tl.full([R], 0.0 if state == 0 else float("inf"), tl.float32),)
        for _ in tl.static_range(STORED):
            words = words + (tl.zeros([R], tl.int32),)
    for t in tl.range(first, first + CHAIN, num_stages=STAGES):
        s = tl.load(factor_ptr + t * stride + first + i)
        target = tl.load(target_ptr + t * N + n, n < N, 0.0)
        scale = tl.load(scale_ptr + t * scale_stride)
        inverse = 1.0 / scale if DESCENT else scale
        now = tl.load(now_ptr + t * N + n, n < N, 0.0) if DESCENT else target
        if before.shape[0] > 1:
            column = factor_ptr + t * stride + all_inputs
            others = tl.load(column, all_inputs < g, 0.0) if DESCENT else tl.load(column)
            known = tl.sum(others[:, :, None] * before, 0)
        else:
            known = tl.zeros([CHAIN, R], tl.float32)
        left = ()
        for state in tl.static_range(_STATES):
            w = target - tl.sum(known + s[:, None] * errors[state], 0)
            if DESCENT:
                w = now + w * inverse
            left = left + (w,)
        here = (i == t - first)[:, None]
        next_costs = ()
        next_errors = ()
        next_words = ()
        for state in tl.static_range(_STATES):
            cost, e, free = choice(left[state // 2], levels, now, scale, state // 2 + 2 * (state % 2), DESCENT)
            other_cost, other_e, other_free = choice(
                left[state // 2 + 2], levels, now, scale, state // 2 + 2 - 2 * (state % 2), DESCENT
            )
            cost += costs[state // 2]
            other_cost += costs[state // 2 + 2]
            other = other_cost < cost
            next_costs = next_costs + (tl.where(other, other_cost, cost),)
            tile = tl.where(other[None, :], errors[state // 2 + 2], errors[state // 2])
            next_errors = next_errors + (tl.where(here, tl.where(other, other_e, e)[None, :], tile),)
            bits = tl.where(other, other_free, free) * 2 + state % 2
            for p in tl.static_range(STORED):
                word = tl.where(other, words[(state // 2 + 2) * STORED + p], words[state // 2 * STORED + p])
                next_words = next_words + (word | (((bits >> p) & 1) << (t - first)),)
        costs = next_costs
        errors = next_errors
        words = next_words
    return least_costly(errors, words, costs, STORED)


@triton.jit
def least_costly(errors: tl.tuple, words: tl.tuple, costs: tl.tuple, STORED: tl.constexpr) -> tl.tuple:
    """Errors, words and costs of the state in which the best path ends."""
    e = errors[0]
    least = costs[0]
    best = ()
    for p in tl.static_range(STORED):
        best = best + (words[p],)
    for state in tl.static_range(1, _STATES):
        better = costs[state] < least
        least = tl.where(better, costs[state], least)
        e = tl.where(better[None, :], errors[state], e)
        chosen = ()
        for p in tl.static_range(STORED):
            chosen = chosen + (tl.where(better, words[state * STORED + p], best[p]),)
        best = chosen
    return e, best, least


@triton.jit
def multiplied(words: tl.tuple) -> tl.tuple:
    """`bpdq_kernels.trellis.multiplied` of words whose bits are in the order of their chain."""
    planes = (words[0] << 1, words[0] ^ (words[0] << 2))
    for p in tl.static_range(1, len(words)):
        planes = planes + (words[p],)
    return planes


@triton.jit
def codes_of(words: tl.tuple) -> tl.tensor:
    """Codes [32, R] of a chain's stored planes."""
    i = tl.arange(0, CHAIN)[:, None]
    planes = multiplied(words)
    codes = (planes[0][None, :] >> i) & 1
    for p in tl.static_range(1, len(planes)):
        codes |= ((planes[p][None, :] >> i) & 1) << p
    return codes


@triton.jit
def with_errors(before: tl.tensor, first: tl.tensor, e: tl.tensor) -> tl.tensor:
    """Errors [G / 32, 32, R] with those [32, R] of the chain from input `first` on."""
    if before.shape[0] == 1:
        return before
    chain = tl.arange(0, before.shape[0])[:, None, None]
    return tl.where(chain == first // CHAIN, e[None, :, :], before)


@triton.jit
def with_path(codes: tl.tensor, first: tl.tensor, words: tl.tuple) -> tl.tensor:
    """Packed codes [G / 8, R] with those of a chain's stored planes; a byte's bits are spread to four apart."""
    word = tl.arange(0, codes.shape[0])[:, None]
    planes = multiplied(words)
    packed = tl.zeros_like(codes)
    for p in tl.static_range(len(planes)):
        bits = (planes[p][None, :] >> (word % 4 * 8)) & 0xFF
        bits = (bits | (bits << 12)) & 0x000F000F
        bits = (bits | (bits << 6)) & 0x03030303
        bits = (bits | (bits << 3)) & 0x11111111
        packed |= bits << p
    return tl.where(word // 4 == first // CHAIN, packed, codes)


@triton.jit
def assign_paths(
    c: tl.tuple, W_ptr: tl.tensor, whiten_ptr: tl.tensor, spread_ptr: tl.tensor, g: tl.tensor, N: tl.tensor,
    n: tl.tensor, BITS: tl.constexpr, G: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`chains.assign_chains`: packed codes."""
    R: tl.constexpr = n.shape[0]
    levels = all_levels(c, BITS)
    e = tl.zeros([G // CHAIN, CHAIN, R], tl.float32)
    codes = tl.zeros([G // 8, R], tl.int32)
    for first in range(0, g, CHAIN):
        errors, words, _ = best_path(
            e, levels, first, W_ptr, W_ptr, spread_ptr, G, whiten_ptr, G + 1, g, N, n, BITS, False
        )
        e = with_errors(e, first, errors)
        codes = with_path(codes, first, words)
    return codes
