"""Column order for quantization: important groups first, important columns first within a group.

Group-aware reordering (GPTQModel's GAR, used by BPDQ section 3): unlike GPTQ's act-order it never moves a column
out of its group, so undoing it at save leaves plain groups and inference pays nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Order(NamedTuple):
    """groups: int64 [..., ceil(K/G)], the stored groups in the order in which to quantize them; columns: int64
    [..., K], the input indices of the first of them, then of the next; sizes: how many inputs the groups have."""

    groups: Tensor
    columns: Tensor
    sizes: list[int]


def group_aware_order(diag_H: Tensor, group_size: int, chain: int = 1) -> Order:
    """diag_H: [..., K]. Groups are sorted by their largest diag(H), columns by diag(H), descending; ties keep the
    natural order. The last group may be short, but not where there are leading axes. chain: of how many columns, side
    by side, the order is kept; it divides G, and K."""
    K = diag_H.shape[-1]
    grouped = pad(diag_H, (0, -K % group_size), value=-torch.inf).unflatten(-1, (-1, group_size))
    groups = grouped.amax(-1).argsort(dim=-1, descending=True, stable=True)
    within = grouped.unflatten(-1, (-1, chain)).amax(-1).argsort(dim=-1, descending=True, stable=True)
    within = (chain * within.unsqueeze(-1) + torch.arange(chain, device=diag_H.device)).flatten(-2)
    columns = within + group_size * torch.arange(grouped.shape[-2], device=diag_H.device).unsqueeze(1)
    columns = torch.take_along_dim(columns, groups.unsqueeze(-1), -2).flatten(-2)
    if K % group_size == 0:
        return Order(groups, columns, [group_size] * grouped.shape[-2])
    sizes = [min(group_size, K - group * group_size) for group in groups.tolist()]
    return Order(groups, columns[columns < K], sizes)


def in_order(x: Tensor, order: Tensor, dim: int) -> Tensor:
    """x [..., *, K, *] with the numbers `order` [..., K] of its axis `dim` < 0, each matrix by its own."""
    if order.ndim == 1:  # moves whole rows, in a quarter of the time
        return x.index_select(dim, order)
    between, after = x.ndim + dim + 1 - order.ndim, -1 - dim
    shape = [order.shape[-1] if i == x.ndim + dim else size for i, size in enumerate(x.shape)]
    index = order.reshape(*order.shape[:-1], *[1] * between, -1, *[1] * after).expand(shape)
    return x.gather(dim, index)  # take_along_dim computes a remainder besides
