"""Layers as a checkpoint's config.json names them."""

import re
from collections.abc import Mapping
from typing import TypeVar

from bpdq_kernels.experts import Experts
from bpdq_kernels.patterns import PREFIX
from bpdq_quantizer.model.stream import Streamed

Value = TypeVar("Value")


def config_names(source: Streamed, values: Mapping[str, Value]) -> dict[str, Value]:
    """`values` by the model's names of layers, by those of the checkpoint; the experts of a layer that have one value
    are one pattern: a model has tens of thousands."""
    found = dict(values)
    for layer, module in source.model.named_modules():
        if not isinstance(module, Experts):
            continue
        members = [f"{layer}.{i}.{name}" for i in range(module.num_experts) for name in module.matrices]
        if len({values.get(name) for name in members}) == 1 and members[0] in values:
            stored = source.names.layer(members[0]).removesuffix(members[0].removeprefix(layer))
            pattern = f"{PREFIX}{re.escape(stored)}[.]"
            found = {name: value for name, value in found.items() if not name.startswith(f"{layer}.")}
            found[pattern] = values[members[0]]
    return {name if name.startswith(PREFIX) else source.names.layer(name): value for name, value in found.items()}
