"""Bytes of vLLM 0.32's and 0.33's KV cache, by `--kv-cache-dtype`, without importing vLLM (a test compares the two).

vLLM allocates blocks of `block_size` tokens over all layers (v1/core/kv_cache_utils.py, of 0.33 kv_cache_planning.py:
get_kv_cache_config_from_groups) and keeps one of them back (v1/core/block_pool.py: null_block). A layer's share of a
block is that many tokens x key/value heads x a slot, without padding (v1/kv_cache_interface.py: AttentionSpec).
"""

from collections.abc import Callable
from typing import NamedTuple

MIB = 2**20
FLASHINFER_WORKSPACE = 394 * MIB  # envs.py: VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE


class KVType(NamedTuple):
    """A value of `--kv-cache-dtype`. slot: bytes of a token's K and V in one layer and head, of the head size.

    packed: vLLM keeps the first and last two layers in 16 bits; workspace: bytes of the attention backend that serves
    it on cards before sm_90; recommended: runs on every card that BPDQ does, without such a workspace.
    """

    slot: Callable[[int], int]
    needs: str
    packed: bool = False
    workspace: int = 0
    recommended: bool = False


def _sixteen_bits(head: int) -> int:
    """v1/kv_cache_interface.py: AttentionSpec.state_content_size_bytes, K and V."""
    return 2 * 2 * head


def _eight_bits(head: int) -> int:
    """As above; the scales of fp8 are per layer and not in the cache."""
    return 2 * head


def _per_token_head(bits: int) -> Callable[[int], int]:
    """v1/attention/backends/triton_attn.py: customize_spec, an fp32 scale each for K and V."""
    return lambda head: 2 * (head * bits // 8 + 4)


def _nvfp4(head: int) -> int:
    """utils/torch_utils.py: nvfp4_kv_cache_full_dim, an fp8 scale for 16 values."""
    return 2 * (head // 2 + head // 16)


def _ultraquant(head: int) -> int:
    """v1/attention/ops/ultraquant/format.py: slot_size, a one-byte scale for 32 values."""
    return 2 * (head // 2 + head // 32)


def _turboquant(key_bits: int, value_bits: int) -> Callable[[int], int]:
    """model_executor/layers/quantization/turboquant/config.py: slot_size_aligned. Keys in 8 bits are fp8, others carry
    an fp16 norm; values carry an fp16 scale and zero point; the sum is rounded up to an even number."""

    def slot(head: int) -> int:
        keys = head if key_bits == 8 else -(-head * key_bits // 8) + 2
        values = -(-head * value_bits // 8) + 4
        return -(-(keys + values) // 2) * 2

    return slot


_FP8 = KVType(_eight_bits, "FlashInfer", workspace=FLASHINFER_WORKSPACE)
_ANY = {"needs": "any card", "recommended": True}
# config/cache.py: CacheDType, without `*_ds_mla` (latent attention, refused here) and `octave_*` (0.33, AMD only)
KV_TYPES = {
    "auto": KVType(_sixteen_bits, **_ANY),
    "bfloat16": KVType(_sixteen_bits, "any card"),
    "float16": KVType(_sixteen_bits, "any card"),
    "int8_per_token_head": KVType(_per_token_head(8), **_ANY),
    "fp8_per_token_head": KVType(_per_token_head(8), "sm_89"),
    "fp8": _FP8,
    "fp8_e4m3": _FP8,
    "fp8_e5m2": _FP8,
    "fp8_inc": KVType(_eight_bits, "Gaudi"),
    "turboquant_k8v4": KVType(_turboquant(8, 4), packed=True, **_ANY),
    "nvfp4": KVType(_nvfp4, "FlashInfer", workspace=FLASHINFER_WORKSPACE),
    "nvfp4_4over6": KVType(_nvfp4, "sm_100", workspace=FLASHINFER_WORKSPACE),
    "int4_per_token_head": KVType(_per_token_head(4), **_ANY),
    "ultraquant_4bit": KVType(_ultraquant, "AMD CDNA4", packed=True),
    "turboquant_4bit_nc": KVType(_turboquant(4, 4), packed=True, **_ANY),
    "turboquant_k3v4_nc": KVType(_turboquant(3, 4), packed=True, **_ANY),
    "turboquant_3bit_nc": KVType(_turboquant(3, 3), packed=True, **_ANY),
}


class Attention(NamedTuple):
    """A model's attention layers, all over the full context."""

    layers: int
    kv_heads: int
    head_size: int


def bytes_per_token(kv_type: str, model: Attention) -> int:
    """Bytes of the cache that a token takes, in all layers.

    model_executor/layers/quantization/turboquant/config.py: get_boundary_skip_layers says which layers stay in 16 bits
    under packed types (engine/arg_utils.py applies it to UltraQuant too).
    """
    kept = 2 * min(2, model.layers // 2) if KV_TYPES[kv_type].packed else 0
    slots = kept * _sixteen_bits(model.head_size) + (model.layers - kept) * KV_TYPES[kv_type].slot(model.head_size)
    return model.kv_heads * slots


def block_size(kv_type: str) -> int:
    """Tokens that are allocated at once: config/cache.py: DEFAULT_BLOCK_SIZE; for packed types twice that, as
    platforms/interface.py: _align_heterogeneous_kv_block_size makes a block of bytes cover 16 tokens in 16 bits."""
    return 32 if KV_TYPES[kv_type].packed else 16


def workspace(kv_type: str, model: Attention, context: int) -> int:
    """Bytes beside the cache while one request of `context` tokens is served.

    v1/attention/backends/turboquant_attn.py: _reserve_workspace holds one layer's cache in 16 bits.
    """
    if not KV_TYPES[kv_type].packed:
        return KV_TYPES[kv_type].workspace
    blocks = -(-context // block_size(kv_type))
    return blocks * block_size(kv_type) * model.kv_heads * _sixteen_bits(model.head_size)


def bytes_for(kv_type: str, model: Attention, context: int) -> int:
    """Bytes of the blocks that one request of `context` tokens takes."""
    blocks = -(-context // block_size(kv_type))
    return blocks * block_size(kv_type) * bytes_per_token(kv_type, model)


def tokens_that_fit(kv_type: str, model: Attention, free: int) -> int:
    """The longest context of one request in `free` bytes for cache and workspace, in whole blocks."""
    size = block_size(kv_type)
    fixed = workspace(kv_type, model, 0)
    block = bytes_for(kv_type, model, size) + workspace(kv_type, model, size) - fixed
    null_block = bytes_for(kv_type, model, size)
    return max(0, (free - fixed - null_block) // block) * size
