"""Column order for quantization: important groups first, important columns first within a group.

Group-aware reordering (GPTQModel's GAR, used by BPDQ section 3): unlike GPTQ's act-order it never moves a column
out of its group, so undoing it at save leaves plain groups and inference pays nothing.
"""

import torch
from torch import Tensor


def group_aware_order(diag_H: Tensor, group_size: int) -> list[tuple[int, Tensor]]:
    """Groups in the order in which to quantize them, each with its columns.

    diag_H: [K]. Returns (group, columns) pairs: `group` indexes the stored groups, `columns` (int64, at most G)
    are that group's input indices. Groups are sorted by their largest diag(H), columns by diag(H), descending;
    ties keep the natural order. The last group may be short.
    """
    groups = diag_H.split(group_size)
    importance = torch.stack([g.max() for g in groups])
    order = importance.argsort(descending=True, stable=True).tolist()
    return [(g, g * group_size + groups[g].argsort(descending=True, stable=True)) for g in order]
