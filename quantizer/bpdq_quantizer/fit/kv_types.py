"""Values of vLLM 0.32's and 0.33's `--kv-cache-dtype`, without importing vLLM (a test compares the two)."""

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
# config/cache.py: CacheDType, without `*_ds_mla` (sparse attention, refused here) and `octave_*` (0.33, AMD only)
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
# v1/attention/backends/mla/triton_mla.py: supported_kv_cache_dtypes, the one backend for latent attention before sm_90
LATENT_TYPES = {name: KVType(lambda size: 2 * size, **_ANY) for name in ("auto", "bfloat16", "float16")} | {
    name: KVType(lambda size: size, "sm_89") for name in ("fp8", "fp8_e4m3")
}
