"""The solver's kernels do what their readable form in torch does: executed by Triton's interpreter, and run for real
(-m gpu)."""

import itertools
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from bpdq_kernels.layout import WORD
from bpdq_quantizer.algorithm import (
    chains,
    cpu_solver,
    grid,
    groups,
    products,
    rounding,
    triton_rounding,
    triton_solver,
)
from bpdq_quantizer.algorithm.grid import paper_start, range_start, residual_start
from bpdq_quantizer.algorithm.hessian import inverse_factor
from bpdq_quantizer.algorithm.order import group_aware_order
from bpdq_quantizer.algorithm.refine import SWEEPS, refine
from bpdq_quantizer.algorithm.solver import one_pass, quantize_linear
from tests.offline import BF16, FP16, FP32
from tests.test_trellis import is_path, to_path

BOTH = (range_start, residual_start)


class Case(NamedTuple):
    """One group; the fields print as the test's name."""

    bits: int
    inputs: int
    rows: int
    dtype: torch.dtype
    starts: tuple
    trellis: bool = False

    def __str__(self) -> str:
        starts = "-".join(start.__name__ for start in self.starts)
        trellis = "-trellis" if self.trellis else ""
        return f"k{self.bits}-g{self.inputs}-N{self.rows}-{str(self.dtype)[6:]}-{starts}{trellis}"


TINY = [
    Case(1, 13, 33, FP32, (paper_start,)),
    Case(2, 16, 5, BF16, BOTH),
    Case(2, 32, 17, FP16, (paper_start, residual_start)),
    Case(3, 35, 9, FP16, (residual_start,)),
    Case(4, 20, 5, BF16, BOTH),
    Case(2, 64, 8, FP16, (paper_start,), True),
    Case(3, 96, 3, BF16, (paper_start,), True),
    Case(4, 32, 5, FP32, (range_start,), True),
]
REAL = [
    Case(bits, inputs, 1000, dtype, BOTH)
    for bits, (inputs, dtype) in itertools.product(
        (1, 2, 3, 4), ((32, BF16), (64, FP16), (100, FP32), (128, BF16), (256, BF16))
    )
]
REAL += [Case(2, 5, 100, BF16, BOTH), *(Case(bits, 64, 77, BF16, (paper_start,)) for bits in (2, 3))]
REAL += [Case(bits, inputs, 1000, BF16, BOTH, True) for bits in (2, 3, 4) for inputs in (32, 64, 96, 128, 256)]


def random_group(inputs: int, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W [g, N], H [g, g] of correlated inputs, damped, and its factor U."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4 * inputs, inputs, generator=generator)
    X += 2 * torch.randn(4 * inputs, 1, generator=generator) @ torch.randn(1, inputs, generator=generator)
    H = X.T @ X / len(X) + 0.01 * torch.eye(inputs)
    return torch.randn(inputs, rows, generator=generator), H, inverse_factor(H, torch.arange(inputs), 0.01)[0]


def compare_groups(case: Case, iterations: int, device: str) -> None:
    """Rounding breaks ties, and the rest of a row follows from that: most rows are the same, none is out of line."""
    W, _, U = (tensor.to(device) for tensor in random_group(case.inputs, case.rows, case.bits))
    arguments = (W, U, case.bits, iterations, 1e-6, case.dtype, case.starts)
    assign = chains.assign_chains if case.trellis else grid.assign_codes
    expected_codes, _, expected_E = grid.quantize_group(*arguments, assign)
    codes, c, E = triton_solver.quantize_group(*arguments, case.trellis)
    assert not case.trellis or is_path(codes.cpu(), case.bits)
    assert torch.equal(c, c.to(case.dtype).float())
    whiten = torch.linalg.solve_triangular(U.T, torch.eye(case.inputs, device=device), upper=False)
    W_hat = (grid.level_table(case.bits, W.device) @ c).gather(0, codes.long())
    torch.testing.assert_close(E, whiten @ (W - W_hat), rtol=1e-3, atol=1e-3 * whiten.abs().max().item())
    loss, expected_loss = E.square().sum(0), expected_E.square().sum(0)
    scale = (whiten @ W).square().sum(0)
    assert (loss <= 2 * expected_loss + 1e-3 * scale).all()
    assert abs(loss.sum() - expected_loss.sum()) <= 0.005 * expected_loss.sum() + 1e-5 * scale.sum()
    changed = (codes != expected_codes).any(0).sum()
    assert changed <= max(1, case.rows // 10)


def compare_descents(case: Case, device: str) -> None:
    W, H, _ = (tensor.to(device) for tensor in random_group(case.inputs, case.rows, case.bits))
    c = torch.randn(case.bits + 1, case.rows, generator=torch.Generator().manual_seed(1)).to(device)
    table = grid.level_table(case.bits, W.device)
    paths = random_paths(case.bits, *W.shape, seed=2).to(device) if case.trellis else None
    start = torch.zeros(W.shape, dtype=torch.uint8, device=device) if paths is None else paths
    W_hat = (table @ c).gather(0, start.long())
    V = H @ (W - W_hat)
    arguments = (W_hat, V, H, c)
    expected = chains.descend_chains(paths, *arguments) if case.trellis else grid.descend_group(*arguments)
    expected_codes, expected_change = expected
    codes, change = triton_solver.descend_group(*arguments, paths)
    same = (codes == expected_codes).all(0)
    assert (~same).sum() <= max(1, case.rows // 10)
    torch.testing.assert_close(change[:, same], expected_change[:, same], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(W_hat + change, (table @ c).gather(0, codes.long()), rtol=1e-5, atol=1e-5)
    before, after = ((error * (H @ error)).sum(0) for error in (W - W_hat, W - W_hat - change))
    assert (after <= before * 1.0001 + 1e-4).all()
    assert not case.trellis or is_path(codes.cpu(), case.bits)


def random_paths(bits: int, inputs: int, rows: int, seed: int) -> torch.Tensor:
    codes = torch.randint(2**bits, (inputs, rows), generator=torch.Generator().manual_seed(seed))
    return to_path(codes.to(torch.uint8), bits)


def rows_are_solved_alone(device: str) -> None:
    """A row that no loss is finite for gives coefficients that are noticed; no other row, and no layout, matters."""
    W, _, U = (tensor.to(device) for tensor in random_group(16, 34, 0))
    W[3, 2] = torch.nan
    wide = torch.cat([U, torch.full_like(U, torch.nan)], dim=1)[:, :16]
    whole = triton_solver.quantize_group(W, wide, 2, 2, 1e-6, BF16, BOTH)
    part = triton_solver.quantize_group(W[:, 20:], U.T.contiguous().T, 2, 2, 1e-6, BF16, BOTH)
    assert (~whole[1].isfinite()).any(0).nonzero().flatten().tolist() == [2]
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[:, 20:], b)


def batches_are_solved_as_their_matrices(case: Case, device: str) -> None:
    """The second of two; sums of products may be rounded otherwise in a batch: most rows are the same."""
    parts = zip(*(random_group(case.inputs, case.rows, seed) for seed in range(2)), strict=True)
    W, H, U = (torch.stack(tensors).to(device) for tensors in parts)
    c = torch.randn(2, 3, case.bits + 1, case.rows, generator=torch.Generator().manual_seed(1)).to(device)[:, 1]
    wide = torch.cat([U, torch.full_like(U, torch.nan)], 2)[..., : case.inputs]
    rows = torch.cat([torch.full_like(W, torch.nan), W], 1)[:, case.inputs :]  # of a matrix with more inputs
    quantize = partial(
        triton_solver.quantize_group,
        bits=case.bits,
        iterations=1,
        alpha=1e-6,
        dtype=case.dtype,
        starts=case.starts,
        trellis=case.trellis,
    )
    sweep = [0.1 * rows, rows, H, c]
    if case.trellis:
        sweep.append(torch.stack([random_paths(case.bits, *W.shape[1:], seed) for seed in range(4)]).to(device)[::2])
    for solve, given in ((quantize, (rows, wide)), (triton_solver.descend_group, sweep)):
        for batch, alone in zip(solve(*given), solve(*(tensor[1] for tensor in given)), strict=True):
            same = torch.isclose(batch[1].float(), alone.float(), rtol=1e-3, atol=1e-4).all(0)
            assert same.float().mean() >= 0.8


@pytest.mark.parametrize(
    "case", [Case(2, 16, 5, BF16, (range_start,)), Case(2, 32, 5, BF16, (paper_start,), True)], ids=str
)
def test_interpreted_batches_are_solved_as_their_matrices(case: Case, interpreter: ProcessPoolExecutor):
    interpreter.submit(batches_are_solved_as_their_matrices, case, "cpu").result()


@pytest.mark.parametrize("case", TINY, ids=str)
def test_interpreted_groups_are_quantized_as_well_as_in_torch(case: Case, interpreter: ProcessPoolExecutor):
    interpreter.submit(compare_groups, case, 1 if case.trellis else 2, "cpu").result()


def compare_rounding(n: int, rows: int, dtype: torch.dtype, device: str) -> None:
    """Of numbers as far from two that can be stored, one or the other is taken: most rows are the same."""
    generator = torch.Generator().manual_seed(n)
    L = torch.randn(rows, n, n, generator=generator).tril(-1) / n + torch.eye(n)
    y = torch.randn(rows, n, generator=generator)
    steps = torch.rand(2, rows, n, generator=generator) / 64 + 0.01 if dtype == torch.int8 else None
    expected, expected_loss = rounding.nearest_plane(L, y, steps, dtype)
    for layout in (L, L.mT.contiguous().mT):
        on_device = [None if tensor is None else tensor.to(device) for tensor in (layout, y, steps)]
        c, loss = (tensor.cpu() for tensor in triton_rounding.nearest_plane(*on_device, dtype))
        same = torch.isclose(c, expected, rtol=0, atol=1e-6).all(-1)
        assert same.float().mean() > 0.9
        torch.testing.assert_close(loss[same], expected_loss[same], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(loss, expected_loss, rtol=0.2, atol=1e-7)


@pytest.mark.parametrize(("n", "dtype"), [(1, BF16), (12, FP16), (21, torch.int8), (32, FP32)])
def test_interpreted_rounding_knows_the_errors_before_it_as_torch_does(n, dtype, interpreter: ProcessPoolExecutor):
    interpreter.submit(compare_rounding, n, 10, dtype, "cpu").result()


@pytest.mark.parametrize("case", TINY, ids=str)
def test_interpreted_descent_takes_the_same_steps_as_in_torch(case: Case, interpreter: ProcessPoolExecutor):
    interpreter.submit(compare_descents, case, "cpu").result()


def test_interpreted_rows_are_solved_alone(interpreter: ProcessPoolExecutor):
    interpreter.submit(rows_are_solved_alone, "cpu").result()


class Launches(TorchDispatchMode):
    """Counts what would start a kernel on a GPU: operations of torch but views and allocations, and Triton's runs."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        self.count += not is_view and "empty" not in func.name() and "view" not in func.name()
        return func(*args, **(kwargs or {}))

    def run(self, *args, **kwargs):
        before = self.count
        for tensor in args:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.uint8:  # codes, to go on with
                tensor.zero_()
        self.count = before + 1


@contextmanager
def on_gpu():
    """Tensors of a CPU are solved by what a GPU's are."""
    solver = mock.patch.object(groups, "solver_for", return_value=triton_solver)
    nearest = mock.patch.object(groups, "nearest_plane_for", return_value=triton_rounding.nearest_plane)
    no_cpu = mock.patch.object(cpu_solver, "library", return_value=None)
    no_onednn = mock.patch.object(products, "quick", return_value=False)
    with solver, nearest, no_cpu, no_onednn:
        yield


@contextmanager
def counted():
    launches = Launches()
    with mock.patch.object(triton.JITFunction, "run", launches.run), on_gpu(), launches:
        yield launches


@pytest.mark.parametrize(("inputs", "trellis"), [(32, False), (128, False), (64, True)])
def test_a_group_and_a_pass_over_it_take_a_few_launches(inputs: int, trellis: bool):
    counts = []
    for many in (1, 3):
        W, H, U = random_group(many * inputs, 40, 0)
        order = group_aware_order(H.diagonal(), inputs, WORD if trellis else 1)
        with counted() as launches:
            one_pass(W, U, order, 2, 10, 1e-6, BF16, BOTH, trellis)
        counts.append(launches.count)
    assert counts[1] - counts[0] <= 2 * 8
    with counted() as launches:
        groups.quantize_group(W[:inputs], U[:inputs, :inputs], 2, 10, 1e-6, BF16, BOTH, trellis)
    assert launches.count <= 3


@pytest.mark.parametrize("trellis", [False, True])
def test_a_sweep_of_descent_over_a_group_is_one_launch(trellis: bool):
    W, H, _ = random_group(100, 40, 0)
    c, paths = torch.zeros(3, 40), torch.zeros(100, 40, dtype=torch.uint8)
    with counted() as launches:
        groups.descend_group(W[:64], W[:64], H[:64, :64], c, paths[:64] if trellis else None)
    assert launches.count == 1


def refinement_launches(inputs: int, groups_count: int, dtype: torch.dtype, trellis: bool) -> int:
    """Launches of a round of refinement, all rows at once."""
    K = inputs * groups_count
    W, H, _ = random_group(K, 40, 0)
    codes, c = torch.zeros(K, 40, dtype=torch.uint8), torch.zeros(groups_count, 3, 40)
    with counted() as launches:
        refine(codes, c, torch.zeros(40), W, H @ W, H, inputs, 1, 1e-6, dtype, trellis)
    return launches.count


@pytest.mark.parametrize(("dtype", "trellis"), [(BF16, False), (torch.int8, False), (BF16, True)])
def test_a_refinement_launches_a_few_kernels_for_each_group_and_none_for_each_column(dtype, trellis: bool):
    assert refinement_launches(64, 4, dtype, trellis) == refinement_launches(32, 4, dtype, trellis)
    per_group = (refinement_launches(32, 4, dtype, trellis) - refinement_launches(32, 2, dtype, trellis)) / 2
    assert per_group <= SWEEPS * 8 + 3 + 24, "each sweep 8, W_hat 3, the joint equations the rest"


@pytest.mark.parametrize(("coefficient_bits", "trellis"), [(8, False), (16, False), (8, True)])
def test_eight_matrices_take_the_launches_of_one(coefficient_bits: int, trellis: bool):
    W, H = (torch.stack(tensors) for tensors in zip(*[random_group(128, 40, i)[:2] for i in range(8)], strict=True))
    counts = []
    for w, h in ((W[0].T, H[0]), (W.mT, H)):
        with counted() as launches:
            quantize_linear(w, h, 2, 32, coefficient_bits, trellis=trellis)
        counts.append(launches.count)
    assert counts[0] <= counts[1] <= counts[0] + 2, "two operands are copied together"


def test_groups_that_no_kernel_holds_are_left_to_torch():
    assert triton_solver.supports(4, 256, BOTH)
    assert not triton_solver.supports(4, 257, BOTH)
    assert not triton_solver.supports(5, 256, BOTH)
    assert not triton_solver.supports(4, 256, (grid.residual_planes,))
    assert triton_solver.supports(2, 32, BOTH, trellis=True)
    assert not triton_solver.supports(1, 32, BOTH, trellis=True)
    assert not triton_solver.supports(2, 48, BOTH, trellis=True)
    with mock.patch.object(groups, "triton_solver", return_value=triton_solver):
        cuda = torch.device("cuda")
        assert groups.solver_for(cuda, 4, 256, BOTH) is triton_solver
        assert groups.takes_batches(cuda, 4, 256, BOTH, trellis=True)
        assert not groups.takes_batches(cuda, 5, 256, BOTH, trellis=True)
        assert groups.solver_for(cuda, 4, 257, BOTH) is grid
        assert groups.solver_for(torch.device("meta"), 2, 64) is grid


def test_without_a_compiler_torch_solves_and_one_line_says_so(caplog):
    error = RuntimeError("Failed to find C compiler")
    driver = type(triton.runtime.driver)
    with mock.patch.object(driver, "active", new_callable=mock.PropertyMock, side_effect=error):
        assert groups.triton_solver.__wrapped__() is None
    (record,) = caplog.records
    assert "Failed to find C compiler" in record.getMessage()


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL, ids=str)
def test_groups_on_a_gpu_are_quantized_as_well_as_in_torch(case: Case):
    compare_groups(case, 10, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL, ids=str)
def test_descent_on_a_gpu_takes_the_same_steps_as_in_torch(case: Case):
    compare_descents(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "dtype"), [(1, BF16), (72, torch.int8), (384, torch.int8), (1400, FP16)])
def test_rounding_on_a_gpu_knows_the_errors_before_it_as_torch_does(n: int, dtype: torch.dtype):
    compare_rounding(n, 40, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL, ids=str)
def test_batches_on_a_gpu_are_solved_as_their_matrices(case: Case):
    batches_are_solved_as_their_matrices(case, "cuda")


@pytest.mark.gpu
def test_rows_on_a_gpu_are_solved_alone():
    rows_are_solved_alone("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("trellis", [False, True])
def test_a_gpu_s_groups_are_solved_by_a_few_kernels(trellis: bool):
    from benchmarks.gpu_solver import kernels  # imports transformers, which no other test here needs

    W, H, U = (tensor.cuda() for tensor in random_group(128, 1000, 0))
    c, paths = torch.zeros(3, 1000, device="cuda"), torch.zeros_like(W, dtype=torch.uint8) if trellis else None
    assert kernels(lambda: groups.quantize_group(W, U, 2, 10, 1e-6, BF16, BOTH, trellis)) in range(9)
    assert kernels(lambda: groups.descend_group(W, W, H, c, paths)) in (0, 1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize(("rounds", "dtype"), [(0, BF16), (1, BF16), (1, torch.int8)])
def test_nothing_on_a_gpu_waits_for_the_host(rounds: int, dtype: torch.dtype, trellis: bool):
    W, H, U = (tensor.cuda() for tensor in random_group(160, 100, 0))
    order = group_aware_order(H.diagonal(), 64, WORD if trellis else 1)

    def solve() -> None:
        found = one_pass(W, U, order, 2, 3, 1e-6, BF16, BOTH, trellis)
        refine(*found, W, H @ W, H, 64, rounds, 1e-6, dtype, trellis)

    solve()  # compiles
    try:
        torch.cuda.set_sync_debug_mode("error")
        solve()
    finally:
        torch.cuda.set_sync_debug_mode("default")
