"""Errors of some outputs made good by others: a Linear's rows solved in turn, against both sides of the Hessian.

To second order an error E [N, K] of a Linear's weight raises the model's loss by tr(G E H E^T) / 2, with H of its
inputs and G = E[g g^T] of the gradients g at its outputs (YAQA, arXiv 2505.22988). Under H alone rows are independent;
under G what the rows solved so far have done wrong moves the target of those to come. With G + d I = R R^T, R upper
triangular in the order in which rows are solved, the loss is a sum over blocks b of rows,

    | R_bb^T E_b + R_db^T E_d |^2    d: the rows solved before b

so that E_b should come close to -R_bb^-T R_db^T E_d: `solver.one_pass` along the outputs, for whole rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bpdq_kernels.layout import coefficients
from bpdq_quantizer.algorithm.hessian import upper_factor
from bpdq_quantizer.algorithm.refine import dequantize_columns
from bpdq_quantizer.algorithm.solution import Solution, joined_rows

CHUNK = 1024  # rows, at most, that know of each other's errors
ROWS = 64  # of each chunk that are solved together, as if independent
DAMPING = 0.03  # of G, as a share of its mean diagonal


class Chunk(NamedTuple):
    """Rows that know of each other's errors. rows [n]: which, those with the largest gradients first; R [n, n]: the
    factor of their G in that order."""

    rows: Tensor
    R: Tensor

    def step(self, first: int) -> Tensor:
        """Which rows are solved together, after `first` others."""
        return self.rows[first : first + ROWS]

    def shift(self, first: int, errors: Tensor) -> Tensor:
        """What the `errors` [N, K] of the first `first` rows add to the targets of the next."""
        block = slice(first, first + ROWS)
        S = self.R[:first, block].T @ errors[self.rows[:first]]
        return torch.linalg.solve_triangular(self.R[block, block].T, S, upper=False)


def solve_in_turn(
    solve: Callable[[Tensor], Solution], covariances: Sequence[Tensor], W: Tensor, group_size: int, apart: bool = False
) -> Solution:
    """Quantize W [N, K] by calls of `solve` for some rows of every chunk, as often as the longest chunk needs.

    covariances: G [n, n] of each chunk of rows, N in all, fp32; apart: a call for each chunk's rows, so that what they
    become does not depend on the others. loss and energy are those of the moved targets, under H alone.
    """
    chunks = chunks_of(covariances)
    errors, found, order = torch.zeros(W.shape, device=W.device), [], []
    for first in range(0, max(map(len, covariances)), ROWS):
        turn = [chunk for chunk in chunks if first < len(chunk.rows)]
        moved = [W[chunk.step(first)] + chunk.shift(first, errors) for chunk in turn]
        rows = torch.cat([chunk.step(first) for chunk in turn])
        solution = joined_rows([solve(part) for part in (moved if apart else [torch.cat(moved)])])
        errors[rows] = W[rows] - approximation(solution, group_size)
        found.append(solution)
        order.append(rows)
    return in_order_of_rows(joined_rows(found), torch.cat(order).argsort())


def steps(rows: int) -> int:
    """Calls of `solve` for so many rows."""
    return -(-min(rows, CHUNK) // ROWS)


def chunks_of(covariances: Sequence[Tensor]) -> list[Chunk]:
    """Chunks of rows that follow each other, from their G [n, n]."""
    chunks, start = [], 0
    for G in covariances:
        order = G.diagonal().argsort(descending=True, stable=True)
        chunks.append(Chunk(start + order, upper_factor(G, order, DAMPING)[0]))
        start += len(G)
    return chunks


def approximation(solution: Solution, group_size: int) -> Tensor:
    """W_hat [N, K] fp32."""
    c = coefficients(solution.c, solution.s)
    return dequantize_columns(solution.codes.T, c, group_size).T


def in_order_of_rows(solution: Solution, order: Tensor) -> Solution:
    """A solution with its rows in this order [N]."""
    s = solution.s if solution.s is None else solution.s[:, order]
    codes, loss, energy = (part[order] for part in (solution.codes, solution.loss, solution.energy))
    return Solution(codes, solution.c[..., order], loss, energy, solution.damping, s)
