"""Settings of tiny random models that are not only attention and MLPs, or have more than text."""

from typing import Any

TEXT = {"vocab_size": 384, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
TEXT |= {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "tie_word_embeddings": False}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 1, "mamba_chunk_size": 32}
GDN = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_conv_kernel_dim": 4}
GDN |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}  # vLLM's CPU backend has no other heads
GDN |= {"layer_types": ["linear_attention", "full_attention"]}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}

CONFIGS: dict[str, dict[str, Any]] = {
    "falcon_h1": TEXT | MAMBA | {"mamba_d_ssm": 256},
    "gemma3_text": TEXT | SLIDING,
    "gemma4_text": TEXT
    | {"layer_types": SLIDING["layer_types"] * 2, "num_hidden_layers": 4, "sliding_window": 16, "global_head_dim": 64}
    | {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 384, "num_kv_shared_layers": 2},
    "granitemoehybrid": TEXT
    | MAMBA
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 0, "shared_intermediate_size": 192},
    "lfm2": TEXT
    | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "conv_dim": 128}
    | {"block_dim": 128, "block_ff_dim": 192, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0}
    | {"tie_word_embeddings": True},  # as vLLM takes them to be
    "mamba2": {name: TEXT[name] for name in TEXT if name != "intermediate_size"}  # which transformers derives
    | {"num_heads": 8, "head_dim": 32, "state_size": 32, "n_groups": 1, "chunk_size": 32},
    "nemotron_h": TEXT
    | {"layers_block_type": ["mamba", "mlp", "attention", "mlp"], "num_hidden_layers": 4, "mamba_num_heads": 8}
    | {"mamba_head_dim": 32, "ssm_state_size": 32, "n_groups": 1, "chunk_size": 32, "conv_kernel": 4},
    "qwen3_5": {"text_config": TEXT | GDN, "vision_config": VISION, "tie_word_embeddings": False}
    | {"image_token_id": 380, "video_token_id": 381, "vision_start_token_id": 382, "vision_end_token_id": 383},
}
