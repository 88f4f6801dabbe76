"""Linears of 16-bit models computed in fp32, for CPUs that have no 16-bit products."""

import pytest
import torch
from torch import nn

from bpdq_quantizer.model import products
from bpdq_quantizer.model.products import FP32Products, quick_products


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (64,)])
def test_a_linear_is_rounded_once_from_fp32_and_so_are_its_gradients(monkeypatch, dtype, bias, shape):
    monkeypatch.setattr(products, "TOKENS", 3)
    torch.manual_seed(0)
    linear = nn.Linear(64, 24, bias=bias, dtype=dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    with FP32Products():
        y = linear(x)
    expected = nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float() if bias else None)
    torch.testing.assert_close(y.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, linear.weight.sum(0).expand_as(x), rtol=2e-2, atol=2e-2)


def test_other_dtypes_and_functions_are_left_alone():
    linear, x = nn.Linear(8, 8), torch.randn(3, 8)
    with FP32Products():
        assert torch.equal(linear(x), x @ linear.weight.T + linear.bias)
        assert (x.bfloat16() + 1).dtype == torch.bfloat16


@pytest.mark.parametrize(("isa", "wide"), [("avx2", True), ("portable", True), ("avx512", False)])
def test_only_a_cpu_without_16_bit_products_takes_it(monkeypatch, isa, wide):
    monkeypatch.setattr(products, "instruction_set", lambda: isa)
    assert isinstance(quick_products(torch.device("cpu")), FP32Products) == wide
    assert not isinstance(quick_products(torch.device("cuda")), FP32Products)
