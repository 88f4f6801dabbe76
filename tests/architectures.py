"""Tiny random models, one of each architecture of transformers that is known to be quantized, by kind."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from bpdq_kernels import dequantize
from bpdq_kernels.experts import fused_experts, take_apart
from bpdq_kernels.skeleton import arranged
from bpdq_quantizer.checkpoint.loader import open_checkpoint
from bpdq_quantizer.model.stream import decoder_blocks
from bpdq_quantizer.model.weights import weights_in
from hybrids import CONFIGS, GDN, MAMBA
from mixtures import EXPERTS, MIXTURES
from tiny import load_tensors, tiny_tokenizer

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256}
GPT = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 256}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LATENT = {"q_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "head_dim": 64, "num_key_value_heads": 4}
LATENT |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64}  # vLLM's CPU backend has no others
LATENT |= {"first_k_dense_replace": 2}  # no experts
PLAIN = [
    "apertus", "arcee", "biogpt", "bitnet", "cohere", "diffllama", "ernie4_5", "gemma", "glm", "glm4", "gpt_neox",
    "gpt_neox_japanese", "granite", "helium", "hunyuan_v1_dense", "jais2", "llama", "ministral", "ministral3",
    "nanochat", "nemotron", "olmo", "olmo2", "persimmon", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
    "stablelm", "starcoder2", "vaultgemma",
]  # fmt: skip
DENSE = dict.fromkeys(PLAIN, SIZES)
DENSE |= {
    "opt": SIZES | {"ffn_dim": 192, "word_embed_proj_dim": 128},
    "gptj": GPT | {"rotary_dim": 16},
    "codegen": GPT | {"rotary_dim": 16},
    "gpt_bigcode": GPT,
    "ctrl": GPT | {"dff": 192},
    "gpt_neo": {
        "hidden_size": 128, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 256,
    },
    "falcon": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mpt": {"d_model": 128, "n_layers": 2, "n_heads": 4},
    "bloom": {"hidden_size": 128, "n_layer": 2, "n_head": 4},
    "xglm": {"d_model": 128, "ffn_dim": 192, "num_layers": 2, "attention_heads": 4},
}  # fmt: skip
WINDOWED = dict.fromkeys(("cohere2", "exaone4", "gemma2", "gemma3_text", "mistral", "olmo3"), SIZES | WINDOWS)
MODERNBERT = {"local_attention": 16, "global_attn_every_n_layers": 2, "bos_token_id": 0}
WINDOWED["modernbert-decoder"] = SIZES | MODERNBERT
WINDOWED["gemma4_text"] = CONFIGS["gemma4_text"]  # with shared keys and values, and inputs of each layer
MLA = {
    "minicpm3": SIZES | LATENT | {"kv_lora_rank": 64, "qk_rope_head_dim": 32},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), SIZES | LATENT),
    "glm4_moe_lite": SIZES | LATENT | {"mlp_layer_types": ["dense", "dense"]},
    "youtu": SIZES | LATENT,
}
SSM = {"hidden_size": 128, "num_hidden_layers": 2, "state_size": 16, "expand": 2, "time_step_rank": 8}
HYBRID = {
    name: CONFIGS[name] for name in ("falcon_h1", "granitemoehybrid", "lfm2", "mamba2", "nemotron_h")
} | {
    "qwen3_5_text": SIZES | GDN,
    "qwen3_next": SIZES | GDN | {"mlp_only_layers": [0, 1], "num_experts": 4, "moe_intermediate_size": 64},
    "olmo_hybrid": SIZES | GDN,
    "kimi_linear": SIZES | LATENT | {"mlp_layer_types": ["dense", "dense"]} | {"linear_attn_config": {
        "kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4,
    }},
    "bamba": SIZES | MAMBA | {"attn_layer_indices": [1]},
    "jamba": SIZES | {
        "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16,
        "mamba_dt_rank": 8, "use_mamba_kernels": False,
    },
    "mamba": SSM,
    "falcon_mamba": SSM,
    "recurrent_gemma": SIZES | {"lru_width": 128, "num_hidden_layers": 3, "attention_window_size": 16},
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = DENSE | WINDOWED | MLA | HYBRID

TOKENS = {"vocab_size": 384, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
UNTIED = TOKENS | {"tie_word_embeddings": False}
INNER = SIZES | UNTIED
MROPE = INNER | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
QWEN_TOWER = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}
DEEP_TOWER = QWEN_TOWER | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
TOWER = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
IMAGES = {"image_token_id": 380, "video_token_id": 381, "vision_start_token_id": 382, "vision_end_token_id": 383}
IMAGE = {"image_token_index": 380}


def wrapped(model_type: str, tower: str | None = None, **changes: Any) -> dict[str, Any]:
    """Settings of a text model of a type, and of a tower."""
    vision = TOWER | changes | ({} if tower is None else {"model_type": tower})
    return {"text_config": INNER | {"model_type": model_type}, "vision_config": vision}


WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"text_config": MROPE, "vision_config": QWEN_TOWER} | IMAGES,
    "qwen3_vl": {"text_config": MROPE | {"num_hidden_layers": 3}, "vision_config": DEEP_TOWER} | IMAGES,
    "qwen3_5": CONFIGS["qwen3_5"],
    "glm4v": {"text_config": INNER | {"rope_parameters": HALF}, "vision_config": QWEN_TOWER} | IMAGES,
    "gemma3": {"text_config": INNER | WINDOWS, "vision_config": TOWER, "mm_tokens_per_image": 4}
    | IMAGE
    | {"boi_token_index": 381, "eoi_token_index": 382},
    "gemma4": {
        "text_config": CONFIGS["gemma4_text"],
        "vision_config": TOWER | {"head_dim": 32, "num_key_value_heads": 2},
        "image_token_id": 380,
    },
    "mistral3": wrapped("mistral", "pixtral") | IMAGE,
    "internvl": wrapped("qwen2", image_size=[28, 28], patch_size=[14, 14]) | {"image_token_id": 380},
    "llava": wrapped("llama", "clip_vision_model") | IMAGE,
    "llava_onevision": wrapped("qwen2", "siglip_vision_model") | IMAGE | {"image_grid_pinpoints": [[28, 28], [28, 56]]},
    "smolvlm": wrapped("llama") | {"image_token_id": 380, "scale_factor": 2},
    "idefics3": wrapped("llama") | {"image_token_id": 380, "scale_factor": 2},
    "qwen3_5_moe": CONFIGS["qwen3_5"] | {"text_config": UNTIED | MIXTURES["qwen3_5_moe_text"]},
    "qwen3_vl_moe": {
        "text_config": MROPE | MIXTURES["qwen3_moe"] | {"num_hidden_layers": 3, "norm_topk_prob": True},
        "vision_config": DEEP_TOWER,
    } | IMAGES,
    "llama4": {
        "text_config": UNTIED | MIXTURES["llama4_text"] | {"model_type": "llama4_text"},
        "vision_config": TOWER | {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}
        | {"intermediate_size": 256},
    } | IMAGE,
}  # fmt: skip


ARCHITECTURES = [*TEXT, *WRAPPERS, *(f"{arch}{EXPERTS}" for arch in MIXTURES)]


def model_folder(folder: Path, arch: str, gain: float = 1.0, **changes: Any) -> Path:
    """Write a Hugging Face folder of a random `arch` model, with `changes` to its text model, and its tokenizer.

    gain: times the weights of the decoder blocks' Linears: with 8 greedy tokens are as good as random, where they
    otherwise repeat the last one's embedding.
    """
    torch.manual_seed(0)
    model = auto_class(arch).from_config(config_of(arch, **changes)).float()
    with experts_apart(model):
        for weight in weights_in(decoder_blocks(model)[1]).values():
            weight.matrix.data *= gain
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def config_of(arch: str, **changes: Any) -> PreTrainedConfig:
    """Of the tiny model, with `changes` to its text model."""
    if arch in WRAPPERS:
        return AutoConfig.for_model(arch, **WRAPPERS[arch] | {"text_config": WRAPPERS[arch]["text_config"] | changes})
    if arch.endswith(EXPERTS):
        arch = arch.removesuffix(EXPERTS)
        return AutoConfig.for_model(arch, **TOKENS | MIXTURES[arch] | changes)
    return AutoConfig.for_model(arch, **TOKENS | TEXT[arch] | changes)


def auto_class(arch: str) -> type:
    """What transformers loads a model of `model_folder` with."""
    return AutoModelForImageTextToText if arch in WRAPPERS else AutoModelForCausalLM


def dequantized(arch: str, source: Path, out: Path, report: dict[str, Any]) -> PreTrainedModel:
    """The 16-bit model of `source` in fp32, with the weights that the planes of its checkpoint `out` stand for."""
    model, stored = auto_class(arch).from_pretrained(source, dtype=torch.float32), load_tensors(out)
    checkpoint = open_checkpoint(out)
    called = arranged(checkpoint.stored, checkpoint.skeleton).layers
    with experts_apart(model):
        weights = weights_in(model)
        for layer in report["layers"]:
            name, group_size, width = called[layer["name"]], layer["group_size"], layer["in_features"]
            W = dequantize(stored[f"{name}.B"], stored[f"{name}.c"], group_size, width, stored.get(f"{name}.s"))
            weights[layer["name"]].assign(W)
    return model


@contextmanager
def experts_apart(model: PreTrainedModel) -> Iterator[None]:
    """Within it a model's experts are one by one, in the memory of the fused ones."""
    fused = fused_experts(model)
    take_apart(model)
    yield
    for name, module in fused.items():
        model.set_submodule(name, module)
