"""The solver's compiled loops do what their readable form in torch does, on every instruction set."""

import functools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpdq_kernels.compiled import FLAGS, instruction_set
from bpdq_quantizer.algorithm import cpu_solver, equations, grid, groups, refine
from bpdq_quantizer.algorithm.grid import paper_start, range_start, residual_start
from bpdq_quantizer.algorithm.hessian import inverse_factor

ISAS = list(FLAGS)[list(FLAGS).index(instruction_set()) :]
STARTS = [(paper_start,), (range_start, residual_start), (residual_start,)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(cpu_solver.library() is None, reason="no C++ compiler")


@functools.cache
def opened(isa: str):
    return cpu_solver.open_library(isa)


@contextmanager
def using(isa: str):
    with mock.patch.object(cpu_solver, "library", return_value=opened(isa)):
        yield


def random_group(g: int, N: int, seed: int):
    """W [g, N], H [g, g] of correlated inputs, and its factor U."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * g, g, generator=generator)
    X += 2 * torch.randn(4 * g, 1, generator=generator) @ torch.randn(1, g, generator=generator)
    H = X.T @ X / len(X)
    return torch.randn(g, N, generator=generator), H, inverse_factor(H, torch.arange(g), 0.01)[0]


GROUPS = st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**20))


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(GROUPS, st.integers(1, 4), st.sampled_from(STARTS), st.sampled_from(DTYPES), st.integers(1, 6))
def test_groups_are_quantized_as_well_as_in_torch(isa, shape, bits, starts, dtype, iterations):
    """Rounding breaks ties, and the rest of a row follows from that: most rows are the same, none is out of line.

    The same examples each time: of thousands there is a row of nearly singular equations, such as five inputs for four
    coefficients, that rounding alone leads elsewhere, in torch too."""
    W, _, U = random_group(*shape)
    expected = grid.quantize_group(W, U, bits, iterations, 1e-6, dtype, starts)
    with using(isa):
        codes, c, E = cpu_solver.quantize_group(W, U, bits, iterations, 1e-6, dtype, starts)
    assert torch.equal(c, c.to(dtype).float())
    W_hat = (grid.level_table(bits, W.device) @ c).gather(0, codes.long())
    whiten = torch.linalg.solve_triangular(U.T, torch.eye(len(U)), upper=False)
    torch.testing.assert_close(E, whiten @ (W - W_hat), rtol=1e-3, atol=1e-3 * whiten.abs().max().item())
    loss, expected_loss = E.square().sum(0), expected[2].square().sum(0)
    scale = (whiten @ W).square().sum(0)
    assert (loss <= 2 * expected_loss + 1e-3 * scale).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_most_rows_are_the_same_as_in_torch(isa, bits):
    W, _, U = random_group(64, 400, bits)
    expected = grid.quantize_group(W, U, bits, 10, 1e-6, torch.bfloat16, STARTS[1])
    with using(isa):
        found = cpu_solver.quantize_group(W, U, bits, 10, 1e-6, torch.bfloat16, STARTS[1])
    same = (found[0] == expected[0]).all(0)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found[1][:, same], expected[1][:, same], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(found[2].square().sum(), expected[2].square().sum(), rtol=2e-3, atol=0)


LAYERS = st.tuples(st.integers(1, 150), st.integers(1, 90), st.integers(1, 4), st.sampled_from([7, 32, 64, 128]))


def random_layer(shape, seed: int):
    """Codes [K, N], W [K, N] and H [K, K] of a layer (K, N, bits, group_size)."""
    K, N, bits, _ = shape
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(K + 5, K, generator=generator)
    H = X.T @ X / len(X) + 0.01 * torch.eye(K)
    codes = torch.randint(2**bits, (K, N), dtype=torch.uint8, generator=generator)
    return codes, torch.randn(K, N, generator=generator), H


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=40)
@given(LAYERS, st.integers(1, 3), st.integers(0, 99))
def test_descent_takes_the_same_steps_as_in_torch(isa, shape, sweeps, seed):
    codes, W, H = random_layer(shape, seed)
    bits, group_size = shape[2:]
    generator = torch.Generator().manual_seed(seed + 1)
    c = torch.randn(-(-len(W) // group_size), bits + 1, W.shape[1], generator=generator)
    expected, expected_loss = refine.descend_in_torch(codes, c, W, H, group_size, sweeps)
    with using(isa):
        found, loss = refine.descend(codes, c, W, H, group_size, sweeps)
    rows = (found == expected).all(0)
    assert rows.float().mean() >= 0.9 or (~rows).sum() <= 1
    torch.testing.assert_close(loss[rows], expected_loss[rows], rtol=1e-3, atol=1e-4)
    error = W - refine.dequantize_columns(found, c, group_size)
    torch.testing.assert_close(loss, (error * (H @ error)).sum(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=40)
@given(LAYERS, st.integers(0, 99))
def test_coefficients_of_a_row_solve_the_equations_of_torch(isa, shape, seed):
    codes, W, H = random_layer(shape, seed)
    bits, group_size = shape[2:]
    b = equations.right_sides(codes, H @ W, group_size, bits)
    A = equations.normal_matrix(codes, H, group_size, bits).tril()
    A = (A + A.tril(-1).mT).double()
    A.diagonal(dim1=1, dim2=2).add_(0.01 * A.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    with using(isa):
        c, _ = cpu_solver.solve_jointly(codes, b, H, group_size, bits, 0.01, torch.float32)
    torch.testing.assert_close(c.T.double(), torch.linalg.solve(A, b.T.double()), rtol=1e-3, atol=1e-3)


def test_singular_equations_give_coefficients_that_are_noticed():
    codes, _, H = random_layer((40, 20, 2, 32), 0)
    codes[:, 3] = 3
    c, _ = cpu_solver.solve_jointly(codes, torch.ones(6, 20), H, 32, 2, -1e-3, torch.bfloat16)
    expected, _ = equations.solve_jointly(codes, torch.ones(6, 20), H, 32, 2, -1e-3, torch.bfloat16)
    assert c[:, 3].isnan().all()
    assert torch.equal(c.isnan(), expected.isnan())


def test_a_row_s_result_depends_on_nothing_else():
    W, _, U = random_group(48, 200, 0)
    whole = cpu_solver.quantize_group(W, U, 2, 5, 1e-6, torch.bfloat16, STARTS[1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = cpu_solver.quantize_group(W, U, 2, 5, 1e-6, torch.bfloat16, STARTS[1])
        part = cpu_solver.quantize_group(W[:, 33:70], U, 2, 5, 1e-6, torch.bfloat16, STARTS[1])
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(whole, alone, part, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[:, 33:70], c)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_without_a_finite_loss_gives_coefficients_that_are_noticed(value):
    W, _, U = random_group(32, 5, 0)
    W[3, 2] = value
    _, c, _ = cpu_solver.quantize_group(W, U, 2, 5, 1e-6, torch.bfloat16, STARTS[1])
    assert c.isfinite().all(0).tolist() == [True, True, False, True, True]


def test_without_a_compiler_torch_solves_and_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpu_solver.library.__wrapped__() is None
    (record,) = caplog.records
    assert "no-such-compiler" in record.getMessage()
    monkeypatch.setattr(cpu_solver, "library", lambda: None)
    W, _, U = random_group(32, 5, 0)
    expected = grid.quantize_group(W, U, 2, 5, 1e-6, torch.bfloat16, STARTS[1])
    found = groups.quantize_group(W, U, 2, 5, 1e-6, torch.bfloat16, STARTS[1])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
