"""Models for `gpu_vllm`: tiny checkpoints of random bit-planes, and the sizes of a real one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.random_planes import random_planes
from bpdq_kernels.format import Scheme

Config = dict[str, Any]
SCHEME = Scheme(2, 128, 8)
QUANTIZATION = {
    "quant_method": "bpdq",
    "checkpoint_format": "bpdq",
    "format_version": 2,
    "bits": SCHEME.bits,
    "group_size": SCHEME.group_size,
    "coefficient_bits": SCHEME.coefficient_bits,
    "ignore": ["lm_head"],
}
COMMON = {
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
}
QWEN2 = COMMON | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
SMALL = {  # heads of 128, for which every attention backend has kernels; an FFN that ends in a short group
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
TINY = {
    "tiny": QWEN2 | SMALL,
    # of the families with experts, one whose routing vLLM can do without compiled operators
    "tiny experts": COMMON
    | SMALL
    | {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "moe_intermediate_size": 352,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
}
QWEN2_5_7B = QWEN2 | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
}


def write_config(folder: Path, config: Config) -> None:
    """A new folder with that config.json alone."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_tiny_checkpoint(folder: Path, name: str) -> None:
    """A checkpoint of TINY's `name` with random planes and coefficients, whose layers keep the size of what goes
    through them."""
    config = TINY[name]
    write_config(folder, config | {"quantization_config": QUANTIZATION})
    random = torch.Generator().manual_seed(0)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    tensors = {
        "model.embed_tokens.weight": normal(random, vocabulary, hidden),
        "lm_head.weight": normal(random, vocabulary, hidden, std=0.05),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for layer, (outputs, inputs) in linears(config, i):
            tensors |= {f"{block}{layer}.{what}": t for what, t in random_linear(random, outputs, inputs).items()}
            if layer.endswith(("q_proj", "k_proj", "v_proj")):
                tensors[f"{block}{layer}.bias"] = normal(random, outputs, std=0.1)
        if has_experts(config, i):
            experts = config["n_routed_experts"]
            tensors[f"{block}mlp.gate.weight"] = normal(random, experts, hidden, std=hidden**-0.5)
            tensors[f"{block}mlp.gate.e_score_correction_bias"] = torch.rand(experts, generator=random)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def linears(config: Config, block: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names within a block, and [outputs, inputs], of what is quantized."""
    hidden = config["hidden_size"]
    heads, shared_heads = (config[f"num_{kind}_heads"] * 128 for kind in ("attention", "key_value"))
    yield "self_attn.q_proj", (heads, hidden)
    yield "self_attn.k_proj", (shared_heads, hidden)
    yield "self_attn.v_proj", (shared_heads, hidden)
    yield "self_attn.o_proj", (hidden, heads)
    ffns, inner = ["mlp"], config["intermediate_size"]
    if has_experts(config, block):
        ffns = ["mlp.shared_experts", *(f"mlp.experts.{e}" for e in range(config["n_routed_experts"]))]
        inner = config["moe_intermediate_size"]
    for ffn in ffns:
        yield f"{ffn}.gate_proj", (inner, hidden)
        yield f"{ffn}.up_proj", (inner, hidden)
        yield f"{ffn}.down_proj", (hidden, inner)


def has_experts(config: Config, block: int) -> bool:
    return block >= config.get("first_k_dense_replace", config["num_hidden_layers"])


def random_linear(random: torch.Generator, outputs: int, inputs: int) -> dict[str, Tensor]:
    """B, int8 c and s of weights around zero, of standard deviation inputs**-0.5 about."""
    B, _ = random_planes(outputs, inputs, SCHEME, random)
    shape = (-(-inputs // SCHEME.group_size), SCHEME.bits + 1, outputs)
    c = torch.randint(-127, 128, shape, generator=random)
    c[:, -1] = -c[:, :-1].sum(1) // 2
    s = torch.full((SCHEME.bits + 1, outputs), 2 * inputs**-0.5 / 64).bfloat16()
    return {"B": B, "c": c.to(torch.int8), "s": s}


def normal(random: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=random) * std).to(torch.bfloat16)
