"""Coefficients in 8 bits: where they are rounded to, what that costs, and that the stored layer is the one reported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpdq_kernels import dequantize
from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import Stored, check_layer
from bpdq_quantizer.algorithm import cpu_solver, equations, rounding
from bpdq_quantizer.algorithm.grid import paper_start
from bpdq_quantizer.algorithm.refine import joint_fit, refine
from bpdq_quantizer.algorithm.rounding import MOST, nearest_plane, round_to, steps_for
from bpdq_quantizer.algorithm.solver import quantize_linear
from bpdq_quantizer.passes.layers import stored


def problem(rows: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """W [rows, inputs] and H of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * inputs, inputs, generator=generator)
    X += torch.randn(3 * inputs, 1, generator=generator) @ torch.randn(1, inputs, generator=generator)
    return torch.randn(rows, inputs, generator=generator), X.T @ X / len(X)


def equations_of(rows: int, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """L [rows, n, n] of matrices far from diagonal, and y [rows, n]."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, 2 * n, n, generator=generator) + 2 * torch.randn(rows, 2 * n, 1, generator=generator)
    return torch.linalg.cholesky(X.mT @ X), 10 * torch.randn(rows, n, generator=generator)


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 999), st.floats(1, 2), st.floats(1e-30, 1e30))
def test_steps_hold_the_coefficients_and_are_one_number_over_powers_of_two(groups, width, seed, margin, size):
    generator = torch.Generator().manual_seed(seed)
    c = size * torch.randn(groups, width, 7, generator=generator) * torch.rand(width, 7, generator=generator) ** 4
    c[:, :, 3] = 0
    steps = steps_for(c, margin)
    assert torch.equal(steps.bfloat16().float(), steps)
    assert (steps > 0).all()
    assert (c.abs() <= steps * (MOST + 0.5)).all()
    powers = torch.log2(steps.amax(0) / steps)
    assert torch.equal(powers, powers.round())
    assert (powers <= 7).all()


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 999), st.sampled_from([torch.float16, torch.bfloat16, torch.int8]))
def test_rounding_gives_what_can_be_stored_and_the_loss_that_it_adds(n, seed, dtype):
    L, y = equations_of(9, n, seed)
    exact = torch.linalg.solve_triangular(L.mT, y.unsqueeze(2), upper=True).squeeze(2)
    steps = exact.abs().amax(1, keepdim=True).expand_as(exact).clone() / MOST if dtype == torch.int8 else None
    c, loss = nearest_plane(L, y, None if steps is None else steps[None], dtype)
    assert torch.allclose(c[0], round_to(c[0], steps, dtype), rtol=1e-6, atol=0)
    expected = (L.mT @ (c[0] - exact).unsqueeze(2)).square().sum((1, 2))
    torch.testing.assert_close(loss[0], expected, rtol=2e-2, atol=1e-3 * expected.max().item())


def test_rounding_that_knows_the_errors_before_it_costs_less():
    L, y = equations_of(200, 24, 0)
    exact = torch.linalg.solve_triangular(L.mT, y.unsqueeze(2), upper=True).squeeze(2)
    steps = exact.abs().amax(1, keepdim=True).expand_as(exact) / MOST
    alone = (L.mT @ (round_to(exact, steps, torch.int8) - exact).unsqueeze(2)).square().sum((1, 2))
    _, together = nearest_plane(L, y, steps[None], torch.int8)
    assert together.sum() < 0.7 * alone.sum()


@pytest.mark.skipif(cpu_solver.library() is None, reason="no C++ compiler")
@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 150),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([32, 64]),
    st.integers(0, 99),
    st.sampled_from([torch.int8, torch.bfloat16, torch.float16]),
)
def test_the_compiled_joint_fit_rounds_as_torch_does(K, N, bits, group_size, seed, dtype):
    W, H = problem(N, K, seed)
    H.diagonal().add_(0.01)
    codes = torch.randint(2**bits, (K, N), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    b = equations.right_sides(codes, H @ W.T, group_size, bits)
    expected, expected_steps = equations.solve_jointly(codes, b, H, group_size, bits, 0.01, dtype)
    c, steps = cpu_solver.solve_jointly(codes, b, H, group_size, bits, 0.01, dtype)
    assert (steps is None) == (expected_steps is None)

    def loss_of(c: torch.Tensor) -> torch.Tensor:
        grouped = c.unflatten(0, (-1, bits + 1))
        error = W.T - torch.cat(
            [(equations.features(part, bits) * grouped[g]).sum(1) for g, part in enumerate(codes.split(group_size))]
        )
        return (error * (H @ error)).sum(0)

    if steps is not None:
        q = c.unflatten(0, (-1, bits + 1)) / steps
        assert torch.allclose(q, q.round(), atol=1e-3)
        assert q.abs().max() <= MOST + 1e-3
        assert torch.equal(steps, steps.bfloat16().float())
    torch.testing.assert_close(loss_of(c), loss_of(expected), rtol=0.02, atol=1e-4 * b.abs().max().item())


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(20, 140), st.sampled_from([32, 64]), st.integers(0, 2), st.integers(0, 99))
def test_a_layer_in_8_bits_is_what_its_report_says(bits, inputs, group_size, refinements, seed):
    W, H = problem(5, inputs, seed)
    H[3], H[:, 3] = 0, 0  # an input that was never used
    s = quantize_linear(W, H, bits, group_size, 8, refinements=refinements)
    layer = stored(s, Scheme(bits, group_size, 8))
    check_layer(layer.B, layer.c, group_size, inputs, layer.s)
    assert (layer.c.dtype, layer.s.dtype) == (torch.int8, torch.bfloat16)
    size = sum(tensor.nbytes for tensor in layer)
    assert size == Scheme(bits, group_size, 8).stored_bytes(5, inputs)
    W = W.clone()
    W[:, 3] = 0
    D = W - dequantize(layer.B, layer.c, group_size, inputs, layer.s)
    D[:, 3] = 0
    torch.testing.assert_close(s.loss, ((D @ H) * D).sum(1), rtol=1e-3, atol=1e-4 * s.energy.max().item())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_8_bits_cost_next_to_nothing(bits):
    W, H = problem(96, 192)
    eight, sixteen = (quantize_linear(W, H, bits, 64, width).loss.sum() for width in (8, 16))
    assert eight < 1.02 * sixteen


def test_the_paper_s_solver_rounds_to_8_bits_too():
    W, H = problem(40, 96)
    paper = {"refinements": 0, "starts": (paper_start,), "damping": 0.05, "alpha": 1e-4}
    eight, sixteen = (quantize_linear(W, H, 2, 32, width, **paper).loss.sum() for width in (8, 16))
    assert eight < sixteen  # its coefficients are fitted together once


def test_a_row_with_singular_equations_is_stored_as_the_pass_left_it():
    W, H = problem(3, 64)
    codes = torch.randint(4, (64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes[:, 1] = 3  # both planes constant: they can't be told from the bias, and nothing damps them
    c = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(1))
    assert joint_fit(codes, H @ W.T, H, 32, 2, -1e-3, torch.int8)[0][:, :, 1].isnan().all()
    found, refined, loss, steps = refine(codes, c, torch.zeros(3), W.T, H @ W.T, H, 32, 1, -1e-3, torch.int8)
    assert torch.equal(refined[:, :, 1], round_to(c, steps_for(c), torch.int8)[:, :, 1])
    assert torch.equal(steps[:, 1], steps_for(c)[:, 1])
    assert loss.isfinite().all()
    assert found.shape == codes.shape


def test_what_a_solution_stores_can_be_cut_by_outputs():
    W, H = problem(6, 64)
    s = quantize_linear(W, H, 2, 32, 8)
    scheme = Scheme(2, 32, 8)
    whole, part = stored(s, scheme), stored(s, scheme, slice(2, 5))
    assert all(torch.equal(a[..., 2:5], b) for a, b in zip(whole, part, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(Stored(*whole).outputs(slice(2, 5)), part, strict=True))


def test_a_layer_of_zeros_stays_zero():
    s = quantize_linear(torch.zeros(2, 64), torch.eye(64), 2, 32, 8)
    assert not s.c.any()
    assert (s.s > 0).all()


def test_margins_are_tried_for_what_they_add():
    """The steps with the least loss win, row by row."""
    L, y = equations_of(50, 12, 3)
    c, steps = rounding.rounded_solution(L, y, 3, torch.int8)
    exact = torch.linalg.solve_triangular(L.mT, y.unsqueeze(2), upper=True).squeeze(2)
    first = steps_for(exact.T.unflatten(0, (-1, 3)))
    _, loss = nearest_plane(L, y, first.T.repeat(1, 4)[None], torch.int8)
    _, best = nearest_plane(L, y, steps.T.repeat(1, 4)[None], torch.int8)
    assert (best <= loss).all()
    assert (best < loss).any()
    assert c.shape == y.shape
