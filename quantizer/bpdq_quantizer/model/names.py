"""What a checkpoint calls tensors, where that is not what transformers' model calls them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from transformers import PreTrainedModel

from bpdq_kernels.conversions import renaming
from bpdq_kernels.experts import Experts
from bpdq_kernels.folder import Headers
from bpdq_kernels.layout import Stored


class StoredNames(NamedTuple):
    """stored: names in the checkpoint, by the model's; original: the other way round; both lack those that are equal,
    and know a layer as its weight."""

    stored: Mapping[str, str] = MappingProxyType({})
    original: Mapping[str, str] = MappingProxyType({})

    def layer(self, name: str) -> str:
        """In the checkpoint."""
        return self.stored.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")

    def tensor(self, name: str) -> str:
        """In the checkpoint; of a layer in bit-planes, too."""
        return _renamed(name, self.stored)

    def in_model(self, name: str) -> str:
        """The inverse of `tensor`."""
        return _renamed(name, self.original)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    layer, _, kind = name.rpartition(".")
    if kind in Stored._fields:
        weight = f"{layer}.weight"
        return f"{names.get(weight, weight).removesuffix('.weight')}.{kind}"
    return names.get(name, name)


def stored_names(skeleton: PreTrainedModel, stored: Headers) -> StoredNames:
    """The names of a model's files, for one with experts: by these vLLM's models know them. The files of others call
    few tensors otherwise, and vLLM takes either name. What transformers makes of several has the model's name."""
    if not any(isinstance(module, Experts) for module in skeleton.modules()):
        return StoredNames()
    model_name, known = renaming(skeleton), skeleton.state_dict()
    found = [(name, *model_name(name)) for name in stored]
    names = {new: name for name, new, pattern in found if new != name and new in known and pattern is None}
    return StoredNames(names, {name: new for new, name in names.items()})
