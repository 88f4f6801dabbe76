"""What of a model is solved, and what is left alone: in solver, bytes and config.json, and in those who load it."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, UnquantizedLinearMethod

import bpdq_quantizer
from bpdq_kernels import dequantize
from bpdq_kernels.patterns import matches
from bpdq_quantizer.checkpoint.inspection import inspect
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model import activations
from bpdq_quantizer.model.activations import capture, capture_one, find_stages, run_batches
from bpdq_quantizer.model.residual import Reader
from bpdq_quantizer.model.weights import Weight, hooked, kept, weights_in
from bpdq_quantizer.run import pipeline
from tiny import load_tensors, tiny_model
from vllm_bpdq.checkpoint import check_folder
from vllm_bpdq.config import BPDQConfig
from vllm_bpdq.linear import BPDQLinearMethod

IDS = torch.arange(30)[None] * 7 % 380
SOME = ("re:.*k_proj", "model.layers.0.self_attn.q_proj", "re:.*1.mlp.down_proj")  # of a stage, and a whole one
BLOCK = ("re:model.layers.0.*",)
GATE_UP = ("re:.*mlp.(gate|up)_proj",)


class Model(nn.Module):
    """first and second read the same tensor; odd is reached twice, never not at all."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.odd, self.never = (nn.Linear(8, 8) for _ in range(4))
        self.inner = nn.ModuleList([nn.Linear(8, 4)])

    def forward(self, x):
        y = self.first(x) + self.second(x)
        return self.inner[0](self.odd(self.odd(y)))


def hooks_of(model):
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_stages_are_of_the_weights_asked_for():
    model, x = Model(), torch.randn(2, 3, 8)
    weights = weights_in(model, "block")
    assert list(weights) == ["block.first", "block.second", "block.odd", "block.never", "block.inner.0"]
    with pytest.raises(InputError, match=r"does not reach each weight of a block once: block\.odd, block\.never$"):
        find_stages(weights.values(), model, x)
    asked = [weights[f"block.{name}"] for name in ("inner.0", "second", "first")]
    stages = find_stages(asked, model, x)
    assert sorted(weight.name for weight in stages[0]) == ["block.first", "block.second"]
    assert [weight.name for weight in stages[1]] == ["block.inner.0"]


def test_a_weight_gives_its_inputs_and_the_gradients_of_its_outputs():
    model, x = Model(), torch.randn(2, 3, 8)
    weight = weights_in(model)["inner.0"]
    reads, output = capture([Reader(weight)], model, x)
    assert torch.equal(nn.functional.linear(reads["inner.0"].x, weight.matrix, weight.linear.bias), output)
    gradients = []
    with hooked([weight.on_gradient(gradients.append)]):
        (model(x) * 3).sum().backward()
    assert torch.equal(gradients[0], torch.full((2, 3, 4), 3.0))


def test_what_is_assigned_is_what_later_weights_see():
    model, x = Model(), torch.randn(2, 3, 8)
    weights = weights_in(model)
    weights["odd"].assign(torch.zeros(8, 8))
    assert torch.equal(capture_one(Reader(weights["inner.0"]), model, x).x, model.odd.bias.expand(2, 3, 8))


@pytest.mark.parametrize(
    "call",
    [
        find_stages,
        lambda weights, *args: capture(map(Reader, weights), *args),
        lambda weights, *args: capture_one(Reader(weights[-1]), *args),
    ],
)
def test_hooks_are_removed_when_a_pass_fails(call):
    model = Model()
    weights = [weight for name, weight in weights_in(model).items() if name in ("first", "inner.0")]
    before = hooks_of(model)
    with pytest.raises(RuntimeError):
        call(weights, model, torch.randn(2, 3, 5))
    assert hooks_of(model) == before


def test_batches_become_what_a_pass_makes_of_them():
    batches = [torch.ones(1, 2), torch.zeros(2, 2)]
    run_batches([lambda batch: batch + 1, lambda batch: batch - 1], batches)
    assert [batch.tolist() for batch in batches] == [[[2, 2]], [[-1, -1], [-1, -1]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("weights") / "model", "qwen2")


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory, text):
    """`quantize` with patterns of weights that are left alone, once for each of its arguments."""
    made = {}

    def quantize(left_alone, at_once=True, **options):
        key = str((left_alone, at_once, options))
        if key not in made:
            small = {"bits": 2, "group_size": 64, "calibration": text, "samples": 6, "seq_len": 32, "iterations": 2}
            out = tmp_path_factory.mktemp("weights") / "out"
            with pytest.MonkeyPatch.context() as patch:
                if not at_once:
                    patch.setattr(activations, "ACTIVATION_BYTES", 1)
                made[key] = out, bpdq_quantizer.quantize(str(model), out, ignore=left_alone, **(small | options))
        return made[key]

    return quantize


CASES = [
    (SOME, {}),
    (BLOCK, {}),
    (SOME, {"at_once": False}),
    (BLOCK, {"at_once": False}),
    (SOME, {"target_bpw": 2.9, "head_bits": 4}),
    (BLOCK, {"target_bpw": 2.9}),
    (SOME, {"tune": "model", "tune_steps": 2}),
    (GATE_UP, {"kv_cache_scales": True}),
]


@pytest.mark.parametrize(("left_alone", "options"), CASES)
def test_weights_that_are_left_alone_stay_in_16_bits(model, quantized, left_alone, options):
    out, report = quantized(left_alone, **options)
    before, after = load_tensors(model), load_tensors(out)
    names = list(weights_in(AutoModelForCausalLM.from_pretrained(model).model.layers, "model.layers"))
    alone = [name for name in names if any(matches(name, pattern) for pattern in left_alone)]
    assert 0 < len(alone) < len(names)
    head = [] if "head_bits" in options else ["lm_head"]
    for name in alone:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    assert {name.removesuffix(".B") for name in after if name.endswith(".B")} - {"lm_head"} == set(names) - set(alone)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert sorted(config["ignore"]) == sorted([*alone, *head])
    assert {layer["name"] for layer in report["layers"]} - {"lm_head"} == set(names) - set(alone)
    found = inspect(out)
    assert found["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    if "target_bpw" in options:
        layers = [layer for layer in report["layers"] if layer["name"] != "lm_head"]
        assert pipeline.mean_bits(layers) <= options["target_bpw"]


@pytest.mark.parametrize(("left_alone", "options"), CASES)
def test_transformers_computes_what_the_checkpoint_says(model, quantized, left_alone, options):
    out, report = quantized(left_alone, **options)
    expected = AutoModelForCausalLM.from_pretrained(model)
    after = load_tensors(out)
    for layer in report["layers"]:
        name, width = layer["name"], layer["in_features"]
        W = dequantize(after[f"{name}.B"], after[f"{name}.c"], layer["group_size"], width, after.get(f"{name}.s"))
        weights_in(expected)[name].assign(W)
    with torch.no_grad():
        found, logits = (m(IDS).logits for m in (AutoModelForCausalLM.from_pretrained(out), expected))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-3)


def test_more_is_left_of_the_16_bit_model(model, quantized):
    """What is left alone is not lost in calibration either: less of the model is damaged."""
    original = AutoModelForCausalLM.from_pretrained(model)
    errors = {}
    for left_alone in ((), BLOCK):
        found = AutoModelForCausalLM.from_pretrained(quantized(left_alone)[0])
        with torch.no_grad():
            errors[left_alone] = (found(IDS).logits - original(IDS).logits).square().mean().item()
    assert errors[BLOCK] < 0.9 * errors[()]


def test_a_target_size_counts_what_is_left_alone(quantized):
    out, _ = quantized(GATE_UP, target_size="1180KB")
    size = sum(tensor.nbytes for tensor in load_tensors(out).values())
    assert 0.97 * 1_180_000 < size <= 1_180_000


def test_vllm_takes_it(quantized):
    out, _ = quantized(GATE_UP)
    config = AutoConfig.from_pretrained(out)
    quant = BPDQConfig.from_config(config.quantization_config)
    check_folder(out, config, quant.format)
    quant.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    method = partial(quant.get_quant_method, prefix="model.layers.0.mlp.gate_up_proj")
    merged, plain = (cls.__new__(cls) for cls in (MergedColumnParallelLinear, ReplicatedLinear))
    assert isinstance(method(merged), UnquantizedLinearMethod)
    assert isinstance(quant.get_quant_method(plain, "model.layers.0.mlp.down_proj"), BPDQLinearMethod)


@pytest.mark.parametrize(
    ("ignore", "message"),
    [
        (["model.layers.0.mlp.gate"], "--ignore model.layers.0.mlp.gate: no Linear of the blocks has such a name"),
        (["re:.*"], "nothing is left to quantize"),
        (["re:("], "--ignore: the pattern '.' is not a regular expression"),
        (["re:(.*.*)*" + "x" * 1000], "--ignore: the pattern .* is too complex"),
    ],
)
def test_what_cannot_be_ignored_is_named_before_any_work(model, tmp_path, text, ignore, message):
    with pytest.raises(InputError, match=message):
        bpdq_quantizer.quantize(model, tmp_path / "out", calibration=text, samples=2, seq_len=32, ignore=ignore)
    assert not list(tmp_path.iterdir())


KEPT = ("linear_attn.a_proj", "linear_attn.b_proj", "self_attn.kv_b_proj", "mlp.gate", "mixer.dt_proj")
SOLVED = ("self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "mlp.gate_proj", "mixer.in_proj")


def test_gates_of_states_and_routers_are_kept_and_no_other_names():
    parent = nn.ModuleDict({"wide": nn.Linear(64, 64)})
    weights = {name: Weight(name, parent, "wide") for name in (f"model.layers.0.{end}" for end in (*KEPT, *SOLVED))}
    assert kept(weights).keys() == {f"model.layers.0.{end}" for end in KEPT}
