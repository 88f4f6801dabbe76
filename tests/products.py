"""Layers of random bit-planes, and what a product of activations with one may differ by."""

import torch

from bpdq_kernels import layout


def random_layer(
    k: int,
    group: int,
    n: int,
    in_features: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    trellis: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """B of any bit pattern, past K too, and random coefficients."""
    generator = torch.Generator().manual_seed(seed)
    shape = layout.plane_shape(in_features, n, k)
    B = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    shape = layout.coefficient_shape(in_features, n, k, group, trellis)
    return B, torch.randn(shape, generator=generator).to(dtype)


def random_stored(
    k: int, group: int, n: int, in_features: int, dtype: torch.dtype, seed: int = 0, trellis: bool = False
) -> layout.Stored:
    """As `random_layer`, with coefficients in `dtype`; in int8 with scales in bf16."""
    if dtype != torch.int8:
        return layout.Stored(*random_layer(k, group, n, in_features, dtype, seed, trellis))
    B, c = random_layer(k, group, n, in_features, torch.float32, seed, trellis)
    generator = torch.Generator().manual_seed(seed + 1)
    s = (torch.rand(k + trellis + 1, n, generator=generator) / 40).bfloat16()
    return layout.Stored(B, (40 * c).round().clamp(-128, 127).to(torch.int8), s)


def assert_product(
    y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None = None, rounded: bool = False
) -> None:
    """y is x @ W.T + bias in x.dtype, with W [N, K] fp32 exact or rounded to x.dtype, and sums in fp32.

    rounded: inputs may be off by 2^-15 of the most that four neighbours have together, each in its own direction.
    """
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], W.shape[0])
    b = 0 if bias is None else bias.double()
    magnitude = x.double().abs()
    allowed = 4e-7 * magnitude.sum(-1, keepdim=True)
    if rounded:
        four = torch.nn.functional.pad(magnitude, (0, -x.shape[-1] % 4)).unflatten(-1, (-1, 4)).sum(-1)
        allowed += 2**-15 * four.amax(-1, keepdim=True) * x.shape[-1] ** 0.5
    subnormal = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps  # y that small is a multiple of it
    allowed = allowed * W.abs().max() + subnormal
    errors = []
    for weight in (W, W.to(x.dtype)):
        exact = x.double() @ weight.double().T + b
        errors.append(((y.double() - exact).abs() / (allowed + torch.finfo(x.dtype).eps * exact.abs())).max())
    assert min(errors) <= 1, errors
