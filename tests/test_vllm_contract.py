"""What the plugin relies upon in vLLM. A failure here says which of it a new vLLM release has changed."""

import inspect

import pytest
import torch
from vllm.config import ModelConfig
from vllm.model_executor import parameter
from vllm.model_executor.layers import fused_moe, linear, quantization
from vllm.model_executor.layers.quantization import base_config, kv_cache
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader import weight_utils
from vllm.model_executor.models.utils import WeightsMapper

from vllm_bpdq.config import BPDQConfig
from vllm_bpdq.kv_cache import MISSING
from vllm_bpdq.linear import BPDQLinearMethod, StoredParameter


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (quantization.register_quantization_config, ["quantization"]),
        (base_config.QuantizationConfig.get_quant_method, ["self", "layer", "prefix"]),
        (
            base_config.QuantizationConfig.override_quantization_method,
            ["hf_quant_cfg", "user_quant", "hf_config"],
        ),
        (base_config.QuantizationConfig.apply_vllm_mapper, ["self", "hf_to_vllm_mapper"]),
        (base_config.QuantizationConfig.from_config, ["config"]),
        (
            linear.LinearMethodBase.create_weights,
            [
                "self",
                "layer",
                "input_size_per_partition",
                "output_partition_sizes",
                "input_size",
                "output_size",
                "params_dtype",
                "extra_weight_attrs",
            ],
        ),
        (linear.LinearMethodBase.apply, ["self", "layer", "x", "bias"]),
        (base_config.QuantizeMethodBase.process_weights_after_loading, ["self", "layer"]),
        (parameter.ModelWeightParameter.load_column_parallel_weight, ["self", "loaded_weight"]),
        (parameter.ModelWeightParameter.load_row_parallel_weight, ["self", "loaded_weight"]),
        (parameter.ModelWeightParameter.load_merged_column_weight, ["self", "loaded_weight", "kwargs"]),
        (parameter.ModelWeightParameter.load_qkv_weight, ["self", "loaded_weight", "kwargs"]),
        (linear.ReplicatedLinear.weight_loader, ["self", "param", "loaded_weight"]),
        (WeightsMapper.apply_list, ["self", "values"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_signatures_are_the_ones_the_plugin_was_written_for(function, expected):
    assert parameters(function) == expected


def test_the_config_implements_every_abstract_method():
    assert not BPDQConfig.__abstractmethods__
    assert not BPDQLinearMethod.__abstractmethods__


def test_methods_registered_for_the_second_loader_are_found_by_name():
    assert "BPDQLinearMethod" in linear.WEIGHT_LOADER_V2_SUPPORTED


@pytest.mark.parametrize(
    ("layer", "call", "arguments"),
    [
        (linear.ColumnParallelLinear, "load_column_parallel_weight", []),
        (linear.RowParallelLinear, "load_row_parallel_weight", []),
        (linear.MergedColumnParallelLinear, "load_merged_column_weight", ["shard_offset", "shard_size"]),
        (linear.QKVParallelLinear, "load_qkv_weight", ["num_heads", "shard_id", "shard_offset", "shard_size"]),
    ],
)
def test_layers_tell_the_parameter_which_outputs_a_tensor_holds(layer, call, arguments):
    source = inspect.getsource(layer.weight_loader_v2)
    assert f"param.{call}(" in source
    assert all(f"{argument}=" in source for argument in arguments)


def test_layers_hand_their_ranks_to_the_parameters():
    """StoredParameter counts on tp_rank and tp_size being the layer's, which differ where a layer isn't split."""
    source = inspect.getsource(linear.LinearBase.update_param_tp_status)
    assert "param.tp_rank = self.tp_rank" in source
    assert "param.tp_size = self.tp_size" in source
    for layer in linear.ColumnParallelLinear, linear.RowParallelLinear:
        assert "self.update_param_tp_status()" in inspect.getsource(layer.__init__)


def test_the_dummy_loader_leaves_integers_alone_and_fills_floats():
    """`--load-format dummy` is told from a missing tensor by coefficients that are no longer NaN."""
    planes, coefficients = torch.full((4,), 7, dtype=torch.int32), torch.full((4,), torch.nan)
    weight_utils.initialize_single_dummy_weight(planes)
    weight_utils.initialize_single_dummy_weight(coefficients)
    assert planes.tolist() == [7] * 4
    assert torch.isfinite(coefficients).all()


def test_scales_of_the_kv_cache_are_renamed_and_start_as_missing():
    names = ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"]
    renamed = base_config.QuantizationConfig.get_cache_scale_mapper().apply_list(names)
    assert renamed == ["model.layers.0.self_attn.attn.k_scale", "model.layers.0.self_attn.attn.v_scale"]
    assert kv_cache.KVCacheScaleParameter().item() == MISSING


def test_custom_methods_are_asked_before_the_built_in_gptq():
    source = inspect.getsource(ModelConfig._verify_quantization)
    assert "quantization_methods = quantization_methods + overrides" in source
    assert '"gptq"' in source


def test_mixture_of_experts_layers_are_recognized_by_name():
    assert "RoutedExperts" in fused_moe.__all__
    assert fused_moe.RoutedExperts.__name__ == "RoutedExperts"


def test_loaded_layers_are_processed_once_each():
    assert "quant_method.process_weights_after_loading(module)" in inspect.getsource(
        loader_utils.process_weights_after_loading
    )


def test_the_parameter_overrides_every_way_of_loading():
    """A new `load_*` method would bypass the checks."""
    known = {name for name in dir(parameter.ModelWeightParameter) if name.startswith("load_")}
    assert known == {name for name in vars(StoredParameter) if name.startswith("load_")}
