"""Models of two blocks that are as wide as Qwen2.5's: the sizes that a whole one has on disk and in vLLM's kernels."""

import pytest
import torch

import bpdq_quantizer
from bpdq_kernels import layout
from bpdq_quantizer.algorithm.solver import Solution
from bpdq_quantizer.fit.plan import plan
from bpdq_quantizer.passes import blocks
from generate import vllm_tokens
from test_plan import QWEN, parts_of, qwen, written_bytes
from tiny import tiny_model

OPTIONS = {"bits": 2, "group_size": 256}


def wide_model(folder, size, layers):
    """Random weights in bfloat16, with the vocabulary of the tiny models."""
    hidden, ffn, _, heads, kv_heads = QWEN[size]
    widths = {"hidden": hidden, "ffn": ffn, "heads": heads, "kv_heads": kv_heads}
    return tiny_model(folder, "qwen2", layers=layers, dtype=torch.bfloat16, tie_word_embeddings=False, **widths)


def nothing_solved(names, W, H, scheme, solve):
    """A `Solution` of the right shapes."""
    n, k = W.shape
    c = torch.zeros(layout.coefficient_shape(k, n, scheme.bits, scheme.group_size), dtype=torch.bfloat16)
    return [Solution(torch.zeros(n, k, dtype=torch.uint8), c, torch.zeros(n), torch.ones(n), torch.tensor(0.01))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", QWEN)
def test_bytes_at_the_real_width_are_those_of_the_plan(tmp_path, monkeypatch, text, size, layers):
    """Also of the whole model: its blocks are as many times the one of these."""
    monkeypatch.setattr(blocks, "solve_checked", nothing_solved)
    model = wide_model(tmp_path / "model", size, layers)
    bpdq_quantizer.quantize(
        str(model), tmp_path / "out", calibration=text, samples=2, seq_len=32, asymmetric=0.0, **OPTIONS
    )
    written = written_bytes(tmp_path / "out")
    assert written == parts_of(plan(str(model), **OPTIONS))
    whole = plan(qwen(tmp_path / "whole", size), **OPTIONS)
    assert written["linear_bytes"] * QWEN[size][2] == whole["linear_bytes"] * layers


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_two_blocks_of_qwen_72b_give_the_same_tokens_on_one_rank_and_on_two(tmp_path, text):
    """The FFN's 29568 inputs over two ranks are 57.75 groups each."""
    model = wide_model(tmp_path / "model", "72B", layers=2)
    cheap = {"solver": "paper", "iterations": 1, "samples": 2, "seq_len": 256}
    report = bpdq_quantizer.quantize(str(model), tmp_path / "out", calibration=text, **cheap, **OPTIONS)
    print(f"{report['cpu_seconds']:.0f} s CPU, {report['peak_host_memory_bytes'] / 1e9:.1f} GB")
    assert written_bytes(tmp_path / "out") == parts_of(plan(str(model), **OPTIONS))
    load = {"model": str(tmp_path / "out"), "quantization": "bpdq"}
    (one,) = vllm_tokens([{"load": load}])
    (two,) = vllm_tokens([{"load": {**load, "tensor_parallel_size": 2}}], multiprocess=True)
    assert one == two
    assert len({tuple(tokens) for tokens in one}) > 1
