"""BPDQ checkpoints in transformers: `import bpdq_quantizer`, then `AutoModelForCausalLM.from_pretrained(folder)`.

Importing this module registers a quantizer under `quant_method: "bpdq"`. The authors' checkpoints say
`quant_method: "gptq"` and transformers resolves config classes by that key alone, so the "gptq" entry of its
registry gets a class that hands them over and leaves every other GPTQ config as it was.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GgufConfig, GPTQConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import bpdq_kernels
from bpdq_kernels import format as bpdq_format
from bpdq_kernels.format import Format, Scheme
from bpdq_kernels.layout import trim
from bpdq_kernels.reference import rows
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.sources import gguf_arguments, read_config

KV_SCALES = ("k_scale", "v_scale")
Headers = dict[str, tuple[tuple[int, ...], torch.dtype]]  # shape and dtype of stored tensors, by name


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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        stored = read_headers(checkpoint_files or [])
        self.schemes = {}
        start = stored_under(model)
        for name, (module, scheme) in quantized_layers(model, self.quantization_config.format, start).items():
            if start + name + ".B" not in stored and is_new_head(model, name):
                continue
            replace(model, name, *stored_layer(start + name, stored, module, scheme), scheme.group_size)
            self.schemes[name] = scheme
        modules = dict(model.named_modules())
        for name, (shape, dtype) in stored.items():  # no use to transformers, but kept: for whom the model is saved
            parent, _, scale = name.removeprefix(start).rpartition(".")
            if self.quantization_config.format.kv_cache_scales and scale in KV_SCALES and parent in modules:
                modules[parent].register_buffer(scale, torch.empty(shape, dtype=dtype, device="meta"))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, scheme in self.schemes.items():
            m = model.get_submodule(name)
            bpdq_format.check(name, m.B, m.c, m.in_features, m.out_features, scheme)  # now with values: no NaN
            m.B = trim(m.B, m.in_features)
            if isinstance(m, BPDQEmbedding):
                m.scale.fill_(m.embed_scale)  # not stored: empty after loading
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def table_names(model: PreTrainedModel) -> tuple[str, str]:
    """Names of the model's tables: the input embedding and the LM head, "" for one that it lacks."""
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(model.get_input_embeddings()), ""), names.get(id(model.get_output_embeddings()), "")


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the LM head is the input embedding."""
    return f"{table_names(model)[1]}.weight" in model.all_tied_weights_keys


def looks_up_rows(embedding: nn.Module) -> bool:
    """Whether an input embedding looks up rows, perhaps times a constant, and does nothing else."""
    return type(embedding).forward is nn.Embedding.forward or hasattr(embedding, "scalar_embed_scale")


def stored_under(model: PreTrainedModel) -> str:
    """What precedes the names of a model's modules in its checkpoint: AutoModel's lack that of the causal model."""
    return f"{model.base_model_prefix}." if model.base_model is model and model.base_model_prefix else ""


def is_new_head(model: PreTrainedModel, name: str) -> bool:
    """Whether the Linear `name` is of a head that a task adds to the model, such as AutoModelForSequenceClassification,
    so that no causal model's checkpoint has it."""
    return model.base_model is not model and not name.startswith(model.base_model_prefix) and not table_names(model)[1]


def quantized_layers(model: PreTrainedModel, fmt: Format, start: str = "") -> dict[str, tuple[nn.Module, Scheme]]:
    """The Linears and tables of a 16-bit skeleton that a checkpoint of format `fmt` holds as bit-planes, by name.

    start: what precedes the names in the checkpoint. Of tied tables only the embedding, by whose name both are stored;
    raises InputError where `fmt` tells them apart.
    """
    tables = table_names(model)
    found = {}
    for name, module in model.named_modules():
        if name in tables or isinstance(module, nn.Linear):
            scheme = fmt.table_scheme(start + name) if name in tables else fmt.scheme_for(start + name)
            if scheme is not None:
                found[name] = (module, scheme)
    if is_tied(model):
        embedding, head = (fmt.table_scheme(name) for name in tables)
        if embedding != head:
            raise InputError(
                f"{' and '.join(tables)} are tied, but quantization_config makes them {embedding} and {head}: "
                "`layers` must name both, with the same bits and group_size"
            )
        found.pop(tables[1], None)
    return found


def replace(model: PreTrainedModel, name: str, B: Tensor, c: Tensor, group_size: int) -> None:
    """Put bit-planes where the model has the Linear or table `name`; an LM head that is tied to it goes with it."""
    module = model.get_submodule(name)
    embedding, head = table_names(model)
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


def stored_layer(name: str, stored: Headers, module: nn.Module, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """B and c of a layer on the meta device, as the headers describe them; raises InputError unless they fit.

    module: the layer in 16 bits, with a weight [N, K].
    """
    for key in (f"{name}.B", f"{name}.c"):
        if key not in stored:
            raise InputError(
                f"{key} is not in the checkpoint, though its config.json says that the layer is quantized: "
                "download or quantize it again"
            )
    B, c = (torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in (stored[f"{name}.{t}"] for t in "Bc"))
    out_features, in_features = module.weight.shape
    try:
        bpdq_format.check(name, B, c, in_features, out_features, scheme)
    except ValueError as e:
        raise InputError(str(e)) from None
    return B, c


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I32": torch.int32}
_DTYPES |= {"I64": torch.int64, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read_headers(files: list[str] | list[Path]) -> Headers:
    """Shape and dtype of every tensor in safetensors files, from their headers alone."""
    stored = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, not a dict
                    header = tensors.get_slice(name)
                    stored[name] = (tuple(header.get_shape()), _DTYPES.get(header.get_dtype(), torch.uint8))
        except Exception as e:  # SafetensorError has no public home
            raise InputError(f"{file}: not a complete safetensors file ({e}): download or quantize it again") from None
    return stored


def load_model(model: str, dtype: torch.dtype | str = "auto", **options: Any) -> PreTrainedModel:
    """A causal LM on the CPU from a Hugging Face folder, hub id, BPDQ checkpoint or `.gguf` file (dequantized).

    options: others of `from_pretrained`. Only safetensors (or GGUF) weights are read and no code from the folder runs.
    Raises InputError.
    """
    source = gguf_arguments(model)
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
