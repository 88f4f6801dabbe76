"""What llm-compressor writes (`compressed-tensors`): integers, packed or not, and floats of 8 and 4 bits."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import is_compressed_tensors_available

from bpdq_kernels.folder import Entry
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.formats.layout import ANY_FLOAT, ORIGINAL, Format, Layout, Part, Read, Shape, matrix

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

SUFFIXES = ("_packed", "_scale", "_zero_point", "_shape", "_g_idx", "_global_scale")
DTYPES = {
    torch.int8: ("I8",),
    torch.uint8: ("U8",),
    torch.int32: ("I32",),
    torch.int64: ("I64", "I32"),
    torch.float8_e4m3fn: ("F8_E4M3",),
}


def reader(quantization: Mapping[str, Any]) -> Read:
    if not is_compressed_tensors_available():
        raise InputError("reading its weights needs the compressed-tensors package: pip install compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    for key in ("transform_config", "sparsity_config"):
        found = quantization.get(key) or {}
        if found and found.get("format") != "dense":
            raise InputError(f"quantization_config: {key} is not supported: {ORIGINAL}")
    try:
        config = QuantizationConfig.model_validate(dict(quantization))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as e:
        raise InputError(f"quantization_config: compressed-tensors can't read it ({e}): {ORIGINAL}") from None
    if config.quantization_status != QuantizationStatus.COMPRESSED:
        status = config.quantization_status.value
        raise InputError(f"quantization_config: quantization_status is {status!r}, not 'compressed': {ORIGINAL}")
    schemes = [scheme for scheme in config.config_groups.values() if scheme.weights is not None]
    known = BaseCompressor.registered_names()
    for scheme in schemes:
        scheme.format = scheme.format or (None if config.format == "mixed-precision" else config.format)
        if scheme.format is not None and scheme.format not in known:
            raise InputError(f"quantization_config: format = {scheme.format!r} is not supported: {ORIGINAL}")
    return partial(layout, schemes=schemes)


def layout(name: str, shape: Shape, found: Mapping[str, Entry], *, schemes: list["QuantizationScheme"]) -> Layout:
    """What the library itself would store of a Linear of that shape, by the scheme that is the weight's."""
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization.lifecycle.initialize import initialize_module_for_quantization

    scheme = scheme_of(name.removesuffix(".weight"), schemes)
    outputs, inputs = matrix(name, shape)
    linear = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.bfloat16)
    try:
        initialize_module_for_quantization(linear, scheme, force_zero_point=False)
        compress_module(linear)
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as e:
        raise InputError(f"{name} {shape}: not supported as {scheme.format} ({e}): {ORIGINAL}") from None
    stored = {
        key.removeprefix("weight"): tensor for key, tensor in linear.state_dict().items() if key.startswith("weight")
    }
    if "_packed" in stored and "_zero_point" in stored:
        stored["_zero_point"] = packed_zeros(name, stored, inputs, scheme.weights.num_bits)
    parts = {suffix: part(tensor) for suffix, tensor in stored.items()}
    shared = scheme.weights.block_structure[0] if scheme.weights.block_structure else 32 // scheme.weights.num_bits
    matrices = {suffix: len(tensor) for suffix, tensor in stored.items() if tensor.ndim == 2}
    rows = {suffix: 1 if length == outputs else shared for suffix, length in matrices.items()}
    return Layout(shape, parts, rows, partial(decode, scheme=scheme))


def packed_zeros(name: str, stored: Mapping[str, Tensor], inputs: int, bits: int) -> Tensor:
    """Zero points as they lie in a file, of what the library would store on the meta device, where from 0.18 on it
    leaves them unpacked. From there on codes run over the ends of words, so that some rows can't be read alone where
    `bits` are no divisor of 32: raises InputError."""
    zeros = stored["_zero_point"]
    if zeros.dtype == torch.int8:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        zeros = pack_to_int32(torch.zeros(zeros.shape, dtype=torch.int8), bits, packed_dim=0)
    if stored["_packed"].shape[1] != -(-inputs // (32 // bits)):
        raise InputError(f"{name}: zero points of {bits} bits, packed without gaps, are not supported: {ORIGINAL}")
    return zeros


def scheme_of(layer: str, schemes: list["QuantizationScheme"]) -> "QuantizationScheme":
    """That of the most specific target: a name, a pattern, or a class."""
    from compressed_tensors.utils.match import match_targets

    if len(schemes) == 1:
        return schemes[0]
    by_target = {target: scheme for scheme in schemes for target in scheme.targets}
    targets = match_targets(layer, nn.Linear(1, 1, device="meta"), by_target)
    if not targets:
        raise InputError(f"{layer} is stored quantized, but quantization_config names no group of it: {ORIGINAL}")
    return by_target[targets[0]]


def part(tensor: Tensor) -> Part:
    shape = tuple(tensor.shape)
    return Part(DTYPES.get(tensor.dtype, ANY_FLOAT), ((1,), (), (1, 1)) if shape == (1,) else (shape,))


def decode(stored: Mapping[str, Tensor], scheme: "QuantizationScheme") -> Tensor:
    """In the precision of fp32 where the format's own scale has 16 bits."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    tensors = {f"weight{suffix}": tensor for suffix, tensor in stored.items()}
    if "_shape" in stored:  # of what may be some rows only
        tensors["weight_shape"] = torch.tensor([len(stored["_packed"]), stored["_shape"][1]])
    scale = tensors["weight_scale"]
    if scale.dtype.itemsize > 1:
        tensors["weight_scale"] = scale = scale.float()
    if scheme.weights.strategy == "block":  # the compressor guesses blocks, and wrongly where the last are smaller
        return dequantize(tensors["weight"], scale, tensors.get("weight_zero_point"), scheme.weights)
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, scheme)["weight"]


FORMAT = Format(SUFFIXES, "_packed", reader)
