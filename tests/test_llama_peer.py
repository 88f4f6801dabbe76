"""The files that llama.cpp gets hold the model, and what it can't be given is named."""

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks import cpu_bench, llama_peer
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


def test_a_tensor_that_no_llama_has_is_named(tmp_path):
    model = tiny_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    save_file({"strange.weight": tensors.popitem()[1], **tensors}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match=r"strange\.weight has no place in a llama"):
        llama_peer.write_gguf(model, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.fixture
def bindings(monkeypatch):
    """In place of llama-cpp-python's, which tests don't need: of its types one."""
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(LLAMA_FTYPE_MOSTLY_Q2_K=10))


@pytest.mark.parametrize(
    ("arch", "kind", "error"),
    [("mistral", "Q2_K", "is a mistral: give one of llama, qwen2"), ("llama", "Q9_Z", "has no type Q9_Z")],
)
def test_other_families_and_types_are_named_before_any_work(arch, kind, error, tmp_path, bindings):
    model = tiny_model(tmp_path / "model", arch)
    with pytest.raises(SystemExit, match=error):
        llama_peer.main([str(model), "--types", "Q2_K", kind, "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=error):
        cpu_bench.main(["--models", str(model), "--llama", kind, "--output", str(tmp_path / "bench")])
    assert not (tmp_path / "out").exists()


def test_missing_bindings_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(SystemExit, match="llama_cpp is not installed: pip install llama-cpp-python"):
        llama_peer.main([str(tiny_model(tmp_path / "model", "llama")), "--output", str(tmp_path)])
