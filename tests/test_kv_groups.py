"""The groups and blocks of layers of several kinds, against vLLM's own code for a card."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config.cache import CacheConfig
from vllm.model_executor.layers.attention.attention import Attention as AttentionLayer
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadataBuilder
from vllm.model_executor.models import ModelRegistry
from vllm.platforms.interface import Platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec, get_kv_quant_mode
from vllm.v1.kv_cache_layout import KVCacheLayout

from bpdq_quantizer.fit import kv_bytes
from bpdq_quantizer.fit.kv_bytes import IN_FLIGHT, STEP_TOKENS, Attention, State
from test_kv_bytes import kv_cache_planning, with_backends_not_installed

MODELS = {
    "Gemma 2 27B": [Attention(23, 16, 128, 4096), Attention(23, 16, 128)],
    "Gemma 3 27B": [Attention(52, 16, 128, 1024), Attention(10, 16, 128)],
    "Gemma 4 31B": [Attention(50, 16, 256, 1024), Attention(10, 4, 512)],
    "gpt-oss and a draft layer": [Attention(12, 8, 64, 128), Attention(13, 8, 64)],
    "Mistral 7B": [Attention(32, 8, 128, 4096)],
    "Command R 7B": [Attention(24, 8, 128, 4097), Attention(8, 8, 128)],
    "heads of two sizes": [Attention(5, 4, 128), Attention(3, 2, 64)],
    "two windows": [Attention(4, 2, 64, 32), Attention(6, 2, 64, 512), Attention(2, 2, 64)],
    "Qwen3.5 27B": [Attention(16, 4, 256), State(48, 3207168)],
    "Nemotron-H 8B": [Attention(4, 8, 128), State(24, 4255744, 3)],
    "Falcon-H1": [Attention(36, 2, 128), State(36, 1582080, 3)],
    "LFM2 1.2B": [Attention(6, 8, 64), State(10, 8192)],
    "DeepSeek V2 Lite": [Attention(27, 1, 576, latent=16 * 256)],
}
CASES = [(model, kv_type) for model, layers in MODELS.items() for kv_type in kv_bytes.types_for(layers)]


class Card(Platform):
    """vLLM's arithmetic of block sizes for a CUDA card; `backend` has the kernels for the KV cache."""

    backend = FlashAttentionBackend

    @classmethod
    def _find_non_ssm_backends(cls, vllm_config):
        return [cls.backend]


class Packs:
    """A backend that this build of vLLM may not have: its packing, and FlashAttention's or FlashInfer's blocks."""

    def __init__(self, sizes):
        self.sizes = sizes

    def customize_spec(self, spec):
        for backend in (TritonAttentionBackend, TurboQuantAttentionBackend):
            spec = backend.customize_spec(spec)
        return with_backends_not_installed(spec)

    def get_supported_kernel_block_sizes(self, spec=None):
        return self.sizes

    def get_preferred_block_size(self, default):
        return default

    def supports_block_size(self, size):
        return True

    def is_mla(self):
        return False


def backend_for(kv_type):
    turbo, info = kv_type.startswith("turboquant"), kv_bytes.KV_TYPES[kv_type].workspace
    chosen = TurboQuantAttentionBackend if turbo else FlashAttentionBackend
    return Packs([16, 32, 64] if info else chosen.get_supported_kernel_block_sizes())


def vllm_setting(layers, kv_type, context, monkeypatch):
    """What vLLM's functions read of its config, its block size aligned as on a card."""
    attention = [kind for kind in layers if isinstance(kind, Attention)]
    state = next((kind for kind in layers if isinstance(kind, State)), None)
    cache = SimpleNamespace(
        cache_dtype=kv_type, block_size=CacheConfig.DEFAULT_BLOCK_SIZE, user_specified_block_size=False,
        kv_cache_dtype_skip_layers=[], mamba_page_size_padded=None, skip_page_size_padded=None,
        mamba_cache_mode="align", mamba_block_size=16, num_gpu_blocks_override=None,
        get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBNHC, prefix_cache_retention_interval=0,
    )  # fmt: skip
    model = SimpleNamespace(
        dtype=torch.bfloat16, is_hybrid=state is not None, use_mla=False, architecture="", max_model_len=context,
        original_max_model_len=context, get_num_kv_heads=lambda _: attention[0].kv_heads,
        get_head_size=lambda: attention[0].head_size,
    )  # fmt: skip
    vllm_config = SimpleNamespace(
        cache_config=cache, model_config=model, speculative_config=None, max_in_flight_tokens=IN_FLIGHT,
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, max_num_batched_tokens=STEP_TOKENS),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
        attention_config=SimpleNamespace(hisparse_config=None), num_prefill_lookahead_tokens=0,
    )  # fmt: skip

    class OfState:
        @staticmethod
        def get_mamba_state_shape_from_config(_):
            return ((state.size,),)

        @staticmethod
        def get_mamba_state_dtype_from_config(_):
            return (torch.int8,)

    monkeypatch.setattr(ModelRegistry, "resolve_model_cls", lambda *_, **__: (OfState, ""))
    monkeypatch.setattr(Card, "backend", backend_for(kv_type))
    ultraquant = SimpleNamespace(UltraQuantAttentionBackend=backend_for(kv_type))
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.ultraquant_attn", ultraquant)
    monkeypatch.setattr("vllm.config.vllm.set_current_vllm_config", lambda _: torch.no_grad())
    Card.update_block_size_for_backend(vllm_config)
    return vllm_config


def vllm_specs(layers, kv_type, vllm_config):
    """The spec of every layer, as vLLM's layers and backends make it."""
    cache, specs = vllm_config.cache_config, {}
    dtype = STR_DTYPE_TO_TORCH_DTYPE.get(kv_type, torch.bfloat16)
    for number, kind in enumerate(layers):
        if isinstance(kind, State):
            spec = MambaSpec(
                shapes=((kind.size,),), dtypes=(torch.int8,), block_size=cache.mamba_block_size,
                page_size_padded=cache.mamba_page_size_padded, mamba_cache_mode="align",
                num_prefill_checkpoint_blocks=kind.blocks - 2,
            )  # fmt: skip
        elif kind.latent:
            spec = MLAAttentionSpec(
                block_size=cache.block_size, num_kv_heads=1, head_size=kind.head_size, dtype=dtype,
                cache_dtype_str=kv_type, kv_quant_mode=get_kv_quant_mode(kv_type),
            )  # fmt: skip
        else:
            layer = SimpleNamespace(
                attn_type=AttentionType.DECODER, kv_cache_dtype=kv_type, sliding_window=kind.window,
                attn_backend=Card.backend, num_kv_heads=kind.kv_heads, head_size=kind.head_size,
                head_size_v=kind.head_size, kv_cache_torch_dtype=dtype,
            )  # fmt: skip
            spec = Card.backend.customize_spec(AttentionLayer.get_kv_cache_spec(layer, vllm_config))
        specs |= {f"layers.{number}.{index}": replace(spec) for index in range(kind.layers)}
    return specs


def vllm_takes(layers, kv_type, context, free, monkeypatch):
    """Whether vLLM would start with `free` bytes for its KV cache and requests of `context` tokens."""
    vllm_config = vllm_setting(layers, kv_type, context, monkeypatch)
    try:
        kv_cache_planning.get_kv_cache_configs(vllm_config, [vllm_specs(layers, kv_type, vllm_config)], [free])
    except ValueError as e:
        if "larger than the available KV cache memory" not in str(e):
            raise
        return False
    return True


def check_bytes(layers, kv_type, contexts, monkeypatch):
    vllm_config = vllm_setting(layers, kv_type, max(contexts), monkeypatch)
    if any(isinstance(kind, State) for kind in layers):
        assert kv_bytes.block_size(kv_type, layers) == vllm_config.cache_config.block_size
    groups = kv_cache_planning.get_kv_cache_groups(vllm_config, vllm_specs(layers, kv_type, vllm_config))
    assert kv_bytes.null_block(kv_type, layers) == kv_cache_planning._pool_bytes_per_block(vllm_config, groups)
    for vllm_config.model_config.max_model_len in contexts:
        needed = kv_cache_planning._max_memory_usage_bytes_from_groups(vllm_config, groups)
        assert kv_bytes.bytes_for(kv_type, layers, vllm_config.model_config.max_model_len) == needed


@pytest.mark.parametrize(("model", "kv_type"), CASES)
def test_bytes_are_vllms(monkeypatch, model, kv_type):
    check_bytes(MODELS[model], kv_type, [1, 700, 5000, 100_000], monkeypatch)


@pytest.mark.parametrize(("model", "kv_type"), CASES)
def test_what_a_token_and_a_request_take_add_up(model, kv_type):
    layers, size = MODELS[model], kv_bytes.block_size(kv_type, MODELS[model])
    long = 2**18 // size * size
    fixed = sum(kv_bytes.fixed_bytes(kv_type, layers).values())
    assert kv_bytes.bytes_for(kv_type, layers, long) == fixed + long * kv_bytes.bytes_per_token(kv_type, layers)


@pytest.mark.parametrize(("model", "kv_type"), CASES)
def test_vllm_starts_with_the_tokens_that_fit_and_no_longer(monkeypatch, model, kv_type):
    layers, free = MODELS[model], 3 * 2**30 + 12345
    tokens = kv_bytes.tokens_that_fit(kv_type, layers, free, 2**17)
    assert vllm_takes(layers, kv_type, tokens, free - kv_bytes.workspace(kv_type, layers, tokens), monkeypatch)
    if model == "Mistral 7B":
        assert tokens == 2**17
    else:
        left = free - kv_bytes.workspace(kv_type, layers, tokens + 1)
        assert not vllm_takes(layers, kv_type, tokens + 1, left, monkeypatch)


def alike(counts, windows):
    """Attention layers that are alike."""
    heads, sizes = st.sampled_from([1, 2, 3, 8]), st.sampled_from([64, 96, 128, 256])
    return st.builds(Attention, counts, heads, sizes, windows, st.just(0))


kinds = st.lists(
    alike(st.integers(1, 40), st.sampled_from([None, 33, 1000])),
    min_size=1,
    max_size=3,
    unique_by=lambda kind: kind[1:],
)
hybrids = st.tuples(
    alike(st.integers(1, 30), st.none()),
    st.builds(State, st.integers(1, 60), st.integers(1, 5_000_000), st.sampled_from([2, 3])),
)


@given(
    layers=kinds | hybrids,
    kv_type=st.sampled_from(["auto", "int8_per_token_head", "fp8", "nvfp4", "int4_per_token_head"]),
    context=st.integers(1, 50_000),
)
@settings(max_examples=150, deadline=None)
def test_bytes_of_any_layers_are_vllms(layers, kv_type, context):
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_bytes(layers, kv_type, [context], monkeypatch)


def test_rows_of_latent_attention_are_vllms():
    layers = MODELS["DeepSeek V2 Lite"]
    for context in (100, 5000, 20000):
        setting = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=kv_bytes.MAX_SEQUENCES),
            cache_config=SimpleNamespace(block_size=16),
            model_config=SimpleNamespace(max_model_len=context),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        )
        rows = MLACommonMetadataBuilder.determine_chunked_prefill_workspace_size(setting)
        assert kv_bytes.workspace("auto", layers, context) == 2 * rows * (576 + 16 * 256)


def test_figures_by_hand():
    qwen, gemma = MODELS["Qwen3.5 27B"], MODELS["Gemma 4 31B"]
    assert kv_bytes.block_size("auto", qwen) == 784  # 3207168 bytes of state, 4096 of a token
    assert kv_bytes.bytes_per_token("auto", qwen) == 16 * 4 * 256 * 2 * 2
    assert kv_bytes.fixed_bytes("auto", qwen) == {"state": 3 * 2 * 16 * 784 * 4096, "window": 0}
    # a page is 16 tokens of a windowed layer, 32 of another; five groups of windows: 128 blocks of 2047 tokens, and one
    assert kv_bytes.bytes_for("auto", gemma, 262144) == 10 * 16 * 16384 * (8192 + 5 * 129)
    assert kv_bytes.fixed_bytes("auto", gemma) == {"state": 0, "window": 10 * 16 * 16384 * 5 * 129}
