"""A model whose decoder blocks stay in their files: a block's weights are read when it is its turn, then dropped."""

import ctypes
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import set_module_tensor_to_device
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpdq_kernels import patterns
from bpdq_kernels.experts import fused_shapes, take_apart
from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import Stored
from bpdq_kernels.skeleton import embedding_names, is_tied
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.expert_weights import ExpertsApart, OfFused, expert_weights
from bpdq_quantizer.model.modules import replace_linear
from bpdq_quantizer.model.names import StoredNames, stored_names
from bpdq_quantizer.model.opening import load_pretrained, plain_skeleton
from bpdq_quantizer.model.quantized import open_config
from bpdq_quantizer.model.source_files import check_places, check_tensors, stored_tensors
from bpdq_quantizer.model.sources import is_gguf
from bpdq_quantizer.model.stored_weights import ReadWeights, StoredWeight, packed_names, stored_weights, unreported
from bpdq_quantizer.model.weights import Weight, kept, weights_in

FUSED = (  # by vLLM, in most families that have them so
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    *(("q_a_proj", "kv_a_proj_with_mqa"), ("in_proj_qkv", "in_proj_z")),
)
Stamps = dict[str, list[int]]  # size and time of change (ns) of files, by name


class WatchedWeights(Mapping[str, Tensor]):
    """`weights` of the files of the folder or file `model`; reading one raises InputError once a file has changed.

    converted: where transformers has put those that are stored otherwise (OLMo hybrid's convolutions); removed with it.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], model: str, before: Stamps, converted: TemporaryDirectory
    ) -> None:
        self.weights, self.model, self.before, self.converted = weights, model, before, converted

    def __getitem__(self, name: str) -> Tensor:
        check_unchanged(self.model, self.before)
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


class Streamed(NamedTuple):
    """A 16-bit causal LM whose blocks are on the meta device. prefix: their name; weights: their tensors by name, read
    from the files on access; left_alone: names, or `re:` patterns, of the blocks' weights that stay in 16 bits;
    by_window: whether a block's arguments are of one window, even if they depend on nothing else (Bloom, XGLM);
    carries: whether blocks read what earlier ones left, beside hidden states (`calls.carries`); quantization: the
    `quantization_config` by which the files hold `quantized` weights, which are dequantized as they are read: by their
    names in the model, those of heads for multi-token prediction by their names in the files; names: those of the
    checkpoint that is made of it; is_fused: whether the files have the experts of a layer in one tensor."""

    model: PreTrainedModel
    prefix: str
    blocks: nn.ModuleList
    weights: Mapping[str, Tensor]
    left_alone: tuple[str, ...] = ()
    by_window: bool = False
    carries: bool = False
    quantization: dict[str, Any] | None = None
    quantized: Mapping[str, StoredWeight] = MappingProxyType({})
    names: StoredNames = StoredNames()
    is_fused: bool = False


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's decoder blocks: the first ModuleList of num_hidden_layers modules in what the model
    calls its decoder, or, as ModernBERT's so calls its LM head, in all of it. Raises InputError."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for decoder in (model.get_decoder() or model, model):
        inside = {id(module) for module in decoder.modules()}
        for name, module in model.named_modules():
            is_list = id(module) in inside and isinstance(module, nn.ModuleList) and len(module) == depth
            if is_list and weights_in(module):
                return name, module
    raise InputError(f"{type(model).__name__}: no list of {depth} decoder blocks with Linear layers found")


def solved(source: Streamed, index: int | None = None) -> dict[str, Weight]:
    """The weights that get a scheme, by name: of block `index`, or of all blocks."""
    name = source.prefix if index is None else f"{source.prefix}.{index}"
    weights = weights_in(source.model.get_submodule(name), name)
    alone = kept(weights)
    return {
        n: w
        for n, w in weights.items()
        if n not in alone and not any(patterns.matches(n, target) for target in source.left_alone)
    }


def leave_alone(source: Streamed, targets: Iterable[str]) -> Streamed:
    """The same with `left_alone`; raises InputError for a target of which nothing is left alone, or if all is."""
    weights = solved(source)
    if not weights:
        name, reason = next(iter(kept(weights_in(source.blocks, source.prefix)).items()))
        raise InputError(
            f"{type(source.model).__name__}: nothing can be quantized, all Linears of its blocks stay in 16 bits, like "
            f"{name} ({reason}): choose a wider model"
        )
    for target in targets:
        try:
            found = [name for name in weights if patterns.matches(name, target)]
        except InputError as e:
            raise InputError(f"--ignore: {e}") from None
        if not found:
            raise InputError(
                f"--ignore {target}: no Linear of the blocks has such a name, they are like {next(iter(weights))}"
            )
    source = source._replace(left_alone=tuple(targets))
    if not solved(source):
        raise InputError("--ignore: nothing is left to quantize: leave a pattern out")
    _check_experts(source, weights)
    return source


def _check_experts(source: Streamed, before: Mapping[str, Weight]) -> None:
    """Raise InputError where some of a layer's experts are left alone, or all of those that only fused files can have
    in 16 bits; before: what would be solved, were none."""
    after = solved(source)
    alone = {weight.layer.name: name for name, weight in before.items() if weight.layer and name not in after}
    for weight in after.values():
        if weight.layer and weight.layer.name in alone:
            raise InputError(
                f"--ignore leaves {alone[weight.layer.name]} alone, but not {weight.name}: the experts of a layer are "
                f"all quantized or none, 're:{re.escape(weight.layer.name)}' leaves these alone"
            )
    if alone and source.is_fused:
        raise InputError(
            f"--ignore leaves {next(iter(alone.values()))} alone, but files of {type(source.model).__name__} have "
            "experts fused, and are not written so: leave the pattern out"
        )


def parted(source: Streamed) -> str | None:
    """What is to be said where some of the Linears that vLLM fuses are left alone, and others not: transformers loads
    such a checkpoint, and so does vLLM in a family that it does not fuse them in."""
    before, after = solved(source._replace(left_alone=())), solved(source)
    for name in (name for name in before if name not in after):
        parent, _, key = name.rpartition(".")
        parts = next((parts for parts in FUSED if key in parts), ())
        other = next((f"{parent}.{part}" for part in parts if f"{parent}.{part}" in after), None)
        if other is not None and before[name].layer is None:
            return (
                f"--ignore leaves {name} in 16 bits, but not {other}: vLLM fuses {', '.join(parts)} in most families, "
                "and does not load a part of them so: ignore all of them, or none"
            )
    return None


def open_model(model: str, dtype: torch.dtype | str = "auto") -> Streamed:
    """Open a Hugging Face folder, hub id or `.gguf` file. A GGUF file is dequantized to bf16 and held in memory.

    dtype: of all but the blocks' weights, of a model whose files are not quantized. Weights that they hold quantized
    are dequantized as they are read. Raises InputError for what `load_pretrained` refuses, and for quantization that
    can't be undone. Later reads raise it if a file of the folder has changed since.
    """
    before = stamps(model)
    if is_gguf(model):  # does not say which 16-bit float was the model's own
        return from_memory(truly_tied(load_pretrained(model, torch.bfloat16)))
    config, quantization = open_config(model)
    skeleton = plain_skeleton(model)
    stored = stored_tensors(model)
    quantized = {} if quantization is None else stored_weights(model, skeleton, stored, quantization)
    check_tensors(model, skeleton, stored, {weight.name for weight in quantized.values()})
    apart = expert_weights(model, skeleton, stored, quantized)
    parts = {weight.name + suffix for weight in quantized.values() for suffix in weight.parts}
    check_places(skeleton, stored, parts, quantization is not None)
    prefix, _ = decoder_blocks(skeleton)
    path = prefix.split(".")
    around = [".".join(path[:depth]) for depth in range(len(path))]  # the modules that hold the blocks, "" first
    siblings = [n for n, _ in skeleton.named_modules() if n and n.rpartition(".")[0] in around and n not in around]
    held = [n for n, _ in skeleton.named_parameters() if n.rpartition(".")[0] in around]  # LLaVA-OneVision's newline
    device_map = {name: "disk" if name == prefix else "cpu" for name in [*siblings, *held]}
    converted = TemporaryDirectory()  # other tensors are read where they are
    plain = {} if quantization is None else {"config": config, "key_mapping": packed_names(quantization)}
    if fused_shapes(skeleton):
        plain["quantization_config"] = ExpertsApart()
    if quantization is not None:
        dtype = "auto"
    with nullcontext() if quantization is None else unreported():
        lm = load_pretrained(model, dtype, quantized, device_map=device_map, offload_folder=converted.name, **plain)
    hooks = [getattr(module, "_hf_hook", None) for module in lm.modules()]
    weights = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None))
    remove_hook_from_module(lm, recurse=True)
    for module in lm.modules():  # what the hooks leave behind is a reference cycle, which would keep replaced Linears
        vars(module).pop("forward", None)
    truly_tied(lm).requires_grad_(False)
    weights = ReadWeights(weights, {**apart, **quantized}, lm.dtype)
    for name, parameter in lm.named_parameters():
        if name in quantized and not parameter.is_meta:
            parameter.data = weights[name]
        else:  # no longer mapped from files, of which all that was looked at would stay
            parameter.data = parameter.data.clone()
    watched = WatchedWeights(weights, model, before, converted)
    return Streamed(
        lm,
        *decoder_blocks(lm),
        watched,
        quantization=quantization,
        quantized=quantized,
        names=stored_names(skeleton, stored),
        is_fused=any(isinstance(weight, OfFused) for weight in apart.values()),
    )


def truly_tied(lm: PreTrainedModel) -> PreTrainedModel:
    """lm, whose config no longer ties the LM head where its files hold one that differs."""
    if embedding_names(lm)[1] and not is_tied(lm):
        for config in (lm.config, lm.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
    return lm


def from_memory(lm: PreTrainedModel) -> Streamed:
    """The same for a model in memory, which keeps it there."""
    take_apart(lm)
    prefix, blocks = decoder_blocks(lm)
    weights = {f"{prefix}.{name}": tensor for name, tensor in blocks.state_dict().items()}
    drop_block(blocks)
    lm.requires_grad_(False)
    return Streamed(lm, prefix, blocks, weights)


def load_block(source: Streamed, index: int, device: torch.device) -> nn.Module:
    """Block `index` with its weights on `device`; `drop_block` drops them. Raises InputError if one can't be read."""
    block = source.blocks[index]
    for name in block.state_dict():
        full_name = f"{source.prefix}.{index}.{name}"
        value = read_weight(source, full_name, device)
        try:
            set_module_tensor_to_device(block, name, device, value=value)
        except ValueError as e:
            raise InputError(f"{full_name} does not fit the model ({e}): download the model again") from e
    for name, buffer in unsaved_buffers(block).items():
        set_module_tensor_to_device(block, name, device, value=buffer)
    return block


def read_weight(source: Streamed, name: str, device: torch.device) -> Tensor:
    """A copy on `device` of one of the blocks' tensors, by its name in the model; raises InputError."""
    try:
        return source.weights[name].to(device, copy=True)  # a mapped file that is cut short later is no harm
    except KeyError:
        raise InputError(f"{name} is not in the model's files: download the model again") from None
    except (OSError, SafetensorError) as e:
        raise InputError(f"{name} can't be read ({e}): download the model again") from e


def drop_block(block: nn.Module) -> None:
    """Free the tensors of a block, or of all, but for those that its files lack; they go to the CPU."""
    kept = {name: buffer.cpu() for name, buffer in unsaved_buffers(block).items()}
    block.to("meta")
    for name, buffer in kept.items():
        set_module_tensor_to_device(block, name, "cpu", value=buffer)
    trim_heap()


def unsaved_buffers(block: nn.Module) -> dict[str, Tensor]:
    """Buffers that no checkpoint holds, by name: masks of GPT-Neo, tables of positions of GPT-J."""
    saved = block.state_dict().keys()
    return {name: buffer for name, buffer in block.named_buffers() if name not in saved}


def trim_heap() -> None:
    """Return freed memory to the system: glibc would keep it in pieces, more with each block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def fill_block(block: nn.Module, tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> None:
    """Give a block the tensors of a quantized one; tensors, schemes: by their names in it."""
    for name in [key.removesuffix(".B") for key in tensors if key.endswith(".B")]:
        scheme = schemes[name]
        stored = Stored(*(tensors[f"{name}.{tensor}"] for tensor in scheme.tensors))
        replace_linear(block, name, stored, scheme.group_size)
    block.load_state_dict(tensors, assign=True)


def stamps(model: str) -> Stamps:
    """Size and time of change of the files that `open_model` reads, none of a hub id; raises InputError."""
    path = Path(model)
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), path / "config.json"])
    try:
        found = {file.name: file.stat() for file in files} if path.exists() else {}
    except OSError as e:
        raise InputError(f"{model}: can't be read ({e}): download the model again") from None
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def check_unchanged(model: str, before: Stamps) -> None:
    """Raise InputError unless the files of `model` are those of `stamps` before."""
    now = stamps(model) if before else {}
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        raise InputError(
            f"{model}: {changed[0]} has changed since the run began: put it back as it was, or start again with a "
            "folder that stays as it is"
        )
