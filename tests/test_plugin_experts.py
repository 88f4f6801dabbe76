"""Loading BPDQ experts into vLLM's own layer of experts, over simulated ranks, without an engine."""

import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from math import inf
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from vllm.config import LoRAConfig
from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.models.mixtral import MixtralModel

import vllm_bpdq.experts
from bpdq_kernels.activation import Activation, activate
from bpdq_kernels.format import Format, Scheme
from expert_layers import DOWN, GATE, PARTS, PREFIX, UP, Rank, expert_layer
from ranks import become, config, finish, stored
from vllm_bpdq.config import BPDQConfig

HIDDEN, INNER, EXPERTS = 128, 192, 3
SILU = Activation("silu")
ONE = [Rank()]
TWO = [Rank(0, 2), Rank(1, 2)]
SPLIT = [Rank(0, 2, experts=True), Rank(1, 2, experts=True)]  # 2 experts and 1
RANKS = {"alone": ONE, "tensors": TWO, "experts": SPLIT}
IDS = torch.tensor([[0, 1], [2, 0], [1, -1], [2, 1], [0, 2]], dtype=torch.int32)


@pytest.fixture(params=RANKS.values(), ids=RANKS)
def ranks(request):
    return request.param


@cache
def experts(width: int = 16, bits: int = 2, group: int = 64, seed: int = 0) -> dict[tuple[int, str], tuple]:
    """Each expert's matrices, as stored and dense."""
    sizes = {GATE: (INNER, HIDDEN), UP: (INNER, HIDDEN), DOWN: (HIDDEN, INNER)}
    return {
        (i, part): stored(n, k, group, bits, seed=100 * seed + 10 * i + len(part), width=width)
        for i in range(EXPERTS)
        for part, (n, k) in sizes.items()
    }


@cache
def biases() -> dict[tuple[int, str], torch.Tensor]:
    torch.manual_seed(5)
    return {(i, part): torch.randn(HIDDEN if part == DOWN else INNER) for i in range(EXPERTS) for part in PARTS}


def tensors(matrices: dict[tuple[int, str], tuple]) -> Iterator[tuple[str, torch.Tensor]]:
    """As a model's loader hands them to a layer of experts."""
    for (number, part), (layer, _) in matrices.items():
        for kind, tensor in layer._asdict().items():
            if tensor is not None:
                yield f"{number}.{part}.{kind}", tensor


def loaded(
    rank: Rank, matrices: dict, biased: bool = False, quant: BPDQConfig | None = None, **settings
) -> RoutedExperts:
    width = 16 if matrices[0, UP][0].s is None else 8
    quant = quant or config(width=width)
    layer = expert_layer(quant, HIDDEN, INNER, EXPERTS, rank, biases=biased, **settings)
    weights = [*tensors(matrices)]
    weights += [(f"{i}.{part}.bias", bias) for (i, part), bias in biases().items() if biased]
    list(layer.load_weights(weights))
    return finish(layer)


def dense(matrices: dict, x, weights, activation=SILU, biased=False, on_input=False) -> torch.Tensor:
    """What the experts of `IDS` give, each alone."""
    y = torch.zeros_like(x)
    for t, choices in enumerate(IDS.tolist()):
        for a, i in enumerate(choices):
            if i < 0:
                continue
            before, after = (weights[t, a], 1) if on_input else (1, weights[t, a])
            bias = {part: biases()[i, part] if biased else None for part in PARTS}
            h = torch.cat([F.linear(before * x[t], matrices[i, part][1], bias[part]) for part in (GATE, UP)])
            y[t] += after * F.linear(activate(h, activation), matrices[i, DOWN][1], bias[DOWN])
    return y


def outputs(layers: list[RoutedExperts], x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, as vLLM reduces them."""
    return sum(layer.forward_modular(x, weights, IDS.clone()) for layer in layers)


def assert_same(y: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Up to rounding, of each token."""
    error = (y.float() - exact).norm(dim=1)
    assert (error <= tolerance * exact.norm(dim=1)).all(), error / exact.norm(dim=1)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(len(IDS), HIDDEN), torch.rand(IDS.shape)


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 128)])  # 192 inputs are 1.5 groups, 96 on each of two ranks
def test_the_ranks_together_give_what_the_experts_stand_for(ranks, width, bits, group):
    matrices, (x, weights) = experts(width, bits, group), inputs()
    layers = [loaded(rank, matrices, quant=config(bits, group, width)) for rank in ranks]
    assert_same(outputs(layers, x, weights), dense(matrices, x, weights))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", ["silu", "swigluoai", "gelu_tanh"])
def test_biases_count_once_and_the_activation_is_the_layers(ranks, name, on_input):
    matrices, (x, weights) = experts(), inputs()
    settings = {"activation": name, "apply_router_weight_on_input": on_input}
    layers = [loaded(rank, matrices, biased=True, **settings) for rank in ranks]
    expected = dense(matrices, x, weights, Activation(name, limit=7.0 if name == "swigluoai" else inf), True, on_input)
    assert_same(outputs(layers, x, weights), expected)


def test_offloaded_experts_go_back_to_host_memory(ranks, width):
    layer = expert_layer(config(width=width), HIDDEN, INNER, EXPERTS, ranks[0])
    list(layer.load_weights(tensors(experts(width))))
    for param in layer.parameters():
        param._vllm_is_uva_offloaded = True
    finish(layer)
    assert not any(hasattr(param, "_vllm_is_uva_offloaded") for param in layer.parameters())


def test_experts_without_a_gate_have_two_matrices(ranks):
    matrices, (x, weights) = {key: m for key, m in experts().items() if key[1] != GATE}, inputs()
    settings = {"activation": "relu2_no_mul", "names": (UP, DOWN, None)}
    layers = [loaded(rank, matrices, **settings) for rank in ranks]
    expected = torch.zeros_like(x)
    for t, choices in enumerate(IDS.tolist()):
        for a, i in enumerate(choices):
            if i >= 0:
                h = F.relu(x[t] @ matrices[i, UP][1].T) ** 2
                expected[t] += weights[t, a] * (h @ matrices[i, DOWN][1].T)
    assert_same(outputs(layers, x, weights), expected)


@pytest.mark.parametrize("model_dtype", [torch.float16, torch.bfloat16])
def test_coefficients_keep_the_precision_of_the_checkpoint(width, model_dtype):
    layer = loaded(ONE[0], experts(width), dtype=model_dtype)
    x, weights = inputs()
    assert layer.w13_c.dtype == layer.w2_c.dtype == (torch.bfloat16 if width == 16 else torch.int8)
    y, exact = outputs([layer], x.to(model_dtype), weights), dense(experts(width), x, weights)
    assert y.dtype == model_dtype
    assert_same(y, exact, 0.02)


def test_a_checkpoint_may_call_the_matrices_as_mixtral_does():
    matrices, (x, weights) = experts(), inputs()
    named = {GATE: "w1", UP: "w3", DOWN: "w2"}
    renamed = {(i, named[part]): matrix for (i, part), matrix in matrices.items()}
    for names in (matrices, renamed):  # those with our names are renamed by the model
        mapped = MixtralModel.hf_to_vllm_mapper.apply(tensors(names))
        layer = expert_layer(config(), HIDDEN, INNER, EXPERTS, names=("w1", "w2", "w3"))
        list(layer.load_weights(mapped))
        assert_same(outputs([finish(layer)], x, weights), dense(matrices, x, weights))


def test_what_did_not_arrive_is_named(ranks, width):
    """Of this rank's experts alone."""
    last = {16: "c", 8: "s"}[width]
    for rank in ranks:
        layer = expert_layer(config(width=width), HIDDEN, INNER, EXPERTS, rank)
        left_out = {f"0.{UP}.B", f"1.{DOWN}.{last}", f"2.{GATE}.c"}
        list(layer.load_weights((n, t) for n, t in tensors(experts(width)) if n not in left_out))
        mine = {name for name in left_out if int(name[0]) in layer.quant_method.numbers}
        with pytest.raises(ValueError, match=r"not in the checkpoint, though its config\.json says") as error:
            finish(layer)
        assert set(re.findall(r"experts\.(\d\.\w+\.\w)\b", str(error.value))) == mine
        assert PREFIX in str(error.value)


def test_a_bias_that_did_not_arrive_is_named():
    layer = expert_layer(config(), HIDDEN, INNER, EXPERTS, biases=True)
    list(layer.load_weights(tensors(experts())))
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.bias, .* and 5 more not in the checkpoint"):
        finish(layer)


def test_coefficients_that_are_not_finite_are_named(ranks, width):
    kind = "c" if width == 16 else "s"
    found = []
    for rank in ranks:
        layer = expert_layer(config(width=width), HIDDEN, INNER, EXPERTS, rank)
        for name, tensor in tensors(experts(width)):
            tensor = tensor.clone()
            if name == f"2.{UP}.{kind}":
                tensor[..., :] = torch.inf
            list(layer.load_weights([(name, tensor)]))
        if 2 in layer.quant_method.numbers:
            with pytest.raises(ValueError, match=rf"experts\.2\.{UP}\.{kind} holds NaN or infinity"):
                finish(layer)
            found.append(rank)
        else:
            finish(layer)
    assert found


@pytest.mark.parametrize("kind", ["B", "c", "bias"])
def test_a_tensor_that_does_not_fit_is_named(kind):
    layer = expert_layer(config(), HIDDEN, INNER, EXPERTS, TWO[0], biases=True)
    with pytest.raises(ValueError, match=rf"experts\.1\.{DOWN}\.{kind} is .*, expected "):
        list(layer.load_weights([(f"1.{DOWN}.{kind}", torch.zeros(5, 3, 7, dtype=torch.int32))]))


def test_a_share_that_starts_inside_a_word_is_refused():
    with pytest.raises(ValueError, match=r"experts.*down_proj: .* 48 of 96 inputs.*--tensor-parallel-size"):
        expert_layer(config(2, 32), HIDDEN, 96, EXPERTS, TWO[1])


def test_weights_in_use_are_loaded_over_by_a_reload_only(width):
    x, weights = inputs()
    layer = loaded(ONE[0], experts(width))
    with pytest.raises(ValueError, match=rf"experts\.0\.{GATE}: its weights are in use: .* reload_weights"):
        list(layer.load_weights(tensors(experts(width, seed=1))))
    assert_same(outputs([finish(layer)], x, weights), dense(experts(width), x, weights))


def test_layerwise_reload_replaces_the_weights_in_place(ranks, width):
    """vLLM's `reload_weights`, and waking from sleep level 2."""
    x, weights = inputs()
    for rank in ranks:
        layer = expert_layer(config(width=width), HIDDEN, INNER, EXPERTS, rank, biases=True)
        record_metadata_for_reloading(layer)
        plain = [(f"{i}.{part}.bias", bias) for (i, part), bias in biases().items()]
        list(layer.load_weights([*tensors(experts(width)), *plain]))
        finish(layer)
        addresses = [tensor.data_ptr() for tensor in layer.parameters()]
        initialize_layerwise_reload(layer)
        new = experts(width, seed=2)
        list(layer.load_weights([*tensors(new), *plain]))
        finalize_layerwise_reload(layer, None)
        assert addresses == [tensor.data_ptr() for tensor in layer.parameters()]
        fresh = loaded(rank, new, biased=True)
        assert torch.equal(outputs([layer], x, weights), outputs([fresh], x, weights))


def test_after_a_refused_reload_the_experts_answer_no_more(width):
    layer = expert_layer(config(width=width), HIDDEN, INNER, EXPERTS)
    record_metadata_for_reloading(layer)
    list(layer.load_weights(tensors(experts(width))))
    finish(layer)
    initialize_layerwise_reload(layer)
    list(layer.load_weights((n, t) for n, t in tensors(experts(width)) if n != f"1.{UP}.B"))
    with pytest.raises(ValueError, match=rf"experts\.1\.{UP}\.B not in the checkpoint"):
        finalize_layerwise_reload(layer, None)
    with pytest.raises(RuntimeError, match="a layer's weights are not loaded, as after a reload that was refused"):
        outputs([layer], *inputs())


def in_fp16(weights: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, t.half() if name.endswith(".c") else t) for name, t in weights)


def test_a_reload_that_would_round_coefficients_is_refused():
    layer = expert_layer(config(), HIDDEN, INNER, EXPERTS)
    record_metadata_for_reloading(layer)
    list(layer.load_weights(tensors(experts())))
    finish(layer)
    initialize_layerwise_reload(layer)
    message = r"experts\.\*\.c is torch\.float16, which a reload would round to torch\.bfloat16"
    with pytest.raises(ValueError, match=message):
        list(layer.load_weights(in_fp16(tensors(experts()))))


def test_experts_in_two_precisions_are_refused():
    layer = expert_layer(config(), HIDDEN, INNER, EXPERTS)
    weights = [*tensors(experts())]
    list(layer.load_weights([*weights[:-2], *in_fp16(weights[-2:])]))
    with pytest.raises(ValueError, match=rf"experts\.2\.{DOWN}\.c is torch\.float16, but other experts .*bfloat16"):
        finish(layer)


def test_dummy_weights_pass_the_checks_and_compute(width):
    layer = expert_layer(config(width=width), HIDDEN, INNER, EXPERTS, biases=True)
    DummyModelLoader.load_weights(None, layer, None)
    assert torch.isfinite(outputs([finish(layer)], *inputs())).all()


def test_nothing_that_was_loaded_is_kept_twice(width):
    layer = loaded(ONE[0], experts(width))
    method = layer.quant_method
    held = [t for m in (method.up, method.down) for t in method.prepared(layer, m) if isinstance(t, torch.Tensor)]
    assert sum(t.nbytes for t in layer.parameters()) == sum(t.nbytes for t in held)


def test_kernels_are_warmed_up_once_with_all_that_they_are_called_with(width, monkeypatch):
    """On a GPU, a specialization that loading leaves out is compiled while the first request waits."""
    warmed, called = [], []
    monkeypatch.setattr(vllm_bpdq.experts, "warm_up_experts", lambda *arguments: warmed.append(arguments))
    layer = loaded(ONE[0], experts(width), biased=True, apply_router_weight_on_input=True)
    finish(layer)
    monkeypatch.setattr(vllm_bpdq.experts, "moe", lambda x, weights, ids, *rest: called.append(rest))
    layer.forward_modular(*inputs(), IDS)
    ((up, down, activation, choices, *rest),) = warmed
    assert choices == IDS.shape[1]
    for ours, theirs in zip(
        (*up, *down, activation, *rest), (*called[0][0], *called[0][1], *called[0][2:]), strict=True
    ):
        assert ours is theirs or ours == theirs


def test_compiled_experts_share_one_graph_for_every_number_of_tokens(width):
    layer, graphs = loaded(SPLIT[0], experts(width), biased=True), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer.forward_modular, backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in 3, 5, 17, 60:
            x, w, ids = torch.randn(tokens, HIDDEN), torch.rand(tokens, 2), torch.randint(0, EXPERTS, (tokens, 2))
            torch.testing.assert_close(compiled(x, w, ids), layer.forward_modular(x, w, ids))
    assert len(graphs) == 1
    ops = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert ops.count(torch.ops.bpdq.moe) == 1


def test_experts_in_16_bits_are_vllms():
    quant = BPDQConfig(Format(Scheme(2, 64), ignore=("re:.*experts.*",)))
    layer = expert_layer(quant)
    assert {name for name, _ in layer.named_parameters()} == {"w13_weight", "w2_weight"}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("as_ignored", [True, False])
def test_experts_that_differ_are_refused(part, as_ignored):
    name = f"{PREFIX}.1.{part}"
    quant = BPDQConfig(Format(Scheme(2, 64), *(((name,),) if as_ignored else ((), {name: Scheme(3, 64)}))))
    found = "16-bit" if as_ignored else r"Scheme\(bits=3, .*\)"
    with pytest.raises(ValueError, match=rf"{PREFIX}: .* differently .*1\.{part} {found}.* ignore all of them"):
        expert_layer(quant)


@pytest.mark.parametrize(("model_type", "is_refused"), [("llama4", True), ("llama4_text", True), ("gpt_oss", False)])
def test_llama_4_has_the_experts_of_all_layers_in_bit_planes_or_of_none(model_type, is_refused):
    quant = BPDQConfig(Format(Scheme(2, 64), ignore=(r"re:model[.]layers[.]1[.].*experts",)))
    quant.hf_config = SimpleNamespace(model_type=model_type)
    expert_layer(quant)
    refused = pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts: vLLM takes the experts of all layers")
    with refused if is_refused else nullcontext():
        expert_layer(quant, prefix="model.layers.1.mlp.experts")


def test_an_activation_that_the_kernels_lack_is_refused():
    with pytest.raises(ValueError, match=rf"{PREFIX}: the activation swiglustep .* --ignore 're:.*experts.*'"):
        expert_layer(config(), activation="swiglustep")


@pytest.mark.parametrize(("targets", "is_refused"), [(None, True), (["experts"], True), (["q_proj"], False)])
def test_adapters_of_experts_are_refused(targets, is_refused):
    lora = LoRAConfig(max_lora_rank=8, target_modules=targets)
    refused = pytest.raises(ValueError, match=rf"{PREFIX}: .*--lora-target-modules")
    with refused if is_refused else nullcontext():
        expert_layer(config(), lora=lora)


def test_routers_stay_in_16_bits(monkeypatch):
    """vLLM's models ask for some of theirs."""
    become(monkeypatch, 0, 1)
    gate = GateLinear(HIDDEN, EXPERTS, quant_config=config(), prefix="model.layers.0.mlp.gate")
    assert isinstance(gate.quant_method, UnquantizedLinearMethod)


def test_experts_that_are_named_one_by_one_are_found_fast():
    """128 experts of 48 layers: as --target-bpw writes them."""
    prefixes = [f"model.layers.{n}.mlp.experts" for n in range(48)]
    names = [f"{prefix}.{i}.{part}" for prefix in prefixes for i in range(128) for part in PARTS]
    half = len(names) // 2
    quant = BPDQConfig(Format(Scheme(2, 64), tuple(names[:half]), dict.fromkeys(names[half:], Scheme(3, 64))))
    quant.apply_vllm_mapper(MixtralModel.hf_to_vllm_mapper.get_rename_mapper())
    layer = expert_layer(config(), experts=128)
    start = time.process_time()
    found = [quant._experts_scheme(layer, prefix) for prefix in prefixes]
    assert found == 24 * [None] + 24 * [Scheme(3, 64)]
    assert time.process_time() - start < 20
