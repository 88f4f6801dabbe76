"""The op `bpdq::linear`, and the three functions that everything above the kernels calls.

All dispatch on device and number of tokens happens inside the op: vLLM traces with a symbolic token count, so
a branch outside would be frozen into the graph.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bpdq_kernels import reference
from bpdq_kernels.layout import GROUP_SIZES, WORD, check_layer, trim


class Packed(NamedTuple):
    """A layer as the kernels want it; build it with `prepare`.

    B: int32 [ceil(K/32), k, N]; c: floating point [ceil(K/G), k+1, N]; group_size: G.
    """

    B: Tensor
    c: Tensor
    group_size: int


_lib = torch.library.Library("bpdq", "DEF")
_lib.define("linear(Tensor x, Tensor B, Tensor c, int group_size, Tensor? bias) -> Tensor")


def _linear_fake(x: Tensor, B: Tensor, c: Tensor, group_size: int, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[2]))


def _linear_cuda(x: Tensor, B: Tensor, c: Tensor, group_size: int, bias: Tensor | None) -> Tensor:
    from bpdq_kernels.triton_linear import bpdq_linear

    return bpdq_linear(x, B, c, group_size, bias)


_lib.impl("linear", reference.linear, "CPU")
_lib.impl("linear", _linear_cuda, "CUDA")
_lib.impl("linear", _linear_fake, "Meta")
_lib.impl("linear", torch.library.fallthrough_kernel, "Autograd")  # no gradient, and no warning where x wants one


def prepare(
    B: Tensor,
    c: Tensor,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Packed:
    """Make a stored layer ready for `linear` on `device`, for activations of `dtype` (fp32, fp16 or bf16).

    B: int32 [ceil(K/32), k, N], padding words allowed; c: [ceil(K/G), k+1, N] in its stored dtype, which is kept:
    weights are computed in fp32 and rounded once to the activations' dtype. K = `in_features`.
    Raises ValueError for a group size or dtype that no kernel takes, and for shapes that don't fit together.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size} is not supported: use one of {GROUP_SIZES}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"activations in {dtype} are not supported: use float32, float16 or bfloat16")
    check_layer(B, c, group_size, in_features)
    return Packed(trim(B, in_features).to(device).contiguous(), c.to(device).contiguous(), group_size)


def linear(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias [N], in x.dtype. Inference only: no gradient flows.

    Raises ValueError where x is not as wide as the layer.
    """
    words = packed.B.shape[0]
    if -(-x.shape[-1] // WORD) != words:
        raise ValueError(
            f"x has {x.shape[-1]} inputs, but the layer has {(words - 1) * WORD + 1} to {words * WORD}: "
            "pass activations as wide as the layer was quantized"
        )
    return torch.ops.bpdq.linear(x, packed.B, packed.c, packed.group_size, bias)
