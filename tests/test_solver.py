"""The solver against a slow, transparent implementation of the paper, and its invariants."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpdq_quantizer.algorithm import grid
from bpdq_quantizer.algorithm import refine as refine_module
from bpdq_quantizer.algorithm.grid import (
    assign_codes,
    clustered,
    fit_coefficients,
    most_significant_planes,
    nearest_codes,
    quantize_group,
    residual_planes,
)
from bpdq_quantizer.algorithm.hessian import accumulate, corrected, inverse_factor, symmetrize
from bpdq_quantizer.algorithm.order import group_aware_order
from bpdq_quantizer.algorithm.refine import dequantize_columns, descend, joint_fit, refine
from bpdq_quantizer.algorithm.solver import STARTS, quantize_linear


def problem(n: int, k_in: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [n, k_in] and the Hessian of correlated inputs."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(k_in, k_in, generator=gen) / k_in**0.5 + torch.eye(k_in)
    X = torch.randn(8 * k_in, k_in, generator=gen) @ mix * torch.rand(k_in, generator=gen).add(0.1)
    H = torch.zeros(k_in, k_in)
    accumulate(H, X[None], len(X))
    H = symmetrize(H)
    return torch.randn(n, k_in, generator=gen) * 0.05, H


def bits_of(code: int, k: int) -> list[int]:
    return [(code >> p) & 1 for p in range(k)]


def slow_row(
    w: np.ndarray, U: np.ndarray, k: int, iterations: int, alpha: float
) -> tuple[list[int], np.ndarray, float]:
    """One row of one group, as the paper's text says it, in float64 and Python loops.

    Error E of the unrefitted weights column by column (eq. 3-4), refit (eq. 7), then the delta correction (eq. 9).
    """
    g = len(w)
    candidates = [np.array([*bits, 1.0]) for bits in itertools.product((0, 1), repeat=k)]

    def refit(B: list[np.ndarray]) -> np.ndarray:
        X = np.stack(B)
        VX = np.linalg.solve(U.T, X)
        A = VX.T @ VX
        A += alpha * np.mean(np.diag(A)) * np.eye(k + 1)
        c = np.linalg.solve(A, VX.T @ np.linalg.solve(U.T, w))
        return torch.tensor(c).to(torch.bfloat16).double().numpy()

    low, high = min(w.min(), 0.0), max(w.max(), 0.0)
    scale = (high - low) / 255
    q = np.clip(np.round(w / scale) + np.round(-low / scale), 0, 255).astype(int)
    c = refit([np.array([*bits_of(v >> (8 - k), k), 1.0]) for v in q])
    best = None
    for _ in range(iterations):
        rest, B, E, W_old = w.copy(), [], np.zeros(g), np.zeros(g)
        for t in range(g):
            b = min(candidates, key=lambda x: abs(rest[t] - x @ c))
            B.append(b)
            W_old[t] = b @ c
            E[t] = (rest[t] - W_old[t]) / U[t, t]
            rest[t:] -= E[t] * U[t, t:]
        c = refit(B)
        W_new = np.array([b @ c for b in B])
        delta = np.linalg.solve(U.T, W_old - W_new)
        loss = float(((E + delta) ** 2).sum())
        if best is None or loss < best[2]:
            codes = [int(sum(int(bit) << p for p, bit in enumerate(b[:-1]))) for b in B]
            best = (codes, c, loss)
    return best


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_group_is_solved_as_the_paper_says(k):
    W, H = problem(5, 16, seed=k)
    U, _ = inverse_factor(H, torch.arange(len(H)), 0.05)
    codes, c, E = quantize_group(W.T.contiguous(), U, k, 4, 1e-4, torch.bfloat16)
    for row in range(5):
        slow_codes, slow_c, slow_loss = slow_row(W[row].double().numpy(), U.double().numpy(), k, 4, 1e-4)
        assert E[:, row].square().sum().item() == pytest.approx(slow_loss, rel=1e-3)
        assert codes[:, row].tolist() == slow_codes
        assert c[:, row].tolist() == pytest.approx(slow_c, rel=1e-2, abs=1e-4)


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 4), g=st.integers(2, 40), n=st.integers(1, 9), seed=st.integers(0, 99))
def test_propagated_error_belongs_to_the_stored_weights(k, g, n, seed):
    W, H = problem(n, g, seed)
    U, _ = inverse_factor(H, torch.arange(len(H)), 0.05)
    codes, c, E = quantize_group(W.T.contiguous(), U, k, 3, 1e-4, torch.bfloat16)
    W_hat = dequantize_columns(codes, c[None], g)
    assert torch.equal(c, c.to(torch.bfloat16).float())
    torch.testing.assert_close(U.T @ E, W.T - W_hat, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 3), seed=st.integers(0, 99))
def test_more_iterations_never_make_a_row_of_a_group_worse(k, seed):
    W, H = problem(8, 32, seed)
    U, _ = inverse_factor(H, torch.arange(len(H)), 0.05)
    losses = [quantize_group(W.T.contiguous(), U, k, i, 1e-4, torch.bfloat16)[2].square().sum(0) for i in (1, 2, 5, 10)]
    for earlier, later in itertools.pairwise(losses):
        assert (later <= (1 + 1e-6) * earlier).all(), "but for the rounding of sums in fp32"


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_weights_on_a_bit_plane_grid_are_recovered(k):
    gen = torch.Generator().manual_seed(k)
    codes = torch.randint(0, 2**k, (6, 96), generator=gen)
    codes[:, 0::32], codes[:, 1::32] = 0, 2**k - 1
    W = codes * 0.25 - 0.25 * 2 ** (k - 1)
    _, H = problem(6, 96)
    solution = quantize_linear(W, H, k, 32)
    assert solution.loss.sum() < 1e-4 * solution.energy.sum()


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 4), group_size=st.sampled_from([32, 64]), k_in=st.integers(5, 150), n=st.integers(1, 7))
def test_any_shape_gives_a_consistent_layer(k, group_size, k_in, n):
    W, H = problem(n, k_in)
    s = quantize_linear(W, H, k, group_size, iterations=2)
    assert s.codes.shape == (n, k_in)
    assert s.codes.max() < 2**k
    assert s.c.shape == (-(-k_in // group_size), k + 1, n)
    D = (W - dequantize_columns(s.codes.T, s.c.float(), group_size).T).double()
    torch.testing.assert_close(s.loss.double(), ((D @ H.double()) * D).sum(1), rtol=1e-3, atol=1e-9)


def test_rows_do_not_depend_on_each_other():
    W, H = problem(10, 96)
    together = quantize_linear(W, H, 2, 32)
    apart = [quantize_linear(part, H, 2, 32) for part in W.split([3, 7])]
    assert torch.equal(together.codes, torch.cat([s.codes for s in apart]))
    assert torch.equal(together.c, torch.cat([s.c for s in apart], dim=2))


def test_loss_beats_rounding_each_weight_to_the_same_number_of_levels():
    W, H = problem(32, 128)
    low, high = W.view(32, 4, 32).amin(-1, keepdim=True), W.view(32, 4, 32).amax(-1, keepdim=True)
    step = (high - low) / 3
    D = W - (((W.view(32, 4, 32) - low) / step).round() * step + low).view(32, 128)
    rounding = ((D @ H) * D).sum()
    assert quantize_linear(W, H, 2, 32).loss.sum() < 0.5 * rounding


def test_every_row_of_a_group_keeps_the_outcome_of_its_best_start():
    W, H = problem(40, 32)
    U, _ = inverse_factor(H, torch.arange(32), 0.05)
    group = W.T.contiguous(), U, 2, 10, 1e-6, torch.bfloat16
    alone = [quantize_group(*group, starts=[start]) for start in STARTS]
    both = quantize_group(*group, starts=STARTS)
    best = torch.stack([E.square().sum(0) for _, _, E in alone]).argmin(0)
    assert set(best.tolist()) == {0, 1}, "each start is some row's best"
    for kind in range(3):
        for row, start in enumerate(best.tolist()):
            torch.testing.assert_close(both[kind][:, row], alone[start][kind][:, row], rtol=1e-4, atol=1e-6)


def test_scaling_the_calibration_inputs_changes_nothing():
    W, H = problem(8, 64)
    a, b = quantize_linear(W, H, 2, 32), quantize_linear(W, H * 2.0**-20, 2, 32)
    assert torch.equal(a.codes, b.codes)


def test_dead_inputs_are_quantized_as_zeros_and_cost_nothing():
    W, H = problem(4, 64)
    H[7], H[:, 7], H[40], H[:, 40] = 0, 0, 0, 0
    W[:, 7] = 100.0
    s = quantize_linear(W, H, 2, 32)
    assert torch.isfinite(s.c.float()).all()
    assert s.loss.sum() < 0.2 * s.energy.sum()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99),
    dead=st.integers(1, 40),
    scale=st.sampled_from([2.0**-14, 2.0**14, 1e-4, 1e4]),
    refinements=st.sampled_from([0, 2]),
)
def test_the_scale_of_the_inputs_changes_nothing_where_some_are_dead(seed, dead, scale, refinements):
    W, H = problem(6, 64, seed)
    unused = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:dead]
    H[unused], H[:, unused] = 0, 0
    a, b = (quantize_linear(W, s * H, 2, 32, iterations=3, refinements=refinements) for s in (1.0, scale))
    if scale in (2.0**-14, 2.0**14):  # no rounding differs
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.c, b.c)
    live = H.diagonal() > 0
    assert (a.codes != b.codes)[:, live].float().mean() < 0.2, "one row's start may be decided by rounding"
    torch.testing.assert_close(b.loss.sum(), scale * a.loss.sum(), rtol=0.02, atol=0)


def test_dead_inputs_do_not_change_how_the_others_are_damped():
    W, H = problem(4, 48)
    wide = torch.zeros(64, 64)
    wide[:48, :48] = H
    U, _ = inverse_factor(H, torch.arange(48), 0.01)
    U_wide, _ = inverse_factor(wide, torch.arange(64), 0.01)
    torch.testing.assert_close(U_wide[:48, :48], U, rtol=1e-4, atol=1e-4)
    C = torch.randn(48, 48)
    C_wide = torch.nn.functional.pad(C, (0, 16, 0, 16))
    W_wide = torch.nn.functional.pad(W, (0, 16))
    torch.testing.assert_close(corrected(W_wide, wide, C_wide, 0.5)[:, :48], corrected(W, H, C, 0.5))


def test_a_layer_without_any_live_input_is_quantized_as_zeros():
    s = quantize_linear(torch.randn(4, 64), torch.zeros(64, 64), 2, 32)
    assert (dequantize_columns(s.codes.T, s.c.float(), 32) == 0).all()


@given(diag=st.lists(st.floats(0, 100, width=32), min_size=1, max_size=200), size=st.sampled_from([32, 64]))
def test_order_moves_groups_whole(diag, size):
    diag = torch.tensor(diag)
    order = group_aware_order(diag, size)
    steps = list(zip(order.groups.tolist(), order.columns.split(order.sizes), strict=True))
    assert sorted(order.columns.tolist()) == list(range(len(diag)))
    for group, columns in steps:
        assert set(columns.tolist()) == set(range(group * size, min((group + 1) * size, len(diag))))
        assert (diag[columns].diff() <= 0).all()
    peaks = torch.stack([diag[columns].max() for _, columns in steps])
    assert (peaks.diff() <= 0).all()


def test_most_significant_planes_of_the_8_bit_grid():
    W = torch.arange(256.0)[:, None] / 255
    assert most_significant_planes(W, 2)[:, 0].tolist() == [i // 64 for i in range(256)]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_residual_planes_are_signs_of_what_the_planes_before_leave(k):
    W = torch.randn(50, 3) + torch.tensor([0.0, 2.0, -1.0])
    codes = residual_planes(W, k)
    for row in range(3):
        left = W[:, row].double() - W[:, row].double().mean()
        for p in reversed(range(k)):
            assert ((codes[:, row] >> p) & 1).tolist() == (left > 0).long().tolist()
            left -= left.sign() * left.abs().mean()


@settings(max_examples=25, deadline=None)
@given(k=st.integers(1, 3), g=st.integers(4, 40), seed=st.integers(0, 99))
def test_clustering_lowers_the_weighted_error_of_a_grid(k, g, seed):
    W, H = problem(20, g, seed)
    W, weights = W.T.contiguous(), 1 / inverse_factor(H, torch.arange(g), 0.05)[0].diagonal()

    def error(codes):
        c = fit_coefficients(codes, W, weights.diag(), k, 1e-6, torch.float32)
        return (weights[:, None] * (W - dequantize_columns(codes, c[None], g))).square().sum(0)

    codes = residual_planes(W, k)
    before, after = error(codes), error(clustered(codes, W, (1 / weights).diag(), k))
    assert (after <= 1.001 * before + 1e-6 * W.square().sum(0)).all()
    assert after.sum() < before.sum() or g < 16, "few weights may be on the best grid from the start"


def test_nearest_codes_are_nearest():
    W, c = torch.randn(20, 6), torch.randn(3, 6)  # levels in any order, negative coefficients too
    codes = nearest_codes(W, c, 2)
    levels = torch.stack([c[2], c[0] + c[2], c[1] + c[2], c[0] + c[1] + c[2]])
    assert torch.equal(codes.long(), (W.unsqueeze(1) - levels).abs().argmin(1))


def test_assignment_takes_the_nearest_level_when_errors_do_not_propagate():
    W = torch.randn(20, 6)
    c = torch.randn(3, 6)  # levels in any order, negative coefficients too
    codes = assign_codes(W, c, torch.eye(20), 2)
    levels = torch.stack([c[2], c[0] + c[2], c[1] + c[2], c[0] + c[1] + c[2]])
    assert torch.equal(codes.long(), (W[None] - levels[:, None]).abs().argmin(0))


def test_constant_planes_still_give_finite_coefficients():
    codes = torch.full((32, 4), 3, dtype=torch.uint8)
    c = fit_coefficients(codes, torch.ones(32, 4), torch.eye(32), 2, 1e-4, torch.bfloat16)
    torch.testing.assert_close(c.sum(0), torch.ones(4), rtol=1e-2, atol=1e-2)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(20, 90), st.integers(0, 2), st.integers(0, 99))
def test_loss_and_energy_are_those_of_the_undamped_hessian(bits, inputs, refinements, seed):
    W, H = problem(5, inputs, seed)
    H[3], H[:, 3] = 0, 0  # an input that was never used
    s = quantize_linear(W, H, bits, 32, refinements=refinements)
    expected = row_loss(W.T, s.codes.T, s.c.float(), H, 32)
    torch.testing.assert_close(s.energy, (W * (W @ H)).sum(1), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(s.loss, expected, rtol=1e-3, atol=1e-4 * s.energy.max().item())


def row_loss(W, codes, c, H, group_size):
    D = W - dequantize_columns(codes, c, group_size)
    return (D * (H @ D)).sum(0)


@settings(max_examples=20, deadline=None)
@given(k=st.integers(1, 3), k_in=st.integers(33, 140), n=st.integers(1, 6), seed=st.integers(0, 99))
def test_refinement_never_makes_a_row_worse(k, k_in, n, seed):
    W, H = problem(n, k_in, seed)
    H.diagonal().add_(0.05 * H.diagonal().mean())
    s = quantize_linear(W, H, k, 32, iterations=2, refinements=0)
    codes, c = s.codes.T.contiguous(), s.c.float()
    before = row_loss(W.T, codes, c, H, 32)
    codes, c, loss, _ = refine(codes, c, before, W.T, H @ W.T, H, 32, 2, 1e-6, torch.bfloat16)
    after = row_loss(W.T, codes, c, H, 32)
    assert (after <= before * (1 + 1e-4)).all()
    torch.testing.assert_close(loss, after, rtol=1e-3, atol=1e-4 * before.max().item())


def test_joint_fit_solves_the_rows_least_squares_problem():
    W, H = problem(3, 80)
    codes = torch.randint(0, 4, (80, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    c, _ = joint_fit(codes, H @ W.T, H, 32, 2, 0.0, torch.float32)
    L = torch.linalg.cholesky(H.double())
    for n in range(3):
        X = torch.zeros(80, 9, dtype=torch.float64)  # three groups of two planes and a bias; the last is short
        for i in range(80):
            X[i, i // 32 * 3 : i // 32 * 3 + 3] = torch.tensor([codes[i, n] & 1, codes[i, n] >> 1 & 1, 1])
        expected = torch.linalg.lstsq(L.T @ X, L.T @ W[n].double()[:, None]).solution[:, 0]
        torch.testing.assert_close(c[:, :, n].flatten().double(), expected, rtol=2e-2, atol=2e-3)


def test_a_row_with_singular_equations_keeps_its_coefficients():
    W, H = problem(3, 64)
    s = quantize_linear(W, H, 2, 32, refinements=0)
    codes, c = s.codes.T.contiguous(), s.c.float()
    codes[:, 1] = 3  # both planes constant: they can't be told from the bias, and nothing damps them
    assert joint_fit(codes, H @ W.T, H, 32, 2, -1e-3, torch.float32)[0][:, :, 1].isnan().all()
    loss = row_loss(W.T, codes, c, H, 32)
    refined_codes, refined_c, _, _ = refine(codes, c, loss, W.T, H @ W.T, H, 32, 2, -1e-3, torch.bfloat16)
    assert torch.equal(refined_codes[:, 1], codes[:, 1])
    assert torch.equal(refined_c[:, :, 1], c[:, :, 1])


def test_after_descent_no_single_column_can_be_improved_much():
    W, H = problem(4, 64)
    s = quantize_linear(W, H, 2, 32, refinements=0)
    codes, c = s.codes.T.contiguous(), s.c.float()
    for _ in range(10):
        codes, loss = descend(codes, c, W.T, H, 32, 1)
    torch.testing.assert_close(loss, row_loss(W.T, codes, c, H, 32), rtol=1e-3, atol=1e-7)
    for i in range(64):
        for code in range(4):
            other = codes.clone()
            other[i] = code
            assert (row_loss(W.T, other, c, H, 32) >= loss * (1 - 1e-3)).all()


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_coefficients_do_not_depend_on_how_many_rows_are_solved_in_a_call(batch, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    W, codes = torch.randn(16, 7, generator=generator), torch.randint(4, (16, 7), generator=generator)
    whole = fit_coefficients(codes, W, torch.eye(16), 2, 1e-4, torch.bfloat16)
    monkeypatch.setattr(grid, "BATCH", batch)
    assert torch.equal(fit_coefficients(codes, W, torch.eye(16), 2, 1e-4, torch.bfloat16), whole)


def test_refinement_does_not_depend_on_how_many_rows_are_refined_at_once(monkeypatch):
    W, H = problem(24, 96)
    one = quantize_linear(W, H, 2, 32, refinements=2)
    monkeypatch.setattr(refine_module, "CHUNK_ELEMENTS", 7 * 96 * 3)
    monkeypatch.setattr(refine_module, "CPU_ELEMENTS", 2 * 96 * 3)
    other = quantize_linear(W, H, 2, 32, refinements=2)
    assert (one.codes != other.codes).float().mean() < 0.02, "rounding may decide between levels equally near"
    torch.testing.assert_close(other.loss.sum(), one.loss.sum(), rtol=1e-3, atol=0)


@pytest.mark.gpu
def test_more_rows_than_a_launch_counts_are_solved_on_a_gpu():
    generator = torch.Generator().manual_seed(0)
    n = 70_000
    W, codes = torch.randn(32, n, generator=generator), torch.randint(4, (32, n), generator=generator)
    solved = [
        fit_coefficients(codes.to(device), W.to(device), torch.eye(32, device=device), 2, 1e-4, torch.float32).cpu()
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(solved[1], solved[0], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_layer_costs_the_same_on_a_gpu(bits):
    W, H = problem(512, 160)
    losses = [quantize_linear(W.to(d), H.to(d), bits, 64).loss.sum().item() for d in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
