"""Random models of real shapes as folders on disk, without a tokenizer: in 16 bits and in bit-planes."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_planes import random_layer
from bpdq_kernels.format import Scheme

QWEN25 = {
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
RANDOM_MODELS: dict[str, dict[str, Any]] = {
    "135M": {  # SmolLM2
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "0.5B": QWEN25
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "1.5B": QWEN25
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
    "30B-A3B": {  # two blocks of 48, and few words, so that the blocks count
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "vocab_size": 2048,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    },
}
HEAD_BITS = 4  # of the tied embedding and LM head, which a small model spends much of its time in
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_random_models(size: str, folder: Path, scheme: Scheme) -> list[str]:
    """Folders of a model of RANDOM_MODELS: in 16 bits, with its blocks in planes, and, where they are tied, with
    embedding and LM head in HEAD_BITS planes too."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**RANDOM_MODELS[size])
    plain = folder / f"random-{size}"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(plain)
    tensors = {name: tensor for file in plain.glob("*.safetensors") for name, tensor in load_file(file).items()}
    settings = json.loads((plain / "config.json").read_text())
    quantization = {"quant_method": "bpdq", "checkpoint_format": "bpdq", **vars(scheme)}
    quantization["format_version"] = 3 if scheme.trellis else 2
    quantization |= {"ignore": ["lm_head", "re:.*[.]mlp[.]gate$"], "meta": {"bpdq": {"msbits": scheme.bits}}}
    pack(tensors, LINEARS, scheme)
    packed = folder / f"random-{size}-bpdq"
    models = [str(plain), write_model(packed, tensors, settings | {"quantization_config": quantization})]
    if config.tie_word_embeddings:
        table = Scheme(HEAD_BITS, scheme.group_size, scheme.coefficient_bits)
        pack(tensors, ("embed_tokens",), table)
        quantization |= {"ignore": [], "layers": {"model.embed_tokens": vars(table), "lm_head": vars(table)}}
        packed = folder / f"random-{size}-bpdq-head"
        models.append(write_model(packed, tensors, settings | {"quantization_config": quantization}))
    return models


def pack(tensors: dict[str, Tensor], layers: tuple[str, ...], scheme: Scheme) -> None:
    """Put random planes in place of the weights of all `layers`."""
    for name in [name for name in tensors if name.removesuffix(".weight").endswith(layers)]:
        layer = name.removesuffix(".weight")
        stored = random_layer(*tensors.pop(name).shape, scheme, torch.default_generator)
        tensors |= {f"{layer}.{key}": tensor for key, tensor in stored._asdict().items() if tensor is not None}


def write_model(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> str:
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)
