"""The Hessian, its factors, and the correction for shifted inputs."""

import pytest
import torch

from bpdq_quantizer.algorithm import hessian
from bpdq_quantizer.algorithm.hessian import (
    accumulate,
    accumulate_shift,
    corrected,
    factorize,
    inverse_factor,
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


@pytest.mark.gpu
def test_sums_of_bf16_on_a_gpu_are_those_of_fp32():
    original, x = (torch.randn(3, 500, 300).cumsum(-1).bfloat16() for _ in range(2))
    found, expected = ([torch.zeros(300, 300, device=device) for _ in range(2)] for device in ("cuda", "cpu"))
    for H, C in (found, expected):
        accumulate(H, x.to(H.device), 1500)
        accumulate_shift(C, (x + original / 64).to(H.device), x.to(H.device), 1500)
        symmetrize(H)
    for sums, exact, tolerance in zip(found, expected, (1e-5, 1e-3), strict=True):
        assert (sums.cpu() - exact).norm() < tolerance * exact.norm()


def test_correction_is_the_least_squares_answer_to_shifted_inputs(monkeypatch):
    monkeypatch.setattr(hessian, "CORRECTION_DAMPING", 0.0)
    original, W = torch.randn(2, 50, 6), torch.randn(4, 6)
    x = original @ (torch.eye(6) + 0.3 * torch.randn(6, 6))
    H, C = torch.zeros(6, 6), torch.zeros(6, 6)
    accumulate(H, x, 100)
    accumulate_shift(C, original, x, 100)
    whole, half = (corrected(W, symmetrize(H), C.clone(), share) for share in (1.0, 0.5))
    torch.testing.assert_close(x @ whole.T, original @ W.T, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half, (W + whole) / 2)


def test_large_activations_in_fp16_do_not_overflow_the_shift():
    x = torch.full((1, 50, 4), 3e4, dtype=torch.float16)
    C = torch.zeros(4, 4)
    accumulate_shift(C, -x, x, 50)
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


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_is_factorized_in_its_own_memory(upper, transposed):
    X = torch.randn(40, 8)
    A = symmetrize(X.T @ X)
    expected = torch.linalg.cholesky(A, upper=upper)
    A = A.mT if transposed else A
    factor, failed = factorize(A, upper)
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
