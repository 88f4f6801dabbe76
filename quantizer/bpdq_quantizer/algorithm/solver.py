"""A whole Linear: group after group, with the error of each group propagated to the ones after it (BPDQ, alg. 1)."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bpdq_quantizer.algorithm.grid import Start, range_start, residual_start
from bpdq_quantizer.algorithm.groups import quantize_group
from bpdq_quantizer.algorithm.hessian import live_mean, upper_factor
from bpdq_quantizer.algorithm.order import group_aware_order
from bpdq_quantizer.algorithm.refine import dequantize_columns, refine
from bpdq_quantizer.algorithm.rounding import stored_coefficients

STARTS = (range_start, residual_start)


class Solution(NamedTuple):
    """Quantized rows. codes: uint8 [N, K], bit p is plane p; c: [ceil(K/G), k+1, N] in the stored dtype; loss, energy:
    [N], diag of (W - W_hat) H (W - W_hat)^T and of W H W^T with the undamped H; damping: as used; s: the scales
    [k+1, N] bf16 of int8 c."""

    codes: Tensor
    c: Tensor
    loss: Tensor
    energy: Tensor
    damping: float
    s: Tensor | None = None


# W [N, K], H [K, K], bits, group_size, coefficient_bits: `quantize_linear` with its options decided, here or elsewhere
# (`run.workers`)
Solve = Callable[[Tensor, Tensor, int, int, int], Solution]


def quantize_linear(
    W: Tensor,
    H: Tensor,
    bits: int,
    group_size: int,
    coefficient_bits: int = 16,
    *,
    iterations: int = 10,
    refinements: int = 2,
    alpha: float = 1e-6,
    damping: float = 0.01,
    starts: Sequence[Start] = STARTS,
    dtype: torch.dtype = torch.bfloat16,
    rows: int | None = None,
) -> Solution:
    """Quantize W [N, K] against the Hessian H [K, K] of its inputs (fp32, symmetric, not modified).

    Rows are independent given H, so the rows of several Linears that read the same input may be stacked.
    `starts`: initial grids of a group, of which every row keeps the one with the best outcome; rows: that are solved at
    a time, by default all. The paper's algorithm is `refinements` = 0, `damping` = 0.05, `starts` = (paper_start,);
    more rounds go on with `algorithm.refine`. dtype: of coefficients in 16 bits. Those in 8 are first rounded in the
    joint fit: rounded in the pass, they cost 0.3 (k = 2) to 1.3 % (k = 4) of the refined loss.
    """
    diagonal = H.diagonal()
    steps = group_aware_order(diagonal, group_size)
    order = torch.cat([columns for _, columns in steps])
    R, damping = upper_factor(H, order, damping)
    chunks = W.split(rows or len(W))
    targets = (used_inputs(chunk, diagonal) for chunk in chunks)  # one at a time in memory
    eight = coefficient_bits == 8
    first, last = (torch.float32, torch.int8) if eight else (dtype, dtype)
    found = [one_pass(target, R, steps, bits, iterations, alpha, first, starts) for target in targets]
    del R
    damped, d = H.clone(), damping * live_mean(diagonal)
    damped.diagonal().add_(d)
    energies = []
    for i, chunk in enumerate(chunks):
        target = used_inputs(chunk, diagonal)
        HW = damped @ target
        energies.append((HW * target).sum(0) - d * target.square().sum(0))
        codes, c, loss, s = refine(*found[i], target, HW, damped, group_size, refinements, alpha, last)
        found[i] = codes, c, undamped(loss, d, target, codes, c, group_size), s
    codes, c, loss, s = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    s = s if eight else None
    c = stored_coefficients(c, s, last)
    return Solution(codes.T.contiguous(), c, loss, torch.cat(energies), damping, s.bfloat16() if eight else None)


def used_inputs(W: Tensor, diagonal: Tensor) -> Tensor:
    """W [N, K] of any float dtype as fp32 [K, N], zero for dead inputs: those that no calibration token ever used."""
    target = W.to(torch.float32, copy=True).T.contiguous()
    return target.masked_fill_((diagonal == 0).unsqueeze(1), 0)


def one_pass(
    target: Tensor,
    R: Tensor,
    steps: list[tuple[int, Tensor]],
    bits: int,
    iterations: int,
    alpha: float,
    dtype: torch.dtype,
    starts: Sequence[Start],
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [K, N], c [ceil(K/G), k+1, N] and loss [N] of target [K, N] under R R^T: group after group in the order of
    `steps`, which is that of R [K, K].

    The loss is |R^T D|^2 for errors D = W - W_hat. In a group that is |R_gg^T (W + R_gg^-T S - W_hat)|^2, where S is
    what the errors of the groups before add to the group's coordinates.
    """
    errors = target[torch.cat([columns for _, columns in steps])]  # the weights of groups to come
    codes, coefficients, norms = [], {}, []
    blocks = diagonal_blocks(R, [len(columns) for _, columns in steps])
    start = 0
    for (group, columns), U in zip(steps, blocks, strict=True):
        block = slice(start, start + len(columns))
        S = R[:start, block].T @ errors[:start]
        weight = torch.addmm(errors[block], U.T, S)
        code, coefficients[group], E = quantize_group(weight, U, bits, iterations, alpha, dtype, starts)
        codes.append(code)
        norms.append(torch.linalg.vector_norm(E, dim=0))
        torch.mm(U.T, E - S, out=errors[block])
        start = block.stop
    del errors
    natural = torch.cat([columns for _, columns in steps]).argsort()
    loss = torch.stack(norms).square().sum(0)
    return torch.cat(codes)[natural], torch.stack([coefficients[group] for group in range(len(steps))]), loss


def diagonal_blocks(R: Tensor, sizes: list[int]) -> list[Tensor]:
    """The inverses [g, g] of R's diagonal blocks of these sizes; those of one size in one operation."""
    starts = [0, *itertools.accumulate(sizes)]
    blocks = [R[start:stop, start:stop] for start, stop in itertools.pairwise(starts)]
    inverses = {}
    for size in set(sizes):
        alike = torch.stack([block for block in blocks if len(block) == size])
        inverse = torch.linalg.solve_triangular(alike, torch.eye(size, device=R.device), upper=True)
        inverses[size] = iter(inverse.unbind())
    return [next(inverses[size]) for size in sizes]


def undamped(loss: Tensor, d: Tensor, W: Tensor, codes: Tensor, c: Tensor, group_size: int) -> Tensor:
    """What `loss` [N], that of W [K, N] under H + d I, is under H."""
    error = W - dequantize_columns(codes, c, group_size)
    return (loss - d * error.square().sum(0)).clamp(min=0)
