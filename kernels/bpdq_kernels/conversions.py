"""What transformers makes of a checkpoint's tensors as it loads a model: it renames them, and makes some out of several
(experts of a layer, OLMo hybrid's convolutions) or turned ones (Qwen3-VL's experts)."""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bpdq_kernels.errors import InputError
from bpdq_kernels.experts import fused_shapes, without_fusing
from bpdq_kernels.folder import REMEDY, Headers, check_plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming

logger = logging.getLogger(__name__)


def _transforms(model: "PreTrainedModel") -> tuple[list["WeightRenaming"], list["WeightConverter"]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    transforms = get_model_conversion_mapping(model)
    if fused_shapes(model):
        transforms = without_fusing(transforms)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    return [t for t in transforms if not isinstance(t, WeightConverter)], converters


def renaming(model: "PreTrainedModel") -> Callable[[str], tuple[str, str | None]]:
    """From a tensor's name in files to its name in `model`, or to that of fused experts that are one by one there, and
    the pattern of the names that transformers makes that tensor out of, None if it only renames it."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _transforms(model)
    wanted = {**model.state_dict(), **fused_shapes(model)}

    def renamed(name: str) -> tuple[str, str | None]:
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        return (name, None) if new not in wanted and (name in wanted or pattern) else (new, pattern)

    return renamed


def check_made(stored: Headers, made: Mapping[str, Iterable[str]], model: "PreTrainedModel") -> None:
    """Raise InputError unless all that transformers makes tensors of the skeleton `model` out of is in `stored`, once,
    in the right shape and a dtype for it. made: by the names of those tensors, what of the files they are made of."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = _transforms(model)
    plain, prefix = model.state_dict(), f"{model.base_model_prefix}."
    for target, names in made.items():
        parts = _parts(target, plain[target], converters, model)
        if parts is None:
            logger.warning("whether all that %s is made of is in the checkpoint can't be checked", target)
            continue
        found: dict[str, str] = {}
        for name in names:
            renamed, _ = rename_source_key(name, renamings, [])
            options = (renamed, f"{prefix}{renamed}", renamed.removeprefix(prefix))
            part = next((option for option in options if option in parts), None)
            if part is None:
                raise InputError(
                    f"{stored[name].file}: {name} has no place in {target} {tuple(plain[target].shape)} of the model "
                    f"of config.json: {REMEDY}"
                )
            if part in found:
                raise twice(name, found[part], stored)
            found[part] = name
            check_plain(name, stored[name], *parts[part])
        for part in sorted(parts.keys() - found.keys()):
            raise InputError(f"{part} is not in the checkpoint: {REMEDY}")


def twice(name: str, other: str, stored: Headers) -> InputError:
    """Of two tensors of `stored` for one of the model: transformers would take either."""
    return InputError(
        f"{stored[name].file}: {name} and {other} are the same tensor of the model: remove what does not belong to the "
        "checkpoint"
    )


def _parts(
    target: str, tensor: Tensor, converters: Iterable["WeightConverter"], model: "PreTrainedModel"
) -> dict[str, list[tuple[int, ...]]] | None:
    """What transformers makes a tensor of a skeleton out of, by name, and the shapes that each may have, as it would
    save it; None where that can't be told from one tensor."""
    for converter in converters:
        back = copy.deepcopy(converter).reverse_transform()
        new, pattern = back.rename_source_key(target)
        if pattern is None:
            continue
        if len(converter.target_patterns) > 1:
            return None
        back.add_tensor(new, target, pattern, tensor)
        saved = back.convert(new, model=model, config=model.config)
        parts = {name: [tuple(part.shape)] for name, part in saved.items()}
        for operation in converter.operations:
            if getattr(operation, "check_dims", False):  # it turns what has the other shape
                for shapes in parts.values():
                    turned = torch.empty(shapes[0], device="meta").transpose(operation.dim0, operation.dim1)
                    shapes.append(tuple(turned.shape))
        return parts
    return None
