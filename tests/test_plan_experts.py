"""`bpdq plan` for mixtures of experts: published models by hand, and every family's experts one by one.

tests/configs/ has the sizes of Qwen3-30B-A3B (30.5 billion parameters, 3.3 of them for each token) and
Qwen3-Next-80B-A3B (80 and 3), as their model cards and config.json have them.
"""

import functools
import json
from math import inf

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

import bpdq_quantizer
from architectures import auto_class, model_folder
from bpdq_kernels.format import Scheme
from bpdq_quantizer.cli import main
from bpdq_quantizer.fit import hours
from bpdq_quantizer.fit.memory import expert_input_bytes, experts_at_once, quantize_device_bytes, quantize_host_bytes
from bpdq_quantizer.fit.parts import Model, read_model
from bpdq_quantizer.fit.plan import plan
from mixtures import EXPERTS as EACH
from mixtures import MIXTURES
from test_plan import refusal
from test_plan_models import CONFIGS, docs_row
from tiny import load_tensors, tiny_tokenizer

QWEN3_30B, QWEN3_NEXT = (str(CONFIGS / f"{name}.json") for name in ("qwen3-30b-a3b", "qwen3-next-80b-a3b"))
HIDDEN, INNER, EXPERTS, CHOSEN, LAYERS, VOCABULARY = 2048, 768, 128, 8, 48, 151936
ATTENTION = [(4096, HIDDEN), (512, HIDDEN), (512, HIDDEN), (HIDDEN, 4096)]
EXPERT = [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]


@functools.cache
def qwen3() -> Model:
    return read_model(QWEN3_30B)


def tiny(folder, kind: str, **changes) -> str:
    sizes = {"vocab_size": 384, "pad_token_id": None, **MIXTURES[kind], **changes}
    AutoConfig.for_model(kind, **sizes).save_pretrained(folder)
    return str(folder)


def weights(shapes) -> int:
    return sum(n * k for n, k in shapes)


def test_parts_of_qwen3_30b_by_hand():
    m = qwen3()
    (block,) = m.blocks
    (mixture,) = block.experts
    assert (block.count, sorted(block.linears)) == (LAYERS, sorted(ATTENTION))
    assert (mixture.count, mixture.chosen, sorted(mixture.linears)) == (EXPERTS, CHOSEN, sorted(EXPERT))
    assert sorted(mixture.stages) == [(2 * INNER, HIDDEN), (HIDDEN, INNER)]
    assert len(m.linears) == LAYERS * (len(ATTENTION) + EXPERTS * len(EXPERT))
    assert m.others == LAYERS * (EXPERTS * HIDDEN + 2 * HIDDEN + 2 * 128) + HIDDEN  # routers and norms
    assert (m.embedding, m.head) == ((VOCABULARY, HIDDEN),) * 2


def test_a_token_of_qwen3_30b_reads_eight_experts_of_each_layer(monkeypatch, capsys):
    monkeypatch.setattr("bpdq_quantizer.fit.plan.read_model", lambda model, ignore: qwen3())
    assert main(["plan", QWEN3_30B, "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["parameters"] / 1e9 == pytest.approx(30.53, abs=0.005)
    assert found["active_parameters"] / 1e9 == pytest.approx(3.35, abs=0.005)
    scheme = Scheme(2, 128, 8)
    layer = sum(scheme.tiled_bytes(n, k) for n, k in ATTENTION + CHOSEN * EXPERT)
    assert found["active_bytes"] == LAYERS * layer + 2 * VOCABULARY * HIDDEN + 2 * qwen3().others
    assert found["most_tokens_per_second"] == pytest.approx(936e9 / found["active_bytes"])
    assert found["linear_bytes"] == LAYERS * sum(scheme.stored_bytes(n, k) for n, k in ATTENTION + EXPERTS * EXPERT)
    page = (CONFIGS.parent.parent / "docs" / "plan.md").read_text()
    assert "\n".join(lines[:7]) in page
    assert all(line in page for line in lines if line.startswith("to quantize"))


def test_memory_to_quantize_holds_some_experts_matrices_and_a_layers_inputs():
    m = qwen3()
    tokens = 128 * 2048
    inputs = 4 * 2 * tokens * HIDDEN
    assert expert_input_bytes(m, tokens) == inputs
    block = weights(ATTENTION + EXPERTS * EXPERT)
    (mixture,) = m.mixtures
    count = experts_at_once(mixture)
    stage = max(4 * 4 * (count * (k * k + n * k) + 3 * count * n * k) for n, k in mixture.stages)
    assert (1 << 30) < stage <= (2 << 30), "1 GiB of matrices and 1 GiB to refine them"
    outputs = sum(n for n, _ in ATTENTION) + sum(n for n, _ in ATTENTION[:3])
    assert quantize_device_bytes(m) == 2 * 2 * block + stage + 4 * 1024 * outputs + 2 * (1 << 30)
    assert quantize_device_bytes(m) > quantize_device_bytes(m._replace(blocks=[m.blocks[0]._replace(experts=())]))
    tables = 2 * VOCABULARY * HIDDEN
    hidden_states = 2 * tokens * HIDDEN
    least = 2 * (tables + block + hidden_states) + inputs
    assert least <= quantize_host_bytes(m) <= least + 2 * 3 * hidden_states


NOT_COUNTED = ("llama4_text", "jamba", "kimi_linear", "nemotron_h", "granitemoehybrid", "lfm2_moe", "gemma4_text")


@pytest.mark.parametrize("kind", [kind for kind in MIXTURES if kind not in NOT_COUNTED])
def test_experts_of_every_family_are_counted_one_by_one(tmp_path, kind):
    m = read_model(tiny(tmp_path, kind))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    sizes = [t.numel() for name, t in model.state_dict().items() if name not in model.all_tied_weights_keys]
    assert weights([*m.linears, m.embedding, m.head or (0, 0)]) + m.others == sum(sizes)
    assert {(mixture.count, mixture.chosen, len(mixture.linears)) for mixture in m.mixtures} == {(8, 2, 3)}


@pytest.mark.parametrize("kind", ["deepseek_v3", "hunyuan_v1_moe", "qwen3_moe"])
def test_bytes_are_those_that_quantize_writes(tmp_path, text, kind):
    """Also where a model of 16 bits has something in fp32."""
    model = auto_class(kind).from_pretrained(model_folder(tmp_path / "fp32", f"{kind}{EACH}"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    small = {"calibration": text, "samples": 2, "seq_len": 32, "iterations": 1, "solver": "paper"}
    bpdq_quantizer.quantize(tmp_path / "model", tmp_path / "out", coefficient_bits=8, group_size=64, **small)
    written = sum(tensor.nbytes for tensor in load_tensors(tmp_path / "out").values())
    assert plan(str(tmp_path / "model"), group_size=64, context=64)["checkpoint_bytes"] == written


def test_experts_that_stay_in_16_bits_are_read_by_the_tokens_that_choose_them(tmp_path):
    model = tiny(tmp_path, "qwen3_moe")
    dense, found = (plan(model, ignore=names) for names in ((), ("re:.*experts.*",)))
    assert found["parameters"] == dense["parameters"]
    assert found["active_parameters"] == dense["active_parameters"]
    shapes = [(128, 64), (64, 128), (64, 128)]  # of an expert
    assert found["other_bytes"] - dense["other_bytes"] == 2 * 2 * 8 * weights(shapes)
    packed = sum(Scheme(2, 128, 8).tiled_bytes(*shape) for shape in shapes)
    assert found["active_bytes"] - dense["active_bytes"] == 2 * 2 * (2 * weights(shapes) - packed)


def test_hours_are_those_of_all_experts_and_forward_passes_those_of_the_chosen(tmp_path):
    few, many = (plan(tiny(tmp_path / str(n), "qwen3_moe", num_experts=n)) for n in (8, 64))
    assert few["quantize_cpu_seconds"] < many["quantize_cpu_seconds"] < 8 * few["quantize_cpu_seconds"]
    all_of_them = plan(tiny(tmp_path / "all", "qwen3_moe", num_experts=8, num_experts_per_tok=8))
    assert all_of_them["quantize_cpu_seconds"] > few["quantize_cpu_seconds"]
    assert all_of_them["active_bytes"] > few["active_bytes"]
    assert all_of_them["parameters"] == all_of_them["active_parameters"]


def test_experts_that_are_solved_at_once_share_launches(tmp_path):
    """On a card without limits only launches are left; groups that are no whole ones are solved one by one."""
    (mixture,) = read_model(tiny(tmp_path, "qwen3_moe", num_experts=64)).mixtures
    expert = hours.Block(mixture.stages, [])
    card = hours.RTX_3090._replace(bytes=inf, half=inf, full=inf)
    one, eight, whole = (hours.card_seconds(expert, 2, 64, 256, card, count) for count in (1, 8, 64))
    assert one == pytest.approx(8 * eight) == pytest.approx(64 * whole)
    assert hours.card_seconds(expert, 2, 256, 256, card, 8) == hours.card_seconds(expert, 2, 256, 256, card)
    assert experts_at_once(mixture) == 64
    large = mixture._replace(stages=((28672, 4096), (4096, 14336)))  # Mixtral's
    assert experts_at_once(large) == 1


def test_outputs_of_chosen_experts_need_room_on_the_card(tmp_path):
    one, four = (plan(tiny(tmp_path / str(n), "qwen3_moe", num_experts_per_tok=n)) for n in (1, 4))
    assert four["card_overhead_bytes"] - one["card_overhead_bytes"] == 512 * 3 * (4 * 128 + 2 * 64)


def test_a_config_that_does_not_say_how_many_experts_a_token_chooses_is_refused(tmp_path, capsys):
    assert "config.json does not say how many experts" in refusal(
        capsys, tiny(tmp_path, "qwen3_moe", num_experts_per_tok=0)
    )


@pytest.mark.parametrize(
    ("row", "config", "billions"),
    [
        ("Qwen3-30B-A3B", QWEN3_30B, (30.53, 3.35)),
        pytest.param("Qwen3-Next-80B-A3B", QWEN3_NEXT, (79.67, 3.87), marks=pytest.mark.slow),
    ],
)
def test_the_tables_rows_of_the_docs(monkeypatch, row, config, billions):
    if config == QWEN3_30B:
        monkeypatch.setattr("bpdq_quantizer.fit.plan.read_model", lambda model, ignore: qwen3())
    found = plan(config)
    assert (found["parameters"] / 1e9, found["active_parameters"] / 1e9) == pytest.approx(billions, abs=0.005)
    assert docs_row(row, found) in (CONFIGS.parent.parent / "docs" / "plan.md").read_text()
