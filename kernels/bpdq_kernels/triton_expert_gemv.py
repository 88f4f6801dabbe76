"""Few tokens' experts on CUDA: y = act(W_e x) for each pair of a token and an expert of its choice, one launch for all.

The arithmetic is that of `triton_gemv`: a block computes some tiles of 16 outputs of one pair. With a gate it has two
tiles, one of the gate's outputs and the same of up, and multiplies them before they are rounded. Blocks of pairs follow
each other, those of tiles come after: what tokens with the same expert read twice is in the L2 cache the second time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels import layout
from bpdq_kernels.activation import Activation
from bpdq_kernels.dispatch import Gemv
from bpdq_kernels.layout import Tiles, cdiv, groups_in_unit
from bpdq_kernels.triton_activation import activate, activate_one, constants
from bpdq_kernels.triton_gemv import dot_tiles
from bpdq_kernels.triton_layout import TILE_ROWS
from bpdq_kernels.warp import prefetch

MANY_COEFFICIENTS = 20  # of a block's tiles in a unit: with as many, 168 registers are too few for some architectures


@triton.jit(do_not_specialize=["E", "choices"], do_not_specialize_on_alignment=["x_ptr", "ids_ptr", "y_ptr"])
def expert_gemv_kernel(
    x_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    planes_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ratios_ptr: tl.tensor,  # None: coefficients in 16 bits
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    E: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride_y: tl.tensor,
    choices: tl.tensor,  # pairs that share a row of x
    PLANES: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    BF16: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE: tl.constexpr,  # UNIT divides K
    GATED: tl.constexpr,  # TILES is 2, and 2 x TILE_ROWS divides N
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
) -> None:
    pair = tl.program_id(0)
    expert = tl.load(ids_ptr + pair)
    if (expert < 0) | (expert >= E):
        return
    expert = expert.to(tl.int64)
    first = tl.program_id(1) * (1 if GATED else TILES)
    stride = N // 2 // TILE_ROWS if GATED else 1
    thread = tl.arange(0, 32 * WARPS)
    scales_ptr += expert * N
    # misses at the end would be waited for
    row = (first + thread // TILE_ROWS * stride) * TILE_ROWS + thread % TILE_ROWS
    prefetch(scales_ptr + row, (thread < TILES * TILE_ROWS) & (row < N))
    y = dot_tiles(
        x_ptr + (pair // choices).to(tl.int64) * K,
        planes_ptr,
        coefficients_ptr,
        ratios_ptr,
        expert * (tl.cdiv(N, 4 * TILE_ROWS) * 4) + first,
        stride,
        K,
        PLANES,
        STORED,
        GROUP,
        BF16,
        TILES,
        WARPS,
        WHOLE,
    )
    s = tl.arange(0, 2 * TILES)[None, :]
    r = tl.arange(0, 8)[:, None]
    row = (first + s // 2 * stride) * TILE_ROWS + s % 2 * 8 + r
    y *= tl.load(scales_ptr + row, row < N, 0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + expert * N + row, row < N, 0).to(tl.float32)
    outputs = N
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(y, [8, 2, 2]), 0, 2, 1))
        y = activate(gate, up, ACTIVATION, ALPHA, LIMIT)
        outputs = N // 2
        row = first * TILE_ROWS + tl.arange(0, 2)[None, :] * 8 + r
    else:
        y = activate_one(y, ACTIVATION)
    tl.store(y_ptr + pair.to(tl.int64) * stride_y + row, y.to(y_ptr.dtype.element_ty), row < outputs)


def options(config: Gemv, planes: int, group_size: int) -> dict[str, int]:
    """Compiler options: registers as for one token, or all where two tiles' coefficients want them."""
    coefficients = config.tiles * groups_in_unit(group_size) * (planes + 1)
    registers = 128 if config.warps == 8 else 168 if coefficients < MANY_COEFFICIENTS else 255
    return {"num_warps": config.warps, "maxnreg": registers, "enable_fp_fusion": True}


def launch(
    x: Tensor,
    ids: Tensor,
    choices: int,
    tiles: Tiles,
    group_size: int,
    bias: Tensor | None,
    activation: Activation | None,
    y: Tensor,
    config: Gemv,
    compile_only: bool = False,
) -> None:
    """Write act(W_e x[p // choices] + bias[e]), e = ids[p], into row p of y; where e is no expert rows stay as is.

    x: [.., K], fp16 or bf16, from a multiple of 4 bytes on, and ids int32 [P], contiguous; tiles: of E experts,
    [E, ..]; bias: [E, N]; y: [P, N], or [P, N/2] with a gate, where 32 divides N; its rows may be apart. activation:
    None for none. `compile_only`: make the kernel and don't run it."""
    experts, out_features = tiles.scales.shape
    in_features = x.shape[1]
    fused = y.shape[1] < out_features
    expert_gemv_kernel.run(
        x,
        ids,
        tiles.planes,
        tiles.pairs,
        tiles.scales,
        tiles.ratio_pairs,
        bias,
        y,
        experts,
        out_features,
        in_features,
        y.stride(0),
        choices,
        PLANES=tiles.multiplied,
        STORED=tiles.stored,
        GROUP=group_size,
        BF16=tiles.dtype == torch.bfloat16,
        TILES=config.tiles,
        WARPS=config.warps,
        WHOLE=in_features % layout.UNIT == 0,
        **constants(activation, fused),
        grid=(ids.numel(), cdiv(y.shape[1], layout.TILE_ROWS * (1 if fused else config.tiles))),
        warmup=compile_only,
        **options(config, tiles.multiplied, group_size),
    )
