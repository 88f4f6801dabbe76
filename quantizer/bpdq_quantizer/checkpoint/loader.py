"""BPDQ checkpoints in transformers: `import bpdq_quantizer`, then `AutoModelForCausalLM.from_pretrained(folder)`.

Importing this module registers a quantizer under `quant_method: "bpdq"`. The authors' checkpoints say
`quant_method: "gptq"` and transformers resolves config classes by that key alone, so the "gptq" entry of its
registry gets a class that hands them over and leaves every other GPTQ config as it was.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    GPTQConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bpdq_kernels import format as bpdq_format
from bpdq_kernels import skeleton
from bpdq_kernels.experts import are_apart, take_apart, without_fusing
from bpdq_kernels.folder import REMEDY, Headers, check_scale, read_folder, read_json
from bpdq_kernels.format import KV_SCALES, Format
from bpdq_kernels.layout import trim
from bpdq_kernels.mtp import head_pattern
from bpdq_kernels.skeleton import embedding_names, quantized_layers, stored_layer
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.modules import BPDQEmbedding, held, replace
from bpdq_quantizer.model.opening import load_pretrained, plain_skeleton
from bpdq_quantizer.model.quantized import open_config
from bpdq_quantizer.model.source_files import check_files
from bpdq_quantizer.model.sources import is_gguf
from bpdq_quantizer.model.stream import decoder_blocks, load_block, open_model
from bpdq_quantizer.model.support import check_dense


@register_quantization_config("bpdq")
class BPDQConfig(QuantizationConfigMixin):
    """A checkpoint's `quantization_config`, in our dialect or the authors', for transformers."""

    def __init__(self, **config: Any) -> None:
        self.config = {"quant_method": "bpdq", **config}
        self.format = bpdq_format.parse(self.config)
        self.quant_method = "bpdq"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return dict(self.config)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class _GPTQOrBPDQConfig(GPTQConfig):
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        target = BPDQConfig if bpdq_format.claims(config_dict) else GPTQConfig
        return target.from_dict(config_dict, **kwargs)


AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = _GPTQOrBPDQConfig


@register_quantizer("bpdq")
class BPDQQuantizer(HfQuantizer):
    """Replaces the modules that the checkpoint holds as bit-planes, and checks that every tensor arrives."""

    requires_calibration = True

    def update_tp_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Where transformers shows the config before it reads the index and builds the model, which may take for ever:
        a local folder is checked here."""
        folder = Path(config.name_or_path)
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
            skeleton.check_config(config, read_folder(folder))
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        stored = read_folder(files[0].parent) if files else {}
        if {file.name for file in files} != {entry.file.name for entry in stored.values()}:
            raise InputError(f"{files[0]}: transformers would read this file, which is not the checkpoint's")
        if are_apart(stored):
            take_apart(model)
        self.fuses = not are_apart(stored)
        arranged = skeleton.arranged(stored, model)
        checked = model if embedding_names(model)[1] else causal_skeleton(model, stored)
        fmt = self.quantization_config.format
        own = {name for name in model.state_dict() if is_new_head(model, name)}  # in files of such a model
        skeleton.check_stored({name: entry for name, entry in stored.items() if name not in own}, checked, fmt)
        heads = {f"^{re.escape(name)}$" for name in stored if head_pattern(name, model.config)}
        model._keys_to_ignore_on_load_unexpected |= heads  # of which transformers knows by name those of some sizes
        self.schemes = {}
        for name, (module, scheme) in quantized_layers(model, fmt, arranged.layers).items():
            if name + ".B" not in arranged.tensors and is_new_head(model, name):
                continue
            replace(model, name, stored_layer(name, arranged.tensors, module, scheme), scheme.group_size)
            self.schemes[name] = scheme
        modules = dict(model.named_modules())
        for name, entry in arranged.tensors.items():  # no use to transformers, but kept: for whom the model is saved
            parent, _, scale = name.rpartition(".")
            if fmt.kv_cache_scales and scale in KV_SCALES and parent in modules:
                modules[parent].register_buffer(scale, entry.meta())

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], *_: Any) -> list[WeightTransform]:
        """Called before the tensors are read, after the modules are replaced; by newer transformers with the model."""
        return weight_conversions if self.fuses else without_fusing(weight_conversions)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, scheme in self.schemes.items():
            m = model.get_submodule(name)
            bpdq_format.check(name, held(m), m.in_features, m.out_features, scheme)  # now with values: no NaN
            m.B = trim(m.B, m.in_features)
            if isinstance(m, BPDQEmbedding):
                m.scale.fill_(m.embed_scale)  # not stored: empty after loading
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[2] in KV_SCALES and not tensor.is_meta:
                check_scale(name, tensor)
            if not tensor.is_meta and tensor.is_floating_point() and not bpdq_format.is_finite(tensor):
                raise InputError(f"{name} holds NaN or infinity in {tensor.dtype}: {REMEDY}")
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def causal_skeleton(model: PreTrainedModel, stored: Headers) -> PreTrainedModel | None:
    """The causal LM whose checkpoint AutoModel or a model for a task is loaded from, without its head where AutoModel
    has saved that; None if transformers has none."""
    try:
        return skeleton.as_stored(skeleton.build(model.config, stored), stored)
    except ImportError:
        return None


def is_new_head(model: PreTrainedModel, name: str) -> bool:
    """Whether the Linear or tensor `name` is of a head that a task adds to the model, such as
    AutoModelForSequenceClassification, so that no causal model's checkpoint has it."""
    return (
        model.base_model is not model and not name.startswith(model.base_model_prefix) and not embedding_names(model)[1]
    )


class Checkpoint(NamedTuple):
    """A BPDQ checkpoint folder, of which nothing but values is unchecked."""

    config: PreTrainedConfig
    format: Format
    stored: Headers
    skeleton: PreTrainedModel  # in 16 bits, on the meta device; without an LM head where AutoModel has saved it


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder's config.json and the headers of its files; raises InputError unless they belong together."""
    file = folder / "config.json"
    fmt = bpdq_format.parse(read_json(file).get("quantization_config") or {})
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # whatever a value of config.json makes transformers raise
        raise InputError(f"{file}: transformers can't use it ({' '.join(str(e).split())})") from e
    stored = read_folder(folder)
    try:
        model = skeleton.as_stored(skeleton.build(config, stored), stored)
    except ImportError as e:
        raise InputError(f"{file}: {e}") from e
    skeleton.check_stored(stored, model, fmt)
    return Checkpoint(config, fmt, stored, model)


def is_checkpoint(model: str) -> bool:
    """Whether `model` is a folder whose config.json speaks of BPDQ, or of a quantization that can't be told."""
    if not (Path(model) / "config.json").exists():
        return False
    quantization = read_json(Path(model) / "config.json").get("quantization_config")
    return quantization is not None and (not isinstance(quantization, dict) or bpdq_format.claims(quantization))


def quantization_of(model: str) -> dict[str, Any] | None:
    """How a model's files hold weights quantized, None for 16 bits; raises InputError where `open_model` does not
    dequantize them, nor those of a model that is not dense."""
    _, quantization = open_config(model)
    if quantization is not None:
        check_dense(*decoder_blocks(plain_skeleton(model)))
    return quantization


def load_model(model: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """A causal LM on the CPU from a Hugging Face folder, hub id, BPDQ checkpoint or `.gguf` file (dequantized to
    bf16, as by `open_model`).

    Other quantized models are dequantized as `bpdq quantize` does it, and where it does not, loaded as transformers
    does. Only safetensors (or GGUF) weights are read and no code from the folder runs. Raises InputError.
    """
    if is_checkpoint(model):
        open_checkpoint(Path(model))
    elif is_gguf(model):
        lm = load_pretrained(model, torch.bfloat16)
        return lm if dtype == "auto" else lm.to(dtype)
    else:
        try:
            quantization = quantization_of(model)
        except InputError:
            return load_pretrained(model, dtype)
        if quantization is not None:
            source = open_model(model)
            for index in range(len(source.blocks)):
                load_block(source, index, torch.device("cpu"))
            return source.model.to(source.model.dtype if dtype == "auto" else dtype)
        check_files(model)
    return load_pretrained(model, dtype)
