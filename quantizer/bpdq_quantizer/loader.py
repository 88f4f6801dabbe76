"""BPDQ checkpoints in transformers: `import bpdq_quantizer`, then `AutoModelForCausalLM.from_pretrained(folder)`.

Importing this module registers a quantizer under `quant_method: "bpdq"`. The authors' checkpoints say
`quant_method: "gptq"` and transformers resolves config classes by that key alone, so the "gptq" entry of its
registry gets a class that hands them over and leaves every other GPTQ config as it was.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GgufConfig,
    GPTQConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import bpdq_kernels
from bpdq_kernels import format as bpdq_format
from bpdq_kernels import skeleton
from bpdq_kernels.folder import REMEDY, Headers, check_scale, read_folder, read_json
from bpdq_kernels.format import KV_SCALES, Format
from bpdq_kernels.layout import trim
from bpdq_kernels.reference import rows
from bpdq_kernels.skeleton import embedding_names, is_tied, quantized_layers, stored_layer
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.sources import gguf_arguments, read_config


class BPDQLinear(nn.Module):
    """A Linear [N, K] held as bit-planes B and coefficients c (shapes in `bpdq_kernels.layout`), optional bias [N]."""

    def __init__(self, B: Tensor, c: Tensor, group_size: int, in_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.group_size, self.in_features, self.out_features = group_size, in_features, B.shape[2]
        self.register_buffer("B", B)
        self.register_buffer("c", c)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return bpdq_kernels.stored_linear(x, self.B, self.c, self.group_size, self.bias)

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] that B and c stand for, in fp32: code of some models reads it (nanochat, GPT-BigCode)."""
        return bpdq_kernels.dequantize(self.B, self.c, self.group_size, self.in_features)

    def extra_repr(self) -> str:
        k = self.B.shape[1]
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={k}, group_size={self.group_size}"
        )


class BPDQEmbedding(nn.Module):
    """An embedding [N, K] of N tokens held as a BPDQLinear's B and c; rows come in `dtype`, times `scale` (Gemma)."""

    def __init__(
        self, B: Tensor, c: Tensor, group_size: int, in_features: int, dtype: torch.dtype, scale: float
    ) -> None:
        super().__init__()
        self.group_size, self.in_features, self.out_features = group_size, in_features, B.shape[2]
        self.register_buffer("B", B)
        self.register_buffer("c", c)
        self.embed_scale = scale
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype), persistent=False)  # follows model.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape): [*ids.shape, K]."""
        B, c = self.B[:, :, ids.flatten()], self.c[:, :, ids.flatten()]
        return rows(B, c, self.group_size, self.in_features, self.scale.dtype, ids) * self.scale

    extra_repr = BPDQLinear.extra_repr


class TiedHead(nn.Module):
    """The LM head of a BPDQEmbedding. It holds no planes itself: buffers, unlike parameters, do not stay shared when a
    model is moved, and transformers ties parameters only."""

    def __init__(self, embedding: BPDQEmbedding, bias: Tensor | None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # not a submodule
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., N] of x [..., K], in x.dtype."""
        return bpdq_kernels.stored_linear(x, self.embedding.B, self.embedding.c, self.embedding.group_size, self.bias)


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
        start = stored_under(model)
        checked = model if embedding_names(model)[1] and not start else causal_skeleton(model, stored)
        skeleton.check_stored(stored, checked, self.quantization_config.format)
        self.schemes = {}
        for name, (module, scheme) in quantized_layers(model, self.quantization_config.format, start).items():
            if start + name + ".B" not in stored and is_new_head(model, name):
                continue
            replace(model, name, *stored_layer(start + name, stored, module, scheme), scheme.group_size)
            self.schemes[name] = scheme
        modules = dict(model.named_modules())
        for name, entry in stored.items():  # no use to transformers, but kept: for whom the model is saved
            parent, _, scale = name.removeprefix(start).rpartition(".")
            if self.quantization_config.format.kv_cache_scales and scale in KV_SCALES and parent in modules:
                modules[parent].register_buffer(scale, entry.meta())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, scheme in self.schemes.items():
            m = model.get_submodule(name)
            bpdq_format.check(name, m.B, m.c, m.in_features, m.out_features, scheme)  # now with values: no NaN
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


def looks_up_rows(embedding: nn.Module) -> bool:
    """Whether an input embedding looks up rows, perhaps times a constant, and does nothing else."""
    return type(embedding).forward is nn.Embedding.forward or hasattr(embedding, "scalar_embed_scale")


def causal_skeleton(model: PreTrainedModel, stored: Headers) -> PreTrainedModel | None:
    """The causal LM whose checkpoint AutoModel or a model for a task is loaded from; None if transformers has none."""
    try:
        return skeleton.build(model.config, stored)
    except ImportError:
        return None


def stored_under(model: PreTrainedModel) -> str:
    """What precedes the names of a model's modules in its checkpoint: AutoModel's lack that of the causal model."""
    return f"{model.base_model_prefix}." if model.base_model is model and model.base_model_prefix else ""


def is_new_head(model: PreTrainedModel, name: str) -> bool:
    """Whether the Linear `name` is of a head that a task adds to the model, such as AutoModelForSequenceClassification,
    so that no causal model's checkpoint has it."""
    return (
        model.base_model is not model and not name.startswith(model.base_model_prefix) and not embedding_names(model)[1]
    )


def replace(model: PreTrainedModel, name: str, B: Tensor, c: Tensor, group_size: int) -> None:
    """Put bit-planes where the model has the Linear or table `name`; an LM head that is tied to it goes with it."""
    module = model.get_submodule(name)
    embedding, head = embedding_names(model)
    width = module.weight.shape[1]
    if name != embedding:
        model.set_submodule(name, BPDQLinear(B, c, group_size, width, module.bias))
        return
    scale = getattr(module, "scalar_embed_scale", 1.0)
    table = BPDQEmbedding(B, c, group_size, width, module.weight.dtype, scale)
    if is_tied(model):
        model.set_submodule(head, TiedHead(table, model.get_submodule(head).bias))
        model._tied_weights_keys, model.all_tied_weights_keys = {}, {}  # no two tensors are left to tie
    model.set_submodule(name, table)


class Checkpoint(NamedTuple):
    """A BPDQ checkpoint folder, of which nothing but values is unchecked."""

    config: PreTrainedConfig
    format: Format
    stored: Headers
    skeleton: PreTrainedModel  # in 16 bits, on the meta device


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
        model = skeleton.build(config, stored)
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


def load_model(model: str, dtype: torch.dtype | str = "auto", **options: Any) -> PreTrainedModel:
    """A causal LM on the CPU from a Hugging Face folder, hub id, BPDQ checkpoint or `.gguf` file (dequantized).

    options: others of `from_pretrained`. Only safetensors (or GGUF) weights are read and no code from the folder runs.
    Raises InputError.
    """
    source = gguf_arguments(model)
    if is_checkpoint(model):
        open_checkpoint(Path(model))
    quantization = {"quantization_config": GgufConfig(dequantize=True)} if "gguf_file" in source else {}
    try:
        lm, info = AutoModelForCausalLM.from_pretrained(
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **source,
            **quantization,
            **options,
        )
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # damaged files raise all kinds
        raise InputError(f"{model}: can't be loaded as a causal language model: {e}") from e
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise InputError(misfit(model, name, tuple(stored), tuple(wanted)))
    if info["missing_keys"]:  # transformers would serve random numbers in their place
        raise InputError(f"{model}: {min(info['missing_keys'])} is not in its files: download the model again")
    return lm.eval()


def misfit(model: str, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What is said of a tensor whose shape is not the one that config.json gives it."""
    return f"{model}: {name} is {stored} in its files, but {wanted} by its config.json: download the model again"


def plain_skeleton(model: str) -> PreTrainedModel:
    """A 16-bit model on the meta device, from its config.json alone: in a folder or by its own path, of a hub id or a
    `.gguf` file. Raises InputError, also for models that are quantized already."""
    config = read_config(model)
    try:
        with init_empty_weights():
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as e:  # sizes that contradict each other
        raise InputError(f"{model}: can't be built from its config.json: {e}") from e
    if getattr(config, "quantization_config", None):
        raise InputError(f"{model} is quantized already: start from the 16-bit model")
    return skeleton
