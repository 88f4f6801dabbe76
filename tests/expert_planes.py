"""Checkpoints whose experts are bit-planes, made of a tiny 16-bit model's files, and the same weights in 16 bits."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from bpdq_kernels import dequantize
from tiny import load_tensors, narrowed, round_to_planes

NUMBERED = re.compile(r"(.*\.experts\.\d+\.\w+)\.weight")
FUSED = re.compile(r"(.*?)(?:\.experts)?\.(gate_up_proj|down_proj|input_linear\.weight|output_linear\.weight)(_bias)?")
DOWN = ("down_proj", "output_linear.weight")
ALL_BUT_EXPERTS = r"re:(?!.*[.]experts[.]\d)"


class Checkpoint(NamedTuple):
    """Folders of one model."""

    planes: Path
    plain: Path


def expert_matrices(name: str, tensor: torch.Tensor, arch: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A file's tensor as the matrices [N, K] of experts, or their biases, by the names that vLLM takes: views of it.
    Nothing of a tensor that is not experts'."""
    if match := NUMBERED.fullmatch(name):
        yield match[1], tensor
        return
    match = FUSED.fullmatch(name)
    if match is None or tensor.ndim != (2 if match[3] else 3):
        return
    base, kind, is_bias = match.groups()
    for i, fused in enumerate(tensor):
        outputs_first = fused if is_bias or arch not in ("gpt_oss", "llama4_text") else fused.T
        one = f"{base}.experts.{i}"
        if kind in DOWN:
            yield f"{one}.down_proj", outputs_first
            continue
        half = len(outputs_first) // 2
        gate, up = (slice(0, None, 2), slice(1, None, 2)) if arch == "gpt_oss" else (slice(half), slice(half, None))
        yield f"{one}.gate_proj", outputs_first[gate]
        yield f"{one}.up_proj", outputs_first[up]


def expert_checkpoint(model: Path, out: Path, arch: str, group_size: int = 32, width: int = 8) -> Checkpoint:
    """Write `out`, where the experts of the 16-bit folder `model` are rounded to 2 planes, and `out`-plain."""
    plain = out.with_name(out.name + "-plain")
    for folder in out, plain:
        shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    source, stored = load_tensors(model), {}
    for name, tensor in source.items():
        found = [*expert_matrices(name, tensor, arch)]
        if not found:
            stored[name] = tensor
        for layer, W in found:
            if name.endswith("_bias"):
                stored[f"{layer}.bias"] = W.clone()
                continue
            stored[f"{layer}.B"], c = round_to_planes(W, 2, group_size, torch.bfloat16)
            stored[f"{layer}.c"], s = narrowed(c) if width == 8 else (c, None)
            if s is not None:
                stored[f"{layer}.s"] = s
            W.copy_(dequantize(stored[f"{layer}.B"], stored[f"{layer}.c"], group_size, W.shape[1], s))
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    save_file(source, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bpdq",
        "checkpoint_format": "bpdq",
        "format_version": 2,
        "bits": 2,
    }
    config["quantization_config"] |= {"group_size": group_size, "coefficient_bits": width, "ignore": [ALL_BUT_EXPERTS]}
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return Checkpoint(out, plain)
