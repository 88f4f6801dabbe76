"""LoRA adapters over bit-planes in vLLM give the tokens of the dequantized weights with the adapters merged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from generate import PROMPTS, transformers_tokens, vllm_tokens
from tiny import LINEARS, bpdq_checkpoint, tiny_model

RANK, SCALE = 8, 2.0
TABLES = {name: {"bits": 4, "group_size": 32} for name in ("model.embed_tokens", "lm_head")}


def write_adapter(folder: Path, model: Path) -> tuple[Path, Path]:
    """An adapter for all Linears of the plain `model`, and that model with it merged."""
    merged = shutil.copytree(model, folder / "merged")
    tensors = load_file(model / "model.safetensors")
    torch.manual_seed(1)
    adapter = {}
    for name, W in tensors.items():
        layer = name.removesuffix(".weight")
        if layer.endswith(LINEARS):
            A, B = 0.1 * torch.randn(RANK, W.shape[1]), 0.1 * torch.randn(W.shape[0], RANK)
            tensors[name] = W + SCALE * B @ A
            adapter |= {f"base_model.model.{layer}.lora_{side}.weight": M for side, M in (("A", A), ("B", B))}
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK * SCALE, "bias": "none"}
    config["target_modules"] = list(LINEARS)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder / "adapter", merged


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_adapter_gives_the_tokens_of_the_merged_weights(tmp_path, ranks):
    """Embedding and LM head are in bit-planes too, which vLLM asks for a device without an adapter for them."""
    model = bpdq_checkpoint(tiny_model(tmp_path / "model", ffn=320), tmp_path / "bpdq", group_size=64, layers=TABLES)
    plain = model.with_name("bpdq-dequantized")
    adapter, merged = write_adapter(tmp_path, plain)
    load = {"model": str(model), "enable_lora": True, "max_lora_rank": RANK, "tensor_parallel_size": ranks}
    (tokens,) = vllm_tokens([{"load": load, "lora": str(adapter)}], multiprocess=ranks > 1)
    assert isinstance(tokens, list), tokens
    before, after = tokens[: len(PROMPTS)], tokens[len(PROMPTS) :]
    assert before == transformers_tokens(plain)
    assert after == transformers_tokens(merged)
    assert before != after
