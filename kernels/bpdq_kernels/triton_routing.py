"""Which tokens an expert sees, found on the device: pairs (token, one of its experts) in the order of the experts, and
blocks of them. And the sum over a token's experts at the end.

Pair p is choice p % A of token p // A. Nothing here waits for the host: grids are as large as sizes allow, and what
the routing leaves over is marked as empty.

    count   a program per expert: how many pairs chose it
    place   a program per expert: its pairs into `order`, behind those of the experts before it, and its blocks of
            TOKENS pairs into `blocks` [.., 3]: expert, first position in `order`, end of the expert's positions

Each program reads all ids. That needs no atomics and gives the same order every time; 128 experts of 32768 pairs read
16 MB from the L2 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels.layout import cdiv

CHUNK, COLUMNS = 1024, 256  # ids of a program at a time, outputs of a program
WARPS = 4


@triton.jit(do_not_specialize=["pairs"], do_not_specialize_on_alignment=["ids_ptr"])
def count_kernel(ids_ptr: tl.tensor, counts_ptr: tl.tensor, pairs: tl.tensor, CHUNK: tl.constexpr) -> None:
    i = tl.arange(0, CHUNK)
    own = tl.zeros([CHUNK], tl.int32)
    for start in range(0, pairs, CHUNK):
        ids = tl.load(ids_ptr + start + i, start + i < pairs, -1)
        own += (ids == tl.program_id(0)).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(own, 0))


@triton.jit(do_not_specialize=["pairs", "E", "entries"], do_not_specialize_on_alignment=["ids_ptr"])
def place_kernel(
    ids_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    order_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    pairs: tl.tensor,
    E: tl.tensor,
    entries: tl.tensor,  # of `blocks`
    TOKENS: tl.constexpr,
    BINS: tl.constexpr,  # a power of two, E or more
    CHUNK: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    other = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + other, other < E, 0)
    first = tl.sum(tl.where(other < expert, counts, 0), 0)
    count = tl.sum(tl.where(other == expert, counts, 0), 0)
    first_block = tl.sum(tl.where(other < expert, tl.cdiv(counts, TOKENS), 0), 0)
    i = tl.arange(0, CHUNK)
    for start in range(0, tl.cdiv(count, TOKENS), CHUNK):
        entry_ptr = blocks_ptr + (first_block + start + i) * 3
        live = (start + i) * TOKENS < count
        tl.store(entry_ptr, expert, live)
        tl.store(entry_ptr + 1, first + (start + i) * TOKENS, live)
        tl.store(entry_ptr + 2, first + count, live)
    if expert == E - 1:  # the rest is empty
        for start in range(first_block + tl.cdiv(count, TOKENS), entries, CHUNK):
            for field in tl.static_range(3):
                tl.store(blocks_ptr + (start + i) * 3 + field, 0, start + i < entries)
    if count > 0:
        for start in range(0, pairs, CHUNK):
            ids = tl.load(ids_ptr + start + i, start + i < pairs, -1)
            own = (ids == expert).to(tl.int32)
            tl.store(order_ptr + first + tl.cumsum(own, 0) - 1, start + i, ids == expert)
            first += tl.sum(own, 0)


@triton.jit(do_not_specialize=["E"], do_not_specialize_on_alignment=["ids_ptr", "weights_ptr", "y_ptr"])
def combine_kernel(
    outputs_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,  # None: of 1
    y_ptr: tl.tensor,
    E: tl.tensor,
    N: tl.tensor,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.zeros([COLUMNS], tl.float32)
    for choice in tl.static_range(CHOICES):
        pair = token * CHOICES + choice
        expert = tl.load(ids_ptr + pair)
        live = (expert >= 0) & (expert < E)
        weight = 1.0 if weights_ptr is None else tl.load(weights_ptr + pair)
        y += weight * tl.load(outputs_ptr + pair * N + n, n < tl.where(live, N, 0), 0)
    tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), n < N)


def entries(pairs: int, experts: int, tokens: int) -> int:
    """How many blocks of up to `tokens` pairs there can be: each expert that has any fills all but its last."""
    hit = min(pairs, experts)
    return hit + (pairs - hit) // tokens


class Routing(NamedTuple):
    """Memory for what `route` finds: counts [E], order [P], blocks [entries, 3], all int32."""

    counts: Tensor
    order: Tensor
    blocks: Tensor


def new_routing(ids: Tensor, experts: int, tokens: int) -> Routing:
    """For ids [P] int32 and blocks of up to `tokens` pairs."""
    blocks = ids.new_empty(entries(ids.numel(), experts, tokens), 3)
    return Routing(ids.new_empty(experts), torch.empty_like(ids), blocks)


def route(ids: Tensor, routing: Routing, tokens: int, compile_only: bool = False) -> None:
    """Fill `routing`, made for these ids and `tokens`; pairs whose ids are outside [0, E) are in no block."""
    counts, order, blocks = routing
    experts, pairs = len(counts), ids.numel()
    options = {"CHUNK": CHUNK, "grid": (experts,), "warmup": compile_only, "num_warps": WARPS}
    count_kernel.run(ids, counts, pairs, **options)
    bins = triton.next_power_of_2(experts)
    place_kernel.run(ids, counts, order, blocks, pairs, experts, len(blocks), TOKENS=tokens, BINS=bins, **options)


def combine(
    outputs: Tensor, ids: Tensor, weights: Tensor | None, experts: int, y: Tensor, compile_only: bool = False
) -> None:
    """Write the sum over each token's experts of weight times output into y [T, N]: outputs [T A, N] fp32; ids int32
    and weights fp32 [T A]."""
    tokens, n = y.shape
    combine_kernel.run(
        outputs,
        ids,
        weights,
        y,
        experts,
        n,
        CHOICES=len(outputs) // tokens,
        COLUMNS=COLUMNS,
        grid=(tokens, cdiv(n, COLUMNS)),
        warmup=compile_only,
        num_warps=WARPS,
    )
