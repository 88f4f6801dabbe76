"""One token without tensor cores: the alternative that `kernel_bench` times the one-token kernels against.

Weights are dequantized in fp32 and multiplied by FFMA, straight from the stored layout; a program takes TILE_N outputs
and walks the inputs a group of 128 (or G) at a time.
"""

import triton
import triton.language as tl
from torch import Tensor

TILE_N, WARPS = 32, 8


@triton.jit
def cuda_core_kernel(
    x_ptr: tl.tensor,
    B_ptr: tl.tensor,
    c_ptr: tl.tensor,
    s_ptr: tl.tensor,
    y_ptr: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    PLANES: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    TILE_N: tl.constexpr,
) -> None:
    n = (tl.program_id(0) * TILE_N + tl.arange(0, TILE_N))[None, None, :]
    word = tl.arange(0, WORDS)[:, None, None]
    bit = tl.arange(0, 32)[None, :, None]
    acc = tl.zeros([WORDS, 32, TILE_N], tl.float32)
    for start in range(0, tl.cdiv(K, 32), WORDS):
        live = (start + word < tl.cdiv(K, 32)) & (n < N)
        c_row = c_ptr + ((start + word) * 32 // GROUP).to(tl.int64) * ((PLANES + 1) * N) + n
        w = coefficient(c_row, s_ptr, n, live, PLANES, N) + tl.zeros([WORDS, 32, TILE_N], tl.float32)
        for p in tl.static_range(PLANES):
            words = tl.load(B_ptr + ((start + word) * PLANES + p).to(tl.int64) * N + n, live, 0)
            w += tl.where((words >> bit) & 1 != 0, coefficient(c_row, s_ptr, n, live, p, N), 0)
        i = (start + word) * 32 + bit
        acc += w * tl.load(x_ptr + i, i < K, 0).to(tl.float32)
    y = tl.sum(tl.sum(acc, 0), 0)
    out = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), out < N)


@triton.jit
def coefficient(
    c_row: tl.tensor, s_ptr: tl.tensor, n: tl.tensor, live: tl.tensor, P: tl.constexpr, N: tl.tensor
) -> tl.tensor:
    c = tl.load(c_row + P * N, live, 0).to(tl.float32)
    if s_ptr is not None:
        c *= tl.load(s_ptr + P * N + n, live, 0).to(tl.float32)
    return c


def cuda_core_linear(x: Tensor, B: Tensor, c: Tensor, group_size: int, s: Tensor | None = None) -> Tensor:
    """y [1, N] = x [1, K] @ W.T for B, c and s as stored (`bpdq_kernels.layout`), x contiguous, fp16 or bf16."""
    y = x.new_empty(1, B.shape[2])
    cuda_core_kernel[(triton.cdiv(B.shape[2], TILE_N),)](
        x,
        B,
        c,
        s,
        y,
        B.shape[2],
        x.shape[1],
        PLANES=B.shape[1],
        GROUP=group_size,
        WORDS=min(4, group_size // 32),
        TILE_N=TILE_N,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return y
