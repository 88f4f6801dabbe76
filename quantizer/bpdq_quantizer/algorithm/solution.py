"""What the solver returns."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """Quantized rows. codes: uint8 [N, K], bit p is plane p; c: [ceil(K/G), k+1, N] in the stored dtype; loss, energy:
    [N], diag of (W - W_hat) H (W - W_hat)^T and of W H W^T with the undamped H; damping: as used, a scalar in fp64 on
    the CPU; s: the scales [k+1, N] bf16 of int8 c. Those of several matrices have an axis more in front, [E, ...]."""

    codes: Tensor
    c: Tensor
    loss: Tensor
    energy: Tensor
    damping: Tensor
    s: Tensor | None = None

    def of(self, matrix: int) -> "Solution":
        """One of several."""
        return Solution(*(None if tensor is None else tensor[matrix] for tensor in self))


def joined(parts: Sequence[Solution], join: Callable[[Sequence[Tensor]], Tensor]) -> Solution:
    """Solutions of several matrices as one."""
    return Solution(*(None if tensors[0] is None else join(tensors) for tensors in zip(*parts, strict=True)))


def joined_rows(parts: Sequence[Solution]) -> Solution:
    """Solutions of rows of one matrix, or of several matrices each, as that of all."""

    def along(axis: int, name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], axis)

    s = None if parts[0].s is None else along(-1, "s")
    return Solution(along(-2, "codes"), *(along(-1, name) for name in ("c", "loss", "energy")), parts[0].damping, s)
