"""Architectures that do things of their own: each is quantized and read back, or refused by name before any work."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import bpdq_quantizer
from architectures import SIZES, TEXT, TOKENS, model_folder
from bpdq_kernels.format import Scheme
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.stream import open_model, solved
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.passes import sensitivity
from bpdq_quantizer.run import prepare
from tiny import tiny_tokenizer

QUICK = {"bits": 4, "group_size": 32, "samples": 3, "seq_len": 32, "iterations": 1, "solver": "paper"}
IDS = torch.arange(30)[None] * 7 % 380
REFUSED = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma3n_text": SIZES
    | {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0, "sliding_window": 16}
    | {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 384, "laurel_rank": 32}
    | {"activation_sparsity_pattern": [0.0] * 2, "intermediate_size": [192] * 2},
    "zamba": {name: SIZES[name] for name in SIZES if name != "head_dim"}
    | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4}
    | {"n_mamba_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
}


def model(folder, arch):
    """Write a folder of a random model."""
    if arch in TEXT:
        return str(model_folder(folder, arch))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **TOKENS | REFUSED[arch])).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def logits(folder):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


def assert_close(out, folder):
    found, expected = logits(out), logits(folder)
    assert (found - expected).std() < 0.3 * expected.std()


@pytest.mark.parametrize("arch", ["opt", "minicpm3", "gptj", "falcon"])
def test_so_it_is_with_tuning_and_tables(tmp_path, text, arch):
    folder = model(tmp_path / "model", arch)
    bpdq_quantizer.quantize(
        folder, tmp_path / "out", calibration=text, head_bits=4, tune="model", tune_steps=2, **QUICK
    )
    assert_close(tmp_path / "out", folder)


@pytest.mark.parametrize("arch", ["opt", "minicpm3", "gptj"])
def test_its_sensitivities_are_measured(tmp_path, arch, monkeypatch):
    monkeypatch.setattr(sensitivity, "GROUP_SIZES", (32,))
    monkeypatch.setattr(sensitivity, "MAX_PLANES", 1)
    source = open_model(model(tmp_path / "model", arch))
    windows = text_windows(torch.arange(64).view(2, 32) * 5)
    solver = {"schemes": sensitivity.choices(16), "alpha": 1e-4, "damping": 0.05}
    stages = sensitivity.sensitivities(source, windows, torch.device("cpu"), **solver)
    assert sorted(name for stage in stages for name in stage.names) == sorted(solved(source))
    assert all(stage.costs[Scheme(1, 32)] > 0 for stage in stages)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("gemma3n_text", r"Gemma3nForCausalLM: its blocks read hidden states of shape \(4, 1, 2, 128\)"),
        ("zamba", r"ZambaForCausalLM: model\.layers\.3\.shared_transf\..* is another block's too"),
        ("gpt2", "GPT2LMHeadModel: no list of 2 decoder blocks with Linear layers"),
    ],
)
def test_it_is_refused_by_name_before_any_work(tmp_path, text, arch, message, monkeypatch):
    monkeypatch.setattr(prepare, "begin", None)
    with pytest.raises(InputError, match=message):
        bpdq_quantizer.quantize(model(tmp_path / "model", arch), tmp_path / "out", calibration=text, **QUICK)


def test_a_window_that_it_cannot_take_is_named_before_any_work(tmp_path, text, monkeypatch):
    monkeypatch.setattr(prepare, "begin", None)
    with pytest.raises(InputError, match="--seq-len 257: CTRLLMHeadModel can't take it"):
        bpdq_quantizer.quantize(
            model(tmp_path / "model", "ctrl"), tmp_path / "out", calibration=text, **QUICK | {"seq_len": 257}
        )
