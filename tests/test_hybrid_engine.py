"""vLLM serves BPDQ checkpoints of hybrids and wrappers over two ranks; one rank: test_family_engine.py."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

import bpdq_quantizer
from architectures import dequantized, model_folder
from families import BF16, NO_IMAGES
from generate import vllm_tokens


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
