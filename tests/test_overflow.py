"""Large numbers in fp16, NaN and infinity: quantized where they can be, and else in no checkpoint and no report."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import bpdq_quantizer
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model import activations
from bpdq_quantizer.passes.layers import check_finite
from bpdq_quantizer.run import pipeline
from tiny import load_tensors, tiny_model


def small(text, **options):
    return {
        "calibration": text,
        "samples": 6,
        "seq_len": 32,
        "group_size": 64,
        "iterations": 3,
        "output_tokens": 0,
        **options,
    }


def with_large_activations(folder: Path) -> Path:
    """A random fp16 model whose first MLP reads inputs of several hundred, and a few thousand in all of a window."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(folder, dtype=torch.float16))
    layer = model.model.layers[0]
    with torch.no_grad():
        layer.post_attention_layernorm.weight.mul_(500)
        layer.mlp.gate_proj.weight.div_(500)
        layer.mlp.up_proj.weight.div_(500)
    model.save_pretrained(folder)
    return folder


def test_large_activations_of_fp16_models_are_quantized(tmp_path, text):
    model = with_large_activations(tmp_path / "model")
    report = bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text))
    assert all(0 < layer["relative_error"] < 0.6 for layer in report["layers"])


@pytest.mark.parametrize("options", [{}, {"solver": "paper"}, {"solver": "paper", "tune": "model"}, {"head_bits": 4}])
@pytest.mark.parametrize("batch_bytes", [activations.ACTIVATION_BYTES, 1])  # one batch, or one for each window
def test_a_last_block_that_overflows_makes_no_checkpoint(tmp_path, text, monkeypatch, options, batch_bytes):
    monkeypatch.setattr(activations, "ACTIVATION_BYTES", batch_bytes)
    model = tiny_model(tmp_path / "model", dtype=torch.float16)
    tensors = load_tensors(model)
    for name, factor in (("down", 30000), ("up", 10)):
        tensors[f"model.layers.1.mlp.{name}_proj.weight"].mul_(factor).clamp_(-6e4, 6e4)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    whose = "16-bit" if "tune" in options else "quantized"
    message = rf"layers\.1\..*the {whose} model computes NaN or infinity in its block: convert the model to bfloat16"
    with pytest.raises(InputError, match=message):
        bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text, **options))
    assert not (tmp_path / "out").exists()


def test_figures_that_are_no_numbers_are_in_no_report(tmp_path, text, monkeypatch):
    model = tiny_model(tmp_path / "model")
    monkeypatch.setattr(pipeline, "mean_bits", lambda _: float("nan"))
    with pytest.raises(InputError, match=r"quantization_report\.json: a figure is NaN or infinite .*: check the model"):
        bpdq_quantizer.quantize(model, tmp_path / "out", **small(text))
    assert not (tmp_path / "out").exists()


def test_infinite_inputs_of_the_16_bit_model_are_not_blamed_on_coefficients():
    shift = torch.eye(2).fill_diagonal_(torch.inf)
    with pytest.raises(InputError, match="up_proj: its calibration inputs hold NaN or infinity"):
        check_finite({"mlp.up_proj.weight": torch.ones(2, 2)}, torch.eye(2), shift)
