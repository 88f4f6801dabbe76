"""What a format says of one weight: its tensors, as they must be in the files, and the weight that they stand for."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from bpdq_kernels.folder import FLOATS, Entry
from bpdq_quantizer.errors import InputError

Shape = tuple[int, ...]
ANY_FLOAT = tuple(FLOATS)
ORIGINAL = "quantize the 16-bit original instead"


class Part(NamedTuple):
    """dtypes: those that a tensor may have, as headers write them; shapes: those that it may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]


class Layout(NamedTuple):
    """parts: by what follows the weight's name in theirs, `_scale_inv`, or nothing; decode: the weight, in any float
    dtype, from the tensors by the same."""

    parts: dict[str, Part]
    decode: Callable[[Mapping[str, Tensor]], Tensor]


Read = Callable[[str, Shape, Mapping[str, Entry]], Layout]


class Format(NamedTuple):
    """suffixes: what may follow a weight's name in the names of its tensors; packed: which of them stands in the place
    of the weight, or None; reader: from a `quantization_config` what reads a layout from the name of a weight, its
    shape in 16 bits and its tensors, by suffix. Both raise InputError for what can't be read."""

    suffixes: tuple[str, ...]
    packed: str | None
    reader: Callable[[Mapping[str, Any]], Read]


def matrix(name: str, shape: Shape) -> tuple[int, int]:
    """Outputs and inputs of a weight; raises InputError for one of another shape."""
    if len(shape) != 2:
        raise InputError(f"{name} {shape} is stored quantized, but is no matrix: not supported, {ORIGINAL}")
    return shape
