"""A sweep of coordinate descent over a group on CUDA, in one Triton kernel (`triton_solver`)."""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from bpdq_quantizer.algorithm.triton_grid import level_of, nearest, sorted_grid
from bpdq_quantizer.algorithm.triton_tiles import STAGES, has_whole_rows, matrix_stride, options, tile
from bpdq_quantizer.algorithm.triton_trellis import CHAIN, all_levels, best_path, codes_of, with_errors


@triton.jit(do_not_specialize=["g", "N", "W_hat_matrix", "V_matrix", "H_matrix", "c_matrix", "stride"])
def descend_kernel(
    W_hat_ptr: tl.tensor,
    V_ptr: tl.tensor,
    H_ptr: tl.tensor,
    c_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    change_ptr: tl.tensor,
    g: tl.tensor,
    N: tl.tensor,
    W_hat_matrix: tl.tensor,
    V_matrix: tl.tensor,
    H_matrix: tl.tensor,
    c_matrix: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """X_matrix: from one matrix of a batch to the next; stride: from a row of H to the next."""
    i = tl.arange(0, G)
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = n < N
    e = tl.program_id(1).to(tl.int64)
    W_hat_ptr += e * W_hat_matrix
    V_ptr += e * V_matrix
    H_ptr += e * H_matrix
    c_ptr += e * c_matrix
    codes_ptr += e * g * N
    change_ptr += e * g * N
    c = ()
    for p in tl.static_range(BITS + 1):
        c = c + (tl.load(c_ptr + p * N + n, live, 0.0),)
    midpoints, order = sorted_grid(c, BITS)
    change = tl.zeros([G, R], tl.float32)
    for t in tl.range(0, g, num_stages=STAGES):
        h = tl.load(H_ptr + t * stride + i, i < g, 0.0)
        now = tl.load(W_hat_ptr + t * N + n, live, 0.0)
        gradient = tl.load(V_ptr + t * N + n, live, 0.0) - tl.sum(h[:, None] * change, 0)
        code = nearest(now + gradient / tl.load(H_ptr + t * (stride + 1)), midpoints, order)
        moved = level_of(code, c, BITS) - now
        change = tl.where((i == t)[:, None], moved[None, :], change)
        tl.store(codes_ptr + t * N + n, code.to(tl.uint8), live)
        tl.store(change_ptr + t * N + n, moved, live)


@triton.jit(do_not_specialize=["g", "N", "W_hat_matrix", "V_matrix", "H_matrix", "c_matrix", "paths_matrix", "stride"])
def descend_paths_kernel(
    W_hat_ptr: tl.tensor,
    V_ptr: tl.tensor,
    H_ptr: tl.tensor,
    c_ptr: tl.tensor,
    paths_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    change_ptr: tl.tensor,
    g: tl.tensor,
    N: tl.tensor,
    W_hat_matrix: tl.tensor,
    V_matrix: tl.tensor,
    H_matrix: tl.tensor,
    c_matrix: tl.tensor,
    paths_matrix: tl.tensor,
    stride: tl.tensor,
    BITS: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
) -> None:
    """As `descend_kernel`, from codes `paths`, which a chain keeps that no path makes better."""
    n = tl.program_id(0) * R + tl.arange(0, R)
    live = n < N
    e = tl.program_id(1).to(tl.int64)
    W_hat_ptr += e * W_hat_matrix
    V_ptr += e * V_matrix
    H_ptr += e * H_matrix
    c_ptr += e * c_matrix
    paths_ptr += e * paths_matrix
    codes_ptr += e * g * N
    change_ptr += e * g * N
    c = ()
    for p in tl.static_range(BITS + 1):
        c = c + (tl.load(c_ptr + p * N + n, live, 0.0),)
    levels = all_levels(c, BITS)
    change = tl.zeros([G // CHAIN, CHAIN, R], tl.float32)
    i = tl.arange(0, CHAIN)[:, None]
    for first in range(0, g, CHAIN):
        moved, words, cost = best_path(
            change, levels, first, V_ptr, W_hat_ptr, H_ptr, stride, H_ptr, stride + 1, g, N, n, BITS, True
        )
        better = (cost <= 0)[None, :]
        moved = tl.where(better, moved, 0.0)
        change = with_errors(change, first, moved)
        here = (first + i) * N + n[None, :]
        codes = tl.where(better, codes_of(words), tl.load(paths_ptr + here, live[None, :], 0).to(tl.int32))
        tl.store(codes_ptr + here, codes.to(tl.uint8), live[None, :])
        tl.store(change_ptr + here, moved, live[None, :])


def descend_group(W_hat: Tensor, V: Tensor, H: Tensor, c: Tensor, paths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `groups.descend_group` for a symmetric H and what `supports` allows, in one launch; of one matrix or a batch,
    with an axis in front of all."""
    *batch, g, N = W_hat.shape
    bits, H = c.shape[-2] - 1, H if H.stride(-1) == 1 else H.contiguous()
    by_rows = (W_hat, V, c) if paths is None else (W_hat, V, c, paths)
    W_hat, V, c, *paths = (tensor if has_whole_rows(tensor) else tensor.contiguous() for tensor in by_rows)
    kernel = descend_paths_kernel if paths else descend_kernel
    sizes = tile(bits, g)
    codes, change = W_hat.new_empty(*batch, g, N, dtype=torch.uint8), W_hat.new_empty(*batch, g, N)
    with torch.cuda.device_of(W_hat):
        kernel.run(
            W_hat,
            V,
            H,
            c,
            *paths,
            codes,
            change,
            g,
            N,
            *(matrix_stride(tensor) for tensor in (W_hat, V, H, c, *paths)),
            H.stride(-2),
            BITS=bits,
            **sizes,
            grid=(triton.cdiv(N, sizes["R"]), prod(batch)),
            warmup=False,
            **options(),
        )
    return codes, change
