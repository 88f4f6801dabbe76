"""Sources that are quantized already: what comes out is, to the bit, what comes out of their weights in 16 bits."""

import json
import shutil
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import bpdq_quantizer
from architectures import EXPERTS, model_folder
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.plan import plan
from bpdq_quantizer.model import stored_weights
from bpdq_quantizer.model.formats import layout
from bpdq_quantizer.model.stream import load_block, open_model
from bpdq_quantizer.run import steps
from mtp_models import with_head
from quantized_sources import (
    FORMATS,
    compressed,
    fp8_blocks,
    fp8_rows,
    fp8_whole,
    mxfp8,
    quantized_pair,
    rewrite,
)
from tiny import LINEARS, load_tensors, tiny_model

FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WHOLE = FP8_CONFIG | {"weight_block_size": None}
FP8_SOURCES = {
    "blocks": (FP8_CONFIG, fp8_blocks),
    "blocks, fp32 scales": (FP8_CONFIG, partial(fp8_blocks, dtype=torch.float32)),
    "blocks of 64 x 32": (FP8_CONFIG | {"weight_block_size": [64, 32]}, partial(fp8_blocks, block=(64, 32))),
    "whole": (WHOLE, fp8_whole),
    "whole, AutoFP8": ({"quant_method": "fp8", "activation_scheme": "static"}, partial(fp8_whole, suffix="_scale")),
    "whole, one element": (WHOLE, partial(fp8_whole, shape=(1,))),
    "rows": (WHOLE, fp8_rows),
    "exponents": ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, mxfp8),
}
SOURCES = FP8_SOURCES | {name: compressed(name) for name in FORMATS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A llama with sizes that 128 does not divide."""
    sizes = {"hidden": 192, "ffn": 352, "heads": 6, "kv_heads": 3, "dtype": torch.bfloat16}
    return tiny_model(tmp_path_factory.mktemp("quantized-sources") / "model", **sizes)


def quantize(source, out, text, **options):
    quick = {"bits": 2, "group_size": 64, "samples": 2, "seq_len": 32, "iterations": 1, "solver": "paper"}
    return bpdq_quantizer.quantize(str(source), out, calibration=text, ignore=["re:.*o_proj"], **quick, **options)


def tensors(source):
    """All tensors of an opened model, block by block."""
    source = open_model(str(source))
    found = {name: t for name, t in source.model.state_dict().items() if not t.is_meta}
    for index in range(len(source.blocks)):
        block = load_block(source, index, torch.device("cpu"))
        found |= {f"{source.prefix}.{index}.{name}": tensor for name, tensor in block.state_dict().items()}
    return found


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("NVFP4", "MXFP4") else ()) for n in SOURCES]
)
def test_weights_are_read_as_their_16_bits(model, tmp_path, name, monkeypatch):
    monkeypatch.setattr(layout, "ELEMENTS", 150 * 192)  # not in one piece
    quantization, store = SOURCES[name]
    quantized, plain = quantized_pair(model, tmp_path / "source", quantization, store)
    found, expected = tensors(quantized), load_tensors(plain)
    assert same(found, expected)
    assert not same(expected, load_tensors(model))


@pytest.fixture(scope="module")
def pairs(model, tmp_path_factory):
    """By format: a folder, and one of the same weights in 16 bits; of two also embedding and LM head."""
    folder = tmp_path_factory.mktemp("pairs")
    everywhere = (*LINEARS, "embed_tokens", "lm_head")
    return {
        "blocks": quantized_pair(
            model, folder / "blocks", *SOURCES["blocks"], ends=everywhere, ignore=("model.layers.0.mlp.up_proj",)
        ),
        "packed": quantized_pair(model, folder / "packed", *SOURCES["W4A16"], ends=everywhere),
        "W4A16": quantized_pair(model, folder / "W4A16", *SOURCES["W4A16"]),
        "FP8": quantized_pair(model, folder / "FP8", *SOURCES["FP8"]),
    }


@pytest.mark.parametrize("name", ["blocks", "FP8"])
def test_what_is_written_is_what_is_written_from_16_bits(pairs, tmp_path, text, name):
    quantized, plain = pairs[name]
    reports = [quantize(quantized, tmp_path / "out", text), quantize(plain, tmp_path / "expected", text)]
    assert same(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "expected"))
    files = [sorted(path.name for path in (tmp_path / out).iterdir()) for out in ("out", "expected")]
    configs = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("out", "expected")]
    assert files[0] == files[1]
    assert configs[0] == configs[1]
    assert configs[0]["dtype"] == "bfloat16"
    stored = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert [report["source_quantization"] for report in reports] == [stored, None]


def test_a_stopped_run_goes_on_to_the_same_tensors(pairs, tmp_path, text, monkeypatch):
    source, plain = pairs["W4A16"]

    def stop(*args):
        save(*args)
        raise KeyboardInterrupt

    save = steps.save_progress
    monkeypatch.setattr(steps, "save_progress", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", text)
    monkeypatch.undo()
    quantize(source, tmp_path / "out", text, resume=True)
    quantize(plain, tmp_path / "expected", text)
    assert same(load_tensors(tmp_path / "out"), load_tensors(tmp_path / "expected"))


def test_embedding_and_head_are_dequantized_too(pairs):
    for quantized, plain in (pairs["blocks"], pairs["packed"]):
        assert same(tensors(quantized), load_tensors(plain))


def test_a_tied_embedding_stays_tied(tmp_path):
    model = tiny_model(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    quantized, plain = quantized_pair(model, tmp_path / "source", *SOURCES["W4A16"], ends=(*LINEARS, "embed_tokens"))
    lm = open_model(str(quantized)).model
    assert torch.equal(lm.get_input_embeddings().weight, load_tensors(plain)["model.embed_tokens.weight"])
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def test_nothing_is_dequantized_before_its_turn(pairs, monkeypatch):
    """Neither in memory nor in files."""
    decoded = []

    def tensors(self):
        decoded.append(self.name)
        return read(self)

    read = stored_weights.StoredWeight.tensors
    monkeypatch.setattr(stored_weights.StoredWeight, "tensors", tensors)
    source = open_model(str(pairs["blocks"][0]))
    assert sorted(decoded) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert all(parameter.is_meta for parameter in source.blocks.parameters())
    load_block(source, 1, torch.device("cpu"))
    assert {name.split(".")[2] for name in decoded if "layers" in name} == {"1"}
    assert not any(Path(source.weights.converted.name).iterdir())


def test_groups_of_layers_have_formats_of_their_own(model, tmp_path):
    groups = {}
    for name, target in (("FP8", "re:.*self_attn.*"), ("W4A16", "Linear")):
        (group,) = FORMATS[name]["config_groups"].values()
        groups[name] = group | {"format": FORMATS[name]["format"], "targets": [target]}
    config = FORMATS["FP8"] | {"format": "mixed-precision", "config_groups": groups}
    attention = tuple(f"self_attn.{name}_proj" for name in "qkvo")
    half = quantized_pair(model, tmp_path / "half", {}, compressed("FP8")[1], ends=attention)
    rest = quantized_pair(half[1], tmp_path / "rest", config, compressed("W4A16")[1], ends=LINEARS[4:])
    stored = {n: t for n, t in load_file(rest[0] / "model.safetensors").items() if ".self_attn." not in n}
    stored |= {n: t for n, t in load_file(half[0] / "model.safetensors").items() if ".self_attn." in n}
    rewrite(rest[0], stored, config)
    assert same(tensors(rest[0]), load_tensors(rest[1]))


@pytest.mark.parametrize("name", ["blocks", "W4A16"])
def test_names_that_transformers_changes(tmp_path, name):
    """A wrapper's language model, and what sees images; stored in fp32, its weights come in 16 bits."""
    model = model_folder(tmp_path / "model", "llava")
    ends = (*LINEARS, "fc1", "linear_1")
    quantized, plain = quantized_pair(model, tmp_path / "source", *SOURCES[name], ends=ends)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in load_tensors(plain)
    expected = {n: t.bfloat16() if t.is_floating_point() else t for n, t in tensors(plain).items()}
    assert same(tensors(quantized), expected)


def cached(folder, cache, monkeypatch):
    """The hub id someone/model, whose files are those of `folder`."""
    place = cache / "models--someone--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return shutil.copytree(folder, place / "snapshots" / ("a" * 40))


def test_a_hub_id(pairs, tmp_path, monkeypatch):
    quantized, plain = pairs["W4A16"]
    cached(quantized, tmp_path, monkeypatch)
    assert same(tensors("someone/model"), load_tensors(plain))


def test_a_hub_id_in_16_bits_is_looked_at_like_a_folder(pairs, tmp_path, monkeypatch):
    """Whatever its files are called."""
    plain = pairs["W4A16"][1]
    folder = cached(plain, tmp_path, monkeypatch)
    stored = load_tensors(plain)
    for extra in ({}, {"lm_head.bias": torch.ones(384)}):
        (folder / "model.safetensors").unlink(missing_ok=True)
        save_file(stored | extra, folder / "part.safetensors", metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(stored | extra, "part.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if extra:
            with pytest.raises(
                InputError, match=r"part\.safetensors: lm_head\.bias has no place in the model of config"
            ):
                open_model("someone/model")
        else:
            assert same(tensors("someone/model"), stored)


def test_eval_is_of_the_16_bit_weights(pairs, text, capsys):
    found = []
    for source in pairs["blocks"]:
        argv = ["eval", str(source), "--text", text, "--seq-len", "32", "--windows", "2", "--json"]
        assert main(argv) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"])
    assert found[0] == found[1]
    assert load_model(str(pairs["blocks"][0])).dtype == torch.bfloat16


def test_plan_counts_what_is_written(pairs, tmp_path):
    quantized, plain = pairs["blocks"]
    expected = plan(str(plain))
    for dtype in ("bfloat16", "float32", None):
        config = json.loads((quantized / "config.json").read_text()) | {"dtype": dtype}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = plan(str(tmp_path))
        assert {key: value for key, value in found.items() if "bytes" in key} == {
            key: value for key, value in expected.items() if "bytes" in key
        }


def test_experts_in_mxfp4(tmp_path):
    """As gpt-oss stores them, all of a layer's together, gate and up in turn."""
    folder = tmp_path / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 384, "num_local_experts": 2}
    config = AutoConfig.for_model("gpt_oss", **sizes, layer_types=["full_attention"], dtype="bfloat16")
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    fused = [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]
    expected = {name: tensor for name, tensor in stored.items() if name not in fused}
    for name in fused:
        experts, inputs, outputs = stored.pop(name).shape
        codes = torch.randint(16, (experts, outputs, inputs))
        exponents = torch.randint(120, 130, (experts, outputs, inputs // 32))
        stored[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).byte().view(*exponents.shape, 16)
        stored[f"{name}_scales"] = exponents.byte()
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes % 8] * (1 - 2 * (codes // 8))
        weight = values * (exponents - 127.0).exp2().repeat_interleave(32, -1)
        layer = name.rpartition(".")[0]
        for i, matrix in enumerate(weight.bfloat16()):
            parts = {"down_proj": matrix} if "down" in name else {"gate_proj": matrix[::2], "up_proj": matrix[1::2]}
            expected |= {f"{layer}.{i}.{key}.weight": part for key, part in parts.items()}
    for name in [name for name in expected if name.endswith("_bias")]:
        layer, bias = name.rpartition(".")[0], expected.pop(name)
        for i, vector in enumerate(bias):
            parts = {"down_proj": vector} if "down" in name else {"gate_proj": vector[::2], "up_proj": vector[1::2]}
            expected |= {f"{layer}.{i}.{key}.bias": part for key, part in parts.items()}
    name = next(name.removesuffix("_scales") for name in stored if name.endswith("_scales"))
    rewrite(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert same(tensors(folder), expected)
    rewrite(folder, stored | {f"{name}_scales": torch.full_like(stored[f"{name}_scales"], 255)}, None)
    with pytest.raises(InputError, match=f"{name}_scales holds NaN or infinity"):
        open_model(str(folder))


@pytest.mark.parametrize("name", ["blocks", "W4A16"])
def test_experts_that_are_quantized_one_by_one(tmp_path, name):
    model = model_folder(tmp_path / "model", f"mixtral{EXPERTS}")
    stored = {name: tensor.bfloat16() for name, tensor in load_tensors(model).items()}
    rewrite(model, stored, None, dtype="bfloat16")
    quantized, plain = quantized_pair(model, tmp_path / "source", *SOURCES[name], ends=("w1", "w2", "w3"))
    assert same(tensors(quantized), tensors(plain))


@pytest.mark.parametrize("name", ["blocks", "W4A16"])
def test_heads_for_multi_token_prediction_come_in_16_bits(tmp_path, text, name, capfd):
    """Their scales, and those of activations, are left behind."""
    model = with_head(tmp_path / "model", "qwen3_5")
    config = model / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    quantized, plain = quantized_pair(model, tmp_path / "source", *SOURCES[name])
    scale = {"mtp.layers.0.mlp.up_proj.input_scale": torch.ones(1)}
    rewrite(quantized, load_tensors(quantized) | scale, None)
    for source in (quantized, plain):
        quantize(source, source.with_name(f"{source.name}-out"), text)
    found, expected = (load_tensors(folder.with_name(f"{folder.name}-out")) for folder in (quantized, plain))
    assert any(name.startswith("mtp.layers.0.mlp") for name in expected)
    assert same(found, expected)
    assert "whole layers for multi-token prediction" not in capfd.readouterr().out
