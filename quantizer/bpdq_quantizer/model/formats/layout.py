"""What a format says of one weight: its tensors, as they must be in the files, and the weight that they stand for."""

from collections.abc import Callable, Mapping
from math import lcm, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bpdq_kernels.folder import FLOATS, Entry
from bpdq_quantizer.errors import InputError

Shape = tuple[int, ...]
ANY_FLOAT = tuple(FLOATS)
ORIGINAL = "quantize the 16-bit original instead"
ELEMENTS = 1 << 24  # that are decoded at a time: of each there are several copies in fp32


class Part(NamedTuple):
    """dtypes: those that a tensor may have, as headers write them; shapes: those that it may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]


class Layout(NamedTuple):
    """shape: the weight's; parts: by what follows its name in theirs, `_scale_inv`, or nothing; rows: by the same, how
    many of the weight's rows one row of a tensor is for, where not all of it is for all; decode: the weight, or some of
    its rows, in any float dtype, from the tensors."""

    shape: Shape
    parts: dict[str, Part]
    rows: dict[str, int]
    decode: Callable[[Mapping[str, Tensor]], Tensor]


Read = Callable[[str, Shape, Mapping[str, Entry]], Layout]


class Format(NamedTuple):
    """suffixes: what may follow a weight's name in the names of its tensors; packed: which of them stands in the place
    of the weight, or None; reader: from a `quantization_config` what reads a layout from the name of a weight, its
    shape in 16 bits and its tensors, by suffix. Both raise InputError for what can't be read."""

    suffixes: tuple[str, ...]
    packed: str | None
    reader: Callable[[Mapping[str, Any]], Read]


def decoded(layout: Layout, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """A weight from its tensors, some rows at a time."""
    unit = lcm(*layout.rows.values())
    step = unit * max(1, ELEMENTS // (unit * prod(layout.shape[1:])))
    weight = torch.empty(layout.shape, dtype=dtype)
    for start in range(0, layout.shape[0], step):
        part = dict(stored)
        for suffix, rows in layout.rows.items():
            part[suffix] = stored[suffix][start // rows : (start + step) // rows]
        weight[start : start + step] = layout.decode(part)
    return weight


def matrix(name: str, shape: Shape) -> tuple[int, int]:
    """Outputs and inputs of a weight; raises InputError for one of another shape."""
    if len(shape) != 2:
        raise InputError(f"{name} {shape} is stored quantized, but is no matrix: not supported, {ORIGINAL}")
    return shape
