"""Weights of sources that are quantized already: found in the files, checked, and dequantized when they are read."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from bpdq_kernels.conversions import renaming
from bpdq_kernels.experts import fused_shapes
from bpdq_kernels.folder import FLOATS, REMEDY, Entry, Headers
from bpdq_kernels.mtp import head_pattern
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.formats import FORMATS
from bpdq_quantizer.model.formats.layout import ORIGINAL, Format, Layout, decoded

EXPONENT_NAN = 255  # of scales that are exponents of two


class StoredWeight(NamedTuple):
    """name: in the files, without what follows it there; parts: its tensors, by that; layout: what they stand for."""

    name: str
    parts: dict[str, Entry]
    layout: Layout

    def tensors(self) -> dict[str, Tensor]:
        """Read from the files, by suffix."""
        found = {}
        for suffix, entry in self.parts.items():
            with safe_open(entry.file, framework="pt") as file:
                found[suffix] = file.get_tensor(self.name + suffix)
        return found

    def read(self, dtype: torch.dtype) -> Tensor:
        """It, dequantized."""
        return decoded(self.layout, self.tensors(), dtype)

    def read_one(self, i: int, dtype: torch.dtype) -> Tensor:
        """The matrix of expert i, of a weight of all."""
        found = {}
        for suffix, entry in self.parts.items():
            with safe_open(entry.file, framework="pt") as file:
                found[suffix] = file.get_slice(self.name + suffix)[i : i + 1]
        return self.layout.decode(found)[0].to(dtype)


class Readable(Protocol):
    """A weight in files, where it is."""

    def read(self, dtype: torch.dtype) -> Tensor:
        """It, in `dtype`."""


class ReadWeights(Mapping[str, Tensor]):
    """`others`, but with those that are `found` elsewhere read in `dtype` whenever they are looked up."""

    def __init__(self, others: Mapping[str, Tensor], found: Mapping[str, Readable], dtype: torch.dtype) -> None:
        self.others, self.found, self.dtype = others, found, dtype

    def __getitem__(self, name: str) -> Tensor:
        weight = self.found.get(name)
        return self.others[name] if weight is None else weight.read(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.others)

    def __len__(self) -> int:
        return len(self.others)


def stored_weights(
    model: str, skeleton: PreTrainedModel, stored: Headers, quantization: Mapping[str, Any]
) -> dict[str, StoredWeight]:
    """The weights of the 16-bit `skeleton` of a model that its files `stored` hold quantized, by their names in it; of
    heads for multi-token prediction, which it lacks, by their names in the files.

    Raises InputError for tensors that are missing, have another dtype or shape than the weight's format says, or hold
    scales that are no numbers. Of the others' values nothing is read.
    """
    fmt = FORMATS[quantization["quant_method"]]
    with named(model):
        read = fmt.reader(quantization)
    wanted = {name: tensor.shape for name, tensor in skeleton.state_dict().items()} | fused_shapes(skeleton)
    model_name, found = renaming(skeleton), {}
    for name in candidates(stored, fmt):
        target, is_converted = model_name(name)
        parts = {suffix: stored[name + suffix] for suffix in ("", *fmt.suffixes) if name + suffix in stored}
        if target in wanted:
            shape = tuple(wanted[target])
        elif head_pattern(name, skeleton.config) and name.endswith(".weight"):
            target, shape, is_converted = name, shape_of_head(name, parts), False
        else:
            continue
        with named(next(iter(parts.values())).file):
            if is_converted:
                raise InputError(f"{name} is stored quantized, and transformers makes others of it: {ORIGINAL}")
            layout = read(name, shape, parts)
        check_parts(name, parts, layout, quantization["quant_method"])
        found[target] = StoredWeight(name, parts, layout)
    check_values(found.values())
    return found


def shape_of_head(name: str, parts: Mapping[str, Entry]) -> tuple[int, ...]:
    """That of a weight of which no config tells it; raises InputError."""
    if "_shape" in parts:
        file = parts["_shape"].file
        with safe_open(file, framework="pt") as tensors:
            return tuple(tensors.get_tensor(f"{name}_shape").tolist())
    if "" in parts:
        return parts[""].shape
    suffix, entry = next(iter(parts.items()))
    raise InputError(f"{entry.file}: {name}{suffix} does not tell how large {name} is: {ORIGINAL}")


@contextmanager
def named(source: object) -> Iterator[None]:
    """Put the file or model before what is said of it."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{source}: {e}") from None


def candidates(stored: Headers, fmt: Format) -> list[str]:
    """Names that a suffix follows in the files, and those of tensors that are no usual floats."""
    ends = {name.removesuffix(suffix) for name in stored for suffix in fmt.suffixes if name.endswith(suffix)}
    return sorted(ends | {name for name, entry in stored.items() if entry.dtype not in FLOATS})


def check_parts(name: str, parts: Mapping[str, Entry], layout: Layout, method: str) -> None:
    """Raise InputError unless a weight's tensors are those of its layout."""
    for suffix, part in layout.parts.items():
        if suffix not in parts:
            other, entry = next(iter(parts.items()))
            raise InputError(
                f"{entry.file}: {name}{other} is {entry.dtype}, but {name}{suffix}, without which it is no {method} "
                f"weight, is not in the model's files: {REMEDY}"
            )
        entry = parts[suffix]
        if entry.dtype not in part.dtypes or entry.shape not in part.shapes:
            raise InputError(
                f"{entry.file}: {name}{suffix} is {entry.dtype} {entry.shape}, expected {' or '.join(part.dtypes)} "
                f"{' or '.join(map(str, part.shapes))} by the {method} of config.json: {REMEDY}"
            )
    for suffix in parts.keys() - layout.parts.keys():
        raise InputError(
            f"{parts[suffix].file}: {name}{suffix} has no place beside {' and '.join(name + s for s in layout.parts)} "
            f"by the {method} of config.json: {REMEDY}"
        )


def check_values(weights: Iterable[StoredWeight]) -> None:
    """Raise InputError for scales that are no numbers, and for shapes that are stored and not the weights' own."""
    by_file = defaultdict(list)
    for weight in weights:
        for suffix, entry in weight.parts.items():
            if suffix.endswith(("_scale", "_scale_inv", "_scales", "_shape")):
                by_file[entry.file].append((weight, suffix))
    for file, parts in by_file.items():
        with safe_open(file, framework="pt") as tensors:
            for weight, suffix in parts:
                value = tensors.get_tensor(weight.name + suffix)
                check_value(f"{file}: {weight.name}{suffix}", suffix, value, weight.layout.shape)


def check_value(name: str, suffix: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if suffix == "_shape":
        if tuple(value.tolist()) != shape:
            raise InputError(f"{name} is {value.tolist()}, but config.json makes the weight {shape}: {REMEDY}")
    elif not ((value != EXPONENT_NAN).all() if value.dtype == torch.uint8 else value.float().isfinite().all()):
        raise InputError(f"{name} holds NaN or infinity: {REMEDY}")


def packed_names(quantization: Mapping[str, Any]) -> dict[str, str]:
    """As `key_mapping` of transformers: what is stored in a weight's place gets its name, and is not missed."""
    packed = FORMATS[quantization["quant_method"]].packed
    return {} if packed is None else {f"{packed}$": ""}


@contextmanager
def unreported() -> Iterator[None]:
    """Let transformers not report the tensors that it has no place for: scales, hundreds of them."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
