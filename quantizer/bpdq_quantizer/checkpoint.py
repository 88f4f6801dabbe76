"""Writing a BPDQ checkpoint folder, and reading what one holds."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bpdq_kernels.folder import Headers, read_headers
from bpdq_kernels.format import FORMAT_VERSION, KV_CACHE_SCHEME, Scheme
from bpdq_kernels.skeleton import quantized_layers, stored_layer
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.loader import open_checkpoint
from bpdq_quantizer.stream import Streamed
from bpdq_quantizer.work import shard, write_tensors


def quantization_config(
    scheme: Scheme,
    iterations: int,
    alpha: float,
    ignore: list[str],
    layers: Mapping[str, Scheme] | None = None,
    kv_cache_scales: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of config.json. `checkpoint_format` and `meta` are what the authors' loader reads.

    layers: schemes of the layers that differ from `scheme`, and of the embedding and LM head, by name; kv_cache_scales:
    whether the checkpoint holds them.
    """
    overrides = {"layers": {name: dataclasses.asdict(s) for name, s in layers.items()}} if layers else {}
    if kv_cache_scales:
        overrides["kv_cache_scheme"] = KV_CACHE_SCHEME
    return {
        "quant_method": "bpdq",
        "checkpoint_format": "bpdq",
        "format_version": FORMAT_VERSION,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "ignore": ignore,
        **overrides,
        "meta": {"bpdq": {"msbits": scheme.bits, "n_iters": iterations, "alpha": alpha}},
    }


def finish(
    folder: Path,
    source: Streamed,
    tokenizer: PreTrainedTokenizerBase,
    config: dict[str, Any],
    report: dict[str, Any],
    scales: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what a folder with the blocks' files lacks; config.json, without which no loader takes it, comes last.

    scales: those of the KV cache, by name.
    """
    model, prefix, blocks, _ = source
    rest = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{prefix}.") and name not in model.all_tied_weights_keys
    }
    write_tensors(shard(folder, 1, len(blocks) + 1), {**rest, **(scales or {})})
    files = sorted(folder.glob("model-*.safetensors"))
    headers = {file.name: read_headers([file]) for file in files}
    index = {
        "metadata": {"total_size": sum(stored_bytes(stored) for stored in headers.values())},
        "weight_map": {name: file for file, stored in headers.items() for name in stored},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    (folder / "quantization_report.json").write_text(json.dumps(report, indent=2) + "\n")
    model.config.quantization_config = config
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)


def stored_bytes(stored: Headers) -> int:
    """Bytes of the tensors that headers describe."""
    return sum(entry.nbytes for entry in stored.values())


def inspect(checkpoint: str | Path) -> dict[str, Any]:
    """Layers, bits per weight and bytes of a checkpoint folder, from config.json and safetensors headers alone."""
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise InputError(f"{checkpoint}: not a checkpoint folder (config.json is missing)")
    _, settings, stored, skeleton = open_checkpoint(folder)
    layers = []
    for name, (module, scheme) in quantized_layers(skeleton, settings).items():
        out_features, in_features = module.weight.shape
        size = sum(t.nbytes for t in stored_layer(name, stored, module, scheme))
        layers.append(
            {
                "name": name,
                "in_features": in_features,
                "out_features": out_features,
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "bytes": size,
                "bits_per_weight": 8 * size / module.weight.numel(),
            }
        )
    weights = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    quantized = sum(layer["bytes"] for layer in layers)
    total = stored_bytes(stored)
    return {
        "checkpoint": str(checkpoint),
        "architecture": type(skeleton).__name__,
        "layers": layers,
        "quantized_weights": weights,
        "bits_per_weight": 8 * quantized / weights if weights else 0.0,
        "quantized_bytes": quantized,
        "other_bytes": total - quantized,
        "kv_cache_scales": settings.kv_cache_scales,
        "file_bytes": sum(file.stat().st_size for file in {entry.file for entry in stored.values()}),
    }
