"""vLLM serves what the quantizer writes of each family that it runs in 16 bits: eager, those with experts compiled too,
with the greedy tokens of the dequantized weights."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import AutoTokenizer, PreTrainedModel

import bpdq_quantizer
from architectures import ARCHITECTURES, EXPERTS, dequantized, model_folder
from families import FAMILIES
from generate import greedy_tokens, same_up_to_a_tie, vllm_tokens

SERVED = [name for name, family in FAMILIES.items() if not isinstance(family.engine, str)]
GROUPS = [SERVED[i : i + 6] for i in range(0, len(SERVED), 6)]
MIXED = [name for name in SERVED if name.endswith(EXPERTS)]
MIXED_FP32 = [name for name in MIXED if "dtype" not in FAMILIES[name].engine]
MIXED_GROUPS = [MIXED_FP32[i : i + 3] for i in range(0, len(MIXED_FP32), 3)]
QUICK = {"bits": 2, "group_size": 32, "samples": 3, "seq_len": 32, "iterations": 1, "solver": "paper"}


class Made(NamedTuple):
    """Checkpoints of a random model: the quantizer's, and its source with the weights that the planes stand for, which
    is `model` too."""

    quantized: Path
    dequantized: Path
    model: PreTrainedModel


def made(folder: Path, arch: str, text: str) -> Made:
    source, out, plain = model_folder(folder / "model", arch, FAMILIES[arch].gain), folder / "out", folder / "plain"
    left = {"ignore": [FAMILIES[arch].ignore]} if FAMILIES[arch].ignore else {}
    report = bpdq_quantizer.quantize(str(source), out, calibration=text, **QUICK, **left)
    model = dequantized(arch, source, out, report)
    model.save_pretrained(plain)
    AutoTokenizer.from_pretrained(source).save_pretrained(plain)
    return Made(out, plain, model.eval())


def faults(folder: Path, archs: list[str], text: str, **options: Any) -> dict[str, list]:
    """The tokens, or errors, of the families whose checkpoints do not give the tokens of the dequantized weights: in
    transformers, or in vLLM where that computes otherwise; options: of the engines."""
    models = {arch: made(folder / arch, arch, text) for arch in archs}
    engines = [
        {"load": {"model": str(path), **FAMILIES[arch].engine, **options}}
        for arch, (*paths, _) in models.items()
        for path in paths[: 1 if FAMILIES[arch].same else 2]
    ]
    tokens, found = iter(vllm_tokens(engines)), {}
    for arch, (*_, model) in models.items():
        found[arch] = [next(tokens), greedy_tokens(model) if FAMILIES[arch].same else next(tokens)]
    return {arch: pair for arch, pair in found.items() if not agree(arch, models[arch].model, *pair)}


def agree(arch: str, model: PreTrainedModel, tokens: list[list[int]] | str, expected: list[list[int]] | str) -> bool:
    """Whether tokens are the same: in bf16 up to the first near tie of logits, which rounding decides, and if they are
    not vLLM's with the dequantized weights, they may be those in fp32."""
    if isinstance(tokens, str) or "dtype" not in FAMILIES[arch].engine:
        return tokens == expected
    return same_up_to_a_tie(model, tokens, expected, greedy_tokens(model))


def test_one_of_each_kind_is_served(tmp_path, text):
    """Windows and shared keys, latent attention, states beside attention, and one that sees images."""
    assert faults(tmp_path, ["gemma4_text", "deepseek_v2", "falcon_h1", "qwen3_5"], text) == {}


@pytest.mark.slow
@pytest.mark.parametrize("archs", GROUPS, ids=lambda archs: f"{archs[0]}..{archs[-1]}")
def test_every_family_is_served(tmp_path, text, archs):
    assert faults(tmp_path, archs, text) == {}


@pytest.mark.slow
@pytest.mark.parametrize("archs", MIXED_GROUPS, ids=lambda archs: f"{archs[0]}..{archs[-1]}")
def test_every_family_with_experts_is_served_compiled(tmp_path, text, archs):
    assert faults(tmp_path, archs, text, enforce_eager=False) == {}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [name for name in MIXED if name not in MIXED_FP32])
def test_in_bf16_compiled_tokens_are_eager_ones(tmp_path, text, arch):
    """Those of the dequantized weights round otherwise, and routers near a tie then go another way."""
    checkpoint = made(tmp_path, arch, text)
    load = {"model": str(checkpoint.quantized), **FAMILIES[arch].engine}
    eager, compiled = vllm_tokens([{"load": load}, {"load": load | {"enforce_eager": False}}])
    assert isinstance(compiled, list), compiled
    assert same_up_to_a_tie(checkpoint.model, compiled, eager)


def test_each_family_is_known_of():
    assert list(FAMILIES) == ARCHITECTURES
