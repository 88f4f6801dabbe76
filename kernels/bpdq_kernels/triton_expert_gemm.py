"""Experts of many tokens on CUDA: Y = act(X W_e^T) for blocks of pairs with the same expert, one launch for all.

The arithmetic is that of `triton_gemm`: weights are made in registers, never in memory. A block of the grid computes
some tiles of 16 outputs for up to TOKENS pairs: those of an entry of `triton_routing`'s `blocks`, whose rows it gathers
through `order`; or, for few tokens, one pair. Blocks of outputs follow each other, so that the rows, and then the
expert's weights, are in the L2 cache. With a gate a warp has two tiles, one of the gate's outputs and the same of up,
and multiplies them before they are rounded.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels import layout
from bpdq_kernels.activation import Activation
from bpdq_kernels.dispatch import Gemm
from bpdq_kernels.layout import Tiles, cdiv
from bpdq_kernels.triton_activation import activate, activate_one, constants
from bpdq_kernels.triton_gemm import dot_rows, row_of_sum, tile_of_sum, token_of_sum
from bpdq_kernels.triton_layout import TILE_ROWS
from bpdq_kernels.warp import prefetch


@triton.jit(
    do_not_specialize=["E", "choices", "stride_x"], do_not_specialize_on_alignment=["blocks_ptr", "order_ptr", "y_ptr"]
)
def expert_gemm_kernel(
    x_ptr: tl.tensor,
    blocks_ptr: tl.tensor,  # the pairs' experts where there is no order
    order_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ratios_ptr: tl.tensor,  # None: coefficients in 16 bits
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    E: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride_x: tl.tensor,
    stride_y: tl.tensor,
    choices: tl.tensor,  # pairs that share a row of x
    PLANES: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    TOKENS: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
    WHOLE: tl.constexpr,  # UNIT divides K
    GATED: tl.constexpr,  # TILES is 2, and 2 x TILE_ROWS divides N
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    if order_ptr is None:
        first = tl.program_id(1)
        end = first + 1
        expert = tl.load(blocks_ptr + first)
        empty = (expert < 0) | (expert >= E)
    else:
        expert = tl.load(blocks_ptr + tl.program_id(1) * 3)
        first = tl.load(blocks_ptr + tl.program_id(1) * 3 + 1)
        end = tl.load(blocks_ptr + tl.program_id(1) * 3 + 2)
        empty = first >= end
    if empty:
        return
    expert = expert.to(tl.int64)
    TEAMS: tl.constexpr = WARPS // SPLIT
    WARP_TILES: tl.constexpr = 1 if GATED else TILES  # next to each other
    stride = N // 2 // TILE_ROWS if GATED else 1
    outputs = N // 2 if GATED else N
    thread = tl.arange(0, 32 * WARPS)
    first_tile = tl.program_id(0) * (TEAMS * WARP_TILES)
    scales_ptr += expert * N
    # misses at the end would be waited for
    prefetched = first_tile * TILE_ROWS + thread % (TEAMS * WARP_TILES * TILE_ROWS)
    half = thread // (TEAMS * WARP_TILES * TILE_ROWS)
    prefetch(scales_ptr + half * outputs + prefetched, (half * outputs < N) & (prefetched < outputs))
    tile = first_tile + thread // 32 % TEAMS * WARP_TILES
    pairs = ()
    for n in tl.static_range(TOKENS // 8):
        # positions past the end: computed, never stored
        position = tl.minimum(first + n * 8 + thread % 32 // 4, end - 1)
        pairs = pairs + ((position if order_ptr is None else tl.load(order_ptr + position)) // choices,)
    y = dot_rows(
        x_ptr,
        planes_ptr,
        coefficients_ptr,
        ratios_ptr,
        pairs,
        expert * (tl.cdiv(N, 4 * TILE_ROWS) * 4) + tile,
        tile * TILE_ROWS < outputs,
        stride,
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
    tile = first_tile + thread // 32 * WARP_TILES
    row = (tile + tile_of_sum(s, TOKENS) * stride) * TILE_ROWS + row_of_sum(s, thread)
    y *= tl.load(scales_ptr + row, row < N, 0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + expert * N + row, row < N, 0).to(tl.float32)
    if GATED:
        y = tl.reshape(y, [TEAMS * 32, 2, TOKENS // 2])
        gate, up = tl.split(tl.permute(y, 0, 2, 1))
        y = activate(gate, up, ACTIVATION, ALPHA, LIMIT)
        s = tl.arange(0, TOKENS // 2)[None, :]
        row = tile * TILE_ROWS + row_of_sum(s, thread)
    else:
        y = activate_one(y, ACTIVATION)
    position = first + token_of_sum(s, thread, TOKENS)
    live = (position < end) & (row < outputs)
    pair = position if order_ptr is None else tl.load(order_ptr + position, live, 0)
    tl.store(y_ptr + pair.to(tl.int64) * stride_y + row, y.to(y_ptr.dtype.element_ty), live)


def options(config: Gemm, planes: int, coefficient_bits: int) -> dict[str, Any]:
    """Compiler options: registers for three blocks on a multiprocessor, or two where those are too few."""
    many = config.tokens > 16 or planes == 4 or (planes, coefficient_bits) == (3, 16)
    return {"num_warps": config.warps, "maxnreg": 255 if many else 168, "enable_fp_fusion": True}


def launch(
    x: Tensor,
    blocks: Tensor,
    order: Tensor | None,
    choices: int,
    tiles: Tiles,
    group_size: int,
    bias: Tensor | None,
    activation: Activation | None,
    y: Tensor,
    config: Gemm,
    compile_only: bool = False,
) -> None:
    """Write act(W_e x[p // choices] + bias[e]) into row p of y for the pairs p, of expert e, that `blocks` and `order`
    name (`triton_routing.Routing`), or for all of `blocks` [P], their experts, where there is no order. Rows of other
    pairs, and of those whose e is no expert, stay as they are.

    x: [.., K], fp16 or bf16, rows contiguous and 16-byte aligned (8 divides K); tiles: of E experts, [E, ..]; bias:
    [E, N]; y: [P, N], or [P, N/2] with a gate, where 32 divides N; its rows may be apart. activation: None for none.
    `compile_only`: make the kernel and don't run it."""
    experts, out_features = tiles.scales.shape
    in_features = x.shape[1]
    fused = y.shape[1] < out_features
    block_tiles = config.warps // config.split * (1 if fused else config.tiles)
    expert_gemm_kernel.run(
        x,
        blocks,
        order,
        tiles.planes,
        tiles.pairs,
        tiles.scales,
        tiles.ratio_pairs,
        bias,
        y,
        experts,
        out_features,
        in_features,
        x.stride(0),
        y.stride(0),
        choices,
        PLANES=tiles.multiplied,
        STORED=tiles.stored,
        GROUP=group_size,
        BF16=tiles.dtype == torch.bfloat16,
        TOKENS=config.tokens,
        TILES=config.tiles,
        WARPS=config.warps,
        SPLIT=config.split,
        WHOLE=in_features % layout.UNIT == 0,
        **constants(activation, fused),
        grid=(cdiv(cdiv(out_features, 2 if fused else 1), layout.TILE_ROWS * block_tiles), len(blocks)),
        warmup=compile_only,
        **options(config, tiles.multiplied, tiles.coefficient_bits),
    )
