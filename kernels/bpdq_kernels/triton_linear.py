"""y = x @ W.T + bias on CUDA from B, c and s as stored: a tile is dequantized and multiplied at once, in plain Triton.

Used where no rearranged copy is at hand (transformers, whose models can be saved again) and for fp32 activations;
vLLM's 16-bit path is `tiled_linear`.

A program computes TILE_N outputs of TILE_M tokens and walks the inputs in steps of TILE_K, a divisor of G, so a
step needs one set of coefficients:

                    TILE_K inputs = TILE_K/32 words             TILE_M tokens
                   .------------------------------.            .-----.
      TILE_N       | word t | word t+1 |   ...    |    TILE_K  | x^T |     TILE_N  .-----.
      outputs      |  w = c0 + sum_p c_p * bit_p  |      x     |     |  +=         | acc |
                   '------------------------------'            |     |             '-----'
                    fp32, rounded once to x.dtype              '-----'              fp32

The weights are the 16-row operand of the MMA and the tokens its 8-column one: with few tokens that halves the
tensor-core time. Even and odd inputs are dequantized apart and joined, so that two neighbours meet in one
register as the MMA wants them and weights need not pass through shared memory.

Budget on an RTX 3090 (82 SMs at 1.695 GHz, 936 GB/s) at k = 2, G = 128: a weight is 2.375 bits, 0.044 clocks of
an SM's share of DRAM bandwidth, in which the SM issues 5.6 thread instructions. Up to 8 tokens the loop spends 6.4
per weight (per plane a bit test, an add and a select), so instruction issue takes 1.1 of DRAM time and the tensor
cores 0.7; above 8 tokens the tensor cores, at the rate of fp32 accumulation, are the bound.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels.triton_layout import plane_in_store


class Tile(NamedTuple):
    """Tokens, outputs and inputs of a program's step, with its warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


TILES_16BIT = (Tile(8, 64, 128, 4, 3), Tile(16, 64, 128, 4, 3), Tile(32, 64, 64, 2, 3), Tile(64, 64, 64, 4, 3))
# no tensor cores: fp32 has to stay fp32, but 64 outputs x 64 tokens Triton 3.6 multiplies in TF32 on sm_100
TILES_FP32 = (Tile(8, 64, 32, 4, 2), Tile(64, 32, 32, 8, 2))


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr: tl.tensor,
    B_ptr: tl.tensor,
    c_ptr: tl.tensor,
    s_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    stride_x: tl.tensor,
    PLANES: tl.constexpr,
    STORED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    # 64-bit where tokens x inputs or tokens x outputs can pass 2^31
    m = tl.program_id(0).to(tl.int64) * TILE_M + tl.arange(0, TILE_M)
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    i = tl.arange(0, TILE_K)
    word = tl.arange(0, TILE_K // 32)
    even = (1 << (2 * tl.arange(0, 16)))[None, :, None]
    odd = even << 1
    x_tile = x_ptr + m[None, :] * stride_x + i[:, None]
    B_tile = B_ptr + word[:, None] * STORED * N + n[None, :]
    acc = tl.zeros((TILE_N, TILE_M), tl.float32)
    s = ()
    for p in tl.static_range(PLANES + 1):
        if s_ptr is not None:
            s = s + (tl.load(s_ptr + p * N + n, mask=n < N, other=0).to(tl.float32),)
    for start in range(0, K, TILE_K):
        c_row = c_ptr + start // GROUP * (PLANES + 1) * N + n
        c0 = tl.load(c_row + PLANES * N, mask=n < N, other=0).to(tl.float32)
        if s_ptr is not None:
            c0 *= s[PLANES]
        w_even = c0[None, None, :]
        w_odd = w_even
        live = (n < N)[None, :] & (start + word * 32 < K)[:, None]
        for p in tl.static_range(PLANES):
            c_p = tl.load(c_row + p * N, mask=n < N, other=0).to(tl.float32)
            if s_ptr is not None:
                c_p *= s[p]
            c_p = c_p[None, None, :]
            bits = tl.load(B_tile + plane_in_store(p, PLANES, STORED) * N, mask=live, other=0)
            bits = multiplied_plane(bits, p, PLANES, STORED)[:, None, :]
            w_even = tl.where((bits & even) != 0, w_even + c_p, w_even)
            w_odd = tl.where((bits & odd) != 0, w_odd + c_p, w_odd)
        w = tl.join(w_even.to(x_ptr.dtype.element_ty), w_odd.to(x_ptr.dtype.element_ty))  # [words, 16, N, 2]
        w = w.permute(2, 0, 1, 3).reshape(TILE_N, TILE_K)
        # inputs past K read as 0: whatever bits the last word holds there, finite coefficients make them vanish
        x = tl.load(x_tile, mask=(m < M)[None, :] & (start + i < K)[:, None], other=0)
        if INTERPRETED:  # TRITON_INTERPRET=1 multiplies bf16 as integers: give it the same numbers in fp32
            w = w.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(w, x, acc, input_precision="ieee")
        x_tile += TILE_K
        B_tile += TILE_K // 32 * STORED * N
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    y_tile = y_ptr + m[None, :] * N + n[:, None]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def multiplied_plane(word: tl.tensor, P: tl.constexpr, PLANES: tl.constexpr, STORED: tl.constexpr) -> tl.tensor:
    """As that of `triton_layout`, of words as stored (`bpdq_kernels.trellis.shifted`)."""
    if PLANES == STORED or P > 1:
        return word
    from_even = word & 0x55555555
    if P == 0:
        return (word << 2) | (from_even >> 29)
    return word ^ ((word << 4) | (from_even >> 27))


def tile_for(tokens: int, dtype: torch.dtype) -> Tile:
    """The smallest tile of the table that holds `tokens`, else the largest."""
    tiles = TILES_FP32 if dtype == torch.float32 else TILES_16BIT
    return next((tile for tile in tiles if tile.m >= tokens), tiles[-1])


def options(tile: Tile) -> dict[str, int]:
    """Compiler options. Left to itself, ptxas would rather spill some registers than have fewer blocks at a time; in
    fp32 it spills where it may have more."""
    found = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return found if tile in TILES_FP32 else found | {"maxnreg": 255}


def stored_linear(
    x: Tensor, B: Tensor, c: Tensor, group_size: int, bias: Tensor | None, s: Tensor | None = None
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias [N] in x.dtype (fp32, fp16 or bf16), accumulated in fp32.

    B: int32 [ceil(K/32), k, N], any bit pattern; c: [ceil(K/G), k+1, N] floating point, finite, or int8 with s
    [k+1, N]; of trellis-coded planes c and s have k+2 rows; all contiguous. Raises ValueError where they are not.
    Allocates nothing but y where x has unit stride along K.
    """
    if not all(tensor is None or tensor.is_contiguous() for tensor in (B, c, s)):
        raise ValueError("bit-planes B and coefficients c must be contiguous: build them with bpdq_kernels.prepare")
    in_features, out_features = x.shape[-1], B.shape[2]
    rows = x.reshape(-1, in_features)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    y = x.new_empty((*x.shape[:-1], out_features))
    tokens = rows.shape[0]
    if tokens == 0:
        return y
    with torch.cuda.device_of(x):
        launch(rows, B, c, s, group_size, bias, y.view(-1, out_features), tile_for(tokens, x.dtype))
    return y


def launch(
    x: Tensor,
    B: Tensor,
    c: Tensor,
    s: Tensor | None,
    group_size: int,
    bias: Tensor | None,
    y: Tensor,
    tile: Tile,
    compile_only: bool = False,
) -> None:
    """Write x [M, K] W^T + bias into y [M, N]: x with unit stride along K, all else contiguous.
    `compile_only`: make the kernel and don't run it."""
    (tokens, in_features), out_features = x.shape, y.shape[1]
    linear_kernel.run(
        x,
        B,
        c,
        s,
        bias,
        y,
        tokens,
        out_features,
        in_features,
        x.stride(0),
        PLANES=c.shape[1] - 1,
        STORED=B.shape[1],
        GROUP=group_size,
        TILE_M=tile.m,
        TILE_N=tile.n,
        TILE_K=min(tile.k, group_size),
        INTERPRETED=not isinstance(linear_kernel, triton.JITFunction),
        grid=(triton.cdiv(tokens, tile.m), triton.cdiv(out_features, tile.n)),
        warmup=compile_only,
        **options(tile),
    )
