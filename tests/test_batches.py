"""Several matrices, each with its own Hessian, solved together as each alone."""

import pytest
import torch

from bpdq_quantizer.algorithm import chains, cpu_solver, grid, groups
from bpdq_quantizer.algorithm.solver import quantize_linear
from test_solver import problem


def matrices(inputs, count=4):
    """W [E, N, K] and H [E, K, K] with groups in other orders, a dead input, and one that needs more damping."""
    layers = [problem(9, inputs, seed) for seed in range(count)]
    W, H = (torch.stack(tensors) for tensors in zip(*layers, strict=True))
    H[1, 5], H[1, :, 5] = 0, 0
    W[1, :, 5] = torch.nan
    H[2].diagonal().sub_(torch.linalg.eigvalsh(H[2])[0] + 0.015 * H[2].diagonal().mean())
    return W, H


@pytest.mark.parametrize(
    ("inputs", "options"),
    [(96, {}), (80, {"coefficient_bits": 8}), (64, {"refinements": 0}), (64, {"trellis": True})],
)
def test_on_a_cpu_several_matrices_get_the_tensors_of_each(inputs, options):
    W, H = matrices(inputs)
    together = quantize_linear(W, H, 2, 32, iterations=2, **options)
    for i, (w, h) in enumerate(zip(W, H, strict=True)):
        alone = quantize_linear(w, h, 2, 32, iterations=2, **options)
        for a, b in zip(together.of(i), alone, strict=True):
            assert a is b is None or torch.equal(a, b)


class InTurn:
    """Stands in for kernels that take batches: groups are solved one after the other, all else at once."""

    @staticmethod
    def quantize_group(W, U, *rest):
        *options, trellis = rest
        assign = chains.assign_chains if trellis else grid.assign_codes
        return in_turn(lambda w, u: grid.quantize_group(w, u, *options, assign), W, U)

    @staticmethod
    def descend_group(W_hat, V, H, c, paths):
        if paths is None:
            return in_turn(grid.descend_group, W_hat, V, H, c)
        return in_turn(chains.descend_chains, paths, W_hat, V, H, c)


def in_turn(solve, *tensors):
    if tensors[0].ndim == 2:
        return solve(*tensors)
    return [torch.stack(found) for found in zip(*map(solve, *tensors), strict=True)]


@pytest.mark.parametrize(
    ("bits", "width", "rows", "trellis"),
    [(2, 8, None, False), (3, 16, 4, False), (1, 8, 5, False), (1, 8, None, True)],
)
def test_matrices_solved_at_once_are_solved_as_alone(bits, width, rows, trellis, monkeypatch):
    """But for the order of sums: batched products may be rounded otherwise."""
    monkeypatch.setattr(groups, "solver_for", lambda *_, **__: InTurn)
    monkeypatch.setattr(cpu_solver, "library", lambda: None)
    W, H = matrices(128)
    options = {"coefficient_bits": width, "iterations": 3, "rows": rows, "trellis": trellis}
    together = quantize_linear(W, H, bits, 32, **options)
    assert together.damping.tolist() == [0.01, 0.01, 0.02, 0.01]
    same = []
    for i, (w, h) in enumerate(zip(W, H, strict=True)):
        one, alone = together.of(i), quantize_linear(w, h, bits, 32, **options)
        assert [getattr(t, "dtype", None) for t in one] == [getattr(t, "dtype", None) for t in alone]
        torch.testing.assert_close(one.energy, alone.energy)
        assert one.loss.sum().item() == pytest.approx(alone.loss.sum().item(), rel=0.02)
        same.append((one.codes == alone.codes).all(1) & torch.isclose(one.loss, alone.loss, rtol=1e-3))
    assert torch.stack(same).float().mean() > 0.8
