"""Random bit-planes for benchmarks, with as little to import as a GPU's sanitizer has time for."""

import torch
from torch import Tensor

from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import Stored, coefficient_shape, plane_shape

STD = 0.02  # of coefficients, about a trained model's


def random_planes(
    out_features: int, in_features: int, scheme: Scheme, random: torch.Generator, trellis: bool = False
) -> tuple[Tensor, Tensor]:
    """B and bf16 c of a layer, on the generator's device; trellis: with the coefficients of a trellis."""
    shape = plane_shape(in_features, out_features, scheme.bits)
    B = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=random.device, generator=random)
    shape = coefficient_shape(in_features, out_features, scheme.bits, scheme.group_size, trellis)
    return B, (STD * torch.randn(shape, device=random.device, generator=random)).bfloat16()


def random_layer(
    out_features: int, in_features: int, scheme: Scheme, random: torch.Generator, trellis: bool = False
) -> Stored:
    """A layer on the generator's device: bf16 c, or int8 c with bf16 s whose ratios are powers of two."""
    B, c = random_planes(out_features, in_features, scheme, random, trellis)
    if scheme.coefficient_bits == 16:
        return Stored(B, c)
    exponents = torch.randint(0, 3, c.shape[1:], device=random.device, generator=random)
    s = (STD / 32 * 2.0**-exponents).bfloat16()
    return Stored(B, (c / s).round().clamp(-128, 127).to(torch.int8), s)


def random_experts(
    count: int, out_features: int, in_features: int, scheme: Scheme, random: torch.Generator, trellis: bool = False
) -> Stored:
    """One matrix of each of `count` experts, on the generator's device."""
    layers = [random_layer(out_features, in_features, scheme, random, trellis) for _ in range(count)]
    return Stored(*(None if tensors[0] is None else torch.stack(tensors) for tensors in zip(*layers, strict=True)))
