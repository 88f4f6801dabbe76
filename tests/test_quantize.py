"""From a model folder to a checkpoint that transformers loads, on tiny models."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import bpdq_quantizer
from bpdq_kernels import dequantize
from bpdq_kernels.format import Scheme
from bpdq_quantizer import activations, checkpoint
from bpdq_quantizer.activations import block_inputs, capture, find_stages, run_block, stage_statistics
from bpdq_quantizer.blocks import decoder_blocks
from bpdq_quantizer.hessian import correction
from bpdq_quantizer.loader import BPDQLinear
from bpdq_quantizer.pipeline import ASYMMETRIC, SOLVERS
from bpdq_quantizer.solver import quantize_linear
from bpdq_quantizer.tune import final_states
from tiny import TEXT, tiny_model, tiny_tokenizer

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"]
IDS = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"][40:60]])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 4)
    return str(path)


def small(text, **options):
    return {"bits": 2, "group_size": 64, "calibration": text, "samples": 6, "seq_len": 32, "iterations": 3, **options}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, text):
    """A llama with tied embeddings in bf16, quantized."""
    folder = tmp_path_factory.mktemp("quantized")
    tiny_model(folder / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    report = bpdq_quantizer.quantize(str(folder / "model"), folder / "out", **small(text))
    return folder / "model", folder / "out", report


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_quantized_and_reloads(arch, tmp_path, text):
    tiny_model(tmp_path / "model", arch)
    bpdq_quantizer.quantize(str(tmp_path / "model"), tmp_path / "out", **small(text, bits=4, group_size=128))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    planes = {name for name, m in model.named_modules() if isinstance(m, BPDQLinear)}
    assert len(planes) == 2 * 7
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        error = (model(IDS).logits - original(IDS).logits).std() / original(IDS).logits.std()
    assert error < 0.5  # unrelated logits would give 1.4
    for name, m in original.named_modules():
        if name in planes and m.bias is not None:
            assert torch.equal(m.bias, model.get_submodule(name).bias)


def test_checkpoint_says_what_it_is(quantized):
    _, out, _ = quantized
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == config["checkpoint_format"] == "bpdq"
    assert config["bits"] == config["meta"]["bpdq"]["msbits"] == 2
    assert config["ignore"] == ["lm_head"]
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.B"].shape == (11, 2, 128)
    assert tensors["model.layers.0.mlp.down_proj.c"].shape == (6, 3, 128)
    assert tensors["model.layers.0.mlp.down_proj.c"].dtype == torch.bfloat16
    assert "lm_head.weight" not in tensors, "tied weights are stored once"
    assert {p.name for p in out.iterdir()} >= {"tokenizer.json", "generation_config.json", "quantization_report.json"}
    assert "user: hi" in AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )


def test_report_has_loss_error_bits_and_time_of_every_layer(quantized):
    _, out, report = quantized
    saved = json.loads((out / "quantization_report.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert len(saved["layers"]) == 14
    for layer in saved["layers"]:
        assert layer["loss"] > 0
        assert 0 < layer["relative_error"] < 1
        assert layer["seconds"] > 0
        assert layer["bits_per_weight"] == 2 + 16 * 3 / 64


def test_same_seed_gives_identical_tensors(quantized, tmp_path, text):
    model, out, _ = quantized
    bpdq_quantizer.quantize(str(model), tmp_path / "again", **small(text))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_linears_that_share_an_input_are_one_stage():
    config = AutoConfig.for_model(
        "gemma2", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=50, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    prefix, decoder = decoder_blocks(model)
    hidden, calls = block_inputs(model, decoder, torch.arange(20).view(2, 10))
    stages = find_stages(decoder[1], lambda h: run_block(decoder[1], calls[1], torch.device("cpu"), h), hidden[0])
    assert prefix == "model.layers"
    assert stages == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_each_layer_is_calibrated_on_the_quantized_prefix(quantized, text):
    """Solve two layers again, on the Hessian that the finished checkpoint itself produces."""
    model_folder, out, _ = quantized
    original = AutoModelForCausalLM.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(out)
    planes = {name: m for name, m in model.named_modules() if isinstance(m, BPDQLinear)}
    for name, m in planes.items():
        plain = torch.nn.Linear(m.in_features, m.out_features, bias=False, dtype=torch.bfloat16)
        plain.weight.data.copy_(dequantize(m.B, m.c, 64, m.in_features))
        model.set_submodule(name, plain)
    ids = AutoTokenizer.from_pretrained(out)(TEXT * 4, add_special_tokens=False)["input_ids"][: 6 * 32]
    tokens = torch.tensor(ids).view(6, 32)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        stored, weight = model.get_submodule(name), original.get_submodule(name).weight.detach()
        inputs, _ = capture(original, [name], lambda t: original.base_model(t, use_cache=False), tokens)
        run = partial(model.base_model, use_cache=False)
        H, C = stage_statistics(stored, run, [tokens], lambda _, x=inputs[name]: x)
        target = weight.float() + ASYMMETRIC["refined"] * weight.float() @ correction(H, C)
        solved = quantize_linear(target, H, 2, 64, iterations=3, **SOLVERS["refined"])
        D = target - stored.weight.detach().float()
        assert ((D @ H) * D).sum().item() == pytest.approx(solved.loss.sum().item(), rel=0.02)
        original_run = partial(original.base_model, use_cache=False)
        original_H, _ = stage_statistics(original.get_submodule(name), original_run, [tokens], None)
        assert (original_H - H).norm() > 0.05 * H.norm(), "the prefix makes a difference that the test can see"


def test_one_pass_and_a_pass_per_stage_agree(quantized, tmp_path, text, monkeypatch):
    """A calibration set that fits one batch takes a shortcut, which must not change what is solved."""
    model, _, report = quantized
    monkeypatch.setattr(activations, "ACTIVATION_BYTES", 1)
    again = bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text))
    for a, b in zip(report["layers"][:7], again["layers"][:7], strict=True):  # later blocks drift by bf16 rounding
        assert a["name"] == b["name"]
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03)


def test_asymmetric_calibration_brings_the_model_closer_to_the_16_bit_one(quantized, tmp_path, text):
    model_folder, out, _ = quantized
    bpdq_quantizer.quantize(str(model_folder), tmp_path / "plain", **small(text, asymmetric=0.0))
    original = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = AutoTokenizer.from_pretrained(out)(TEXT * 4, add_special_tokens=False)["input_ids"][: 6 * 32]
    tokens = torch.tensor(ids).view(6, 32)
    errors = []
    for folder in (out, tmp_path / "plain"):
        states = final_states(AutoModelForCausalLM.from_pretrained(folder), tokens)
        errors.append((states - final_states(original, tokens)).float().square().mean().item())
    assert errors[0] < 0.95 * errors[1]


def test_fp16_models_get_fp16_coefficients(tmp_path, text):
    tiny_model(tmp_path / "model", dtype=torch.float16)
    bpdq_quantizer.quantize(str(tmp_path / "model"), tmp_path / "out", **small(text, bits=1, group_size=32))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.1.mlp.up_proj.c"].dtype == torch.float16


@pytest.mark.parametrize("moment", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_a_killed_run_leaves_nothing_that_loads(moment, quantized, tmp_path, text):
    model, _, report = quantized
    code = (
        "import sys, bpdq_quantizer; print('ready', flush=True); "
        f"bpdq_quantizer.quantize({str(model)!r}, {str(tmp_path / 'out')!r}, bits=2, group_size=64, "
        f"calibration={text!r}, samples=6, seq_len=32, iterations=3)"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    run.stdout.readline()
    time.sleep(moment * report["seconds"])
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    for folder in tmp_path.iterdir():
        if folder.name == "out":  # it was done before the kill
            AutoModelForCausalLM.from_pretrained(folder)
            continue
        assert folder.name.startswith("out.partial-")
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_failed_run_removes_its_folder(tmp_path):
    def fail():
        with checkpoint.new_folder(tmp_path / "out") as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_config_is_the_last_file_written(quantized, tmp_path, monkeypatch):
    """Whatever is interrupted before config.json leaves a folder that no loader takes for a model."""
    _, out, _ = quantized
    model = AutoModelForCausalLM.from_pretrained(out)
    seen = []

    def record(folder, **kwargs):
        seen.append({p.name for p in tmp_path.iterdir()})

    monkeypatch.setattr(model.config, "save_pretrained", record)
    config = checkpoint.quantization_config(Scheme(2, 64), 3, 1e-4, ["lm_head"])
    checkpoint.save(tmp_path, model, AutoTokenizer.from_pretrained(out), config, {})
    assert len(seen) == 1
    assert seen[0] >= {"model.safetensors", "tokenizer.json", "quantization_report.json", "generation_config.json"}


def test_large_models_are_sharded_with_an_index(quantized, tmp_path, monkeypatch):
    _, out, _ = quantized
    model = AutoModelForCausalLM.from_pretrained(out)
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "60KB")
    config = checkpoint.quantization_config(Scheme(2, 64), 3, 1e-4, ["lm_head"])
    checkpoint.save(tmp_path, model, AutoTokenizer.from_pretrained(out), config, {})
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.slow
@pytest.mark.gpu
def test_cuda_and_cpu_agree(quantized, tmp_path, text):
    model, _, report = quantized
    on_gpu = bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text, device="cuda"))
    for a, b in zip(report["layers"], on_gpu["layers"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.2)
