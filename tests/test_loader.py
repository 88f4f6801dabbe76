"""BPDQ checkpoints, ours and the authors', through transformers' own from_pretrained."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.quantizers.auto import AutoQuantizationConfig

import bpdq_quantizer  # noqa: F401, registers the loader
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.loader import BPDQLinear
from tiny import bpdq_checkpoint, tiny_model

IDS = torch.arange(30)[None] * 7 % 380
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model", "qwen2")


def logits(folder, **kwargs):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()(IDS).logits


@pytest.mark.parametrize("dialect", ["ours", "authors"])
@pytest.mark.parametrize(("bits", "group_size"), [(1, 32), (2, 256), (3, 128), (4, 64)])
def test_logits_equal_those_of_the_dequantized_weights(model, dialect, bits, group_size):
    out = bpdq_checkpoint(model, model.parent / "out", bits, group_size, dialect)
    torch.testing.assert_close(logits(out), logits(f"{out}-dequantized"), rtol=1e-4, atol=1e-4)


def test_layers_can_differ_in_planes_and_group_size(model):
    layers = {LAYER: {"bits": 4, "group_size": 32}, "model.layers.0.self_attn.o_proj": {"bits": 1}}
    out = bpdq_checkpoint(model, model.parent / "out", layers=layers)
    assert AutoModelForCausalLM.from_pretrained(out).get_submodule(LAYER).B.shape[1] == 4
    torch.testing.assert_close(logits(out), logits(f"{out}-dequantized"), rtol=1e-4, atol=1e-4)


def test_fp16_coefficients_keep_their_bits_in_a_bf16_model(tmp_path):
    tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    out = bpdq_checkpoint(tmp_path / "model", tmp_path / "out", coefficient_dtype=torch.float16)
    c = AutoModelForCausalLM.from_pretrained(out).get_submodule(LAYER).c
    assert torch.equal(c, load_file(out / "model.safetensors")[f"{LAYER}.c"])


def test_a_loaded_checkpoint_saves_to_one_that_loads(model):
    out = bpdq_checkpoint(model, model.parent / "out")
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(model.parent / "again")
    assert torch.equal(logits(out), logits(model.parent / "again"))


def test_weights_stay_packed(model):
    out = bpdq_checkpoint(model, model.parent / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    quantized = [m for m in loaded.modules() if isinstance(m, BPDQLinear)]
    assert len(quantized) == 14
    assert not [m for m in loaded.model.layers.modules() if isinstance(m, torch.nn.Linear)]


def test_other_gptq_configs_are_left_to_transformers():
    config = AutoQuantizationConfig.from_dict({"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert type(config) is GPTQConfig


def damage(out, change):
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.B"), f"{LAYER}.B is not in the checkpoint"),
        (lambda t: t.pop(f"{LAYER}.c"), f"{LAYER}.c is not in the checkpoint"),
        (lambda t: t.update({f"{LAYER}.B": t[f"{LAYER}.B"][:-1].clone()}), f"{LAYER}.B is .* expected int32"),
        (lambda t: t.update({f"{LAYER}.B": t[f"{LAYER}.B"].float()}), f"{LAYER}.B is torch.float32"),
        (lambda t: t.update({f"{LAYER}.c": t[f"{LAYER}.c"][:, :-1].clone()}), f"{LAYER}.c is .* expected"),
        (lambda t: t[f"{LAYER}.c"].fill_(float("nan")), f"{LAYER}.c holds NaN"),
    ],
)
def test_a_damaged_tensor_stops_the_load_and_is_named(model, change, message):
    out = bpdq_checkpoint(model, model.parent / "out")
    damage(out, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_truncated_file_stops_the_load_and_is_named(model):
    out = bpdq_checkpoint(model, model.parent / "out")
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: not a complete safetensors file"):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 2}, "format_version 2"), ({"bits": 5}, "bits = 5"), ({"group_size": 48}, "group_size = 48")],
)
def test_an_unsupported_format_stops_the_load(model, change, message):
    out = bpdq_checkpoint(model, model.parent / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].update(change)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(out)
