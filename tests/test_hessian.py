"""The Hessian, its factors, and the correction for shifted inputs."""

from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from bpdq_quantizer.algorithm import cpu_hessian, hessian
from bpdq_quantizer.algorithm.hessian import (
    accumulate,
    accumulate_shift,
    corrected,
    factorize,
    inverse_factor,
    shift,
    symmetrize,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_hessian_is_twice_the_mean_outer_product():
    x = torch.randn(3, 7, 5, dtype=torch.bfloat16)
    H = torch.zeros(5, 5)
    for part in x:
        accumulate(H, part[None], 21)
    flat = x.reshape(21, 5).double()
    torch.testing.assert_close(symmetrize(H).double(), 2 / 21 * flat.T @ flat, rtol=1e-5, atol=1e-6)


def bf16(*shape: int) -> Tensor:
    return (1 + torch.randn(*shape)).bfloat16()


@pytest.mark.skipif(cpu_hessian.library() is None, reason="no compiler, or a CPU without products of bf16")
@given(
    tokens=st.integers(1, 40) | st.integers(1020, 2060),
    shape=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    threads=st.integers(1, 3),
)
@example(tokens=1025, shape=(48, 97), threads=2)
def test_sums_of_bf16_on_a_cpu_are_exact(tokens: int, shape: tuple[int, int], threads: int):
    a, b = bf16(tokens, shape[0]), bf16(tokens, shape[1])
    (before, square), whole = (torch.randn(size, size) for size in shape), torch.randn(shape)
    known = before.clone(), whole.clone(), square.clone()
    threads_before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        cpu_hessian.add_products(before, a, a, 0.5)
        cpu_hessian.add_products(whole, a, b, -2.0)
        cpu_hessian.add_products(square, b, b, 1.0)
    finally:
        torch.set_num_threads(threads_before)
    for found, first, x, y, alpha in zip(
        (before, whole, square), known, (a, a, b), (a, b, b), (0.5, -2.0, 1.0), strict=True
    ):
        exact = first.double() + alpha * x.double().T @ y.double()
        error = (found - exact) / (1 + abs(alpha) * (x.double().abs().T @ y.double().abs()))
        assert (error.tril() if x is y else error).abs().max() < 1e-5


@pytest.mark.skipif(cpu_hessian.library() is None, reason="no compiler, or a CPU without products of bf16")
def test_sums_of_bf16_are_those_of_fp32_on_any_cpu():
    original, x = bf16(3, 100, 300), bf16(3, 100, 300)
    found, expected = ([torch.zeros(300, 300) for _ in range(2)] for _ in range(2))
    for (H, C), library in ((found, cpu_hessian.library()), (expected, None)):
        with mock.patch.object(cpu_hessian, "library", return_value=library):
            accumulate(H, x, 300)
            accumulate_shift(C, shift(x + original / 64, x), x, 300)
            symmetrize(H)
    for sums, exact, tolerance in zip(found, expected, (1e-6, 1e-3), strict=True):
        assert (sums - exact).norm() < tolerance * exact.norm()


def test_a_cpu_without_products_of_bf16_compiles_nothing(monkeypatch):
    monkeypatch.setattr(cpu_hessian, "instruction_set", lambda: "avx512")
    monkeypatch.setattr(cpu_hessian, "open_library", None)
    assert cpu_hessian.library.__wrapped__() is None


@pytest.mark.gpu
def test_sums_of_bf16_on_a_gpu_are_those_of_fp32():
    original, x = (torch.randn(3, 500, 300).cumsum(-1).bfloat16() for _ in range(2))
    found, expected = ([torch.zeros(300, 300, device=device) for _ in range(2)] for device in ("cuda", "cpu"))
    for H, C in (found, expected):
        accumulate(H, x.to(H.device), 1500)
        accumulate_shift(C, shift(x + original / 64, x).to(H.device), x.to(H.device), 1500)
        symmetrize(H)
    for sums, exact, tolerance in zip(found, expected, (1e-5, 1e-3), strict=True):
        assert (sums.cpu() - exact).norm() < tolerance * exact.norm()


def test_correction_is_the_least_squares_answer_to_shifted_inputs(monkeypatch):
    monkeypatch.setattr(hessian, "CORRECTION_DAMPING", 0.0)
    original, W = torch.randn(2, 50, 6), torch.randn(4, 6)
    x = original @ (torch.eye(6) + 0.3 * torch.randn(6, 6))
    H, C = torch.zeros(6, 6), torch.zeros(6, 6)
    accumulate(H, x, 100)
    accumulate_shift(C, shift(original, x), x, 100)
    whole, half = (corrected(W, symmetrize(H), C.clone(), share) for share in (1.0, 0.5))
    torch.testing.assert_close(x @ whole.T, original @ W.T, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half, (W + whole) / 2)


def test_correction_makes_good_what_the_residual_stream_lacks(monkeypatch):
    monkeypatch.setattr(hessian, "CORRECTION_DAMPING", 0.0)
    original, x, W = torch.randn(1, 80, 6), torch.randn(1, 80, 6), torch.randn(4, 6)
    before, now = torch.randn(2, 1, 80, 4)
    H, C, P = torch.zeros(6, 6), torch.zeros(6, 6), torch.zeros(4, 6)
    accumulate(H, x, 80)
    accumulate_shift(C, shift(original, x), x, 80)
    accumulate_shift(P, shift(before, now), x, 80)
    found = corrected(W, symmetrize(H), C, 1.0, P)
    expected = torch.linalg.lstsq(x[0].double(), (original @ W.T + before - now)[0].double()).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_large_activations_in_fp16_do_not_overflow_the_shift():
    x = torch.full((1, 50, 4), 3e4, dtype=torch.float16)
    C = torch.zeros(4, 4)
    accumulate_shift(C, shift(-x, x), x, 50)
    torch.testing.assert_close(C, torch.full((4, 4), -2 * 6e4 * 3e4), rtol=1e-3, atol=0)


def test_correction_without_inputs_changes_nothing_and_its_damping_grows_until_the_hessian_factorizes():
    W, C = torch.randn(4, 6), torch.randn(6, 6)
    assert torch.equal(corrected(W, torch.zeros(6, 6), torch.zeros(6, 6), 0.5), W)
    H = torch.full((6, 6), 1.25)  # rounded badly: eigenvalues -0.25, where the damping is 0.1, then 0.2, then 0.4
    H.fill_diagonal_(1.0)
    d = 4 * hessian.CORRECTION_DAMPING
    expected = W + 0.5 * W @ C @ torch.linalg.inv(H + d * torch.eye(6))
    torch.testing.assert_close(corrected(W, H, C, 0.5), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e38, torch.nan])
def test_a_correction_by_a_hessian_that_no_damping_makes_factorizable_ends(scale):
    """The sum of such a diagonal overflows fp32."""
    with pytest.raises(ValueError, match="overflow fp32"):
        corrected(torch.randn(4, 6), scale * torch.eye(6), torch.randn(6, 6), 0.5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_is_factorized_in_its_own_memory(transposed):
    X = torch.randn(40, 8)
    A = symmetrize(X.T @ X)
    expected = torch.linalg.cholesky(A)
    A = A.mT if transposed else A
    factor, failed = factorize(A)
    assert not failed
    assert factor.data_ptr() == A.data_ptr()
    torch.testing.assert_close(factor, expected)


def test_damping_grows_until_the_hessian_factorizes():
    H = torch.eye(4)
    H[0, 0] = -0.15  # not positive definite: d = 0.05 * mean is not enough
    U, damping = inverse_factor(H, torch.arange(len(H)), 0.05)
    assert damping > 0.05
    d = damping * H.diagonal().mean()
    torch.testing.assert_close(U.T @ U @ (H + d * torch.eye(4)), torch.eye(4), rtol=1e-3, atol=1e-3)


def test_a_hessian_with_nan_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        inverse_factor(torch.full((3, 3), torch.nan), torch.arange(3), 0.05)
