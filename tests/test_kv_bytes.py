"""The KV-cache arithmetic of `bpdq plan` against vLLM's own code."""

from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from vllm import envs
from vllm.config.cache import CacheConfig, CacheDType
from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
from vllm.platforms.interface import Platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE, nvfp4_kv_cache_full_dim
from vllm.v1.attention.backends import turboquant_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
from vllm.v1.attention.ops.ultraquant.format import slot_size
from vllm.v1.core import kv_cache_utils as kv_cache_planning
from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode
from vllm.v1.kv_cache_layout import KVCacheLayout

from bpdq_quantizer.fit.kv_bytes import (
    Attention,
    block_size,
    bytes_for,
    bytes_per_token,
    tokens_that_fit,
    workspace,
)
from bpdq_quantizer.fit.kv_types import FLASHINFER_WORKSPACE, KV_TYPES

with suppress(ImportError):  # vLLM 0.33
    from vllm.v1.core import kv_cache_planning

QWEN_72B = Attention(layers=80, kv_heads=8, head_size=128)
MODELS = [
    QWEN_72B,
    Attention(layers=28, kv_heads=4, head_size=128),  # Qwen2.5-7B
    Attention(layers=30, kv_heads=3, head_size=64),  # SmolLM2-135M
    Attention(layers=18, kv_heads=1, head_size=256),
    Attention(layers=3, kv_heads=2, head_size=96),
]


def vllm_specs(kv_type: str, model: Attention) -> dict[str, FullAttentionSpec]:
    """The spec of every layer, as vLLM's Attention.get_kv_cache_spec and the attention backend build it."""
    skipped = []
    if KV_TYPES[kv_type].packed:
        config = SimpleNamespace(is_hybrid=False, hf_text_config=SimpleNamespace(num_hidden_layers=model.layers))
        skipped = TurboQuantConfig.get_boundary_skip_layers(config)
    specs = {}
    for layer in range(model.layers):
        stored = "auto" if str(layer) in skipped else kv_type
        spec = FullAttentionSpec(
            block_size=block_size(kv_type, [model]),
            num_kv_heads=model.kv_heads,
            head_size=model.head_size,
            dtype=STR_DTYPE_TO_TORCH_DTYPE.get(stored, torch.bfloat16),
            kv_quant_mode=get_kv_quant_mode(stored),
        )
        for backend in (TritonAttentionBackend, TurboQuantAttentionBackend):
            spec = backend.customize_spec(spec)
        specs[f"layers.{layer}"] = with_backends_not_installed(spec)
    return specs


def with_backends_not_installed(spec: FullAttentionSpec) -> FullAttentionSpec:
    """What `customize_spec` of FlashInfer and UltraQuant does, which vLLM's CPU build can't import."""
    if spec.kv_quant_mode.is_nvfp4:
        content = nvfp4_kv_cache_full_dim(spec.head_size)
        return replace(spec, num_head_slots=2 * spec.num_kv_heads, state_content_bytes=content)
    if spec.kv_quant_mode.is_ultraquant:
        return replace(spec, state_content_bytes=slot_size(spec.head_size))
    return spec


def test_every_type_that_vllm_knows_is_counted():
    known = {name for name in get_args(CacheDType) if not name.endswith("_ds_mla") and not name.startswith("octave_")}
    assert set(KV_TYPES) == known


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("model", MODELS)
def test_bytes_per_token_are_vllms(kv_type, model):
    pages = [spec.page_size_bytes for spec in vllm_specs(kv_type, model).values()]
    assert bytes_per_token(kv_type, [model]) * block_size(kv_type, [model]) == sum(pages)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("model", MODELS)
def test_vllm_takes_a_request_of_the_tokens_that_fit_and_no_longer_one(kv_type, model):
    free = 2**30 + 12345
    tokens = tokens_that_fit(kv_type, [model], free, 1)
    layout = KVCacheLayout.LBNHC
    config = SimpleNamespace(
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout, num_gpu_blocks_override=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        model_config=SimpleNamespace(max_model_len=tokens),
    )
    left = free - workspace(kv_type, [model], tokens)
    kv_cache_planning.check_enough_kv_cache_memory(config, vllm_specs(kv_type, model), left)
    config.model_config.max_model_len += 1
    left = free - workspace(kv_type, [model], tokens + 1)
    with pytest.raises(ValueError, match="larger than the available KV cache memory"):
        kv_cache_planning.check_enough_kv_cache_memory(config, vllm_specs(kv_type, model), left)


@pytest.mark.parametrize("kv_type", ["auto", "turboquant_k8v4", "turboquant_4bit_nc", "turboquant_3bit_nc"])
@pytest.mark.parametrize("model", MODELS)
def test_block_size_is_vllms(kv_type, model):
    packed = KV_TYPES[kv_type].packed

    class Card(Platform):
        @classmethod
        def _find_non_ssm_backends(cls, vllm_config):
            return [FlashAttentionBackend, *([TurboQuantAttentionBackend] if packed else [])]

    cache = SimpleNamespace(
        cache_dtype=kv_type,
        block_size=CacheConfig.DEFAULT_BLOCK_SIZE,
        user_specified_block_size=False,
        kv_cache_dtype_skip_layers=["0"] if packed else [],
        mamba_page_size_padded=None,
    )
    sizes = SimpleNamespace(
        dtype=torch.bfloat16,
        is_hybrid=False,
        get_num_kv_heads=lambda _: model.kv_heads,
        get_head_size=lambda: model.head_size,
    )
    Card.update_block_size_for_backend(SimpleNamespace(cache_config=cache, model_config=sizes, parallel_config=None))
    assert cache.block_size == block_size(kv_type, [model])


def test_workspaces_are_vllms(monkeypatch):
    assert envs.environment_variables["VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE"]() == FLASHINFER_WORKSPACE
    reserved = []
    manager = SimpleNamespace(get_simultaneous=lambda *buffers: reserved.append(buffers))
    monkeypatch.setattr(turboquant_attn, "is_workspace_manager_initialized", lambda: True)
    monkeypatch.setattr(turboquant_attn, "current_workspace_manager", lambda: manager)
    builder = SimpleNamespace(
        kv_cache_spec=SimpleNamespace(
            num_kv_heads=8, head_size=128, block_size=block_size("turboquant_k8v4", [QWEN_72B])
        ),
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=1, enable_chunked_prefill=True, max_num_batched_tokens=512),
            model_config=SimpleNamespace(
                get_num_attention_heads=lambda _: 64, dtype=torch.bfloat16, max_model_len=5000
            ),
            parallel_config=None,
            attention_config=SimpleNamespace(tq_max_kv_splits_for_cuda_graph=32),
        ),
    )
    turboquant_attn.TurboQuantMetadataBuilder._reserve_workspace(builder)
    sizes = [sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in buffers) for buffers in reserved]
    assert workspace("turboquant_k8v4", [QWEN_72B], 5000) == sizes[1]
    assert sizes[0] < 2**21, "splits of one token's attention, not counted"


def test_figures_for_a_70b_model_by_hand():
    assert bytes_per_token("auto", [QWEN_72B]) == 320 * 1024
    assert bytes_per_token("int8_per_token_head", [QWEN_72B]) == 80 * 8 * 2 * (128 + 4)
    assert bytes_per_token("turboquant_3bit_nc", [QWEN_72B]) == 4 * 8 * 512 + 76 * 8 * (48 + 2 + 48 + 4)
    assert bytes_for("auto", [QWEN_72B], 17) == 32 * 320 * 1024


def test_nothing_fits_into_nothing():
    for kv_type in KV_TYPES:
        assert tokens_that_fit(kv_type, [QWEN_72B], 0, 9) == tokens_that_fit(kv_type, [QWEN_72B], -(2**30), 9) == 0
