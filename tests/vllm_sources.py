"""What the plugin and `bpdq plan` rely upon in vLLM's sources, and a reader that checks a tree of them.

Sources are parsed, never imported, so any release can be checked, CUDA builds too. Files are relative to `vllm/`; names
are of classes, functions and methods in them, "" of the module.
"""

import ast
from functools import cache
from pathlib import Path

BASE_CONFIG = "model_executor/layers/quantization/base_config.py"
QUANTIZATION = "model_executor/layers/quantization/__init__.py"
KV_CACHE = "model_executor/layers/quantization/kv_cache.py"
TURBOQUANT = "model_executor/layers/quantization/turboquant/config.py"
LINEAR = "model_executor/layers/linear.py"
EMBEDDING = "model_executor/layers/vocab_parallel_embedding.py"
ATTENTION = "model_executor/layers/attention/attention.py"
MAMBA = "model_executor/layers/mamba/mamba_utils.py"
PARAMETER = "model_executor/parameter.py"
LOADER = "model_executor/model_loader/utils.py"
DEFAULT_LOADER = "model_executor/model_loader/default_loader.py"
WEIGHTS = "model_executor/model_loader/weight_utils.py"
LAYERWISE = "model_executor/model_loader/reload/layerwise.py"
RELOAD_META = "model_executor/model_loader/reload/meta.py"
CONFIG = "config/vllm.py"
MODELS = "model_executor/models/utils.py"
FUSED_MOE = "model_executor/layers/fused_moe/__init__.py"
EXPERTS = "model_executor/layers/fused_moe/routed_experts.py"
EXPERTS_METHOD = "model_executor/layers/fused_moe/fused_moe_method_base.py"
EXPERT_MAP = "model_executor/layers/fused_moe/expert_map_manager.py"
RUNNER = "model_executor/layers/fused_moe/runner/moe_runner.py"
GPT_OSS = "model_executor/models/gpt_oss.py"

SIGNATURES = {  # parameters in order, as written: name, *name, **name
    (QUANTIZATION, "register_quantization_config"): "quantization",
    (BASE_CONFIG, "QuantizationConfig.get_quant_method"): "self layer prefix",
    (BASE_CONFIG, "QuantizationConfig.override_quantization_method"): "cls hf_quant_cfg user_quant hf_config",
    (BASE_CONFIG, "QuantizationConfig.apply_vllm_mapper"): "self hf_to_vllm_mapper",
    (BASE_CONFIG, "QuantizationConfig.maybe_update_config"): "self model_name hf_config revision",
    (WEIGHTS, "download_weights_from_hf"): (
        "model_name_or_path cache_dir allow_patterns revision subfolder ignore_patterns"
    ),
    (WEIGHTS, "download_safetensors_index_file_from_hf"): "model_name_or_path index_file cache_dir subfolder revision",
    (CONFIG, "get_current_vllm_config_or_none"): "",
    (LAYERWISE, "finalize_layerwise_reload"): "*args **kwargs",
    (RELOAD_META, "to_meta_tensor"): "tensor",
    (BASE_CONFIG, "QuantizationConfig.from_config"): "cls config",
    (BASE_CONFIG, "QuantizationConfig.get_name"): "self",
    (BASE_CONFIG, "QuantizationConfig.get_supported_act_dtypes"): "self",
    (BASE_CONFIG, "QuantizationConfig.get_min_capability"): "cls",
    (BASE_CONFIG, "QuantizationConfig.get_config_filenames"): "",
    (BASE_CONFIG, "QuantizeMethodBase.process_weights_after_loading"): "self layer",
    (BASE_CONFIG, "QuantizeMethodBase.embedding"): "self layer *args **kwargs",
    (BASE_CONFIG, "QuantizeMethodBase.tie_weights"): "self layer embed_tokens",
    (KV_CACHE, "BaseKVCacheMethod.create_weights"): "self layer",
    (KV_CACHE, "BaseKVCacheMethod.process_weights_after_loading"): "self layer",
    (LINEAR, "register_weight_loader_v2_supported_method"): "cls",
    (LINEAR, "ReplicatedLinear.weight_loader"): "self param loaded_weight",
    (LINEAR, "LinearMethodBase.apply"): "self layer x bias",
    (LINEAR, "LinearMethodBase.create_weights"): (
        "self layer input_size_per_partition output_partition_sizes input_size output_size params_dtype "
        "**extra_weight_attrs"
    ),
    (PARAMETER, "ModelWeightParameter"): "",
    (PARAMETER, "BasevLLMParameter.__init__"): "self data weight_loader",
    (PARAMETER, "_ColumnvLLMParameter.__init__"): "self output_dim **kwargs",
    (PARAMETER, "RowvLLMParameter.__init__"): "self input_dim **kwargs",
    (PARAMETER, "_ColumnvLLMParameter.load_column_parallel_weight"): "self loaded_weight",
    (PARAMETER, "RowvLLMParameter.load_row_parallel_weight"): "self loaded_weight",
    (PARAMETER, "_ColumnvLLMParameter.load_merged_column_weight"): "self loaded_weight **kwargs",
    (PARAMETER, "_ColumnvLLMParameter.load_qkv_weight"): "self loaded_weight **kwargs",
    (MODELS, "WeightsMapper.apply_list"): "self values",
    (EXPERTS_METHOD, "FusedMoEMethodBase.__init__"): "self moe",
    (EXPERTS_METHOD, "FusedMoEMethodBase.create_weights"): (
        "self layer num_experts hidden_size intermediate_size_per_partition params_dtype **extra_weight_attrs"
    ),
    (EXPERTS_METHOD, "FusedMoEMethodBase.maybe_roundup_sizes"): (
        "self hidden_size intermediate_size_per_partition act_dtype moe_parallel_config"
    ),
    (EXPERTS_METHOD, "FusedMoEMethodBase.get_fused_moe_quant_config"): "self layer",
    (EXPERTS_METHOD, "FusedMoEMethodBase.apply"): (
        "self layer x topk_weights topk_ids shared_experts shared_experts_input"
    ),
    (EXPERT_MAP, "ExpertMapManager.expert_map"): "self",
    (EMBEDDING, "VocabParallelEmbedding"): "",
    (ATTENTION, "Attention"): "",
}
_SIZES = "layer=self input_size_per_partition=self. output_partition_sizes=self. input_size=self. output_size=self."
STATEMENTS = {  # fragments of the code of a function or class, as ast.unparse writes it
    (BASE_CONFIG, "QuantizationConfig.__init__"): ["self.packed_modules_mapping"],
    (BASE_CONFIG, "resolve_quant_method"): ["quant_config.get_quant_method(layer, prefix)"],
    (BASE_CONFIG, "QuantizationConfig.get_cache_scale_mapper"): ["k_scale", "v_scale", ".attn."],
    (KV_CACHE, "KVCacheScaleParameter"): ["torch.tensor(-1.0)"],
    (LINEAR, "register_weight_loader_v2_supported_method"): ["WEIGHT_LOADER_V2_SUPPORTED", "cls.__name__"],
    (LINEAR, "LinearBase.update_param_tp_status"): ["param.tp_rank = self.tp_rank", "param.tp_size = self.tp_size"],
    (LINEAR, "ReplicatedLinear.__init__"): [
        "self.quant_method.create_weights(self, self.input_size, self.output_partition_sizes, self.input_size, "
        "self.output_size, self.params_dtype, weight_loader="
    ],
    (LINEAR, "ColumnParallelLinear.__init__"): [*_SIZES.split(), "self.update_param_tp_status()"],
    (LINEAR, "RowParallelLinear.__init__"): [*_SIZES.split(), "self.update_param_tp_status()"],
    (LINEAR, "ColumnParallelLinear.weight_loader_v2"): ["param.load_column_parallel_weight(loaded_weight="],
    (LINEAR, "RowParallelLinear.weight_loader_v2"): ["param.load_row_parallel_weight(loaded_weight="],
    (LINEAR, "MergedColumnParallelLinear.weight_loader_v2"): [
        "param.load_merged_column_weight(loaded_weight=",
        "shard_offset=",
        "shard_size=",
    ],
    (LINEAR, "QKVParallelLinear.weight_loader_v2"): [
        "param.load_qkv_weight(loaded_weight=",
        "num_heads=",
        "shard_id=",
        "shard_offset=",
        "shard_size=",
    ],
    (EMBEDDING, "VocabParallelEmbedding.__init__"): [
        "self.org_vocab_size =",
        "self.shard_indices =",
        "self.params_dtype =",
        "self.quant_method",
        "weight_loader=self.weight_loader",
    ],
    (EMBEDDING, "VocabParallelEmbedding.forward"): ["self.quant_method.embedding("],
    ("v1/spec_decode/draft_model.py", "DraftModelProposer._get_model"): ["prefix='draft_model'"],
    ("v1/worker/gpu/spec_decode/standalone_ar/speculator.py", ""): ["prefix='draft_model'"],
    ("model_executor/models/adapters.py", "load_weights_using_from_2_way_softmax"): [
        "language_model.lm_head = ParallelLMHead(text_config.vocab_size, text_config.hidden_size)"
    ],
    ("model_executor/models/transformers/causal.py", "CausalMixin.compute_logits"): ["self.lm_head.bias"],
    (EMBEDDING, "ParallelLMHead.tie_weights"): ["self.quant_method.tie_weights(self, embed_tokens)"],
    (EMBEDDING, "VocabParallelEmbeddingShardIndices"): ["org_vocab_start_index", "org_vocab_end_index"],
    (ATTENTION, "Attention.__init__"): ["self.kv_cache_dtype =", "self.layer_name ="],
    (LOADER, "device_loading_context"): ["getattr(p, '_vllm_is_uva_offloaded', False)"],
    ("config/speculative.py", "SpeculativeConfig.hf_config_override"): ["'n_predict': n_predict"],
    (LOADER, "process_weights_after_loading"): ["quant_method.process_weights_after_loading(module)"],
    (LOADER, "configure_quant_config"): ["quant_config.packed_modules_mapping = packed_mapping"],
    (CONFIG, "VllmConfig._get_quantization_config"): [
        "quant_config.maybe_update_config(model_config.model, hf_config=model_config.hf_config, "
        "revision=model_config.revision)"
    ],
    (LOADER, "initialize_model"): ["set_current_vllm_config(vllm_config"],
    (DEFAULT_LOADER, "DefaultModelLoader._prepare_weights"): ["filter_duplicate_safetensors_files("],
    ("config/load.py", "LoadConfig"): ["load_format:", "download_dir:", "ignore_patterns:"],
    ("model_executor/model_loader/sharded_state_loader.py", "ShardedStateLoader.load_weights"): [
        "param_data.copy_(tensor)"
    ],
    ("model_executor/model_loader/reload/inplace.py", "reload_weights"): ["model_config.model = weights_path"],
    ("v1/worker/gpu_worker.py", "Worker.reload_weights"): ["with set_current_vllm_config(self.vllm_config)"],
    (LAYERWISE, ""): ["LAYERWISE_INFO:"],
    (LAYERWISE, "finalize_layerwise_processing"): [
        "for layer in model.modules():",
        "_place_kernel_tensors(layer, info)",
    ],
    (LAYERWISE, "_copy_and_restore_kernel_tensors"): ["param.data.copy_(getattr(layer, name))"],
    ("model_executor/models/registry.py", "_ModelRegistry.resolve_model_cls"): ["return (model_cls, arch)"],
    ("model_executor/models/adapters.py", "as_seq_cls_model"): [
        "self.score = ReplicatedLinear(",
        "prefix=maybe_prefix(prefix, 'score')",
        "'classifier_from_token'",
        "'method'",
    ],
    (WEIGHTS, "initialize_single_dummy_weight"): ["if not torch.is_floating_point(param):"],
    (FUSED_MOE, ""): ["'RoutedExperts'", "'GateLinear'", "'FusedMoEMethodBase'"],
    (MODELS, "AutoWeightsLoader.load_weights"): ["mapper |= quant_config.get_checkpoint_weight_mapper()"],
    (MODELS, "WeightsMapper.apply"): ["shard_data.shard_id = one_shard_id"],
    (RUNNER, "MoERunner._apply_quant_method"): [
        "self.routed_experts.forward_modular(x=hidden_states, topk_weights=topk_weights, topk_ids=topk_ids, "
        "shared_experts=self._shared_experts, shared_experts_input=shared_experts_input)",
    ],
    (GPT_OSS, ""): ["'w13_bias': 'gpt_oss_w13'", "'w2_bias': 'gpt_oss_w2'"],
    (GPT_OSS, "GptOssModel._try_load_streamed_expert"): [
        "weight_loader(param, loaded_weight, weight_name=fused_name, "
    ],
    (GPT_OSS, "GptOssModel._load_weights_other"): ["weight_loader(param, weight)"],
    ("model_executor/models/granitemoehybrid.py", "GraniteMoeHybridModel.load_weights"): ["weight_loader(param, p)"],
    ("config/model.py", "ModelConfig._verify_quantization"): [
        "quantization_methods = quantization_methods + overrides",
        "'gptq'",
    ],
    (EXPERTS, "RoutedExperts.__init__"): [
        *[f"self.ckpt_{part}_proj_name =" for part in ("gate", "up", "down")],
        *[f"self.swiglu_{what} =" for what in ("limit", "alpha", "beta")],
        "self.activation =",
        "self.apply_router_weight_on_input =",
        "self.quant_method = self._get_quant_method(",
    ],
    (EXPERTS, "RoutedExperts.expert_map"): ["getattr(self.quant_method, 'moe_kernel', None)", "self._expert_map"],
    (EXPERTS, "RoutedExperts.load_weights"): [
        "is_fused = loaded_weight.dim() == 3 and named_expert is None",
        "param.weight_loader(param=param, loaded_weight=loaded_expert, weight_name=weight_name, shard_id=shard_id, "
        "expert_id=expert_id, return_success=True)",
    ],
    (EXPERTS, "RoutedExperts.build_expert_params_mapping"): ["w13_", "w2_", "('w1', ckpt_gate_proj_name)"],
    ("model_executor/layers/fused_moe/config.py", "FusedMoEConfig"): [
        *(f"{name}: int" for name in ("num_logical_experts", "intermediate_size")),
        "has_bias: bool",
        "def tp_rank(",
    ],
    ("plugins/__init__.py", ""): ["DEFAULT_PLUGINS_GROUP = 'vllm.general_plugins'"],
    # the bytes of KV caches, besides SAME
    ("config/cache.py", "CacheConfig"): ["DEFAULT_BLOCK_SIZE: ClassVar[int] = 16"],
    ("envs.py", ""): [
        "'VLLM_BATCH_INVARIANT'",
        "'VLLM_USE_MODELSCOPE'",
        "'VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE', str(394 * 1024 * 1024)",
    ],
    ("v1/core/block_pool.py", "BlockPool.__init__"): ["self.null_block = self.free_block_queue.popleft()"],
    ("engine/arg_utils.py", "EngineArgs"): ["get_boundary_skip_layers("],
    ("model_executor/models/config.py", "MambaModelConfig"): ["cache_config.mamba_cache_mode = 'align'"],
    ("platforms/interface.py", "Platform._align_hybrid_block_size"): [
        "attn_block_size = kernel_block_alignment_size * cdiv(mamba_page_size, kernel_block_alignment_size * "
        "attn_page_size_1_token)",
        "cache_config.mamba_page_size_padded = attn_page_size",
    ],
}
LOADERS = {
    "load_column_parallel_weight",
    "load_merged_column_weight",
    "load_qkv_weight",
    "load_row_parallel_weight",
}
SAME = [  # code whose results tests compare with ours in the installed vLLM; in other releases it is the same code
    (PARAMETER, "ModelWeightParameter"),
    (PARAMETER, "_ColumnvLLMParameter"),
    (PARAMETER, "RowvLLMParameter"),
    (BASE_CONFIG, "QuantizationConfig.get_cache_scale_mapper"),
    (KV_CACHE, "BaseKVCacheMethod"),
    (TURBOQUANT, "TurboQuantConfig"),
    (WEIGHTS, "filter_duplicate_safetensors_files"),
    ("v1/kv_cache_interface.py", "AttentionSpec.state_content_size_bytes"),
    ("v1/kv_cache_interface.py", "AttentionSpec.page_size_bytes"),
    ("v1/kv_cache_interface.py", "FullAttentionSpec.max_memory_usage_bytes"),
    ("v1/kv_cache_interface.py", "SlidingWindowSpec.max_admission_blocks_per_request"),
    ("v1/kv_cache_interface.py", "SlidingWindowSpec.max_memory_usage_bytes"),
    ("v1/kv_cache_interface.py", "MambaSpec.page_size_bytes"),
    ("v1/kv_cache_interface.py", "MambaSpec.max_memory_usage_bytes"),
    (ATTENTION, "Attention.get_kv_cache_spec"),
    (MAMBA, "MambaStateShapeCalculator.mamba2_state_shape"),
    (MAMBA, "MambaStateShapeCalculator.short_conv_state_shape"),
    (MAMBA, "MambaStateShapeCalculator.gated_delta_net_state_shape"),
    (MAMBA, "MambaStateDtypeCalculator._mamba_state_dtype"),
    ("model_executor/layers/mamba/mamba_mixer2.py", "MambaMixer2.get_kv_cache_spec"),
    ("v1/attention/backends/triton_attn.py", "TritonAttentionBackend.customize_spec"),
    ("v1/attention/backends/turboquant_attn.py", "TurboQuantMetadataBuilder._reserve_workspace"),
    ("v1/attention/ops/ultraquant/format.py", "slot_size"),
    ("utils/torch_utils.py", "nvfp4_kv_cache_full_dim"),
    ("platforms/interface.py", "Platform.update_block_size_for_backend"),
    (CONFIG, "VllmConfig.max_in_flight_tokens"),
    (CONFIG, "VllmConfig.max_concurrent_batches"),
]
FILES = sorted({file for file, _ in (*SIGNATURES, *STATEMENTS, *SAME)})


def problems(tree: Path, like: Path) -> list[str]:
    """One line for each thing that `tree`, a folder `vllm`, lacks or has otherwise; SAME is compared with `like`."""
    found = []
    for (file, name), expected in SIGNATURES.items():
        node = _find(tree, file, name)
        if node is None:
            found.append(f"{file}: no {name}")
        elif isinstance(node, ast.FunctionDef) and _parameters(node) != expected:
            found.append(f"{file}: {name}({_parameters(node)}), expected ({expected})")
    for (file, name), fragments in STATEMENTS.items():
        node = _find(tree, file, name)
        if node is None:
            found.append(f"{file}: no {name}")
            continue
        code = ast.unparse(node)
        found += [f"{file}: {name or 'the module'} without {text!r}" for text in fragments if text not in code]
    for file, name in SAME:
        here, there = (_find(root, file, name) for root in (tree, like))
        if here is None or there is None:
            found.append(f"{file}: no {name}")
        elif _code(here) != _code(there):
            found.append(f"{file}: {name} is other code than in {like}")
    if (defined := _loaders(tree)) != LOADERS:
        found.append(f"{PARAMETER}: loads weights by {' '.join(sorted(defined))}, expected {' '.join(sorted(LOADERS))}")
    return found


def _loaders(tree: Path) -> set[str]:
    """The `load_*` methods of ModelWeightParameter and the classes above it, which the plugin overrides."""
    names, methods = ["ModelWeightParameter"], set()
    while names:
        node = _find(tree, PARAMETER, names.pop())
        if isinstance(node, ast.ClassDef):
            names += [base.id for base in node.bases if isinstance(base, ast.Name)]
            methods |= {f.name for f in node.body if isinstance(f, ast.FunctionDef) and f.name.startswith("load_")}
    return methods


def _find(tree: Path, file: str, name: str) -> ast.AST | None:
    """The class, function or method `name` of `file`, the module for "", or None."""
    node = _parse(tree / file)
    for part in filter(None, name.split(".")):
        if node is None:
            return None
        named = (child for child in ast.walk(node) if isinstance(child, ast.ClassDef | ast.FunctionDef))
        node = next((child for child in named if child.name == part and child is not node), None)
    return node


@cache
def _parse(path: Path) -> ast.Module | None:
    return ast.parse(path.read_text()) if path.exists() else None


def _parameters(node: ast.FunctionDef) -> str:
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    return " ".join(names)


def _code(node: ast.AST) -> str:
    """Without docstrings, which change more often."""
    for child in ast.walk(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(child) and len(child.body) > 1:
            child.body = child.body[1:]
    return ast.unparse(node)
