"""Which checkpoints the plugin claims, and what it tells vLLM about each layer."""

import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from transformers import AutoConfig
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from bpdq_kernels.format import KV_CACHE_SCHEME, Scheme
from vllm_bpdq import register
from vllm_bpdq.config import BPDQConfig
from vllm_bpdq.kv_scales import BPDQKVCacheMethod, load_scale
from vllm_bpdq.linear import BPDQLinearMethod

OURS = {"quant_method": "bpdq", "checkpoint_format": "bpdq", "format_version": 1, "bits": 2, "group_size": 128}
AUTHORS = {"quant_method": "gptq", "checkpoint_format": "bpdq", "bits": 8, "group_size": 64}
AUTHORS |= {"meta": {"bpdq": {"msbits": 3, "n_iters": 10, "alpha": 1e-4}}, "lm_head": False}
GPTQ = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def a(kind: type) -> torch.nn.Module:
    """An instance that is only ever asked for its type."""
    return kind.__new__(kind)


def config(**changes) -> BPDQConfig:
    quant = BPDQConfig.from_config(OURS | changes)
    quant.packed_modules_mapping = PACKED
    return quant


def scheme_of(quant: BPDQConfig, prefix: str) -> Scheme | None:
    method = quant.get_quant_method(a(ColumnParallelLinear), prefix)
    return method.scheme if isinstance(method, BPDQLinearMethod) else None


@pytest.mark.parametrize("checkpoint", [OURS, AUTHORS])
@pytest.mark.parametrize("flag", [None, "bpdq"])
def test_both_dialects_are_served_with_and_without_the_flag(checkpoint, flag):
    assert BPDQConfig.override_quantization_method(checkpoint, flag, hf_config=None) == "bpdq"


@pytest.mark.parametrize(
    "checkpoint",
    [
        GPTQ,
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "checkpoint_format": "bpdq"},
        {"quant_method": "fp8"},
        {},
    ],
)
@pytest.mark.parametrize("flag", [None, "bpdq", "gptq"])
def test_checkpoints_of_other_methods_are_left_alone(checkpoint, flag):
    assert BPDQConfig.override_quantization_method(checkpoint, flag) is None


@pytest.mark.parametrize("checkpoint", [OURS, AUTHORS])
def test_asking_for_another_method_is_not_overridden(checkpoint):
    assert BPDQConfig.override_quantization_method(checkpoint, "awq") is None


def test_both_dialects_parse_into_planes_and_group_size():
    assert BPDQConfig.from_config(OURS).format.default == Scheme(2, 128)
    assert BPDQConfig.from_config(AUTHORS).format.default == Scheme(3, 64)


def test_an_unusable_config_names_the_key():
    with pytest.raises(ValueError, match="msbits"):
        BPDQConfig.from_config(AUTHORS | {"meta": None})
    with pytest.raises(ValueError, match="format_version 9"):
        BPDQConfig.from_config(OURS | {"format_version": 9})


def test_registering_twice_is_harmless():
    register()
    register()
    assert get_quantization_config("bpdq") is BPDQConfig
    assert QUANTIZATION_METHODS.count("bpdq") == 1


def test_vllm_finds_the_plugin():
    (plugin,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "bpdq"]
    assert plugin.load() is register


def test_importing_the_plugin_imports_nothing_heavy():
    code = "import sys, vllm_bpdq; print(sorted({'torch', 'vllm', 'transformers', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_registering_imports_no_layers():
    code = (
        "import sys, vllm.model_executor.layers.quantization as q; before = set(sys.modules);"
        "import vllm_bpdq; vllm_bpdq.register();"
        "new = set(sys.modules) - before;"
        "print('vllm_bpdq.config' in new, [m for m in new if m.startswith('vllm.') or m == 'vllm_bpdq.linear'])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip().endswith("True []"), out.stderr


def test_every_precision_of_activations_is_accepted():
    assert config().get_supported_act_dtypes() == [torch.float32, torch.float16, torch.bfloat16]
    assert config().get_name() == "bpdq"
    assert BPDQConfig.get_min_capability() == 80


def test_layers_get_their_own_scheme():
    quant = config(layers={"re:.*mlp.*": {"bits": 3, "group_size": 64}, "model.layers.1.self_attn.o_proj": {"bits": 4}})
    assert scheme_of(quant, "model.layers.0.self_attn.qkv_proj") == Scheme(2, 128)
    assert scheme_of(quant, "model.layers.0.mlp.gate_up_proj") == Scheme(3, 64)
    assert scheme_of(quant, "model.layers.0.mlp.down_proj") == Scheme(3, 64)
    assert scheme_of(quant, "model.layers.0.self_attn.o_proj") == Scheme(2, 128)
    assert scheme_of(quant, "model.layers.1.self_attn.o_proj") == Scheme(4, 128)


def test_ignored_layers_stay_in_16_bits():
    quant = config(ignore=["lm_head", "model.layers.0.mlp.down_proj", "re:.*self_attn.*"])
    for prefix in "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.qkv_proj", "lm_head":
        assert isinstance(quant.get_quant_method(a(ColumnParallelLinear), prefix), UnquantizedLinearMethod)
    assert scheme_of(quant, "model.layers.1.mlp.down_proj") == Scheme(2, 128)


def test_layers_of_a_draft_model_have_the_names_of_its_checkpoint():
    """vLLM builds it with a prefix."""
    layer, part = "model.layers.0.mlp.down_proj", "re:model.layers.1[.]"
    quant = config(ignore=[layer], layers={"model.layers.0.self_attn.o_proj": {"bits": 4}, part: {"bits": 3}})
    assert scheme_of(quant, f"draft_model.{layer}") is None
    assert scheme_of(quant, "draft_model.model.layers.0.self_attn.o_proj") == Scheme(4, 128)
    assert scheme_of(quant, "draft_model.model.layers.1.self_attn.qkv_proj") == Scheme(3, 128)
    assert scheme_of(quant, "draft_model.model.layers.0.self_attn.qkv_proj") == Scheme(2, 128)


@pytest.mark.parametrize(
    ("name", "is_classifier"),
    [("score", True), ("language_model.score", True), ("model.layers.0.score", False), ("model.layers.0.mlp", False)],
)
def test_a_classifier_on_a_language_model_is_in_16_bits(name, is_classifier):
    assert (scheme_of(config(), name) is None) == is_classifier


@pytest.mark.parametrize(
    "change",
    [
        {"ignore": ["model.layers.0.self_attn.k_proj"]},
        {"layers": {"re:.*k_proj": {"bits": 3}}},
        {"layers": {"model.layers.0.self_attn.k_proj": {"group_size": 64}}},
        {"format_version": 2, "layers": {"model.layers.0.self_attn.k_proj": {"coefficient_bits": 8}}},
        {"format_version": 3, "layers": {"model.layers.0.self_attn.k_proj": {"code": "trellis4"}}},
    ],
)
def test_fused_layers_whose_parts_differ_are_refused(change):
    message = r"model\.layers\.0\.self_attn\.qkv_proj: vLLM fuses .* k_proj .* group_size, coefficient_bits and code"
    with pytest.raises(ValueError, match=message):
        config(**change).get_quant_method(a(ColumnParallelLinear), "model.layers.0.self_attn.qkv_proj")


@pytest.mark.parametrize(
    ("model_type", "ignored", "remedy"),
    [
        ("bloom", "re:.*query_key_value", r"query_key_value: .* with --ignore 're:\.\*query_key_value'"),
        ("jamba", "re:.*[.]mamba[.]", r"mamba\.in_proj: .* with --ignore 're:\.\*\[\.]mamba\[\.]'"),
        ("falcon_mamba", "re:.*[.]mixer[.]", r"mixer\.in_proj: .* serve it with transformers"),
    ],
)
def test_what_vllm_takes_in_16_bits_only_is_refused_in_bit_planes(model_type, ignored, remedy):
    """Which otherwise ends in an AttributeError, or in shuffled weights."""
    model = AutoConfig.for_model(model_type)
    with pytest.raises(ValueError, match=remedy):
        config().maybe_update_config("folder", model)
    config(ignore=[ignored]).maybe_update_config("folder", model)
    config().maybe_update_config("folder", AutoConfig.for_model("falcon"))


@pytest.mark.parametrize("kind", [VocabParallelEmbedding, ParallelLMHead, Attention])
def test_embeddings_head_and_attention_keep_what_vllm_gives_them(kind):
    assert config().get_quant_method(a(kind), "model.layers.0.self_attn.attn") is None


@pytest.mark.parametrize("dtype", ["auto", "fp8_e4m3"])
def test_attention_gets_a_method_where_the_checkpoint_has_scales(dtype):
    layer = a(Attention)
    layer.__dict__["kv_cache_dtype"] = dtype
    assert isinstance(config(kv_cache_scheme=KV_CACHE_SCHEME).get_quant_method(layer, "x.attn"), BPDQKVCacheMethod)
    layer.__dict__["kv_cache_dtype"] = "fp8_e5m2"
    assert config(kv_cache_scheme=KV_CACHE_SCHEME).get_quant_method(layer, "x.attn") is None


@pytest.mark.parametrize("changes", [{"num_nextn_predict_layers": 1}, {"num_hidden_layers": 0, "n_predict": 1}])
def test_a_head_that_drafts_has_no_scales(changes):
    """Whether vLLM gives it the config of its model, or one of its own."""
    quant, layer = config(kv_cache_scheme=KV_CACHE_SCHEME), a(Attention)
    layer.__dict__["kv_cache_dtype"] = "auto"
    quant.hf_config = AutoConfig.for_model("glm4_moe", num_hidden_layers=46)
    quant.hf_config.update(changes)
    assert quant.get_quant_method(layer, "model.layers.46.mtp_block.self_attn.attn") is None
    if "n_predict" not in changes:
        assert quant.get_quant_method(layer, "model.layers.45.self_attn.attn") is not None


@pytest.mark.parametrize("dtype", [None, "auto", "fp8_e5m2"])
@pytest.mark.parametrize("scheme", [None, KV_CACHE_SCHEME])
def test_scales_that_no_layer_takes_are_not_loaded(dtype, scheme):
    """GLM-4's, ERNIE's and Llama 4's models in vLLM would look for a place for them."""
    quant, layer = config(**({"kv_cache_scheme": scheme} if scheme else {})), a(Attention)
    layer.__dict__["kv_cache_dtype"] = dtype
    if dtype:
        quant.get_quant_method(layer, "model.layers.0.self_attn.attn")
    mapper = quant.get_checkpoint_weight_mapper()
    for name in ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.attn.v_scale"):
        assert mapper.map_name(name) == (name if scheme and dtype == "auto" else None)
    assert mapper.map_name("model.layers.0.self_attn.k_proj.c") == "model.layers.0.self_attn.k_proj.c"


@pytest.mark.parametrize("asked", ["--quantization-config", "VLLM_BATCH_INVARIANT"])
def test_what_bit_planes_cannot_do_is_refused_before_anything_is_loaded(monkeypatch, asked):
    quant = config()
    quant.maybe_update_config("folder", AutoConfig.for_model("llama"))
    if asked.startswith("VLLM"):
        monkeypatch.setenv(asked, "1")
    else:
        quant.online_quantization_config = object()
    with pytest.raises(ValueError, match=f"{asked}: layers in bit-planes .*: (leave it out|unset it)"):
        quant.get_quant_method(a(ColumnParallelLinear), "model.layers.0.mlp.up_proj")


def test_scales_that_latent_attention_would_not_read_are_refused():
    assert config().get_quant_method(a(MLAAttention), "x.attn") is None
    with pytest.raises(
        ValueError, match=r"x\.attn: of latent attention vLLM caches latent states, .* remove kv_cache_scheme"
    ):
        config(kv_cache_scheme=KV_CACHE_SCHEME).get_quant_method(a(MLAAttention), "x.attn")


@pytest.mark.parametrize("scale", [[0.0], [-2.0], [torch.nan], [torch.inf], [1.0, 2.0], [], [3e38], [1e-20]])
def test_a_scale_is_one_number_that_keys_can_have_been_divided_by(scale):
    param = torch.nn.Parameter(torch.tensor(-1.0), requires_grad=False)
    with pytest.raises(ValueError, match="expected one number from"):
        load_scale(param, torch.tensor(scale))
    load_scale(param, torch.tensor([0.5]))
    assert param.item() == 0.5


def test_names_follow_the_model_when_vllm_renames_its_modules():
    """Multimodal models: the checkpoint says `model.layers`, vLLM `language_model.model.layers`."""
    quant = config(
        ignore=["lm_head", "model.layers.0.mlp.down_proj", "re:.*o_proj"],
        layers={"model.layers.1.mlp.down_proj": {"bits": 3}},
    )
    quant.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert scheme_of(quant, "language_model.model.layers.0.self_attn.o_proj") is None
    assert scheme_of(quant, "language_model.model.layers.0.mlp.down_proj") is None
    assert scheme_of(quant, "language_model.model.layers.1.mlp.down_proj") == Scheme(3, 128)


@pytest.mark.parametrize(("arch", "mixer"), [("mamba", "backbone.layers.0.mixer"), ("jamba", "model.layers.0.mamba")])
def test_linears_of_mamba_1_are_refused_in_bit_planes(arch, mixer):
    """vLLM asks for no method for them, and none of its errors would say so."""
    hf_config = AutoConfig.for_model(arch, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1)
    kept = [f"{mixer.replace('0', str(number))}.{key}_proj" for number in range(2) for key in ("in", "out")]
    used = kept if arch == "mamba" else kept[:2]
    config(ignore=used).maybe_update_config("model", hf_config=hf_config)
    config().maybe_update_config("model", hf_config=AutoConfig.for_model("llama"))
    with pytest.raises(ValueError, match=rf"{re.escape(used[-1])}: .* {arch} models in 16 bits only: "):
        config(ignore=used[:-1]).maybe_update_config("model", hf_config=hf_config)
