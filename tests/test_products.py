"""Products on CPUs: in fp32 where there are none of 16 bits, and oneDNN's in fp32."""

import pytest
import torch
from torch import nn

from bpdq_quantizer.algorithm import products as algorithm
from bpdq_quantizer.algorithm.hessian import factorize
from bpdq_quantizer.algorithm.products import BLOCK, matmul, solve
from bpdq_quantizer.model import products
from bpdq_quantizer.model.products import FP32Products, OneDNNProducts, quick_products


@pytest.fixture
def onednn(monkeypatch):
    """Whatever the CPU."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(algorithm, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(algorithm, "SMALLEST", 1)


def layouts(a):
    """a [M, N] as it is, transposed in memory, with gaps between rows, and both."""
    wide = a.new_full((len(a) + 2, a.shape[1] + 3), torch.nan)
    wide[: len(a), : a.shape[1]] = a
    return [
        a.contiguous(),
        a.T.contiguous().T,
        wide[: len(a), : a.shape[1]],
        wide.T.contiguous().T[: len(a), : a.shape[1]],
    ]


@pytest.mark.parametrize("shape", [(5, 7, 9), (1, 64, 3), (0, 4, 5), (4, 0, 5), (4, 5, 0), (33, 130, 65)])
def test_a_product_is_that_of_torch_however_its_factors_lie(onednn, shape):
    m, k, n = shape
    a, b = torch.randn(m, k), torch.randn(k, n)
    expected = (a.double() @ b.double()).float()
    for one in layouts(a):
        for other in layouts(b):
            torch.testing.assert_close(matmul(one, other), expected, rtol=1e-5, atol=1e-5)


def test_batches_and_other_dtypes_are_left_to_torch(onednn):
    a, b = torch.randn(2, 5, 7), torch.randn(2, 7, 3)
    assert torch.equal(matmul(a, b), a @ b)
    assert torch.equal(matmul(a[0].double(), b[0].double()), a[0].double() @ b[0].double())


@pytest.mark.parametrize("k", [4 * BLOCK, 4 * BLOCK + 77])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_wide_matrix_is_factorized_and_solved_in_blocks(onednn, monkeypatch, k, transposed):
    monkeypatch.setattr(algorithm, "ROWS", 300)
    X = torch.randn(2 * k, k) * torch.randn(k).mul(0.5).exp()
    A = X.T @ X / len(X) + 0.01 * torch.eye(k)
    expected = torch.linalg.cholesky(A.double())
    copy = A.mT.clone().mT if transposed else A.clone()
    L, failed = factorize(copy)
    assert not failed
    assert L.data_ptr() == copy.data_ptr()
    torch.testing.assert_close(L.double(), expected, rtol=1e-3, atol=1e-4)
    B = torch.randn(5, k)
    torch.testing.assert_close(solve(L, B.clone()) @ A, B, rtol=1e-3, atol=2e-3)
    A[700, 700] = -1
    assert factorize(A)[1]


def test_linears_in_fp32_are_the_same_and_keep_their_gradients(onednn):
    linear, x = nn.Linear(24, 16), torch.randn(2, 5, 24)
    expected, called = linear(x), []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch, OneDNNProducts():
        patch.setattr(products, "linear", lambda *args: called.append(args) or algorithm.linear(*args))
        torch.testing.assert_close(linear(x), expected)
        torch.testing.assert_close(nn.functional.linear(x[:, :0], linear.weight), x[:, :0] @ linear.weight.T)
    assert len(called) == 1
    x.requires_grad_()
    with OneDNNProducts():
        (gradient,) = torch.autograd.grad(linear(x).sum(), x)
    torch.testing.assert_close(gradient, linear.weight.sum(0).expand_as(x))


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
    assert isinstance(quick_products(torch.device("cpu"), torch.float32), OneDNNProducts) != wide
    assert not isinstance(quick_products(torch.device("cpu"), torch.bfloat16), OneDNNProducts)
    assert not isinstance(quick_products(torch.device("cuda")), FP32Products)
