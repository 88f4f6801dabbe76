"""A whole Linear: group after group, with the error of each group propagated to the ones after it (BPDQ, alg. 1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from bpdq_quantizer.grid import quantize_group
from bpdq_quantizer.hessian import inverse_factor
from bpdq_quantizer.order import group_aware_order
from bpdq_quantizer.refine import dequantize_columns, refine

SPREADS = {2: (0.8, 0.6)}  # by k: four levels leave the tails to the outer ones; with more the full range is better


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
    spreads: tuple[float, ...] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    rows: int | None = None,
) -> Solution:
    """Quantize W [N, K] against the Hessian H [K, K] of its inputs (fp32, symmetric, not modified).

    Rows are independent given H, so the rows of several Linears that read the same input may be stacked.
    `spreads`: shares of a group's range that initial grids span, by default SPREADS; every row keeps the best outcome.
    rows: that are solved at a time, by default all.
    The paper's algorithm is `refinements` = 0, `damping` = 0.05, `spreads` = (1,); more rounds go on with
    `bpdq_quantizer.refine`.
    """
    spreads = SPREADS.get(bits, (1.0,)) if spreads is None else spreads
    diagonal = H.diagonal()
    steps = group_aware_order(diagonal, group_size)
    order = torch.cat([columns for _, columns in steps])
    U, damping = inverse_factor(H, order, damping)
    chunks = W.split(rows or len(W))
    found = []
    for chunk in chunks:
        target = used_inputs(chunk, diagonal)
        found.append([one_pass(target, U, steps, bits, iterations, alpha, dtype, spread) for spread in spreads])
    del U
    if refinements:
        damped = H.clone()
        damped.diagonal().add_(damping * diagonal.mean())
        for passes, chunk in zip(found, chunks, strict=True):
            target = used_inputs(chunk, diagonal)
            passes[:] = [refine(*one, target, damped, group_size, refinements, alpha, dtype) for one in passes]
        del damped
    parts = [best_rows(passes, chunk.float().T, H, group_size) for passes, chunk in zip(found, chunks, strict=True)]
    codes, c, loss, energy = (torch.cat(tensors, dim=-1) for tensors in zip(*parts, strict=True))
    return Solution(codes.T.contiguous(), c.to(dtype), loss, energy, damping)


def used_inputs(W: Tensor, diagonal: Tensor) -> Tensor:
    """W [N, K] of any float dtype as fp32 [K, N], zero for dead inputs: those that no calibration token ever used."""
    target = W.to(torch.float32, copy=True).T.contiguous()
    target[diagonal == 0] = 0
    return target


def one_pass(
    target: Tensor,
    U: Tensor,
    steps: list[tuple[int, Tensor]],
    bits: int,
    iterations: int,
    alpha: float,
    dtype: torch.dtype,
    spread: float,
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
        codes[columns], c[group], E = quantize_group(weight[block], U_block, bits, iterations, alpha, dtype, spread)
        weight[stop:].addmm_(U[block, stop:].T, E, alpha=-1)
        start = stop
    return codes, c


def best_rows(
    found: list[tuple[Tensor, Tensor]], target: Tensor, H: Tensor, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each row's codes [K, N] and c [ceil(K/G), k+1, N] from the attempt with its lowest loss, that loss [N], and the
    row's energy [N]."""
    codes, c, loss = None, None, None
    for row_codes, row_c in found:
        error = target - dequantize_columns(row_codes, row_c, group_size)
        row_loss = ((H @ error) * error).sum(0)
        if loss is None:
            codes, c, loss = row_codes, row_c, row_loss
        else:
            better = row_loss < loss
            codes, c = torch.where(better, row_codes, codes), torch.where(better, row_c, c)
            loss = torch.where(better, row_loss, loss)
    return codes, c, loss, ((H @ target) * target).sum(0)
