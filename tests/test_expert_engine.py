"""vLLM serves experts in bit-planes with the same greedy tokens eager and compiled, and over ranks of tensor or expert
parallelism; those of every family, by one rank: test_family_engine.py."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import EXPERTS, model_folder
from expert_planes import expert_checkpoint
from families import BF16
from generate import greedy_tokens, same_up_to_a_tie, vllm_tokens

TWO_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "changes", "options"),
    [
        ("qwen3_moe", {}, {}),
        ("gpt_oss", {"intermediate_size": 128}, {}),
        ("qwen3_5_moe_text", TWO_HEADS, BF16),
    ],
)
def test_compiled_and_on_two_ranks_the_tokens_are_those_of_the_dequantized_weights(tmp_path, arch, changes, options):
    """Each rank has half of every expert, or all of half of them."""
    source = model_folder(tmp_path / "model", arch + EXPERTS, 8.0, **changes)
    checkpoint = expert_checkpoint(source, tmp_path / "out", arch)
    load, plain = ({"model": str(folder), **options} for folder in checkpoint)
    two = load | {"tensor_parallel_size": 2}
    dense, *tokens = vllm_tokens([{"load": plain}, {"load": load}, {"load": load | {"enforce_eager": False}}])
    tokens += vllm_tokens([{"load": two}, {"load": two | {"enable_expert_parallel": True}}], multiprocess=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.plain, dtype=torch.float32).eval()
    expected = dense if options else greedy_tokens(model)
    for found in tokens:
        assert isinstance(found, list), found
        assert found == expected or (options and same_up_to_a_tie(model, found, expected))
