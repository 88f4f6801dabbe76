"""Trellis-coded planes: how they are derived, and the paths that the solver finds."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpdq_kernels.layout import check_layer, pack_codes, unpack
from bpdq_kernels.reference import dequantize
from bpdq_kernels.trellis import chain_order, multiplied, shifted, stored
from bpdq_quantizer.algorithm import chains, cpu_solver, grid, refine
from bpdq_quantizer.algorithm.order import group_aware_order
from bpdq_quantizer.algorithm.solver import quantize_linear
from tests.test_cpu_solver import ISAS, STARTS, random_group, random_layer, using
from tests.test_solver import problem

CHAINS = st.tuples(st.sampled_from([32, 64, 96]), st.integers(1, 40), st.integers(0, 2**20))  # inputs, outputs, seed
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9))  # words, planes, outputs


def words(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(seed)).int()


def in_chains(B: torch.Tensor) -> torch.Tensor:
    """Bits of B [words, k, N] by their places, [k, N, words, 32]."""
    bits = unpack(B, 32 * len(B))
    return bits[..., chain_order(bits.shape[-1])].unflatten(-1, (-1, 32))


def test_a_chain_is_a_word_with_even_inputs_first():
    order = chain_order(96)
    assert order.view(3, 32)[1].tolist() == [*range(32, 64, 2), *range(33, 64, 2)]
    assert torch.equal(order.sort()[0], torch.arange(96))


@pytest.mark.parametrize("places", range(1, 17))
def test_bits_are_shifted_along_their_chain(places: int):
    x = words((4, 1, 9), places)
    expected = torch.nn.functional.pad(in_chains(x)[..., :-places], (places, 0))
    assert torch.equal(in_chains(shifted(x, places)), expected)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 2**20))
def test_derived_planes_are_those_of_the_definition(shape, seed):
    B = words(shape, seed)
    x, *free = in_chains(B)
    z0, z1, *same = in_chains(multiplied(B))
    earlier = torch.nn.functional.pad(x, (2, 0))
    assert torch.equal(z0, earlier[..., 1:-1])
    assert torch.equal(z1, x ^ earlier[..., :-2])
    assert all(torch.equal(*planes) for planes in zip(free, same, strict=True))
    assert torch.equal(stored(multiplied(B)), B)


def is_path(codes: torch.Tensor, bits: int) -> bool:
    """Whether codes [K, N] in chains' order are those of stored planes."""
    codes = codes.mT[:, chain_order(len(codes)).argsort()]
    B = pack_codes(codes, bits)
    return torch.equal(multiplied(stored(B)), B)


def slow_path(base: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The least squared error [N] of all paths for base [n, N], by trying all."""
    least = torch.full_like(base[0], torch.inf)
    for path in itertools.product((0, 1), repeat=len(base)):
        x = (0, 0, *path)
        cost = torch.zeros_like(least)
        for i, w in enumerate(base):
            subset = x[i + 1] + 2 * (x[i + 2] ^ x[i])
            cost += torch.stack([(w - level).square() for level in levels[subset::4]]).amin(0)
        least = torch.minimum(least, cost)
    return least


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 4), st.integers(1, 7), st.integers(0, 2**20))
def test_without_feedback_the_best_of_all_paths_is_found(bits, n, seed):
    generator = torch.Generator().manual_seed(seed)
    W, c = torch.randn(n, 9, generator=generator), torch.randn(bits + 1, 9, generator=generator)
    _, e, cost = chains.best_paths(W, c, torch.eye(n), lambda t, w, level: w - level, lambda t, w, e: e.square())
    torch.testing.assert_close(cost[0], slow_path(W, grid.level_table(bits, W.device) @ c))
    torch.testing.assert_close(cost[0], e.square().sum(0))


def test_the_cost_of_a_path_is_its_loss():
    W, _, U = random_group(96, 30, 0)
    c = torch.tensor([[0.3], [0.6], [1.2], [-1.0]]).expand(-1, 30)
    diagonal = U.diagonal()
    arguments = W, c, U / diagonal.unsqueeze(1), lambda t, w, level: w - level
    codes, _, costs = chains.best_paths(*arguments, lambda t, w, e: (e / diagonal[t]).square())
    W_hat = (grid.level_table(3, W.device) @ c).gather(0, codes.long())
    E = torch.linalg.solve_triangular(U.T, W - W_hat, upper=False)
    torch.testing.assert_close(costs.sum(0), E.square().sum(0))
    assert is_path(codes, 3)
    assert torch.equal(codes, chains.assign_chains(W, c, U, 3))


@pytest.mark.skipif(cpu_solver.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=30)
@given(CHAINS, st.integers(2, 4), st.sampled_from(STARTS), st.integers(1, 5))
def test_compiled_groups_are_as_good_as_in_torch(isa, shape, bits, starts, iterations):
    W, _, U = random_group(*shape)
    arguments = W, U, bits, iterations, 1e-6, torch.bfloat16, starts
    expected = grid.quantize_group(*arguments, chains.assign_chains)[2].square().sum(0)
    with using(isa):
        codes, c, E = cpu_solver.quantize_group(*arguments, trellis=True)
    W_hat = (grid.level_table(bits, W.device) @ c).gather(0, codes.long())
    whiten = torch.linalg.solve_triangular(U.T, torch.eye(len(U)), upper=False)
    torch.testing.assert_close(E, whiten @ (W - W_hat), rtol=1e-3, atol=1e-3 * whiten.abs().max().item())
    assert (E.square().sum(0) <= 2 * expected + 1e-3 * (whiten @ W).square().sum(0)).all()
    assert is_path(codes, bits)


@pytest.mark.skipif(cpu_solver.library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", ISAS)
@settings(deadline=None, max_examples=30)
@given(
    st.tuples(st.sampled_from([32, 96, 160]), st.integers(1, 90), st.integers(2, 4), st.sampled_from([32, 64, 128])),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_compiled_descent_takes_the_steps_of_torch_and_never_rises(isa, shape, sweeps, seed):
    codes, W, H = random_layer(shape, seed)
    bits, group_size = shape[2:]
    codes = to_path(codes, bits)
    generator = torch.Generator().manual_seed(seed + 1)
    c = torch.randn(-(-len(W) // group_size), bits + 1, W.shape[1], generator=generator)
    expected, expected_loss = refine.descend_in_torch(codes, c, W, H, group_size, sweeps, trellis=True)
    with using(isa):
        found, loss = refine.descend(codes, c, W, H, group_size, sweeps, trellis=True)
    rows = (found == expected).all(0)
    assert rows.float().mean() >= 0.9 or (~rows).sum() <= 1
    torch.testing.assert_close(loss[rows], expected_loss[rows], rtol=1e-3, atol=1e-4)
    before, after = (W - refine.dequantize_columns(x, c, group_size) for x in (codes, found))
    torch.testing.assert_close(loss, (after * (H @ after)).sum(0), rtol=1e-3, atol=1e-3)
    assert (loss <= (before * (H @ before)).sum(0) * 1.0001 + 1e-4).all()
    assert is_path(found, bits)


def to_path(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [K, N] in chains' order with z0 and z1 of some path."""
    order = chain_order(len(codes))
    B = multiplied(stored(pack_codes(codes.mT[:, order.argsort()], bits)))
    planes = unpack(B, len(codes))[..., order]
    return sum(plane << p for p, plane in enumerate(planes)).mT.contiguous()


def test_order_keeps_chains_together():
    diagonal = torch.rand(256, generator=torch.Generator().manual_seed(0))
    order = group_aware_order(diagonal, 128, 32)
    assert torch.equal(order.columns.view(-1, 32) % 32, torch.arange(32).expand(8, -1))
    first = order.columns.view(2, 4, 32)[0, 0]
    assert diagonal[first].amax() == diagonal.amax()
    assert torch.equal(group_aware_order(diagonal, 128).columns, group_aware_order(diagonal, 128, 1).columns)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_layer_is_solved_into_paths_that_lose_less(bits: int):
    W, H = problem(48, 192)
    plain = quantize_linear(W, H, bits, 64, 8)
    found = quantize_linear(W, H, bits, 64, 8, trellis=True)
    B = pack_codes(found.codes, bits + 1)
    assert torch.equal(multiplied(stored(B)), B)
    W_hat = refine.dequantize_columns(found.codes.mT, found.c.float() * found.s.float(), 64).mT
    error = (W - W_hat).double()
    torch.testing.assert_close(found.loss.double(), (error @ H.double() * error).sum(1), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(found.energy, plain.energy)
    assert found.loss.sum() < 0.95 * plain.loss.sum()


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("coefficient_bits", [8, 16])
def test_the_oracle_multiplies_derived_planes(bits: int, coefficient_bits: int):
    W, H = problem(40, 96)
    found = quantize_linear(W, H, bits, 64, coefficient_bits, trellis=True)
    planes = pack_codes(found.codes, bits + 1)
    expected = dequantize(planes, found.c, 64, 96, found.s)  # as if all were stored
    assert torch.equal(dequantize(stored(planes), found.c, 64, 96, found.s), expected)
    error = (W - expected).double()
    torch.testing.assert_close(found.loss.double(), (error @ H.double() * error).sum(1), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("planes", "inputs", "message"),
    [(4, 64, "4 bit-planes: 1 to 3 with a trellis"), (2, 48, "need a multiple of 32 inputs, not 48")],
)
def test_what_no_trellis_can_be_is_refused(planes: int, inputs: int, message: str):
    with pytest.raises(ValueError, match=message):
        check_layer(torch.zeros(2, planes, 8, dtype=torch.int32), torch.zeros(1, planes + 2, 8), 64, inputs)
