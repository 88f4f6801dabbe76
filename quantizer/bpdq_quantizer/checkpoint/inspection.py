"""What a checkpoint folder holds."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bpdq_kernels.mtp import head_pattern
from bpdq_kernels.skeleton import arranged, embedding_names, quantized_layers, stored_layer
from bpdq_quantizer.checkpoint.loader import open_checkpoint
from bpdq_quantizer.checkpoint.writer import stored_bytes
from bpdq_quantizer.errors import InputError


def inspect(checkpoint: str | Path) -> dict[str, Any]:
    """Layers, bits per weight and bytes of a checkpoint folder, from config.json and safetensors headers alone; layers
    by the names that transformers' model gives them."""
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise InputError(f"{checkpoint}: not a checkpoint folder (config.json is missing)")
    _, settings, stored, skeleton = open_checkpoint(folder)
    layers, named = [], arranged(stored, skeleton)
    for name, (module, scheme) in quantized_layers(skeleton, settings, named.layers).items():
        out_features, in_features = module.weight.shape
        size = sum(t.nbytes for t in stored_layer(name, named.tensors, module, scheme) if t is not None)
        layers.append(
            {
                "name": name,
                "in_features": in_features,
                "out_features": out_features,
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "coefficient_bits": scheme.coefficient_bits,
                "code": scheme.code,
                "bytes": size,
                "bits_per_weight": 8 * size / module.weight.numel(),
            }
        )
    quantized = {layer["name"] for layer in layers}
    linears = [name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    tables = embedding_names(skeleton)
    linear = [layer for layer in layers if layer["name"] not in tables]
    every, weights = (sum(x["in_features"] * x["out_features"] for x in found) for found in (layers, linear))
    planes = sum(layer["bytes"] for layer in layers)
    total = stored_bytes(stored)
    known = skeleton.state_dict().keys()
    heads = {name: e for name, e in named.tensors.items() if name not in known and head_pattern(name, skeleton.config)}
    return {
        "checkpoint": str(checkpoint),
        "architecture": type(skeleton).__name__,
        "layers": layers,
        "left_in_16_bits": [name for name in linears if name not in quantized],
        "quantized_weights": every,
        "bits_per_weight": 8 * sum(layer["bytes"] for layer in linear) / weights if weights else 0.0,
        "quantized_bytes": planes,
        "other_bytes": total - planes,
        "mtp_bytes": stored_bytes(heads),
        "kv_cache_scales": settings.kv_cache_scales,
        "file_bytes": sum(file.stat().st_size for file in {entry.file for entry in stored.values()}),
    }


def alike(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers of `inspect`, those whose names differ in numbers alone and that have one shape and scheme as one.

    Its `name` has * in the place of numbers; `count`: of layers; `bytes`: of all of them; `blocks`: which first numbers
    their names have ("0-3, 7").
    """
    found = defaultdict(list)
    for layer in layers:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer["name"])
        scheme = tuple(value for key, value in layer.items() if key not in ("name", "bytes"))
        found[name, scheme].append(layer)
    rows = []
    for (name, _), same in found.items():
        numbers = {int(number[1]) for layer in same if (number := re.search(r"\.(\d+)\.", layer["name"]))}
        size = sum(layer["bytes"] for layer in same)
        rows.append(same[0] | {"name": name, "count": len(same), "bytes": size, "blocks": ranges(numbers)})
    return rows


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in order, those that follow each other as one: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
