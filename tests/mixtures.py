"""Settings of tiny models with experts, one of each family that is known to be quantized."""

from typing import Any

from hybrids import CONFIGS, GDN

EXPERTS = " (experts)"  # behind names of MIXTURES elsewhere: some are among those of families without, too
SIZES = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "moe_intermediate_size": 64}
MANY = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
GROUPS = {"n_group": 2, "topk_group": 1}
LATENT = {"q_lora_rank": 64, "qk_nope_head_dim": 32, "v_head_dim": 32, "head_dim": 64, "num_key_value_heads": 4}
LATENT |= {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
SHARED = {"shared_expert_intermediate_size": 64}
GRANITE = SIZES | LOCAL | {"intermediate_size": 64}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": SIZES | LOCAL,
    "qwen2_moe": SIZES | MANY | SHARED,
    "qwen3_moe": SIZES | MANY,
    "olmoe": SIZES | MANY,
    "gpt_oss": SIZES | LOCAL | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "glm4_moe": SIZES | ROUTED | GROUPS,
    "glm4_moe_lite": SIZES | LATENT | ROUTED | GROUPS | {
        "mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1,
    },
    "deepseek_v2": SIZES | LATENT | ROUTED | {"n_group": 1, "topk_group": 1},
    "deepseek_v3": SIZES | LATENT | ROUTED | GROUPS | {"topk_method": "noaux_tc"},
    "ernie4_5_moe": SIZES | {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1},
    "granitemoe": GRANITE,
    "granitemoeshared": GRANITE | {"shared_intermediate_size": 64},
    "granitemoehybrid": CONFIGS["granitemoehybrid"] | LOCAL | {"intermediate_size": 64},
    "minimax_m2": SIZES | LOCAL | {"intermediate_size": 64, "rotary_dim": 16},
    "hunyuan_v1_moe": SIZES | {"num_experts": 8, "moe_topk": 2, "intermediate_size": 64},
    "llama4_text": SIZES | {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 96, "interleave_moe_layer_step": 2,
        "intermediate_size": 64,
    },
    "phimoe": SIZES | LOCAL | {"intermediate_size": 64},
    "lfm2_moe": CONFIGS["lfm2"] | MANY | {"num_dense_layers": 1, "moe_intermediate_size": 64},
    "qwen3_next": SIZES | GDN | MANY | SHARED,
    "qwen3_5_moe_text": SIZES | GDN | MANY | SHARED,
    "gemma4_text": CONFIGS["gemma4_text"] | {
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64,
    },
    "nemotron_h": CONFIGS["nemotron_h"] | ROUTED | GROUPS | {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"], "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64,
    },
    "afmoe": SIZES | {
        "num_experts": 8, "num_experts_per_tok": 2, "num_dense_layers": 1, "num_shared_experts": 1,
        "score_func": "sigmoid", "route_norm": True, "route_scale": 1.0, "n_group": 1, "topk_group": 1,
    },
    "dots1": SIZES | ROUTED | GROUPS,
    "exaone_moe": SIZES | {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1},
    "flex_olmo": SIZES | MANY | {"intermediate_size": 64},
    "cohere2_moe": SIZES | MANY,
    "jamba": SIZES | MANY | {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "mamba_d_state": 16, "mamba_dt_rank": 8, "use_mamba_kernels": False,
    },
    "kimi_linear": SIZES | LATENT | {
        "num_experts": 8, "num_experts_per_token": 2, "num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"],
        "linear_attn_config": {
            "kda_layers": [1], "full_attn_layers": [2], "num_heads": 4, "head_dim": 32, "short_conv_kernel_size": 4,
        },
    },
}  # fmt: skip
