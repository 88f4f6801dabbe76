"""8-bit floats with a scale for each block, output or weight (`fp8`, `mxfp8`: DeepSeek-V3, Qwen3-FP8)."""

from collections.abc import Mapping
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from bpdq_kernels.folder import Entry
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.formats.layout import ANY_FLOAT, Format, Layout, Part, Read, Shape, matrix

SUFFIXES = ("_scale_inv", "_scale")  # the latter is AutoFP8's name; both are factors of the weight
DEFAULT_BLOCK = (128, 128)


def reader(quantization: Mapping[str, Any]) -> Read:
    block = quantization.get("weight_block_size")
    if block is not None and not (
        isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    ):
        raise InputError(f"quantization_config: weight_block_size = {block!r} must be two positive integers, or null")
    return partial(layout, block=block and tuple(block), is_default="weight_block_size" not in quantization)


def layout(
    name: str, shape: Shape, found: Mapping[str, Entry], *, block: tuple[int, int] | None, is_default: bool
) -> Layout:
    """block: outputs and inputs that share a scale, None for one scale of all, or of each output; is_default: also one
    for each block of 128 x 128, as transformers takes a config that says nothing."""
    rows, _ = matrix(name, shape)
    if block is None:
        shapes = ((), (1,), (1, 1), (rows, 1))
        if is_default:
            shapes += (grid(shape, DEFAULT_BLOCK),)
    else:
        shapes = (grid(shape, block),)
    block = block or DEFAULT_BLOCK
    suffix = next((suffix for suffix in SUFFIXES if suffix in found), SUFFIXES[0])
    scale = found[suffix].shape if suffix in found else ()
    each = {grid(shape, block): block[0], (rows, 1): 1}.get(scale)
    parts = {
        "": Part(("F8_E4M3", "F8_E5M2"), (shape,)),
        suffix: Part((*ANY_FLOAT, "F8_E8M0", "U8"), shapes),
    }
    return Layout(shape, parts, {"": 1} | ({suffix: each} if each else {}), partial(decode, suffix=suffix, block=block))


def grid(shape: Shape, block: tuple[int, int]) -> Shape:
    return tuple(ceil(n / size) for n, size in zip(shape, block, strict=True))


def decode(stored: Mapping[str, Tensor], suffix: str, block: tuple[int, int]) -> Tensor:
    """Transformers takes all blocks of a weight for equally large: to have its last ones so too, zeros are added."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = stored[""], stored[suffix]
    rows, columns = weight.shape
    if tuple(scale.shape) == grid(weight.shape, block):
        padding = (0, -columns % block[1], 0, -rows % block[0])
        weight = torch.nn.functional.pad(weight.float(), padding)
    if scale.dtype != torch.uint8:  # exponents, which transformers knows by their dtype
        scale = scale.float()
    weight = Fp8Dequantize(None).convert({"weight$": weight, "weight_scale_inv": scale})["weight"]
    return weight[:rows, :columns]


FORMAT = Format(SUFFIXES, None, reader)
