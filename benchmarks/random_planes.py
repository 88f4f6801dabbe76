"""Random bit-planes for benchmarks, with as little to import as a GPU's sanitizer has time for."""

import torch
from torch import Tensor

from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import coefficient_shape, plane_shape

STD = 0.02  # of coefficients, about a trained model's


def random_planes(
    out_features: int, in_features: int, scheme: Scheme, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """B and bf16 c of a layer, on the generator's device."""
    shape = plane_shape(in_features, out_features, scheme.bits)
    B = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=random.device, generator=random)
    shape = coefficient_shape(in_features, out_features, scheme.bits, scheme.group_size)
    return B, (STD * torch.randn(shape, device=random.device, generator=random)).bfloat16()
