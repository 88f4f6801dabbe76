"""Model folders with a head for multi-token prediction."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from architectures import model_folder

BLOCK = {"qwen3_5": "model.language_model.layers.1.", "deepseek_v3": "model.layers.1."}
COUNT = {"qwen3_5": "mtp_num_hidden_layers", "deepseek_v3": "num_nextn_predict_layers"}


def with_head(folder: Path, arch: str) -> Path:
    """A model folder with one head, in bf16: a copy of the last block between projections that let through what the
    next token's embedding says, so that its drafts are right where the blocks say little."""
    model_folder(folder, arch)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)[COUNT[arch]] = 1
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
            tensors[name] *= 0.01
    block = {name.removeprefix(BLOCK[arch]): W for name, W in tensors.items() if name.startswith(BLOCK[arch])}
    projection, nothing = torch.eye(128, 256), torch.zeros(128)
    if arch == "qwen3_5":
        tensors |= {f"mtp.layers.0.{name}": W for name, W in block.items()} | {"mtp.fc.weight": projection}
        tensors |= {f"mtp.{norm}.weight": nothing for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")}
    else:
        layer = "model.layers.2."
        tensors |= {f"{layer}{name}": W for name, W in block.items()} | {f"{layer}eh_proj.weight": projection}
        tensors |= {f"{layer}{norm}.weight": nothing + 1 for norm in ("enorm", "hnorm", "shared_head.norm")}
        tensors |= {f"{layer}shared_head.head.weight": tensors["lm_head.weight"]}
    tensors = {name: W.bfloat16().contiguous().clone() for name, W in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
