"""vLLM serves BPDQ checkpoints of hybrids and wrappers over two ranks; one rank: test_family_engine.py."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import bpdq_quantizer
from architectures import dequantized, model_folder
from families import NO_IMAGES
from generate import vllm_tokens


def quantized_and_dequantized(folder: Path, arch: str, text: str) -> list[Path]:
    """Checkpoints of a random `arch` model: the quantizer's, and its source with the weights that the planes stand
    for."""
    source, out, plain = model_folder(folder / "model", arch), folder / "out", folder / "plain"
    options = {"bits": 2, "group_size": 32, "samples": 3, "seq_len": 32, "iterations": 1, "solver": "paper"}
    report = bpdq_quantizer.quantize(str(source), out, calibration=text, **options)
    dequantized(arch, source, out, report).save_pretrained(plain)
    AutoTokenizer.from_pretrained(source).save_pretrained(plain)
    return [out, plain]


@pytest.mark.slow
def test_a_wrapper_is_served_by_two_ranks(tmp_path, text):
    quantized, dequantized = quantized_and_dequantized(tmp_path, "qwen2_5_vl", text)
    (one,) = vllm_tokens([{"load": {"model": str(dequantized), **NO_IMAGES}}])
    load = {"model": str(quantized), "tensor_parallel_size": 2, **NO_IMAGES}
    (two,) = vllm_tokens([{"load": load}], multiprocess=True)
    assert two == one
