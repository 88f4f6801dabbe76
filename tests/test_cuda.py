"""The quantizer on a GPU: with every option, and of every kind of model, it gives what it gives on the CPU."""

from math import log
from pathlib import Path
from statistics import mean

import pytest
import torch

import bpdq_quantizer
from architectures import EXPERTS, model_folder
from bpdq_quantizer.checkpoint.loader import load_model
from tiny import TEXT, tiny_model

pytestmark = pytest.mark.gpu
SMALL = {"bits": 3, "group_size": 32, "samples": 8, "seq_len": 64, "iterations": 3}
OPTIONS = {
    "as by default": {},
    "one plane": {"bits": 1},
    "coefficients in 16 bits": {"coefficient_bits": 16},
    "the paper's": {"solver": "paper"},
    "rotated": {"rotate": "hadamard"},
    "tuned": {"tune": "model", "tune_steps": 3},
    "tuned, both divergences": {"tune": "model", "tune_steps": 3, "tune_loss": "mix", "coefficient_bits": 16},
    "allocated": {"target_bpw": 3.0},
    "gradients of outputs": {"output_tokens": 256},
    "allocated by gradients of outputs": {"target_bpw": 3.0, "output_tokens": 256},
    "tables": {"embed_bits": 3, "head_bits": 4},
    "scales of the KV cache": {"kv_cache_scales": True},
    "its own text": {"calibration": "self"},
    "states on disk": {"offload_dir": "states"},
    "evaluated": {"evaluate": 4},
}
MIXTURES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "llama4_text", "nemotron_h", "qwen3_next")
MODELS = ("gemma3_text", "phi3", "gpt_neox", "bloom", "falcon_h1", "mamba2", "qwen2_5_vl")


def distance(model: torch.nn.Module, original: torch.nn.Module, device: str) -> float:
    """Of the logits, in standard deviations."""
    ids = torch.arange(60, device=device)[None] * 7 % 379
    with torch.inference_mode():
        expected = original.to(device)(ids).logits
        return ((model.to(device)(ids).logits - expected).std() / expected.std()).item()


def quantized_on_both(model: Path, folder: Path, **options: object) -> None:
    """Quantize it on the CPU and on the GPU, and compare losses and logits."""
    (folder / "text.txt").write_text(TEXT * 8)
    options = SMALL | {"calibration": str(folder / "text.txt")} | options
    if "offload_dir" in options:
        options["offload_dir"] = str(folder / "states")
    reports = {d: bpdq_quantizer.quantize(model, folder / d, device=d, **options) for d in ("cpu", "cuda")}
    original = load_model(str(model), torch.float32)
    found = {d: distance(load_model(str(folder / d), torch.float32), original, d) for d in reports}
    again = distance(load_model(str(folder / "cuda"), torch.float32), original, "cpu")
    assert found["cuda"] == pytest.approx(again, rel=0.02), "one checkpoint, two devices"
    assert found["cuda"] < 1.25 * found["cpu"]
    losses = [[layer["loss"] for layer in report["layers"]] for report in reports.values()]
    if options["calibration"] != "self":
        assert abs(mean(log(b / a) for a, b in zip(*losses, strict=True))) < 0.1


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_give_on_a_gpu_what_they_give_on_the_cpu(options: dict[str, object], tmp_path: Path):
    quantized_on_both(tiny_model(tmp_path / "model", dtype=torch.bfloat16), tmp_path, **options)


@pytest.mark.parametrize("arch", [*MODELS, *(f"{arch}{EXPERTS}" for arch in MIXTURES)])
def test_models_are_quantized_on_a_gpu_as_on_the_cpu(arch: str, tmp_path: Path):
    quantized_on_both(model_folder(tmp_path / "model", arch), tmp_path)
