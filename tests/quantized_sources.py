"""Model folders whose weights are quantized already, beside folders of the same weights in 16 bits.

The 16-bit weights are computed here from codes and scales, by formulas of their own; the files are written by nobody's
code for fp8 and MXFP4, and by compressed-tensors' compressors for its formats.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiny import LINEARS

Stored = tuple[dict[str, Tensor], Tensor]  # what follows a weight's name -> tensor; the weight in fp32
FP8 = torch.float8_e4m3fn


def rewrite(folder: Path, tensors: dict[str, Tensor], quantization: dict | None, **config: object) -> Path:
    """Give a model's folder other tensors and settings."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    if quantization is not None:
        settings["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def quantized_pair(
    model: Path,
    out: Path,
    quantization: dict,
    store: Callable[[Tensor], Stored],
    ends: tuple[str, ...] = LINEARS,
    ignore: tuple[str, ...] = (),
) -> tuple[Path, Path]:
    """Write `out` and `out`-16, from the 16-bit folder `model`: weights whose layers' names end in `ends`, but for
    those in `ignore`, as `store` stores them."""
    plain = out.with_name(f"{out.name}-16")
    quantized, dequantized = {}, {}
    for name, tensor in load_file(model / "model.safetensors").items():
        quantized[name] = dequantized[name] = tensor
        layer = name.removesuffix(".weight")
        if layer != name and layer.endswith(ends) and layer not in ignore:
            parts, weight = store(tensor.float())
            del quantized[name]
            quantized |= {name + suffix: part for suffix, part in parts.items()}
            dequantized[name] = weight.to(tensor.dtype)
    shutil.copytree(model, out)
    shutil.copytree(model, plain)
    return rewrite(out, quantized, quantization), rewrite(plain, dequantized, None)


def fp8_blocks(weight: Tensor, block: tuple[int, int] = (128, 128), dtype: torch.dtype = torch.bfloat16) -> Stored:
    """A scale for each block; the last ones may be smaller."""
    rows, columns = weight.shape
    row, column = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
    scale = torch.zeros(int(row[-1]) + 1, int(column[-1]) + 1)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            scale[i, j] = weight[row == i][:, column == j].abs().max() / 448
    scale = scale.to(dtype)
    each = scale.float()[row][:, column]
    codes = (weight / each).to(FP8)
    return {"": codes, "_scale_inv": scale}, codes.float() * each


def fp8_rows(weight: Tensor, suffix: str = "_scale") -> Stored:
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(FP8)
    return {"": codes, suffix: scale}, codes.float() * scale


def fp8_whole(weight: Tensor, suffix: str = "_scale_inv", shape: tuple[int, ...] = ()) -> Stored:
    """One scale."""
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(FP8)
    return {"": codes, suffix: scale.reshape(shape)}, codes.float() * scale


def mxfp8(weight: Tensor) -> Stored:
    """32 inputs share an exponent, biased by 127."""
    exponent = (weight.view(weight.shape[0], -1, 32).abs().amax(-1) / 448).log2().ceil()
    each = exponent.exp2().repeat_interleave(32, 1)
    codes = (weight / each).to(FP8)
    return {"": codes, "_scale_inv": (exponent + 127).to(torch.uint8)}, codes.float() * each


def compressed_config(format: str, weights: dict, activations: dict | None = None) -> dict:
    """The `quantization_config` of all Linears but the LM head."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
FORMATS = {
    "W4A16": compressed_config("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}),
    "W4A16 asymmetric": compressed_config(
        "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
    ),
    "W3A16": compressed_config("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "channel"}),
    "W8A16": compressed_config("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}),
    "int8": compressed_config(
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}, DYNAMIC | {"type": "int"}
    ),
    "FP8": compressed_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, DYNAMIC),
    "FP8 whole": compressed_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, DYNAMIC),
    "FP8 blocks": compressed_config(
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        DYNAMIC | {"strategy": "group", "group_size": 128},
    ),
    "naive": compressed_config("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "NVFP4": compressed_config(
        "nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    ),
    "MXFP4": compressed_config(
        "mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    ),
}


def compressed(format: str) -> tuple[dict, Callable[[Tensor], Stored]]:
    """One of FORMATS, and what stores a weight so."""
    quantization = FORMATS[format]
    (scheme,) = QuantizationConfig.model_validate(quantization).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(quantization["format"])

    def store(weight: Tensor) -> Stored:
        parameters = scales(weight, scheme.weights)
        parts = compressor.compress({"weight": weight, **parameters}, scheme)
        stored = {name.removeprefix("weight"): tensor for name, tensor in parts.items()}
        return stored, decoded(stored, parameters, scheme.weights)

    return quantization, store


def scales(weight: Tensor, args) -> dict[str, Tensor]:
    """Those of the largest weights, and of the smallest where zero is no code in the middle."""
    rows, columns = weight.shape
    if args.strategy == "block":
        return {"weight_scale": fp8_blocks(weight)[0]["_scale_inv"]}
    width = {"tensor": columns, "channel": columns}.get(args.strategy, args.group_size)
    groups = weight.view(rows, columns // width, width)
    largest = groups.abs().amax(2)
    if args.strategy == "tensor":
        largest = largest.max()[None]
    top = {("int", 3): 3, ("int", 4): 7, ("int", 8): 127, ("float", 8): 448, ("float", 4): 6}[args.type, args.num_bits]
    if args.group_size == 16:
        total = (6 * 448 / weight.abs().max())[None]
        return {"weight_scale": (largest * total / top).to(FP8).float(), "weight_global_scale": total}
    if args.type == "float" and args.num_bits == 4:
        return {"weight_scale": (largest / top).log2().ceil().exp2()}
    if args.symmetric:
        return {"weight_scale": (largest / top).bfloat16()}
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scale = ((high - low) / 15).bfloat16()
    zero = (-8 - low / scale.float()).round().clamp(-8, 7).to(torch.int8)
    return {"weight_scale": scale, "weight_zero_point": zero}


def decoded(stored: dict[str, Tensor], parameters: dict[str, Tensor], args) -> Tensor:
    """The weight in fp32, from the codes as they are stored and the scales as they were before."""
    scale, zero = parameters["weight_scale"].float(), parameters.get("weight_zero_point", torch.zeros(()))
    if "_shape" in stored:
        bits, columns = args.num_bits, stored["_shape"][1].item()
        words = (stored["_packed"].unsqueeze(2) >> torch.arange(32)) & 1
        if words.shape[1] == -(-columns // (32 // bits)):  # a word has whole codes, until compressed-tensors 0.17
            words = words[:, :, : 32 // bits * bits]
        words = words.flatten(1)[:, : columns * bits].unflatten(1, (columns, bits))
        codes = (words << torch.arange(bits)).sum(2) - 2 ** (bits - 1)
    elif "_packed" in stored:
        table = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
        codes = table[torch.stack([stored["_packed"] & 15, stored["_packed"] >> 4], 2).flatten(1).long()]
        scale = scale / parameters.get("weight_global_scale", torch.ones(1))
    else:
        codes = stored[""]
    codes = codes.float()
    rows, columns = codes.shape
    if args.strategy == "block":
        return codes * scale[torch.arange(rows) // 128][:, torch.arange(columns) // 128]
    if args.strategy == "tensor":
        return codes * scale
    width = columns // scale.shape[1]
    return (codes - zero.repeat_interleave(width, 1) if zero.ndim else codes) * scale.repeat_interleave(width, 1)
