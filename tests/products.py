"""What a product of activations and bit-planes may differ by."""

import torch


def assert_product(y: torch.Tensor, x: torch.Tensor, W: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """y is x @ W.T + bias in x.dtype, with W [N, K] fp32 exact or rounded to x.dtype, and sums in fp32."""
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], W.shape[0])
    b = 0 if bias is None else bias.double()
    fp32_sums = 4e-7 * x.double().abs().sum(-1, keepdim=True) * W.abs().max() + 1e-30
    errors = []
    for weight in (W, W.to(x.dtype)):
        exact = x.double() @ weight.double().T + b
        errors.append(((y.double() - exact).abs() / (fp32_sums + torch.finfo(x.dtype).eps * exact.abs())).max())
    assert min(errors) <= 1, errors
