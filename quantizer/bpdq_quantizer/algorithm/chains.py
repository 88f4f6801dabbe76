"""Codes of trellis-coded planes (`bpdq_kernels.trellis`): in each chain of 32 inputs the best path by Viterbi's
algorithm, for the two steps of the solver that choose codes column by column (`grid`).

What a column's choice does to later ones depends on the choices before it, so that a path's past does not end with its
state: each of the four states goes on with the weights that its own best path has left (per-survivor processing;
Raheli, Polydoros and Tzou, 1995).

Tensors are transposed as in `grid`, inputs in the order of `bpdq_kernels.trellis.chain_order`: a chain is 32 columns
that follow each other, or fewer at a group's end. States are two axes, [2, 2]: a chain's bit of the input before the
last, and of the last.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bpdq_kernels.layout import WORD
from bpdq_kernels.trellis import CODED
from bpdq_quantizer.algorithm.grid import level_table

Step = Callable[[int, Tensor, Tensor], Tensor]  # of input t, what is left of it w and a level, or its error


def assign_chains(W: Tensor, c: Tensor, U: Tensor, bits: int) -> Tensor:
    """As `grid.assign_codes`, whose errors e cost (e / U[t, t])^2, for codes of paths."""
    diagonal = U.diagonal()

    def cost(t: int, w: Tensor, e: Tensor) -> Tensor:
        return (e / diagonal[t]).square()

    return best_paths(W, c, U / diagonal.unsqueeze(1), lambda t, w, level: w - level, cost)[0]


def descend_chains(codes: Tensor, W_hat: Tensor, V: Tensor, H: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """As `grid.descend_group`, a chain at a time; one that no path makes better keeps `codes` [g, N]."""
    diagonal = H.diagonal()

    def cost(t: int, w: Tensor, e: Tensor) -> Tensor:
        return diagonal[t] * e * (e - 2 * (w - W_hat[t]))

    base = W_hat + V / diagonal.unsqueeze(1)
    found, change, costs = best_paths(base, c, H / diagonal, lambda t, w, level: level - W_hat[t], cost)
    better = (costs <= 0).repeat_interleave(WORD, 0)[: len(codes)]
    return torch.where(better, found, codes), change * better


def best_paths(base: Tensor, c: Tensor, spread: Tensor, error: Step, cost: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [g, N], their errors e [g, N] and each chain's costs [ceil(g/32), N].

    e[t] = error(t, w, level) at cost(t, w, e[t]), where w = base[t] - sum over s < t of spread[s, t] e[s]; base [g, N],
    c [k+1, N].
    """
    base, codes, errors, costs = base.clone(), [], [], []
    levels = (level_table(len(c) - 1, c.device) @ c).unflatten(0, (-1, 2, 2))  # [free, z1, z0, N]
    for first in range(0, len(base), WORD):
        chain = slice(first, min(first + WORD, len(base)))
        found, e, total = best_path(base[chain], levels, spread[chain, chain], first, error, cost)
        base[chain.stop :] -= spread[chain, chain.stop :].mT @ e
        codes.append(found)
        errors.append(e)
        costs.append(total)
    return torch.cat(codes), torch.cat(errors), torch.stack(costs)


def best_path(
    base: Tensor, levels: Tensor, spread: Tensor, first: int, error: Step, cost: Step
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one chain, whose first input is `first`: codes [n, N], errors [n, N], costs [N]."""
    left = base.expand(2, 2, *base.shape).clone()  # what each state's best path has left of the weights
    total = torch.full_like(left[:, :, 0], torch.inf)
    total[0, 0] = 0
    steps = []
    for i in range(len(base)):
        w = left[:, :, i]
        level, code = nearest_levels(w, levels)  # [second, last, z1, N]
        e = error(first + i, w.unsqueeze(2), level)
        options = total.unsqueeze(2) + cost(first + i, w.unsqueeze(2), e)
        # a next bit x needs z1 = x where the second bit is 0, and z1 = 1 - x where it is 1
        options, code, e = (torch.stack([x[0], x[1].flip(1)]) for x in (options, code, e))
        total, second = options.min(0)  # [last, x, N], the states that follow
        code, e = (x.gather(0, second.unsqueeze(0))[0] for x in (code, e))
        came = second.unsqueeze(2)
        left = torch.where(came == 1, left[1].unsqueeze(1), left[0].unsqueeze(1))
        left[:, :, i + 1 :] -= spread[i, i + 1 :].view(-1, 1) * e.unsqueeze(2)
        steps.append((second, code, e))
    total, state = total.flatten(0, 1).min(0)
    codes, errors = [], []
    for second, code, e in reversed(steps):
        here = state.unsqueeze(0)
        codes.append(code.flatten(0, 1).gather(0, here)[0])
        errors.append(e.flatten(0, 1).gather(0, here)[0])
        state = 2 * second.flatten(0, 1).gather(0, here)[0] + state // 2
    return torch.stack(codes[::-1]).to(torch.uint8), torch.stack(errors[::-1]), total


def nearest_levels(w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """For w [2, 2, N] of each state, (second, last), and z1 the nearest of the levels [free, z1, z0, N] whose z0 is the
    state's last bit, and its code: [second, last, z1, N] both."""
    reachable = levels.movedim(2, 0).unsqueeze(0)  # [1, last, free, z1, N]
    nearest = (w[:, :, None, None] - reachable).abs().argmin(2, keepdim=True)
    level = reachable.expand(2, -1, -1, -1, -1).gather(2, nearest).squeeze(2)
    z0, z1 = (torch.arange(2, device=w.device).view(shape) for shape in ((1, 2, 1, 1), (1, 1, 2, 1)))
    return level, z0 + 2 * z1 + 2**CODED * nearest.squeeze(2)
