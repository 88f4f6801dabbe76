"""Which layers keep what, by a config: against the layers that vLLM builds for it, on the meta device."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.triton_utils import allocation
from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec, SlidingWindowSpec
from vllm.v1.worker.gpu import attn_utils

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.kv_bytes import Attention
from bpdq_quantizer.fit.kv_layers import kept_layers

SIZES = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 4096,
}  # fmt: skip
DELTA_NET = {  # vLLM takes heads of 128 only
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 48, "mamba_n_groups": 2, "mamba_d_state": 24, "mamba_d_conv": 5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 48, "v_head_dim": 32, "q_lora_rank": None}
FAMILIES = {
    "llama": ("llama", {}),
    "gemma2": ("gemma2", {"head_dim": 32, "sliding_window": 48}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "sliding_window": 48}),
    "gemma3n": ("gemma3n_text", {
        "head_dim": 32, "sliding_window": 48, "num_hidden_layers": 10, "num_kv_shared_layers": 3,
        "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 10,
    }),
    "gemma4": ("gemma4_text", {
        "head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "sliding_window": 48, "hidden_size_per_layer_input": 0,
    }),
    "gemma4 sharing": ("gemma4_text", {
        "head_dim": 32, "global_head_dim": 64, "num_hidden_layers": 12, "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
    }),
    "falcon": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gptj": ("gptj", {
        "n_embd": 64, "n_layer": 6, "n_head": 4, "rotary_dim": 16, "n_positions": 4096, "num_key_value_heads": 4,
    }),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64, "num_key_value_heads": 4}),
    "gpt-oss": ("gpt_oss", {"head_dim": 32, "sliding_window": 16, "num_local_experts": 4}),
    "mistral": ("mistral", {"head_dim": 32, "sliding_window": 48}),
    "mistral without": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2 all": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 48}),
    "qwen2 none": ("qwen2", {"use_sliding_window": False, "sliding_window": 48}),
    "cohere2": ("cohere2", {"head_dim": 16, "sliding_window": 48}),
    "exaone4": ("exaone4", {"sliding_window": 48, "sliding_window_pattern": 3}),
    "olmo3": ("olmo3", {"sliding_window": 48}),
    "phi3": ("phi3", {"sliding_window": 48, "pad_token_id": 0}),
    "qwen3.5": ("qwen3_5_text", {"head_dim": 32, "mamba_ssm_dtype": "float32", **DELTA_NET}),
    "qwen3.5 half": ("qwen3_5_text", {"head_dim": 32, **DELTA_NET}),
    "qwen3-next": ("qwen3_next", {"head_dim": 32, **EXPERTS, **DELTA_NET, "shared_expert_intermediate_size": 32}),
    "olmo hybrid": ("olmo_hybrid", DELTA_NET),
    "nemotron-h": ("nemotron_h", {
        "hybrid_override_pattern": "M-M*M-", "mamba_num_heads": 4, "mamba_head_dim": 48, "ssm_state_size": 24,
        "n_groups": 2, "head_dim": 16, "conv_kernel": 5,
    }),
    "nemotron-h half": ("nemotron_h", {
        "hybrid_override_pattern": "M-M*M-", "mamba_num_heads": 4, "mamba_head_dim": 48, "ssm_state_size": 24,
        "n_groups": 2, "head_dim": 16, "mamba_ssm_cache_dtype": "bfloat16",
    }),
    "falcon-h1": ("falcon_h1", {"mamba_d_ssm": 192, **MAMBA2}),
    "granite 4": ("granitemoehybrid", {
        "layer_types": ["mamba", "mamba", "attention"] * 2, "shared_intermediate_size": 32, "num_local_experts": 0,
        "mamba_expand": 3, **MAMBA2,
    }),
    "lfm2": ("lfm2", {
        "full_attn_idxs": [1, 4], "conv_L_cache": 4, "conv_dim": 96, "block_dim": 64, "block_ff_dim": 64,
        "block_multiple_of": 16,
    }),
    "deepseek v2": ("deepseek_v2", {**LATENT, "first_k_dense_replace": 9, "n_routed_experts": 4, "n_group": 1}),
    "deepseek v3": ("deepseek_v3", {**LATENT, "q_lora_rank": 32, "first_k_dense_replace": 9}),
    "glm 4 flash": ("glm4_moe_lite", {
        **LATENT, "q_lora_rank": 32, "first_k_dense_replace": 1, "n_routed_experts": 4, **EXPERTS,
    }),
    "minicpm3": ("minicpm3", {
        "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    }),
}  # fmt: skip


@pytest.fixture(scope="module")
def one_rank():
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())  # which takes a quarter of a minute each
        patch.setattr(allocation.triton, "set_allocator", lambda _: None, raising=False)  # of vLLM's CPU build
        patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # where it has states in fp32
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        yield initialize_model_parallel
        destroy_model_parallel()
        destroy_distributed_environment()


def config_of(family):
    kind, changes = FAMILIES[family]
    config = AutoConfig.for_model(kind, **SIZES | changes, dtype="bfloat16")
    stem = type(config).__name__.removesuffix("Config").removesuffix("Text")
    config.architectures = [f"{stem}ForCausalLM"]
    return config


def vllm_layers(config, folder: Path, start) -> Counter:
    """Kinds of the layers of vLLM's own model that keep something, as the fields of `Attention` and `State`."""
    config.save_pretrained(folder)
    args = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, load_format="dummy", enforce_eager=True, max_model_len=4096
    )
    vllm_config = args.create_engine_config()
    found = Counter()
    with set_current_vllm_config(vllm_config):
        start(1, 1)
        with torch.device("meta"):
            initialize_model(vllm_config)
        for spec in attn_utils.get_kv_cache_spec(vllm_config).values():
            if isinstance(spec, MambaSpec):
                blocks = spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes
                found["state", spec.state_content_size_bytes, blocks] += 1
            else:
                window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
                found[isinstance(spec, MLAAttentionSpec), spec.num_kv_heads, spec.head_size, window] += 1
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_those_that_vllm_builds(tmp_path, one_rank, family):
    config = config_of(family)
    found = Counter()
    for kind in kept_layers(family, config):
        if isinstance(kind, Attention):
            found[bool(kind.latent), kind.kv_heads, kind.head_size, kind.window] += kind.layers
        else:
            found["state", kind.size, kind.blocks] += kind.layers
    try:
        assert found == vllm_layers(config, tmp_path, one_rank)
    finally:
        destroy_model_parallel()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama4_text", {}, "does not count chunked attention, chunked_attention, which Llama4"),
        ("bamba", {}, "the states of bamba"),
        ("jamba", {}, "the states of jamba"),
        ("recurrent_gemma", {}, "does not count recurrent, which RecurrentGemma"),
        ("zamba2", {}, "the states of zamba2"),
        ("mamba2", {}, "the states of mamba2"),
        ("deepseek_v32", {}, "sparse attention, indexed_attention, latent attention"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "windows in some layers only, which vLLM does"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "windows in some layers only, which vLLM does"),
        ("nemotron_h", {"sliding_window": 64}, "sliding windows beside states"),
        ("nemotron_h", {"hybrid_override_pattern": "M-M-"}, "no attention layers"),
        ("mllama_text_model", {}, "cross attention"),
        ("llama", {"num_kv_shared_layers": 1}, "shared keys and values"),
        ("llama", {"kv_lora_rank": 8}, "latent attention"),
        ("bloom", {"max_position_embeddings": None}, "says nothing of max_position_embeddings, which"),
    ],
)
def test_others_are_refused_by_name(kind, changes, message):
    sizes = {} if kind in ("opt", "mamba2", "zamba2") else SIZES
    config = AutoConfig.for_model(kind, **sizes | changes)
    with pytest.raises(InputError) as refusal:
        kept_layers("m", config)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("m: ")
