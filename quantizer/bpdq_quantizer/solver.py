"""A whole Linear: group after group, with the error of each group propagated to the ones after it (BPDQ, alg. 1)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bpdq_quantizer.grid import Start, quantize_group, range_start, residual_start
from bpdq_quantizer.hessian import inverse_factor
from bpdq_quantizer.order import group_aware_order
from bpdq_quantizer.refine import dequantize_columns, refine

STARTS = (range_start, residual_start)


class Solution(NamedTuple):
    """Quantized rows. codes: uint8 [N, K], bit p is plane p; c: [ceil(K/G), k+1, N] in the stored dtype;
    loss, energy: [N], diag of (W - W_hat) H (W - W_hat)^T and of W H W^T with the undamped H; damping: as used."""

    codes: Tensor
    c: Tensor
    loss: Tensor
    energy: Tensor
    damping: float


def quantize_linear(
    W: Tensor,
    H: Tensor,
    bits: int,
    group_size: int,
    *,
    iterations: int = 10,
    refinements: int = 2,
    alpha: float = 1e-6,
    damping: float = 0.01,
    starts: Sequence[Start] = STARTS,
    dtype: torch.dtype = torch.bfloat16,
) -> Solution:
    """Quantize W [N, K] against the Hessian H [K, K] of its inputs (fp32, symmetric, not modified).

    Rows are independent given H, so the rows of several Linears that read the same input may be stacked.
    `starts`: initial grids of a group, of which every row keeps the one with the best outcome. The paper's algorithm
    is `refinements` = 0, `damping` = 0.05, `starts` = (paper_start,); more rounds go on with `bpdq_quantizer.refine`.
    """
    target = W.to(torch.float32, copy=True).T.contiguous()  # [K, N]
    diagonal = H.diagonal()
    target[diagonal == 0] = 0  # dead inputs: no calibration token ever used them
    steps = group_aware_order(diagonal, group_size)
    order = torch.cat([columns for _, columns in steps])
    U, damping = inverse_factor(H, order, damping)
    codes, c = one_pass(target, U, steps, bits, iterations, alpha, dtype, starts)
    del U
    if refinements:
        damped = H.clone()
        damped.diagonal().add_(damping * diagonal.mean())
        codes, c = refine(codes, c, target, damped, group_size, refinements, alpha, dtype)
        del damped
    target = W.to(torch.float32).T
    error = target - dequantize_columns(codes, c, group_size)
    loss, energy = (((H @ x) * x).sum(0) for x in (error, target))
    return Solution(codes.T.contiguous(), c.to(dtype), loss, energy, damping)


def one_pass(
    target: Tensor,
    U: Tensor,
    steps: list[tuple[int, Tensor]],
    bits: int,
    iterations: int,
    alpha: float,
    dtype: torch.dtype,
    starts: Sequence[Start],
) -> tuple[Tensor, Tensor]:
    """Codes [K, N] and c [ceil(K/G), k+1, N] of target [K, N]: group after group in the order of `steps`."""
    weight = target[torch.cat([columns for _, columns in steps])]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=target.device)
    c = torch.empty(len(steps), bits + 1, weight.shape[1], device=target.device)
    start = 0
    for group, columns in steps:
        stop = start + len(columns)
        block = slice(start, stop)
        U_block = U[block, block]
        codes[columns], c[group], E = quantize_group(weight[block], U_block, bits, iterations, alpha, dtype, starts)
        weight[stop:].addmm_(U[block, stop:].T, E, alpha=-1)
        start = stop
    return codes, c
