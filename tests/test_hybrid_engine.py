"""vLLM serves BPDQ checkpoints of hybrids, of models with sliding windows and of wrappers, with the tokens of the
dequantized weights."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import bpdq_quantizer
from architectures import dequantized, model_folder
from generate import transformers_tokens, vllm_tokens
from hybrids import hybrid_checkpoint

NO_IMAGES = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
BF16 = {"dtype": "bfloat16"}  # which vLLM's CPU backend asks for where there is a GatedDeltaNet


def tokens_of(folder: Path, archs: dict[str, dict]) -> dict[str, list]:
    """Those of a checkpoint and of the dequantized weights in vLLM, by architecture."""
    checkpoints = [hybrid_checkpoint(folder, arch) for arch in archs]
    pairs = zip(checkpoints, archs.values(), strict=True)
    engines = [{"load": {"model": f"{path}{end}", **load}} for path, load in pairs for end in ("", "-dequantized")]
    tokens = vllm_tokens(engines)
    return {arch: tokens[2 * i : 2 * i + 2] for i, arch in enumerate(archs)}


def test_a_gated_delta_net_in_a_wrapper_gives_the_tokens_of_the_dequantized_weights(tmp_path):
    """In one engine, whose vision tower, of which no image is asked, is on the meta device."""
    quantized, dequantized = tokens_of(tmp_path, {"qwen3_5": NO_IMAGES | BF16})["qwen3_5"]
    assert isinstance(quantized, list), quantized
    assert quantized == dequantized


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["falcon_h1", "gemma3_text", "gemma4_text", "granitemoehybrid", "mamba2"])
def test_hybrids_give_the_tokens_of_transformers(tmp_path, arch):
    checkpoint = hybrid_checkpoint(tmp_path, arch)
    (tokens,) = vllm_tokens([{"load": {"model": str(checkpoint)}}])
    assert tokens == transformers_tokens(checkpoint.with_name(f"{checkpoint.name}-dequantized"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["lfm2", "nemotron_h"])
def test_hybrids_that_transformers_computes_otherwise_give_the_tokens_of_the_dequantized_weights(tmp_path, arch):
    quantized, dequantized = tokens_of(tmp_path, {arch: {}})[arch]
    assert isinstance(quantized, list), quantized
    assert quantized == dequantized


def quantized_and_dequantized(folder: Path, arch: str, text: str, **settings: object) -> list[Path]:
    """Checkpoints of a random `arch` model with other settings of its text model: the quantizer's, and its source with
    the weights that the planes stand for."""
    source, out, plain = model_folder(folder / "model", arch, **settings), folder / "out", folder / "plain"
    options = {"bits": 2, "group_size": 32, "samples": 3, "seq_len": 32, "iterations": 1, "solver": "paper"}
    report = bpdq_quantizer.quantize(str(source), out, calibration=text, **options)
    dequantized(arch, source, out, report).save_pretrained(plain)
    AutoTokenizer.from_pretrained(source).save_pretrained(plain)
    return [out, plain]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("nemotron_h", {}),
        ("falcon_h1", {}),
        ("gemma4_text", {}),
        ("deepseek_v2", {}),
        ("qwen3_5", NO_IMAGES | BF16),
        ("qwen2_5_vl", NO_IMAGES),
        ("qwen3_vl", NO_IMAGES),
    ],
)
def test_what_the_quantizer_writes_is_served(tmp_path, text, arch, options):
    paths = quantized_and_dequantized(tmp_path, arch, text)
    quantized, dequantized = vllm_tokens([{"load": {"model": str(path), **options}} for path in paths])
    assert isinstance(quantized, list), quantized
    assert quantized == dequantized


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "settings", "options"),
    [
        ("qwen2_5_vl", {}, NO_IMAGES),
        ("qwen3_5", {"linear_num_key_heads": 2, "linear_num_value_heads": 4}, NO_IMAGES | BF16),
        ("falcon_h1", {}, {}),  # whose only group of states is each rank's
        ("nemotron_h", {"n_groups": 2}, {}),
    ],
)
def test_what_the_quantizer_writes_is_served_by_two_ranks(tmp_path, text, arch, settings, options):
    quantized, dequantized = quantized_and_dequantized(tmp_path, arch, text, **settings)
    (one,) = vllm_tokens([{"load": {"model": str(dequantized), **options}}])
    load = {"model": str(quantized), "tensor_parallel_size": 2, **options}
    (two,) = vllm_tokens([{"load": load}], multiprocess=True)
    assert two == one
