"""Checkpoints of trellis-coded planes, from the quantizer to transformers."""

import json
import shutil
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM

import bpdq_quantizer
from bpdq_kernels import dequantize, trellis
from bpdq_kernels.format import PLAIN, TRELLIS, parse
from bpdq_kernels.layout import has_trellis, unpack
from bpdq_quantizer.checkpoint.inspection import inspect
from bpdq_quantizer.model.modules import BPDQEmbedding, BPDQLinear, held
from tiny import load_tensors, tiny_model

DOWN = "model.layers.0.mlp.down_proj"


def quantize(model, out, text, **options):
    small = {"calibration": text, "samples": 6, "seq_len": 32, "iterations": 2, "group_size": 64, "code": "trellis"}
    return bpdq_quantizer.quantize(str(model), out, **small | options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model", dtype=torch.bfloat16, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def checkpoint(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("trellis") / "out"
    return out, quantize(model, out, text, embed_bits=3)


def test_planes_that_are_multiplied_are_derived_from_those_stored(checkpoint):
    out, report = checkpoint
    assert json.loads((out / "config.json").read_text())["quantization_config"]["format_version"] == 3
    assert {layer["code"] for layer in report["layers"]} == {TRELLIS}
    tensors = load_tensors(out)
    B, c, s = (tensors[f"{DOWN}.{kind}"] for kind in "Bcs")
    assert (B.shape[1], c.shape[1], s.shape[0]) == (2, 4, 4)
    module = AutoModelForCausalLM.from_pretrained(out).get_submodule(DOWN)
    assert isinstance(module, BPDQLinear)
    assert "bits=2, trellis" in repr(module)
    planes = unpack(trellis.multiplied(B), 352).float()
    coefficients = (c.float() * s.float()).repeat_interleave(64, 0)[:352]  # [K, planes and c0, N]
    W = coefficients[:, 3].T + sum(plane * coefficients[:, p].T for p, plane in enumerate(planes))
    torch.testing.assert_close(module.weight, W)


def test_a_table_s_rows_are_those_of_its_matrix(checkpoint):
    table = AutoModelForCausalLM.from_pretrained(checkpoint[0]).model.embed_tokens
    assert isinstance(table, BPDQEmbedding)
    assert has_trellis(*held(table)[:2])
    ids = torch.tensor([[3, 7], [300, 3]])
    B, c, s = held(table)
    W = dequantize(B, c, 64, 128, s).bfloat16()
    assert torch.equal(table(ids), W[ids])


def test_it_loses_less_than_plain_planes(checkpoint, model, text, tmp_path):
    plain = quantize(model, tmp_path / "out", text, embed_bits=3, code="plain")
    layers = zip(checkpoint[1]["layers"], plain["layers"], strict=True)
    assert mean(coded["relative_error"] / other["relative_error"] for coded, other in layers) < 0.93


def test_inspect_says_so_and_counts_the_bytes(checkpoint):
    out, report = checkpoint
    found = inspect(out)
    assert {layer["code"] for layer in found["layers"]} == {TRELLIS}
    assert found["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    assert found["quantized_bytes"] == sum(
        t.nbytes for n, t in load_tensors(out).items() if n[-2:] in (".B", ".c", ".s")
    )


def test_layers_that_no_chain_fits_stay_plain(text, tmp_path):
    model = tiny_model(tmp_path / "model", ffn=340)
    report = quantize(model, tmp_path / "out", text)
    codes = {layer["name"].rpartition(".")[2]: layer["code"] for layer in report["layers"]}
    assert codes.pop("down_proj") == PLAIN
    assert set(codes.values()) == {TRELLIS}
    settings = parse(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    assert not settings.scheme_for(DOWN).trellis
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_targets_choose_among_trellises(model, text, tmp_path):
    report = quantize(model, tmp_path / "out", text, target_bpw=3.0)
    assert {layer["code"] for layer in report["layers"] if layer["bits"] < 4} == {TRELLIS}
    assert 2.8 < report["bits_per_weight"] <= 3.0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_coefficients_are_tuned_and_planes_stay(model, text, tmp_path):
    """Of one stored plane that nothing was corrected for: tuning improves it whatever the last bits are."""
    options = {"bits": 1, "asymmetric": 0.0}
    quantize(model, tmp_path / "untuned", text, **options)
    report = quantize(model, tmp_path / "tuned", text, **options, tune="model", tune_steps=8)
    before, after = load_tensors(tmp_path / "untuned"), load_tensors(tmp_path / "tuned")
    first, *later = report["tuning"]["held_out_kl"]
    assert min(later) < 0.95 * first
    linears = [name for name in before if name.endswith("proj.B")]
    assert linears
    assert all(torch.equal(before[name], after[name]) for name in linears)


def test_two_workers_give_the_tensors_of_one(model, checkpoint, text, tmp_path):
    quantize(model, tmp_path / "out", text, embed_bits=3, devices="cpu,cpu")
    before, after = load_tensors(checkpoint[0]), load_tensors(tmp_path / "out")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_four_planes_have_no_trellis(model, text, tmp_path):
    with pytest.raises(bpdq_quantizer.InputError, match="bits = 4 with a trellis is not supported: use 1 to 3"):
        quantize(model, tmp_path / "out", text, bits=4)


def test_coefficients_of_plain_planes_are_refused(checkpoint, tmp_path):
    """config.json decides what a layer is; shapes must say the same."""
    out = shutil.copytree(checkpoint[0], tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["code"] = "plain"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"proj\.c is .*expected int8 \(2, 3, "):
        AutoModelForCausalLM.from_pretrained(out)
