"""What a model's layers keep for each request under vLLM 0.32, from its config: see `kv_bytes`."""

from collections import Counter
from math import prod
from typing import Any

import torch
from transformers import PreTrainedConfig

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.kv_bytes import Attention, Layers, State

FULL, WINDOW, STATE, BOTH, NOTHING = (
    ("full_attention", "attention"),
    ("sliding_attention",),
    ("linear_attention", "mamba", "conv"),
    ("hybrid",),
    ("mlp", "moe"),
)
# transformers_utils/model_arch_config_convertor.py: is_deepseek_mla, of those that transformers has
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
DELTA_NETS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")
MAMBA2 = ("granitemoehybrid", "falcon_h1", "nemotron_h")
SHORT_CONVOLUTIONS = ("lfm2", "lfm2_moe")
SHARING = ("gemma3n_text", "gemma4_text")  # the last layers read others' keys and values
# what vLLM does in ways that are not counted here, by the key of the config that asks for it
NOT_COUNTED = {
    "index_topk": "sparse attention",
    "compress_ratios": "compressed attention",
    "attention_chunk_size": "chunked attention",
    "block_configs": "layers that differ in `block_configs`",
    "cross_attention_layers": "cross attention",
}
NEEDED = ("num_attention_heads", "max_position_embeddings")
KEY_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads")  # the first of them that a config has


def kept_layers(model: str, config: PreTrainedConfig) -> Layers:
    """The layers of `config` that keep keys and values or states, those alike together.

    Raises InputError, which names what `bpdq plan` does not count, or what the config lacks.
    """
    text = config.get_text_config(decoder=True)
    architecture = (config.architectures or [type(config).__name__])[0]
    if found := uncounted(text):
        raise InputError(
            f"{model}: `bpdq plan` does not count {', '.join(found)}, which {architecture} has; "
            "`bpdq quantize` and vLLM may take it all the same"
        )
    missing = [key for key in NEEDED if not value(text, key)]
    if missing:
        raise InputError(f"{model}: its config.json says nothing of {' or '.join(missing)}, which `bpdq plan` needs")
    attention, states = attention_layers(text), count_of(text, STATE + BOTH)
    if not attention:
        raise InputError(f"{model}: {architecture} has no attention layers, and `bpdq plan` counts no other models")
    return [*attention, *([State(states, *state(text))] if states else [])]


def uncounted(text: PreTrainedConfig) -> list[str]:
    """What of a text model's config is not counted, in words."""
    found = [what for key, what in NOT_COUNTED.items() if value(text, key)]
    found += sorted(set(types_of_layers(text)) - set(FULL + WINDOW + STATE + BOTH + NOTHING))
    if value(text, "kv_lora_rank") and text.model_type not in (*LATENT, "minicpm3"):
        found.append("latent attention")
    if count_of(text, STATE + BOTH):
        if text.model_type not in DELTA_NETS + MAMBA2 + SHORT_CONVOLUTIONS:
            found.append(f"the states of {text.model_type}")
        if value(text, "sliding_window"):
            found.append("sliding windows beside states")
    if value(text, "num_kv_shared_layers") and text.model_type not in SHARING:
        found.append("shared keys and values")
    if text.model_type.startswith(("qwen2", "qwen3")) and count_of(text, WINDOW) and count_of(text, FULL):
        found.append("windows in some layers only, which vLLM does not serve")  # model_executor/models/qwen2.py
    return found


def value(config: PreTrainedConfig | None, key: str) -> Any:
    """An optional entry of a config, of its first layer where layers differ; None where it has none."""
    if config is None:
        return None
    return getattr(config.per_layer_config[0] if config.is_heterogeneous else config, key, None)


def types_of_layers(text: PreTrainedConfig) -> list[str]:
    """`layer_types`, or `layers_block_type` (RecurrentGemma); without them all layers have windows if the config knows
    one (engine/arg_utils.py)."""
    types = value(text, "layer_types") or value(text, "layers_block_type")
    if types is None:
        types = [WINDOW[0] if value(text, "sliding_window") else FULL[0]] * text.num_hidden_layers
    return types


def count_of(text: PreTrainedConfig, kinds: tuple[str, ...]) -> int:
    return sum(kind in kinds for kind in types_of_layers(text))


def attention_layers(text: PreTrainedConfig) -> list[Attention]:
    """Those that are alike together; without those that read the keys and values of others (models/gemma3n.py)."""
    if text.model_type in LATENT:
        latent = text.kv_lora_rank + text.qk_rope_head_dim
        read = text.num_attention_heads * (text.qk_nope_head_dim + text.v_head_dim)
        return [Attention(text.num_hidden_layers, 1, latent, latent=read)]
    found = Counter()
    types = types_of_layers(text)
    for index, kind in enumerate(types[: len(types) - (value(text, "num_kv_shared_layers") or 0)]):
        if kind in FULL + WINDOW + BOTH:
            found[heads(text, index), window(text) if kind in WINDOW else None] += 1
    return [Attention(layers, *sizes, looked_back) for (sizes, looked_back), layers in found.items()]


def heads(text: PreTrainedConfig, index: int) -> tuple[int, int]:
    """Key/value heads of a layer, and their size (transformers_utils/model_arch_config_convertor.py)."""
    if text.model_type == "minicpm3":  # models/minicpm3.py: keys and values are those of all heads, values are padded
        return text.num_attention_heads, text.qk_nope_head_dim + text.qk_rope_head_dim
    layer = text.per_layer_config[index] if text.is_heterogeneous else text
    size = value(layer, "head_dim") or text.hidden_size // text.num_attention_heads
    if text.model_type == "falcon" and text.multi_query and not text.new_decoder_architecture:
        return 1, size
    counts = (value(layer, key) for key in KEY_HEADS)
    return next((count for count in counts if count), text.num_attention_heads), size


def window(text: PreTrainedConfig) -> int:
    """Cohere counts tokens that are looked back at without the token itself (models/commandr.py)."""
    return text.sliding_window + (text.model_type == "cohere2")


def state(text: PreTrainedConfig) -> tuple[int, int]:
    """Bytes of a layer's state, and how many blocks hold one request's: model_executor/layers/mamba/mamba_utils.py,
    MambaStateShapeCalculator and MambaStateDtypeCalculator. Convolutions are kept in 16 bits, recurrences as
    models/config.py says."""
    if text.model_type in SHORT_CONVOLUTIONS:
        return 2 * (value(text, "conv_dim") or text.hidden_size) * (text.conv_L_cache - 1), 2
    if text.model_type in DELTA_NETS:
        keys = text.linear_num_key_heads * text.linear_key_head_dim
        values = text.linear_num_value_heads * text.linear_value_head_dim
        convolution = (2 * keys + values) * (text.linear_conv_kernel_dim - 1)
        itemsize = bytes_of(value(text, "mamba_ssm_dtype") if text.model_type.startswith("qwen3_5") else None)
        return 2 * convolution + itemsize * values * text.linear_key_head_dim, 2
    return mamba2_state(text), 3


def mamba2_state(text: PreTrainedConfig) -> int:
    """Bytes of it, from the keys by which each model's config has them."""
    if text.model_type == "nemotron_h":
        inner, groups, width = text.mamba_num_heads * text.mamba_head_dim, text.n_groups, text.ssm_state_size
        recurrence, kernel = (text.mamba_num_heads, text.mamba_head_dim, width), text.conv_kernel
        itemsize = bytes_of(text.mamba_ssm_cache_dtype)
    else:
        inner = value(text, "mamba_d_ssm") or text.mamba_expand * text.hidden_size
        groups, width, kernel = text.mamba_n_groups, text.mamba_d_state, text.mamba_d_conv
        recurrence, itemsize = (text.mamba_n_heads, text.mamba_d_head, width), bytes_of(None)
    return 2 * (inner + 2 * groups * width) * (kernel - 1) + itemsize * prod(recurrence)


def bytes_of(dtype: str | None) -> int:
    """Of an element; 16 bits where the config doesn't say, or says "auto"."""
    return 2 if dtype in (None, "auto") else getattr(torch, dtype).itemsize
