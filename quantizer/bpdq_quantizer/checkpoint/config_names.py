"""Layers as a checkpoint's config.json names them."""

import re
from collections.abc import Mapping
from typing import TypeVar

from bpdq_kernels.patterns import PREFIX
from bpdq_quantizer.model.stream import Streamed
from bpdq_quantizer.model.weights import weights_in

Value = TypeVar("Value")


def config_names(source: Streamed, values: Mapping[str, Value]) -> dict[str, Value]:
    """`values` by the model's names of layers, by those of the checkpoint; the experts of a layer that have one value
    are one pattern: a model has tens of thousands."""
    weights = weights_in(source.model.get_submodule(source.prefix), source.prefix)
    layers: dict[str, list[str]] = {}
    for weight in weights.values():
        if weight.layer is not None:
            layers.setdefault(weight.layer.name, []).append(weight.name)
    found = dict(values)
    for layer, members in layers.items():
        if len({values.get(name) for name in members}) == 1 and members[0] in values:
            stored = source.names.layer(members[0]).removesuffix(members[0].removeprefix(layer))
            pattern = f"{PREFIX}{re.escape(stored)}[.]"
            found = {name: value for name, value in found.items() if not name.startswith(f"{layer}.")}
            found[pattern] = values[members[0]]
    return {name if name.startswith(PREFIX) else source.names.layer(name): value for name, value in found.items()}
