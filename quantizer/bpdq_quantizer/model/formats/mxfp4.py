"""4-bit floats of which 32 share an exponent, as gpt-oss stores its experts (`mxfp4`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bpdq_kernels.folder import Entry
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.formats.layout import ORIGINAL, Format, Layout, Part, Read, Shape

GROUP = 32


def reader(quantization: Mapping[str, Any]) -> Read:
    return layout


def layout(name: str, shape: Shape, found: Mapping[str, Entry]) -> Layout:
    """Of experts [E, K, N], which are stored with the K inputs last."""
    if len(shape) != 3 or shape[1] % GROUP:
        raise InputError(f"{name} {shape} is stored as MXFP4, which transformers reads of experts only: {ORIGINAL}")
    experts, inputs, outputs = shape
    groups = (experts, outputs, inputs // GROUP)
    parts = {"_blocks": Part(("U8",), ((*groups, GROUP // 2),)), "_scales": Part(("U8",), (groups,))}
    return Layout(shape, parts, dict.fromkeys(parts, 1), decode)


def decode(stored: Mapping[str, Tensor]) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(stored["_blocks"], stored["_scales"])


FORMAT = Format(("_blocks", "_scales"), "_blocks", reader)
