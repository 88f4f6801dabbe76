"""Experts one by one in a model whose files are read when they are needed: where each matrix is in them.

Transformers would fuse them as it loads a model, and write the result to disk, all of it.
"""

from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightTransform
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bpdq_kernels.conversions import renaming
from bpdq_kernels.experts import FUSED, Experts, fused_experts, matrix_of, take_apart, without_fusing
from bpdq_kernels.folder import FLOATS, Entry, Headers
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.opening import misfit
from bpdq_quantizer.model.stored_weights import Readable, StoredWeight


class Whole(NamedTuple):
    """A tensor of the files, by its name there."""

    name: str
    entry: Entry

    def read(self, dtype: torch.dtype) -> Tensor:
        with safe_open(self.entry.file, framework="pt") as file:
            return file.get_tensor(self.name).to(dtype)

    def read_one(self, i: int, dtype: torch.dtype) -> Tensor:
        """What it holds of expert i."""
        with safe_open(self.entry.file, framework="pt") as file:
            return file.get_slice(self.name)[i].to(dtype)


class OfFused(NamedTuple):
    """Of a tensor of all experts, what expert i has: some of its outputs, of the last axis if it is transposed."""

    fused: Whole | StoredWeight
    i: int
    outputs: slice
    is_transposed: bool

    def read(self, dtype: torch.dtype) -> Tensor:
        return matrix_of(self.fused.read_one(self.i, dtype), self.outputs, self.is_transposed).contiguous()


def expert_weights(
    model: str, skeleton: PreTrainedModel, stored: Headers, quantized: dict[str, StoredWeight]
) -> dict[str, Readable]:
    """Where the files `stored` of a model hold the weights and biases of the experts of its `skeleton`, by their names
    in that; without those that are `quantized` one by one.

    Raises InputError for those that are missing, there twice, or have another shape, and for experts that config.json
    does not know of.
    """
    modules = {name: module for name, module in skeleton.named_modules() if isinstance(module, Experts)}
    if not modules:
        return {}
    turned = _may_be_turned(skeleton)
    model_name = renaming(skeleton)
    files: dict[str, Whole | StoredWeight] = {model_name(name)[0]: Whole(name, entry) for name, entry in stored.items()}
    files |= quantized
    found: dict[str, Readable] = {}
    for name, module in modules.items():
        for tensor in _tensors(name, module):
            fused = files.get(f"{name}.{tensor.fused}")
            if tensor.name not in files:
                found[tensor.name] = _of_fused(model, module, tensor, fused, turned)
            elif fused is not None:
                raise InputError(
                    f"{model}: {tensor.name} is in its files twice, also in {fused.name}: download it again"
                )
            elif tensor.name not in quantized:
                found[tensor.name] = files[tensor.name]
                _check_shape(model, files[tensor.name], tensor.shape)
    for name in files:
        layer, _, rest = name.rpartition(".experts.")
        number, module = rest.partition(".")[0], modules.get(f"{layer}.experts")
        if module is not None and number.isdigit() and int(number) >= module.num_experts:
            raise InputError(
                f"{model}: {name} has no place: config.json has {module.num_experts} experts: download the model again"
            )
    return found


class _Tensor(NamedTuple):
    """A weight or bias of an expert. fused: what the tensor of all is called; shape: its own."""

    name: str
    i: int
    fused: str
    outputs: slice
    shape: torch.Size


def _tensors(name: str, module: Experts) -> list[_Tensor]:
    found = []
    for i in range(module.num_experts):
        for key, matrix in module.matrices.items():
            for kind, tensor in module.get_submodule(f"{i}.{key}").named_parameters():
                fused = matrix.parameter + ("" if kind == "weight" else f"_{kind}")
                found.append(_Tensor(f"{name}.{i}.{key}.{kind}", i, fused, matrix.outputs, tensor.shape))
    return found


def _check_shape(model: str, tensor: Whole, wanted: torch.Size) -> None:
    if tensor.entry.shape != wanted:
        raise InputError(misfit(model, tensor.name, tensor.entry.shape, tuple(wanted)))


def _of_fused(
    model: str, module: Experts, tensor: _Tensor, fused: Whole | StoredWeight | None, may_be_turned: bool
) -> OfFused:
    if fused is None:
        raise InputError(f"{model}: {tensor.name} is not in its files: download the model again")
    wanted = module.fused_shapes[tensor.fused]
    shape = wanted if isinstance(fused, StoredWeight) else fused.entry.shape
    turned = (*wanted[:1], *reversed(wanted[1:])) if may_be_turned else wanted
    if shape not in (wanted, turned):
        raise InputError(misfit(model, fused.name, shape, tuple(wanted)))
    if isinstance(fused, Whole) and fused.entry.dtype not in FLOATS:
        raise InputError(f"{model}: {fused.name} is {fused.entry.dtype}, no 16-bit float: start from the 16-bit model")
    is_transposed = len(wanted) == 3 and (shape != wanted) != module.is_transposed
    return OfFused(fused, tensor.i, tensor.outputs, is_transposed)


def _may_be_turned(skeleton: PreTrainedModel) -> bool:
    """Whether transformers turns the fused experts of a family's files where they have the other shape (Qwen3-VL);
    raises InputError where it does more than that, and than to put experts together."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    transforms = get_model_conversion_mapping(skeleton)
    others = {id(transform) for transform in without_fusing(transforms)}
    operations = [op for transform in transforms if id(transform) not in others for op in transform.operations]
    if not all(isinstance(operation, Concatenate | MergeModulelist | Transpose) for operation in operations):
        raise InputError(f"{type(skeleton).__name__}: its files hold experts in an order of their own: not supported")
    return any(isinstance(operation, Transpose) for operation in operations)


@register_quantization_config("bpdq_experts_apart")
class ExpertsApart(QuantizationConfigMixin):
    """As `quantization_config` of `from_pretrained`: experts are not read, and are one by one on the meta device."""

    def __init__(self) -> None:
        self.quant_method = "bpdq_experts_apart"


@register_quantizer("bpdq_experts_apart")
class _ExpertsApart(HfQuantizer):
    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.fused = fused_experts(model)
        for name in self.fused:
            model.set_submodule(name, nn.Identity())
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            r"experts\.\d+\.",
            rf"experts\.({'|'.join(FUSED)})",
        }

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], *_: Any) -> list[WeightTransform]:
        return without_fusing(weight_conversions)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        take_apart(model, self.fused)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
