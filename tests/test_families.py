"""Every architecture is quantized, and transformers computes with it what the dequantized weights give."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import bpdq_quantizer
from architectures import ARCHITECTURES, EXPERTS, MLA, auto_class, dequantized, experts_apart, model_folder
from bpdq_kernels.skeleton import arranged, check_stored
from bpdq_quantizer.checkpoint.inspection import inspect
from bpdq_quantizer.checkpoint.loader import open_checkpoint
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model import activations
from bpdq_quantizer.model.activations import embed, run_batches
from bpdq_quantizer.model.calls import block_runs, head_inputs, trunk
from bpdq_quantizer.model.stream import load_block, open_model, solved
from bpdq_quantizer.model.support import check_blocks
from bpdq_quantizer.model.weights import weights_in
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.passes.outputs import measure_outputs
from tiny import load_tensors

QUICK = {"bits": 3, "group_size": 32, "samples": 3, "seq_len": 32, "iterations": 1, "solver": "paper"}
IDS = torch.arange(30)[None] * 7 % 379
EACH_KIND = (
    "qwen3_5_text",
    "nemotron_h",
    "lfm2",
    "gemma4_text",
    "deepseek_v2",
    "olmo_hybrid",
    "recurrent_gemma",
    "bamba",
    "qwen3_5",
    "qwen3_vl",
    "llava_onevision",
    "opt",
    "minicpm3",
    "gptj",
    "gpt_neo",
    "falcon",
    "mpt",
    "gpt_bigcode",
    "nanochat",
    "ctrl",
    "bloom",
    "xglm",
    f"mixtral{EXPERTS}",
    f"gpt_oss{EXPERTS}",
    f"llama4_text{EXPERTS}",
    f"granitemoehybrid{EXPERTS}",
    f"qwen3_5_moe_text{EXPERTS}",
    f"gemma4_text{EXPERTS}",
    f"nemotron_h{EXPERTS}",
)
EVERY = [pytest.param(a, marks=() if a in EACH_KIND else pytest.mark.slow) for a in ARCHITECTURES]
IN_16_BITS = {  # of the Linears of blocks, by the ends of their names
    "qwen3_5_text": {"in_proj_a", "in_proj_b"},
    "qwen3_5": {"in_proj_a", "in_proj_b"},
    "qwen3_next": {"in_proj_ba"},
    "olmo_hybrid": {"a_proj", "b_proj"},
    "kimi_linear": {"b_proj", "f_a_proj", "f_b_proj", "kv_b_proj"},
    "mamba": {"dt_proj", "x_proj"},
    "falcon_mamba": {"dt_proj", "x_proj"},
    "jamba": {"dt_proj", "x_proj"},
    **{arch: {"kv_b_proj"} for arch in (*MLA, *(f"deepseek_v{n}{EXPERTS}" for n in (2, 3)), f"glm4_moe_lite{EXPERTS}")},
    f"qwen2_moe{EXPERTS}": {"shared_expert_gate"},
    f"qwen3_next{EXPERTS}": {"in_proj_ba", "shared_expert_gate"},
    f"qwen3_5_moe_text{EXPERTS}": {"in_proj_a", "in_proj_b", "shared_expert_gate"},
    "qwen3_5_moe": {"in_proj_a", "in_proj_b", "shared_expert_gate"},
    "llama4": {"router"},
    f"hunyuan_v1_moe{EXPERTS}": {"wg"},
    f"llama4_text{EXPERTS}": {"router"},
    f"phimoe{EXPERTS}": {"router"},
    f"gemma4_text{EXPERTS}": {"proj"},
    f"afmoe{EXPERTS}": {"gate"},
    f"jamba{EXPERTS}": {"dt_proj", "router", "x_proj"},
    f"kimi_linear{EXPERTS}": {"b_proj", "f_a_proj", "f_b_proj", "kv_b_proj"},
}
BLOCK = r"(?!.*(vision|visual)).*\.\d+\."  # what the name of a Linear of a decoder block begins with
STREAMED = (f"llama4_text{EXPERTS}", f"gpt_oss{EXPERTS}", "gemma4_text", "bloom", "bamba", "gptj", "qwen3_5_text")


def logits(model):
    with torch.inference_mode():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("arch", EVERY)
def test_transformers_computes_what_the_planes_say(tmp_path, text, arch):
    source, out = model_folder(tmp_path / "model", arch), tmp_path / "out"
    report = bpdq_quantizer.quantize(str(source), out, calibration=text, **QUICK)
    expected = dequantized(arch, source, out, report)
    with experts_apart(expected):
        weights = weights_in(expected).keys() - {layer["name"] for layer in report["layers"]}
    found = logits(auto_class(arch).from_pretrained(out, dtype=torch.float32))
    reference = logits(expected)
    assert (found - reference).std() < 1e-3 * reference.std()
    kept = {name.rpartition(".")[2] for name in weights if re.match(BLOCK, name)}
    assert kept == IN_16_BITS.get(arch, set())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    checkpoint = open_checkpoint(out)
    called = arranged(checkpoint.stored, checkpoint.skeleton).layers
    assert sorted(config["ignore"]) == sorted(called.get(name, name) for name in weights)
    found = inspect(out)
    assert len(found["layers"]) == len(report["layers"])
    assert sorted(found["left_in_16_bits"]) == sorted(weights)
    assert report["left_in_16_bits"].keys() == {name for name in weights if re.match(BLOCK, name)}
    check_that_each_kind_of_tensor_is_missed(out)


def check_that_each_kind_of_tensor_is_missed(folder: Path) -> None:
    """Also where transformers renames tensors as it loads them."""
    _, fmt, stored, model = open_checkpoint(folder)
    for name in {name.rpartition(".")[2]: name for name in stored}.values():
        with pytest.raises(InputError, match=r"is not in the checkpoint"):
            check_stored({key: entry for key, entry in stored.items() if key != name}, model, fmt)
    name, entry = next(iter(stored.items()))
    with pytest.raises(InputError, match=r"has no place in the model of config\.json"):
        check_stored({**stored, f"model.extra.{name}": entry}, model, fmt)


def test_the_text_model_of_a_wrapper_is_loaded_from_its_checkpoint(tmp_path, text):
    """As lm-eval loads it."""
    source, out = model_folder(tmp_path / "model", "qwen3_5"), tmp_path / "out"
    bpdq_quantizer.quantize(str(source), out, calibration=text, **QUICK)
    found = logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    torch.testing.assert_close(found, logits(auto_class("qwen3_5").from_pretrained(out, dtype=torch.float32)))


@pytest.mark.parametrize("arch", STREAMED)
@torch.no_grad()
def test_block_by_block_a_model_computes_what_it_computes_whole(tmp_path, arch):
    """What a block is called with is the model's own: inputs of each layer, shared keys and values, windows, alibi."""
    folder = model_folder(tmp_path / "model", arch)
    tokens = torch.arange(60).view(3, 20) * 7 % 380
    windows = text_windows(tokens)
    source = check_blocks(open_model(str(folder)), windows)
    hidden, calls = embed(source, windows, torch.device("cpu"), None)
    for index in range(len(source.blocks)):
        block = load_block(source, index, torch.device("cpu"))
        run_batches(block_runs(block, calls[index], torch.device("cpu"), len(hidden)), hidden)
    states = torch.cat(list(head_inputs(source.model, source.blocks, hidden)))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    whole = trunk(model)(tokens, use_cache=False).last_hidden_state
    torch.testing.assert_close(states, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["gemma4_text", "bamba", f"mixtral{EXPERTS}"])
def test_a_stopped_run_goes_on_to_the_same_tensors(tmp_path, text, arch, stops_after_a_block):
    source = str(model_folder(tmp_path / "model", arch))
    bpdq_quantizer.quantize(source, tmp_path / "whole", calibration=text, **QUICK)
    with stops_after_a_block():
        bpdq_quantizer.quantize(source, tmp_path / "out", calibration=text, **QUICK)
    bpdq_quantizer.quantize(source, tmp_path / "out", calibration=text, resume=True, **QUICK)
    expected, found = load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize("arch", EVERY)
def test_gradients_are_known_at_the_outputs_of_all_but_experts(tmp_path, arch):
    source = open_model(str(model_folder(tmp_path / "model", arch)))
    windows = text_windows(torch.arange(60).view(3, 20) * 7 % 380)
    source, found = check_blocks(source, windows), {}
    if not source.carries:
        measure_outputs(source, windows, torch.device("cpu"), 0, lambda _, part: found.update(part))
        assert found.keys() == {name for name, weight in solved(source).items() if weight.layer is None}
    for known in found.values():
        assert known.lengths.any()
        assert all(torch.isfinite(G).all() for G in known.covariances)


def test_blocks_that_share_keys_are_quantized_without_gradients(tmp_path, text, capsys):
    source = str(model_folder(tmp_path / "model", "gemma4_text"))
    report = bpdq_quantizer.quantize(source, tmp_path / "out", calibration=text, **QUICK | {"solver": "refined"})
    assert report["options"]["output_tokens"] == 0
    assert "Gemma4ForCausalLM share keys and values: --output-tokens is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("gemma4_text", {"target_bpw": 3.0}, "--target-bpw / --target-size: blocks of Gemma4ForCausalLM share keys"),
        ("gemma4_text", {"output_tokens": 64}, "--output-tokens: blocks of Gemma4ForCausalLM share keys"),
        ("gemma4_text", {"kv_cache_scales": True}, r"--kv-cache-scales: model\.layers\.2 has no attention layer"),
        ("deepseek_v3", {"kv_cache_scales": True}, "--kv-cache-scales: DeepseekV3ForCausalLM has latent attention"),
        ("falcon_h1", {"kv_cache_scales": True}, r"--kv-cache-scales: what model\.layers\.0 caches can't be seen"),
    ],
)
def test_what_an_architecture_cannot_do_is_refused_by_name_before_any_work(tmp_path, text, arch, options, message):
    source = str(model_folder(tmp_path / "model", arch))
    with pytest.raises(InputError, match=message):
        bpdq_quantizer.quantize(source, tmp_path / "out", calibration=text, **QUICK, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_damaged_embedding_is_not_taken_for_an_architecture_that_is_not_supported(tmp_path, text):
    source = model_folder(tmp_path / "model", "llama")
    tensors = load_tensors(source)
    tensors["model.embed_tokens.weight"][7:] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight holds NaN or infinity: the model is dam"):
        bpdq_quantizer.quantize(str(source), tmp_path / "out", calibration=text, **QUICK)


@pytest.mark.parametrize("arch", ["nemotron_h", "qwen3_5_text", f"mixtral{EXPERTS}"])
def test_bits_are_allocated_and_coefficients_tuned(tmp_path, text, arch, monkeypatch):
    monkeypatch.setattr("bpdq_quantizer.passes.sensitivity.GROUP_SIZES", (32,))
    monkeypatch.setattr("bpdq_quantizer.passes.sensitivity.MAX_PLANES", 2)
    monkeypatch.setattr(activations, "ACTIVATION_BYTES", 1)  # several batches
    source = str(model_folder(tmp_path / "model", arch))
    options = {"target_bpw": 2.6, "tune": "model", "tune_steps": 2, "head_bits": 4}
    report = bpdq_quantizer.quantize(source, tmp_path / "out", calibration=text, **QUICK | {"bits": 2}, **options)
    assert report["tuning"]["steps"] == 2
    assert len({layer["bits"] for layer in report["layers"] if layer["name"] != "lm_head"}) == 2
    assert torch.isfinite(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))).all()
