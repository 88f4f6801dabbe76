"""What a BPDQ checkpoint tells vLLM: which checkpoints are ours, and how each layer is to be loaded.

A thin shell around `bpdq_kernels.format.Format`; vLLM's layers are imported on first use, because `register` runs
in processes that never build a model.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from bpdq_kernels import format
from bpdq_kernels.mtp import head_pattern
from bpdq_kernels.ops import ACTIVATION_DTYPES
from bpdq_kernels.patterns import PREFIX
from vllm_bpdq.names import (
    DRAFT,
    is_classifier,
    numbered_experts,
    origins,
    renamed,
    rotated_pairs,
    without_cache_scales,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.models.utils import WeightsMapper


class BPDQConfig(QuantizationConfig):
    """`format` as parsed from `quantization_config`; layer names are turned into vLLM's by `apply_vllm_mapper`."""

    def __init__(self, parsed: format.Format) -> None:
        super().__init__()
        self.format = self.stored_format = parsed
        self.mappers: list[WeightsMapper] = []
        self.has_embedding = False  # of which vLLM's model has said that it may be quantized
        self.model: tuple[str, str | None] | None = None  # name or folder, and revision, until its files are checked
        self.checked: tuple[str, str] | None = None  # which the engine loads: name or folder, and load format
        self.hf_config: Any = None
        self.has_experts: set[bool] = set()  # in bit-planes, and not
        self.has_cache_scales = False  # attention that takes them

    def __repr__(self) -> str:
        return f"BPDQConfig({self.format})"

    @classmethod
    def get_name(cls) -> str:
        return "bpdq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return list(ACTIVATION_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BPDQConfig":
        """Raises ValueError naming the key of `quantization_config` that can't be used, and the remedy."""
        return cls(format.parse(config))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, **kwargs: Any
    ) -> str | None:
        """Claim our checkpoints and the authors', whose config says `gptq`; None for everything else.

        Another `--quantization` than these two is left to vLLM, which refuses the mismatch.
        """
        if format.claims(hf_quant_cfg) and user_quant in (None, "bpdq", hf_quant_cfg["quant_method"]):
            return cls.get_name()
        return None

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None, **kwargs: Any
    ) -> None:
        """Remember which checkpoint this is the config of. Raises ValueError, with a remedy, for bit-planes where vLLM
        takes 16 bits only."""
        self.model, self.hf_config = (model_name, revision), hf_config
        for name, remedy in _in_16_bits_only(hf_config):
            if self.format.scheme_for(name) is not None:
                model_type = hf_config.model_type
                raise ValueError(f"{name}: vLLM takes this layer of {model_type} models in 16 bits only: {remedy}")

    def get_checkpoint_weight_mapper(self) -> "WeightsMapper":
        """What vLLM asks for when the model is built, and before its weights are read, also for a reload, of which the
        files are checked here. Raises ValueError for what they lack, and for an embedding in bit-planes for which no
        method was asked: many of vLLM's models have theirs in 16 bits only."""
        from vllm.distributed import get_pp_group

        self._check_reload()
        name = self._embedding_name()
        if name and not self.has_embedding and get_pp_group().is_first_rank:
            raise ValueError(
                f"{name}: vLLM's model has its embedding in 16 bits only: quantize the model again with "
                "--embed-bits 16, and --head-bits 16 if the LM head is tied to it"
            )
        mapper = super().get_checkpoint_weight_mapper() | numbered_experts(self.hf_config)
        return mapper if self.has_cache_scales else mapper | without_cache_scales()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename exact module names as the model renames its weights. A `re:` pattern stays, as it is for names of the
        checkpoint: it is matched with those."""

        def new(name: str) -> str:
            return name if name.startswith(PREFIX) else renamed(name, hf_to_vllm_mapper)

        self.format = dataclasses.replace(
            self.format,
            ignore=tuple(new(name) for name in self.format.ignore),
            layers={new(name): scheme for name, scheme in self.format.layers.items()},
        )
        self.mappers.append(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of layer `prefix`, of a draft model too; None for an embedding, LM head or experts in 16 bits, and
        for attention unless the checkpoint has scales for its KV cache (which fp8_e5m2 has no use for, and vLLM refuses
        beside them; heads for multi-token prediction, in 16 bits, have none).

        Before the first layer the checkpoint's files are checked: this is where vLLM's load format is known. Raises
        ValueError for what they lack, for what vLLM is asked for and bit-planes can't do, for fused layers whose parts
        differ in scheme and experts that do, for experts with an activation that the kernels lack or with LoRA
        adapters, for an embedding in bit-planes where a draft model of EAGLE's kind or MTP is to share it, for an LM
        head in bit-planes that is to become a classifier, and for scales of the KV cache of latent attention.
        """
        from vllm.model_executor.layers.attention import Attention, MLAAttention
        from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        from vllm_bpdq.embedding import BPDQEmbeddingMethod
        from vllm_bpdq.experts import BPDQExpertsMethod
        from vllm_bpdq.kv_scales import BPDQKVCacheMethod
        from vllm_bpdq.linear import BPDQLinearMethod

        prefix = prefix.removeprefix(DRAFT)
        self._check_files()
        if isinstance(layer, MLAAttention) and self.format.kv_cache_scales:
            raise ValueError(
                f"{prefix}: of latent attention vLLM caches latent states, not the keys and values that the checkpoint "
                "has scales for: remove kv_cache_scheme from quantization_config, or quantize the model again without "
                "--kv-cache-scales"
            )
        if isinstance(layer, Attention) and self.format.kv_cache_scales and layer.kv_cache_dtype != "fp8_e5m2":
            # n_predict: what vLLM adds to the config of a head that drafts, unless that comes with its model's
            if hasattr(self.hf_config, "n_predict") or (self.hf_config and head_pattern(prefix, self.hf_config)):
                return None
            self.has_cache_scales = True
            return BPDQKVCacheMethod(self)
        if isinstance(layer, VocabParallelEmbedding):
            name = prefix or self._embedding_name()
            _check_classifier(self.format)
            # a draft model that comes with the target, and with its config, has names of the checkpoint
            scheme = self.format.embedding_scheme(name) or self.stored_format.embedding_scheme(name)
            if scheme is None:
                return None
            if not isinstance(layer, ParallelLMHead):
                _check_unshared(name)
                self.has_embedding = True
            return BPDQEmbeddingMethod(scheme, name, [name])
        if isinstance(layer, GateLinear) or is_classifier(prefix):  # GateLinear: some of vLLM's models ask for routers
            return UnquantizedLinearMethod()
        if isinstance(layer, LinearBase):
            parts = self._parts(prefix)
            scheme = self._scheme(prefix, parts)
            pairs = rotated_pairs(self.hf_config, parts)
            return UnquantizedLinearMethod() if scheme is None else BPDQLinearMethod(scheme, prefix, parts, pairs)
        if isinstance(layer, RoutedExperts):
            scheme = self._experts_scheme(layer, prefix)
            self._check_llama4(prefix, scheme)
            if scheme is None:
                return None
            _check_unadapted(prefix)
            return BPDQExpertsMethod(layer, scheme, prefix)
        return None

    def _check_files(self) -> None:
        """Check the files that vLLM is about to load, once, and that nothing is asked for that bit-planes can't do."""
        from vllm_bpdq.checkpoint import check, source

        if self.model is None:
            return
        _check_asked(getattr(self, "online_quantization_config", None))
        check(*self.model, self.hf_config, self.stored_format)
        found = source()
        self.checked = found if found and found[0] == self.model[0] else None  # vLLM reloads no draft
        self.model = None
        _keep_order_of_writes()

    def _check_reload(self) -> None:
        """Check the files that vLLM is about to load if they are not those that were checked last."""
        from vllm_bpdq.checkpoint import check_reload, source

        found = source()
        if self.checked is None or found in (None, self.checked):
            return
        check_reload(self.hf_config, self.stored_format, self.checked[0])
        self.checked = found

    def _embedding_name(self) -> str:
        """The embedding that `layers` names, for vLLM's models (Llama) that create theirs without a name."""
        return next((name for name in self.format.layers if name.endswith("embed_tokens")), "")

    def _parts(self, prefix: str) -> list[str]:
        """Names in the checkpoint of the layers that vLLM fuses into `prefix`."""
        parent, _, name = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in names]

    def _stored_names(self, name: str) -> list[str]:
        """What vLLM's layer `name` may be called in the checkpoint; `name` where that can't be told."""
        names = [name]
        for mapper in reversed(self.mappers):
            names = [old for new in names for old in origins(new, mapper)] or names
        return names

    def _scheme(self, prefix: str, parts: list[str]) -> format.Scheme | None:
        schemes = {part: self.format.scheme_for(part, self._stored_names(part)) for part in parts}
        if len(set(schemes.values())) > 1:
            found = ", ".join(f"{part.rpartition('.')[2]} {scheme or '16-bit'}" for part, scheme in schemes.items())
            raise ValueError(
                f"{prefix}: vLLM fuses layers that quantization_config treats differently ({found}): "
                f"give them the same bits, group_size, coefficient_bits and code, or ignore all of them"
            )
        return schemes[parts[0]]

    def _check_llama4(self, prefix: str, scheme: format.Scheme | None) -> None:
        """Raise ValueError for experts that vLLM's loader of Llama 4 would not find: after a layer whose experts are
        fused it looks for no others."""
        self.has_experts.add(scheme is not None)
        if len(self.has_experts) == 2 and getattr(self.hf_config, "model_type", "").startswith("llama4"):
            raise ValueError(
                f"{prefix}: vLLM takes the experts of all layers of Llama 4 in bit-planes, or of none: quantize the "
                "model again without some of them in --ignore, or with 're:.*[.]experts[.].*' in it"
            )

    def _experts_scheme(self, layer: "RoutedExperts", prefix: str) -> format.Scheme | None:
        parts = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
        first: dict[format.Scheme | None, str] = {}
        for number in range(layer.moe_config.num_logical_experts):
            for part in filter(None, parts):
                # a model may have other names for its own tensors of all experts, so that names are not mapped back
                names = self._stored_names(f"{prefix}.{number}.{part}")
                exact = next((name for name in names if self.stored_format.mentions(name)), names[0])
                first.setdefault(self.stored_format.scheme_for(exact, names), f"{number}.{part}")
        if len(first) > 1:
            found = ", ".join(f"{part} {scheme or '16-bit'}" for scheme, part in first.items())
            raise ValueError(
                f"{prefix}: quantization_config treats the experts of one layer differently ({found}): "
                "give all of them the same bits, group_size, coefficient_bits and code, or ignore all of them"
            )
        return next(iter(first))


def _check_asked(online_quantization: Any) -> None:
    """Raise ValueError for what vLLM is told to do with all weights, and bit-planes can't."""
    from vllm import envs

    if online_quantization is not None:
        raise ValueError("--quantization-config: layers in bit-planes are quantized already: leave it out")
    if envs.VLLM_BATCH_INVARIANT:
        raise ValueError(
            "VLLM_BATCH_INVARIANT: layers in bit-planes have other kernels for few tokens than for many, which round "
            "otherwise: unset it"
        )


def _check_unshared(name: str) -> None:
    """Raise ValueError where vLLM would load the embedding `name` into a draft model in 16 bits, or look for its weight
    to compare it with that model's."""
    from vllm.config import get_current_vllm_config_or_none

    current = get_current_vllm_config_or_none()
    if current is not None and current.speculative_config is not None and current.speculative_config.use_eagle():
        raise ValueError(
            f"{name}: an embedding in bit-planes can't be shared with a draft model that reads hidden states: serve "
            "without --speculative-config, or quantize the model again with --embed-bits 16"
        )


def _check_classifier(fmt: format.Format) -> None:
    """Raise ValueError where vLLM would make a classifier of rows of an LM head in bit-planes."""
    from vllm.config import get_current_vllm_config_or_none

    from vllm_bpdq.checkpoint import scores_by_head

    current = get_current_vllm_config_or_none()
    model = None if current is None else current.model_config
    if model is None or model.convert_type != "classify" or not scores_by_head(model):
        return
    head = next((name for name in fmt.layers if name.rpartition(".")[2] == "lm_head"), None)
    if head is not None:
        raise ValueError(
            f"{head}: vLLM makes this classifier of rows of the LM head, which it takes in 16 bits only: quantize the "
            "model again with --head-bits 16"
        )


def _check_unadapted(name: str) -> None:
    """Raise ValueError where vLLM would put LoRA adapters on the experts `name`."""
    from vllm.config import get_current_vllm_config_or_none

    current = get_current_vllm_config_or_none()
    lora = None if current is None else current.lora_config
    if lora is not None and (lora.target_modules is None or "experts" in lora.target_modules):
        raise ValueError(
            f"{name}: experts in bit-planes take no LoRA adapters: name other layers with --lora-target-modules (vLLM "
            "then leaves out, without a word, what an adapter has for experts)"
        )


def _keep_order_of_writes() -> None:
    """On CPUs vLLM multiplies 16-bit layers, such as routers, by an op that writes into an empty tensor, and Inductor
    (torch 2.13), in search of an order that takes less memory, may read that before: have it keep the model's order."""
    from vllm.config import get_current_vllm_config_or_none

    current = get_current_vllm_config_or_none()
    if current is not None and current.device_config.device_type == "cpu":
        current.compilation_config.inductor_compile_config.setdefault("reorder_for_peak_memory", False)


def _in_16_bits_only(config: Any) -> Iterator[tuple[str, str]]:
    """Linears of a model of transformers' config that `bpdq quantize` does not keep, but vLLM 0.32 takes in 16 bits
    only, by the checkpoint's names, and what to do: models/bloom.py reorders outputs before any of our code sees them,
    layers/mamba/mamba_mixer.py (Mamba-1) asks no QuantizationConfig."""
    model_type = getattr(config, "model_type", None)
    if model_type == "bloom":
        for number in range(config.num_hidden_layers):
            name = f"transformer.h.{number}.self_attention.query_key_value"
            yield name, "quantize the model again with --ignore 're:.*query_key_value'"
    mixers = dict.fromkeys(("falcon_mamba", "mamba"), "backbone.layers.{}.mixer") | {"jamba": "model.layers.{}.mamba"}
    if model_type in mixers:
        kinds = getattr(config, "layers_block_type", None) or ["mamba"] * config.num_hidden_layers
        ignore = "quantize the model again with --ignore 're:.*[.]mamba[.]'"
        remedy = ignore if model_type == "jamba" else "serve it with transformers"
        for number, kind in enumerate(kinds):
            if kind in ("mamba", "linear_attention"):
                yield f"{mixers[model_type].format(number)}.in_proj", remedy
                yield f"{mixers[model_type].format(number)}.out_proj", remedy
