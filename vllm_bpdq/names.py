"""Names of a checkpoint's layers as vLLM's models have them, and back.

A model's WeightsMapper is for names of tensors: its prefixes may end in a dot, so a layer is mapped as its weight is.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

TENSOR = ".weight"


def renamed(name: str, mapper: "WeightsMapper") -> str:
    """What `mapper` makes of layer `name`."""
    return (mapper.map_name(name + TENSOR) or name + TENSOR).removesuffix(TENSOR)


def origins(name: str, mapper: "WeightsMapper") -> list[str]:
    """The names that `mapper` turns into `name` by a prefix, a substring or both, or by nothing.

    There may be several, as checkpoints of different ages call a layer differently. None is found of those that a
    regular expression or transformers' renamings turn into `name`.
    """
    prefixes = [(old, new) for old, new in mapper.orig_to_new_prefix.items() if new is not None]
    parts = [(old, new) for old, new in mapper.orig_to_new_substr.items() if new]
    found = [name + TENSOR]
    found += [old + found[0].removeprefix(new) for old, new in prefixes if found[0].startswith(new)]
    found += [tensor.replace(new, old, 1) for tensor in found for old, new in parts if new in tensor]
    layers = dict.fromkeys(tensor.removesuffix(TENSOR) for tensor in found)
    return [layer for layer in layers if renamed(layer, mapper) == name]
