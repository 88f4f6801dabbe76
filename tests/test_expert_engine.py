"""vLLM serves experts in bit-planes with the greedy tokens of the dequantized weights: eager and compiled, over ranks
of tensor or expert parallelism."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from architectures import EXPERTS, model_folder
from expert_planes import Checkpoint, expert_checkpoint
from families import BF16
from generate import greedy_tokens, same_up_to_a_tie, vllm_tokens

SERVED = {  # by vLLM's CPU engine in 16 bits, with these settings
    "mixtral": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "olmoe": {},
    "gpt_oss": {},
    "glm4_moe": {},
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "deepseek_v2": {},
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "ernie4_5_moe": {},
    "granitemoe": {},
    "granitemoeshared": {},
    "granitemoehybrid": {},
    "hunyuan_v1_moe": {},
    "llama4_text": {},
    "gemma4_text": {},
    "dots1": {},
    "exaone_moe": {},
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1},
    "flex_olmo": {"intermediate_size": 64},
    "lfm2_moe": {},
    "qwen3_next": {},
    "qwen3_5_moe_text": {},
}
ENGINES = {"qwen3_next": BF16, "qwen3_5_moe_text": BF16}
# where vLLM's tokens in 16 bits are not transformers'
OWN_WAY = ("glm4_moe_lite", "deepseek_v2", "deepseek_v3", "lfm2_moe", *ENGINES)
GROUPS = [[*SERVED][i : i + 5] for i in range(0, len(SERVED), 5)]


def made(folder: Path, arch: str, **changes: object) -> Checkpoint:
    source = model_folder(folder / "model", arch + EXPERTS, 8.0, **SERVED[arch] | changes)
    return expert_checkpoint(source, folder / "out", arch)


def network(checkpoint: Checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint.plain, dtype=torch.float32).eval()


def faults(checkpoints: dict[str, Checkpoint]) -> dict[str, list]:
    """Tokens, or errors, of families that are not served with those of the dequantized weights: transformers', or
    vLLM's where they differ."""
    engines = [
        {"load": {"model": str(path), **ENGINES.get(arch, {})}}
        for arch, checkpoint in checkpoints.items()
        for path in checkpoint[: 2 if arch in OWN_WAY else 1]
    ]
    tokens, found = iter(vllm_tokens(engines)), {}
    for arch, checkpoint in checkpoints.items():
        model = network(checkpoint)
        pair = [next(tokens), next(tokens) if arch in OWN_WAY else greedy_tokens(model)]
        if isinstance(pair[0], str) or (pair[0] != pair[1] and not same_up_to_a_tie(model, *pair)):
            found[arch] = pair
    return found


@pytest.mark.slow
@pytest.mark.parametrize("archs", GROUPS, ids=lambda archs: f"{archs[0]}..{archs[-1]}")
def test_every_family_is_served(tmp_path, archs):
    assert faults({arch: made(tmp_path / arch, arch) for arch in archs}) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        ("qwen3_moe", {}),
        ("gpt_oss", {"intermediate_size": 128}),
        ("qwen3_5_moe_text", {"linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    ],
)
def test_compiled_and_on_two_ranks_the_tokens_are_those_of_one_eager_rank(tmp_path, arch, changes):
    """Each rank has half of every expert, or all of half of them."""
    checkpoint, options = made(tmp_path, arch, **changes), ENGINES.get(arch, {})
    load = {"model": str(checkpoint.planes), **options}
    eager, compiled = vllm_tokens([{"load": load}, {"load": load | {"enforce_eager": False}}])
    two = load | {"tensor_parallel_size": 2}
    ranks = vllm_tokens([{"load": two}, {"load": two | {"enable_expert_parallel": True}}], multiprocess=True)
    expected = greedy_tokens(network(checkpoint)) if not options else eager
    for tokens in eager, compiled, *ranks:
        assert isinstance(tokens, list), tokens
        assert tokens == expected or (options and same_up_to_a_tie(network(checkpoint), tokens, expected))
