"""Activations between the two matrices of an expert."""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("silu", "gelu", "gelu_tanh", "swigluoai", "relu2_no_mul", "silu_no_mul", "gelu_no_mul")


class Activation(NamedTuple):
    """What an expert does with the I outputs of its gate and the I of up, or with those of up alone (`*_no_mul`).

    silu, gelu, gelu_tanh   f(gate) * up
    swigluoai               gate * sigmoid(alpha * gate) * (up + 1), as gpt-oss has it
    relu2_no_mul            max(up, 0)^2
    silu_no_mul, gelu_no_mul   f(up)

    limit: with a gate, that is at most the limit and up within +-limit, before anything else.
    """

    name: str
    alpha: float = 1.702
    limit: float = inf

    @property
    def is_gated(self) -> bool:
        return not self.name.endswith("_no_mul")

    def inner(self, outputs: int) -> int:
        """I, of a first matrix with so many outputs."""
        return outputs // 2 if self.is_gated else outputs


def check(activation: Activation) -> None:
    """Raise ValueError for a name that is none of NAMES."""
    if activation.name not in NAMES:
        raise ValueError(f"activation {activation.name!r} is not supported: use one of {', '.join(NAMES)}")


def activate(h: Tensor, activation: Activation) -> Tensor:
    """[.., I] in h's dtype, of h [.., 2I], gate first, or [.., I] where there is no gate."""
    if not activation.is_gated:
        return _FUNCTIONS[activation.name.removesuffix("_no_mul")](h)
    gate, up = h.chunk(2, dim=-1)
    if activation.limit < inf:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if activation.name == "swigluoai":
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    return _FUNCTIONS[activation.name](gate) * up


_FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}
