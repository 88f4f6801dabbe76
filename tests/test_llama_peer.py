"""The files that llama.cpp gets hold the model, and what it can't be given is named."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import llama_peer
from tiny import tiny_model


@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("qwen2", True)])
def test_a_gguf_file_has_the_models_logits(arch, tied, tmp_path):
    model = tiny_model(tmp_path / "model", arch, tie_word_embeddings=tied, dtype=torch.bfloat16)
    llama_peer.write_gguf(model, tmp_path / "model.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.arange(12).view(1, -1)
    expected = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(read(ids).logits, expected)
    assert not list(tmp_path.glob("*.partial"))


def test_other_families_are_named(tmp_path):
    with pytest.raises(SystemExit, match="is a mistral: give one of llama, qwen2"):
        llama_peer.write_gguf(tiny_model(tmp_path / "model", "mistral"), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is not None, reason="llama-cpp-python is installed")
def test_missing_bindings_are_named(tmp_path):
    (tmp_path / "model-BF16.gguf").touch()
    with pytest.raises(SystemExit, match="pip install llama-cpp-python"):
        llama_peer.main([str(tmp_path / "model"), "--types", "Q2_K", "--output", str(tmp_path)])
