"""Experts in 16 bits, one after the other or together: what those in bit-planes are timed against."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


def dense_experts(
    x: Tensor,
    weights: Tensor,
    routes: Iterable[tuple[int, Tensor, Tensor]],
    up: Tensor | Mapping[int, Tensor],
    down: Tensor | Mapping[int, Tensor],
) -> Tensor:
    """y [T, H] of x [T, H] and weights [T, A]; routes: of each expert its tokens, and as which of their choices
    (`bpdq_kernels.experts.routes`); up: [2I, H] of each expert, gate's outputs first; down: [H, I]; SiLU between."""
    y = torch.zeros_like(x)
    for expert, token, choice in routes:
        gate, h = linear(x[token], up[expert]).chunk(2, -1)
        out = linear(silu(gate) * h, down[expert])
        y.index_add_(0, token, out * weights[token, choice, None].to(x.dtype))
    return y


def even_experts(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """[E, R, H] of x [E, R, H], R tokens for each expert, known beforehand: less than any batch with a routing needs.

    up: [E, 2I, H], gate's outputs first; down: [E, H, I]; SiLU between.
    """
    gate, h = torch.bmm(x, up.mT).chunk(2, -1)
    return torch.bmm(silu(gate) * h, down.mT)
