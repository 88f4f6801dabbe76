"""vLLM serves BPDQ checkpoints of hybrids, of models with sliding windows and of wrappers, with the tokens of the
dequantized weights."""

from pathlib import Path

import pytest

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
