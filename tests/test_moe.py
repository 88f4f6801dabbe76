"""The experts' op gives what dense matrices of the dequantized weights give, for experts that tokens are routed to."""

from typing import NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpdq_kernels import Activation, PreparedExperts, cpu, dequantize, moe, prepare_experts
from bpdq_kernels.activation import NAMES
from bpdq_kernels.layout import GROUP_SIZES, Stored
from bpdq_kernels.moe import moe_anywhere
from cpu_kernels import ISAS, using
from products import random_stored

SILU = Activation("silu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}  # of a token's length


class Experts(NamedTuple):
    """One matrix of each expert, as stored and dense [E, N, K] fp32."""

    stored: Stored
    dense: torch.Tensor
    group_size: int

    def prepared(self) -> PreparedExperts:
        return prepare_experts(self.stored, self.group_size, self.dense.shape[2])


def random_experts(
    count: int, k: int, group: int, n: int, in_features: int, dtype: torch.dtype, seed: int, trellis: bool = False
) -> Experts:
    layers = [random_stored(k, group, n, in_features, dtype, seed + i, trellis) for i in range(count)]
    stored = Stored(*(None if t[0] is None else torch.stack(t) for t in zip(*layers, strict=True)))
    return Experts(stored, torch.stack([dequantize(B, c, group, in_features, s) for B, c, s in layers]), group)


class Case(NamedTuple):
    """Arguments of `moe`."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    up: Experts
    down: Experts
    activation: Activation
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    weights_on_input: bool = False

    def prepared(self) -> "Case":
        return self._replace(up=self.up.prepared(), down=self.down.prepared())

    def run(self) -> torch.Tensor:
        return moe(*self.prepared())

    def run_in_python(self) -> torch.Tensor:
        case = self.prepared()
        biases = case.up_bias, case.down_bias
        matrices = (*case.up, *case.down, *biases, *case.activation, case.weights_on_input)
        return moe_anywhere(case.x, case.weights, case.ids, *matrices)


def run_on(isa: str | None, case: Case) -> torch.Tensor:
    """The op of an instruction set, which is the same from Python; or what it is without a compiler."""
    if isa is None:
        with mock.patch.object(cpu, "library", return_value=None):
            return case.run_in_python()
    with using(isa):
        y = case.run()
        assert torch.equal(y, case.run_in_python())
    return y


def formula(activation: Activation, h: torch.Tensor) -> torch.Tensor:
    """The activation in fp64, as its own source writes it."""
    functions = {
        "silu": lambda v: v / (1 + torch.exp(-v)),
        "gelu": lambda v: v / 2 * (1 + torch.erf(v / 2**0.5)),
        "gelu_tanh": lambda v: v / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
        "relu2": lambda v: v.clamp_min(0) ** 2,
    }
    if activation.name.endswith("_no_mul"):
        return functions[activation.name.removesuffix("_no_mul")](h)
    inner = h.shape[-1] // 2
    gate = torch.minimum(h[..., :inner], torch.tensor(activation.limit))
    up = torch.maximum(torch.minimum(h[..., inner:], torch.tensor(activation.limit)), -torch.tensor(activation.limit))
    if activation.name == "swigluoai":
        return (up + 1) * gate / (1 + torch.exp(-activation.alpha * gate))
    return functions[activation.name](gate) * up


def expected(case: Case) -> torch.Tensor:
    """[T, H] fp64: every expert's output for every token, weighted where the token chose it."""
    x, zero = case.x.double(), torch.zeros(1, dtype=torch.float64)
    y = torch.zeros_like(x)
    for e, (up, down) in enumerate(zip(case.up.dense.double(), case.down.dense.double(), strict=True)):
        up_bias, down_bias = (zero if bias is None else bias[e].double() for bias in (case.up_bias, case.down_bias))
        for a in range(case.ids.shape[1]):
            weight = torch.where(case.ids[:, a : a + 1] == e, case.weights[:, a : a + 1].double(), 0)
            chosen = weight != 0
            before, after = (weight, chosen) if case.weights_on_input else (chosen, weight)
            y += after * (formula(case.activation, (before * x) @ up.T + up_bias) @ down.T + down_bias)
    return y


def assert_experts(case: Case, y: torch.Tensor) -> None:
    """y is `expected`, up to rounding in x's dtype; exactly 0 for tokens without an expert of ours."""
    assert y.dtype == case.x.dtype
    assert y.shape == case.x.shape
    exact = expected(case)
    error = (y.double() - exact).norm(dim=1)
    assert (error <= TOLERANCE[y.dtype] * exact.norm(dim=1)).all(), (error / exact.norm(dim=1)).max()


def random_case(
    tokens: int,
    choices: int,
    hidden: int,
    inner: int,
    count: int = 5,
    k: int = 2,
    groups: tuple[int, int] = (64, 64),
    c_dtype: torch.dtype = torch.int8,
    dtype: torch.dtype = torch.float32,
    activation: Activation = SILU,
    biases: bool = False,
    weights_on_input: bool = False,
    seed: int = 0,
    ids_dtype: torch.dtype = torch.int32,
    trellises: tuple[bool, bool] = (False, False),
) -> Case:
    """Ids of all experts but the last, which none chooses, and of some that are not here."""
    outputs = 2 * inner if activation.is_gated else inner
    up = random_experts(count, k, groups[0], outputs, hidden, c_dtype, seed, trellises[0])
    down = random_experts(count, k, groups[1], hidden, inner, c_dtype, seed + 100, trellises[1])
    torch.manual_seed(seed)
    here = torch.rand(tokens, count - 1).argsort(1)
    ids = torch.cat([here, torch.tensor([-1, count, 1 << 20]).expand(tokens, -1)], 1)
    ids = ids[:, torch.randperm(ids.shape[1])[:choices]].to(ids_dtype)
    x = (0.1 * torch.randn(tokens, hidden)).to(dtype)
    up_bias, down_bias = (torch.randn(count, n).to(dtype) for n in (outputs, hidden)) if biases else (None, None)
    weights = 0.1 + torch.rand(tokens, choices)
    return Case(x, weights, ids, up, down, activation, up_bias, down_bias, weights_on_input)


@pytest.mark.parametrize("isa", [*ISAS, None])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_experts_give_what_their_dense_matrices_give(isa, data):
    """On every instruction set, and without a compiler."""
    case = random_case(
        tokens=data.draw(st.sampled_from([1, 2, 5, 9, 33, 70])),
        choices=data.draw(st.integers(1, 4)),
        hidden=data.draw(st.integers(16, 150)),
        inner=data.draw(st.integers(16, 150)),
        count=data.draw(st.integers(4, 7)),
        k=data.draw(st.integers(1, 4)),
        groups=(data.draw(st.sampled_from(GROUP_SIZES)), data.draw(st.sampled_from(GROUP_SIZES))),
        c_dtype=data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.int8])),
        dtype=data.draw(st.sampled_from(DTYPES)),
        activation=Activation(data.draw(st.sampled_from(NAMES)), limit=data.draw(st.sampled_from([float("inf"), 1.5]))),
        biases=data.draw(st.booleans()),
        weights_on_input=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 9)),
        ids_dtype=data.draw(st.sampled_from([torch.int32, torch.int64])),
    )
    assert_experts(case, run_on(isa, case))


@pytest.mark.parametrize("isa", [*ISAS, None])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "groups", "c_dtype", "trellises"),
    [
        (1, (32, 256), torch.int8, (True, True)),
        (2, (128, 64), torch.int8, (True, True)),
        (3, (64, 32), torch.float16, (True, True)),
        (2, (128, 128), torch.bfloat16, (True, False)),
        (3, (64, 64), torch.int8, (False, True)),
    ],
)
def test_experts_of_trellis_coded_planes_too(isa, dtype, k, groups, c_dtype, trellises):
    """Of either matrix or both; many experts get one token, some get many."""
    case = random_case(90, 2, 160, 96, 8, k, groups, c_dtype, dtype, biases=True, trellises=trellises)
    case.ids[20:] = case.ids[20:].clamp_max(1)
    assert_experts(case, run_on(isa, case))


@pytest.mark.parametrize("name", NAMES)
def test_every_activation(name):
    case = random_case(3, 2, 64, 48, activation=Activation(name, alpha=1.3, limit=0.8), biases=True)
    assert_experts(case, case.run())


def test_a_rank_without_experts_of_a_token_gives_zeros():
    case = random_case(4, 2, 64, 48, biases=True)
    y = case._replace(ids=torch.full_like(case.ids, -1)).run()
    assert torch.equal(y, torch.zeros_like(case.x))


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(tokens, dtype):
    case = random_case(tokens, 3, 64, 48, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(case.run())
    torch.set_num_threads(1)
    assert all(torch.equal(y, results[0]) for y in results[1:])


@pytest.mark.parametrize("weights_on_input", [False, True])
def test_more_tokens_than_are_taken_at_once(weights_on_input):
    case = random_case(2060, 2, 32, 16, biases=True, weights_on_input=weights_on_input)
    assert_experts(case, case.run())


@pytest.mark.parametrize("how", ["columns apart", "rows apart", "transposed"])
def test_strided_tokens(how):
    case = random_case(5, 3, 64, 48)
    strides = {
        "columns apart": torch.stack([case.x, case.x + 1], -1)[..., 0],
        "rows apart": torch.cat([case.x, case.x + 1], 1)[:, :64],
        "transposed": case.x.T.contiguous().T,
    }
    case = case._replace(ids=case.ids.T.contiguous().T, weights=case.weights.T.contiguous().T)
    assert_experts(case, case._replace(x=strides[how]).run())


@pytest.mark.parametrize("c_dtype", [torch.bfloat16, torch.int8])
def test_prepared_experts_are_the_size_of_stored_ones(c_dtype):
    stored = random_experts(3, 2, 64, 96, 80, c_dtype, 0).stored
    prepared = prepare_experts(stored, 64, 80)
    assert (prepared.planes.nbytes, prepared.coefficients.nbytes) == (stored.B.nbytes, stored.c.nbytes)


def test_padding_past_the_inputs_changes_nothing():
    case = random_case(5, 3, 64, 48)
    B, c, s = case.up.stored
    padded = Stored(torch.nn.functional.pad(B, (0, 0, 0, 0, 0, 3), value=-1), c, s)
    assert torch.equal(case._replace(up=case.up._replace(stored=padded)).run(), case.run())


def test_no_tokens_give_no_rows():
    case = random_case(1, 2, 64, 48)
    assert case._replace(x=case.x[:0], weights=case.weights[:0], ids=case.ids[:0]).run().shape == (0, 64)


def test_the_order_of_tokens_changes_none():
    case = random_case(40, 3, 64, 48)
    order = torch.randperm(40)
    shuffled = case._replace(x=case.x[order], weights=case.weights[order], ids=case.ids[order])
    torch.testing.assert_close(shuffled.run(), case.run()[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("c_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("biases", [True, False])
def test_the_op_keeps_torchs_contract(c_dtype, biases):
    case = random_case(3, 2, 64, 48, c_dtype=c_dtype, biases=biases)
    arguments = (
        *(case.x, case.weights, case.ids, *case.up.prepared(), *case.down.prepared()),
        *(case.up_bias, case.down_bias, *case.activation, False),
    )
    assert set(torch.library.opcheck(torch.ops.bpdq.moe.default, arguments).values()) == {"SUCCESS"}


def test_compiled_for_any_number_of_tokens():
    case = random_case(4, 2, 64, 48, activation=Activation("swigluoai"))
    up, down = case.up.prepared(), case.down.prepared()
    run = torch.compile(lambda x, weights, ids: moe(x, weights, ids, up, down, case.activation), dynamic=True)
    for tokens in (4, 3):
        x, weights, ids = (t[:tokens] for t in (case.x, case.weights, case.ids))
        assert torch.equal(run(x, weights, ids), moe(x, weights, ids, up, down, case.activation))


def test_inputs_that_want_a_gradient_get_none():
    case = random_case(2, 2, 64, 48)
    assert not case._replace(x=case.x.requires_grad_()).run().requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": Activation("tanh")}, "activation 'tanh' is not supported"),
        ({"activation": Activation("relu2_no_mul")}, "don't fit"),
        ({"x": torch.zeros(3, 65)}, "64"),
        ({"x": torch.zeros(2, 64)}, "2 tokens"),
        ({"weights": torch.zeros(3, 1)}, "3 tokens"),
        ({"x": torch.zeros(3, 64, dtype=torch.int8)}, r"x in torch\.int8 is not supported: use float32"),
        ({"up_bias": torch.zeros(5, 8)}, r"bias \(5, 8\) is not \(5, 96\)"),
        ({"down_bias": torch.zeros(64)}, r"bias \(64,\) is not \(5, 64\)"),
        ({"down": random_experts(4, 2, 64, 64, 48, torch.int8, 0)}, "5 experts don't fit second matrices of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        random_case(3, 2, 64, 48)._replace(**change).run()


def test_coefficients_that_do_not_fit_are_refused():
    stored = random_experts(3, 2, 64, 32, 64, torch.int8, 0).stored
    with pytest.raises(ValueError, match="don't describe"):
        prepare_experts(stored, 32, 64)
    with pytest.raises(ValueError, match="group_size 48"):
        prepare_experts(stored, 48, 64)
