"""A source's tensors against the model of its config.json, from the headers of its files alone: what transformers would
turn away later, or leave out so that the model is another one."""

import re
from collections.abc import Collection

from transformers import PreTrainedModel

from bpdq_kernels.conversions import renaming
from bpdq_kernels.experts import fused_shapes
from bpdq_kernels.folder import INDEX, Headers, read_headers
from bpdq_kernels.format import KV_SCALES
from bpdq_kernels.mtp import head_pattern
from bpdq_kernels.skeleton import DERIVED
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.opening import misfit, plain_skeleton
from bpdq_quantizer.model.sources import local_folder, weight_files, weight_map

COMPUTED = (*DERIVED, r"\.(inv_freq|cos_cached|sin_cached)$", r"(^|\.)(attn|attention)\.(masked_)?bias$")  # masks
COMPANIONS = ("_scale", "_scale_inv", "_scales", "_zero_point", "_shape", "_g_idx")  # of weights, and of activations


def stored_tensors(model: str) -> Headers:
    """What the files of a folder or hub id hold, by the names there; raises InputError, also for an index that
    says of a tensor that it is in another file, where a block's would be looked for."""
    folder = local_folder(model)
    stored = read_headers(weight_files(folder))
    for name, file in sorted(weight_map(folder).items()):
        if name in stored and stored[name].file.name != file:
            raise InputError(
                f"{folder / INDEX} says that {name} is in {file}, but it is in {stored[name].file.name}: download the "
                "model again"
            )
    return stored


def check_files(model: str) -> None:
    """Raise InputError for the files of a 16-bit folder or hub id that hold other tensors than the model of its
    config.json."""
    skeleton, stored = plain_skeleton(model, apart=False), stored_tensors(model)
    check_tensors(model, skeleton, stored, ())
    check_places(skeleton, stored)


def check_tensors(model: str, skeleton: PreTrainedModel, stored: Headers, quantized: Collection[str]) -> None:
    """Raise InputError for a tensor of a model's files that is not a float, or not of the skeleton's shape; quantized:
    names of those that need not be."""
    wanted, model_name = skeleton.state_dict(), renaming(skeleton)
    for name in stored.keys() - quantized:
        target, _ = model_name(name)
        found = stored[name].meta()
        if name in wanted and found.shape != wanted[name].shape:  # what has another name may be turned, too
            raise InputError(misfit(model, name, tuple(found.shape), tuple(wanted[name].shape)))
        if target in wanted and wanted[target].is_floating_point() and not found.is_floating_point():
            dtype = stored[name].dtype
            what = (
                f"is {dtype}, though its config.json has no quantization_config" if "F" in dtype else "holds integers"
            )
            raise InputError(f"{model}: {name} {what}: start from the 16-bit model")


def check_places(
    skeleton: PreTrainedModel, stored: Headers, parts: Collection[str] = (), is_quantized: bool = False
) -> None:
    """Raise InputError for tensors of files that have no place in the `skeleton`, nor in a head for multi-token
    prediction; parts: names of those that weights are dequantized from.

    Others are no loss: what transformers knows to leave out, what a model computes itself, and scales of activations.
    """
    wanted = {*skeleton.state_dict(), *fused_shapes(skeleton), *(name for name, _ in skeleton.named_buffers())}
    ends = COMPANIONS if is_quantized else tuple(f".{scale}" for scale in KV_SCALES)
    patterns = (*(skeleton._keys_to_ignore_on_load_unexpected or ()), *COMPUTED)
    spare = re.compile("|".join(f"({pattern})" for pattern in patterns)).search
    model_name, lost = renaming(skeleton), []
    for name in sorted(stored.keys() - wanted - {*parts}):
        target, _ = model_name(name)
        is_known = target in wanted or spare(name) or spare(target) or name.endswith(ends)
        if not is_known and not head_pattern(name, skeleton.config):
            lost.append(name)
    if lost:
        others = f", nor have {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(
            f"{stored[lost[0]].file}: {lost[0]} has no place in the model of config.json, a {type(skeleton).__name__}"
            f"{others}, and would be lost: correct config.json where it does not know of a layer or bias, merge an "
            "adapter into the weights, or take out of the files what is not the model's"
        )
