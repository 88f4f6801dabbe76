"""The solver's loops over columns on CUDA: a group in one Triton kernel, a sweep of descent over a group in another
(`triton_descent`).

Same signatures and, but for the order of sums in fp32, same results as `groups.quantize_group` and
`groups.descend_group` in torch (`grid`, `chains`), which is the readable form. Rows are independent, so a warp takes R
of them through all starts, k-means, iterations and fits on its own, with nothing to wait for but its own shuffles:

                     R rows = 512 / G                          a thread holds 16 values of one row of
                    .--------.                                   e     what assignment left of the inputs before t
           input 0  |        |  lanes along rows first,          V X   a tile for each of k planes
             ..     |  tile  |  the other lanes and the          S, V  column t of the factors, in the thread's inputs
            G - 1   |        |  registers along inputs         and the levels, coefficients and codes (4 bits each)
                    '--------'

Step t of an assignment: the weight of input t less S[:, t] . e, its nearest level, then e[t] and V X += V[:, t] x, so
that the fit finds V X done. With a trellis a second loop adds it up, when all paths are known (`triton_trellis`). G is
g rounded up to a power of two, at least 32: the factors are zero past g. With four planes R is half as much, else
registers spill. S = U / diag(U) and V = U^-T come from a kernel that is launched before, transposed, so that column t
is contiguous. Matrices of a batch are the grid's second axis, each with factors of its own.
"""

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels.layout import WORD
from bpdq_kernels.trellis import CODED
from bpdq_quantizer.algorithm.grid import Start, paper_start, range_start, residual_start
from bpdq_quantizer.algorithm.triton_descent import descend_group
from bpdq_quantizer.algorithm.triton_grid import (
    DTYPES,
    clustered,
    fit,
    level_of,
    nearest,
    range_planes,
    residual_planes,
    sorted_grid,
)
from bpdq_quantizer.algorithm.triton_tiles import (
    STAGES,
    add_planes,
    code_at,
    matrix_stride,
    options,
    tile,
    with_code,
    zeros,
)
from bpdq_quantizer.algorithm.triton_trellis import assign_paths

__all__ = ["descend_group", "quantize_group", "supports"]

MAX_BITS = 4
MAX_INPUTS = 256
STARTS: dict[Start, int] = {paper_start: 0, range_start: 1, residual_start: 2}

_PAPER = tl.constexpr(STARTS[paper_start])
_RANGE = tl.constexpr(STARTS[range_start])
_RESIDUAL = tl.constexpr(STARTS[residual_start])


@triton.jit
def start_codes(
    kind: tl.tensor, W_ptr: tl.tensor, whiten_ptr: tl.tensor, g: tl.tensor, N: tl.tensor, n: tl.tensor,
    BITS: tl.constexpr, G: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Codes [G, R] of a start."""
    i = tl.arange(0, G)
    inside = (i < g)[:, None]
    # volatile, here and below: hoisted out of the loops, what is loaded would fill the registers
    W = tl.load(W_ptr + i[:, None] * N + n[None, :], inside & (n < N)[None, :], 0.0, volatile=True)
    if kind == _RESIDUAL:
        codes = residual_planes(W, inside, g, BITS)
    else:
        codes = range_planes(W, tl.where((kind == _RANGE) & (BITS == 2), 0.8, 1.0), BITS)
    if kind != _PAPER:
        weights = tl.load(whiten_ptr + i * (G + 1), volatile=True)  # 1 / U[i, i], the diagonal of V
        codes = clustered(codes, W, tl.broadcast_to(weights[:, None], W.shape), BITS)
    return codes


@triton.jit
def whitened_planes(
    tile: tl.tensor, whiten_ptr: tl.tensor, g: tl.tensor, BITS: tl.constexpr, G: tl.constexpr
) -> tl.tuple:
    """Codes [G, R] packed, and V X of them."""
    i = tl.arange(0, G)
    word = tl.arange(0, G // 8)
    codes = tl.zeros([G // 8, tile.shape[1]], tl.int32)
    VX = zeros(G, tile.shape[1], BITS)
    for t in tl.range(0, g, num_stages=STAGES):
        v = tl.load(whiten_ptr + t * G + i)
        code = tl.sum(tl.where((i == t)[:, None], tile, 0), 0)
        codes = with_code(codes, word, t, code)
        VX = add_planes(VX, v, code, BITS)
    return codes, VX


@triton.jit
def assign(
    c: tl.tuple, W_ptr: tl.tensor, whiten_ptr: tl.tensor, spread_ptr: tl.tensor, g: tl.tensor, N: tl.tensor,
    n: tl.tensor, BITS: tl.constexpr, G: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """`grid.assign_codes`: packed codes, and V X of them."""
    R: tl.constexpr = n.shape[0]
    i = tl.arange(0, G)
    word = tl.arange(0, G // 8)
    midpoints, order = sorted_grid(c, BITS)
    e = tl.zeros([G, R], tl.float32)
    codes = tl.zeros([G // 8, R], tl.int32)
    VX = zeros(G, R, BITS)
    for t in tl.range(0, g, num_stages=STAGES):
        s = tl.load(spread_ptr + t * G + i)
        v = tl.load(whiten_ptr + t * G + i)
        w = tl.load(W_ptr + t * N + n, n < N, 0.0) - tl.sum(s[:, None] * e, 0)
        code = nearest(w, midpoints, order)
        left = w - level_of(code, c, BITS)
        e = tl.where((i == t)[:, None], left[None, :], e)
        codes = with_code(codes, word, t, code)
        VX = add_planes(VX, v, code, BITS)
    return codes, VX


@triton.jit
def whitened(
    codes: tl.tensor, whiten_ptr: tl.tensor, g: tl.tensor, BITS: tl.constexpr, G: tl.constexpr
) -> tl.tuple:  # fmt: skip
    """V X of packed codes."""
    VX = zeros(G, codes.shape[1], BITS)
    for t in tl.range(0, g, num_stages=STAGES):
        v = tl.load(whiten_ptr + t * G + tl.arange(0, G))
        VX = add_planes(VX, v, code_at(t, codes), BITS)
    return VX


@triton.jit
def loss_of(VW: tl.tensor, features: tl.tuple, c: tl.tuple, BITS: tl.constexpr) -> tl.tensor:
    E = VW
    for p in tl.static_range(BITS + 1):
        E -= features[p] * c[p][None, :]
    return tl.sum(E * E, 0)


@triton.jit(do_not_specialize=["g", "N", "iterations", "starts", "count", "alpha"])
def quantize_kernel(
    W_ptr: tl.tensor,
    VW_ptr: tl.tensor,
    whiten_ptr: tl.tensor,
    spread_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    c_ptr: tl.tensor,
    E_ptr: tl.tensor,
    g: tl.tensor,
    N: tl.tensor,
    iterations: tl.tensor,
    starts: tl.tensor,
    count: tl.tensor,
    alpha: tl.tensor,
    BITS: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    DTYPE: tl.constexpr,
    TRELLIS: tl.constexpr,
) -> None:
    i = tl.arange(0, G)
    n = tl.program_id(0) * R + tl.arange(0, R)
    e = tl.program_id(1).to(tl.int64)
    W_ptr += e * g * N
    VW_ptr += e * g * N
    whiten_ptr += e * (G + 1) * G
    spread_ptr += e * G * G
    codes_ptr += e * g * N
    c_ptr += e * (BITS + 1) * N
    E_ptr += e * g * N
    tile = i[:, None] * N + n[None, :]
    inside = (i < g)[:, None] & (n < N)[None, :]
    best_loss = tl.full([R], float("inf"), tl.float32)
    best = tl.zeros([G // 8, R], tl.int32)
    best_c = ()
    for _ in tl.static_range(BITS + 1):
        best_c = best_c + (tl.full([R], float("nan"), tl.float32),)  # if no loss is finite
    for s in range(count):
        tile_codes = start_codes((starts >> (2 * s)) & 3, W_ptr, whiten_ptr, g, N, n, BITS, G)
        codes, VX = whitened_planes(tile_codes, whiten_ptr, g, BITS, G)
        ones = tl.broadcast_to(tl.load(whiten_ptr + G * G + i, volatile=True)[:, None], [G, R])
        VW = tl.load(VW_ptr + tile, inside, 0.0, volatile=True)
        c = fit(VX + (ones,), VW, alpha, BITS, DTYPE)
        left = iterations
        while left > 0:
            if TRELLIS:
                new_codes = assign_paths(c, W_ptr, whiten_ptr, spread_ptr, g, N, n, BITS, G)
                VX = whitened(new_codes, whiten_ptr, g, BITS, G)
            else:
                new_codes, VX = assign(c, W_ptr, whiten_ptr, spread_ptr, g, N, n, BITS, G)
            ones = tl.broadcast_to(tl.load(whiten_ptr + G * G + i, volatile=True)[:, None], [G, R])
            VW = tl.load(VW_ptr + tile, inside, 0.0, volatile=True)
            c = fit(VX + (ones,), VW, alpha, BITS, DTYPE)
            loss = loss_of(VW, VX + (ones,), c, BITS)
            better = loss < best_loss
            best_loss = tl.where(better, loss, best_loss)
            best = tl.where(better[None, :], new_codes, best)
            kept = ()
            for p in tl.static_range(BITS + 1):
                kept = kept + (tl.where(better, c[p], best_c[p]),)
            best_c = kept
            moved = tl.max(tl.max((new_codes != codes).to(tl.int32), 0), 0)
            codes = new_codes
            left = tl.where(moved != 0, left - 1, 0)  # all rows are at a fixed point
    E = tl.zeros([G, R], tl.float32)
    for t in tl.range(0, g, num_stages=STAGES):
        v = tl.load(whiten_ptr + t * G + i)
        code = code_at(t, best)
        error = tl.load(W_ptr + t * N + n, n < N, 0.0) - level_of(code, best_c, BITS)
        E += v[:, None] * error[None, :]
        tl.store(codes_ptr + t * N + n, code.to(tl.uint8), n < N)
    tl.store(E_ptr + tile, E, inside)
    for p in tl.static_range(BITS + 1):
        tl.store(c_ptr + p * N + n, best_c[p], n < N)


@triton.jit(do_not_specialize=["g", "matrix", "row", "column"])
def factor_kernel(
    U_ptr: tl.tensor,
    whiten_ptr: tl.tensor,
    spread_ptr: tl.tensor,
    g: tl.tensor,
    matrix: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    G: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """R columns of V = U^-T and of S, each contiguous; column G of V: its rows' sums. matrix, row, column: strides of
    U."""
    i = tl.arange(0, G)
    t = tl.program_id(0) * R + tl.arange(0, R)
    e = tl.program_id(1).to(tl.int64)
    U_ptr += e * matrix
    whiten_ptr += e * (G + 1) * G
    spread_ptr += e * G * G
    one = (i[:, None] == t[None, :]) | (t == G)[None, :]
    x = tl.where(one & (i < g)[:, None], 1.0, 0.0)
    for j in tl.range(0, g, num_stages=STAGES):  # U^T x = one, forwards
        pivot = tl.load(U_ptr + j * (row + column))
        u = tl.load(U_ptr + j * row + i * column, (i > j) & (i < g), 0.0)
        here = (i == j)[:, None]
        value = tl.sum(tl.where(here, x, 0.0), 0) / pivot
        x = tl.where(here, value[None, :], x - u[:, None] * value[None, :])
    to = t[None, :] * G + i[:, None]
    tl.store(whiten_ptr + to, x, (t <= G)[None, :])
    pivots = tl.load(U_ptr + i * (row + column), i < g, 1.0)
    before = (i[:, None] < t[None, :]) & (t < g)[None, :]
    u = tl.load(U_ptr + i[:, None] * row + t[None, :] * column, before, 0.0)
    tl.store(spread_ptr + to, u / pivots[:, None], (t < G)[None, :])


def supports(bits: int, inputs: int, starts: Sequence[Start] = (), trellis: bool = False) -> bool:
    """Whether there are kernels for groups of that many inputs."""
    if trellis and (bits < CODED or inputs % WORD):
        return False
    return bits <= MAX_BITS and inputs <= MAX_INPUTS and all(start in STARTS for start in starts)


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
    """As `groups.quantize_group`, for what `supports` allows, in 3 launches; of one matrix or a batch, W [E, g, N] with
    U [E, g, g]."""
    *batch, g, N = W.shape
    W, sizes = W.contiguous(), tile(bits, g)
    G, R = sizes["G"], sizes["R"]
    whiten, spread = W.new_empty(*batch, G + 1, G), W.new_empty(*batch, G, G)
    codes, c = W.new_empty(*batch, g, N, dtype=torch.uint8), W.new_empty(*batch, bits + 1, N)
    E, matrices = torch.empty_like(W), prod(batch)
    kinds = sum(STARTS[start] << (2 * i) for i, start in enumerate(starts))
    with torch.cuda.device_of(W):
        factor_kernel.run(
            U,
            whiten,
            spread,
            g,
            matrix_stride(U),
            *U.stride()[-2:],
            **sizes,
            grid=(triton.cdiv(G + 1, R), matrices),
            warmup=False,
            **options(),
        )
        VW = whiten[..., :g, :g].mT @ W
        quantize_kernel.run(
            W,
            VW,
            whiten,
            spread,
            codes,
            c,
            E,
            g,
            N,
            iterations,
            kinds,
            len(starts),
            alpha,
            BITS=bits,
            **sizes,
            DTYPE=DTYPES[dtype],
            TRELLIS=trellis,
            grid=(triton.cdiv(N, R), matrices),
            warmup=False,
            **options(all_registers=trellis),
        )
    return codes, c, E
