"""Tuning the coefficients: its gradient, its loss, and that a stopped run goes on as if never stopped."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import bpdq_quantizer
from bpdq_kernels import dequantize, layout
from bpdq_quantizer.model.modules import BPDQLinear
from bpdq_quantizer.passes import tune
from bpdq_quantizer.passes.tune import (
    DistillationLoss,
    TunableLinear,
    draw,
    final_states,
    make_packed,
    make_tunable,
    mean_kl,
    tune_model,
)
from bpdq_quantizer.run import block_files
from tiny import TEXT, bpdq_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tune")
    bpdq_checkpoint(tiny_model(root / "model"), root / "checkpoint")
    (root / "text.txt").write_text(TEXT * 4)
    return root


@pytest.fixture(scope="module")
def tokens():
    ids = tiny_tokenizer()(TEXT * 4, add_special_tokens=False)["input_ids"][: 8 * 32]
    return torch.tensor(ids).view(8, 32)


@pytest.fixture(scope="module")
def teacher(folder, tokens):
    return final_states(AutoModelForCausalLM.from_pretrained(folder / "model"), tokens)


def student(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "checkpoint")


@pytest.mark.parametrize(("k", "group_size", "in_features"), [(2, 64, 128), (1, 32, 80), (3, 128, 200)])
def test_gradients_are_those_of_plain_autograd_on_dense_weights(k, group_size, in_features):
    gen = torch.Generator().manual_seed(k)
    codes = torch.randint(0, 2, (k, 24, in_features), generator=gen)
    c = torch.randn(-(-in_features // group_size), k + 1, 24, generator=gen)
    layer = TunableLinear(BPDQLinear(layout.Stored(layout.pack(codes), c), group_size, in_features, None))
    x, x_plain = (torch.randn(2, 7, in_features, generator=gen.manual_seed(1), requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 7, 24, generator=gen)
    y = layer(x)
    (y * weight).sum().backward()

    planes, middle = (p.detach().clone().requires_grad_() for p in (layer.planes, layer.middle))
    bias = middle - planes.sum(1) / 2
    spread = [t.repeat_interleave(group_size, 0)[:in_features] for t in (planes, bias)]
    W = (spread[0] * codes.permute(2, 0, 1)).sum(1) + spread[1]
    (x_plain @ W * weight).sum().backward()
    torch.testing.assert_close(y, x_plain @ W, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.planes.grad, planes.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.middle.grad, middle.grad, rtol=1e-4, atol=1e-3)


def test_a_layer_goes_through_tuning_unchanged_if_nothing_is_tuned():
    codes = torch.randint(0, 2, (2, 8, 64))
    c = torch.randn(1, 3, 8).bfloat16()
    layer = BPDQLinear(layout.Stored(layout.pack(codes), c), 64, 64, None)
    model = torch.nn.Sequential(layer)
    make_packed(model, make_tunable(model))
    again = model[0]
    assert again.c.dtype == torch.bfloat16
    torch.testing.assert_close(dequantize(again.B, again.c, 64, 64), dequantize(layer.B, c, 64, 64), rtol=0, atol=0.02)


def in_8_bits(seed: int = 0) -> BPDQLinear:
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2, (3, 24, 200), generator=gen)
    c = torch.randint(-127, 128, (4, 4, 24), generator=gen).to(torch.int8)
    s = (torch.rand(4, 24, generator=gen) / 50 + 1e-3).bfloat16()
    return BPDQLinear(layout.Stored(layout.pack(codes), c, s), 64, 200, None)


def test_a_layer_in_8_bits_goes_through_tuning_unchanged_if_nothing_is_tuned():
    layer = in_8_bits()
    model = torch.nn.Sequential(layer)
    make_packed(model, make_tunable(model))
    assert all(torch.equal(getattr(model[0], name), getattr(layer, name)) for name in "Bcs")


def test_what_is_tuned_in_8_bits_is_what_will_be_stored():
    """Coefficients move by less than a step and further, and beyond what 8 bits hold; the scales stay."""
    layer, x = in_8_bits(), torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    model = torch.nn.Sequential(layer)
    layers = make_tunable(model)
    with torch.no_grad():
        for parameter in (layers["0"].planes, layers["0"].middle):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) / 20)
    y = model(x)
    y.sum().backward()
    assert layers["0"].planes.grad.abs().min() > 0
    make_packed(model, layers)
    assert model[0].c.dtype == torch.int8
    assert not torch.equal(model[0].c, layer.c)
    assert torch.equal(model[0].s, layer.s)
    torch.testing.assert_close(model(x), y.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reverse", [0.0, 0.3])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_distillation_loss_is_the_kl_of_the_two_models_logits(softcap, reverse, monkeypatch):
    monkeypatch.setattr(tune, "LOSS_ELEMENTS", 3 * 50)  # chunks of three tokens
    head = torch.nn.Linear(16, 50, bias=False)
    teacher = torch.randn(10, 16)
    a, b = (torch.randn(10, 16, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    loss = DistillationLoss.apply(a, teacher, head, softcap, reverse)
    (loss * 2).backward()
    cap = (lambda z: softcap * (z / softcap).tanh()) if softcap else (lambda z: z)
    p, q = cap(head(teacher)).log_softmax(-1), cap(head(b)).log_softmax(-1)
    expected = (1 - reverse) * (p.exp() * (p - q)).sum() + reverse * (q.exp() * (q - p)).sum()
    (expected * 2).backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_final_states_of_the_16_bit_model_give_zero_kl(folder, tokens, teacher):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert mean_kl(model, tokens, teacher) == pytest.approx(0, abs=1e-5)
    assert mean_kl(student(folder), tokens, teacher) > 0.1


def test_tuning_lowers_the_held_out_kl_and_keeps_the_planes(folder, tokens, teacher, tmp_path):
    model, before = student(folder), student(folder)
    report = tune_model(model, tokens, teacher, steps=20, seed=0, state=tmp_path / "state.pt")
    assert min(report["held_out_kl"]) < 0.9 * report["held_out_kl"][0]
    assert mean_kl(model, tokens[-1:], teacher[-1:]) == pytest.approx(min(report["held_out_kl"]), rel=1e-2)
    for name, m in before.named_modules():
        if isinstance(m, BPDQLinear):
            tuned = model.get_submodule(name)
            assert torch.equal(m.B, tuned.B)
            assert m.c.dtype == tuned.c.dtype
            assert not torch.equal(m.c, tuned.c)


def test_the_mixed_loss_weighs_reverse_kl_by_the_16_bit_models_confidence(folder, tokens, teacher, tmp_path):
    original = AutoModelForCausalLM.from_pretrained(folder / "model")
    held_out = min(8, -(-len(tokens) // 16))
    known = tokens[:-held_out]
    with torch.no_grad():
        p = original(known).logits[:, :-1].softmax(-1).gather(2, known[:, 1:, None]).mean().item()
    model = student(folder)
    report = tune_model(model, tokens, teacher, steps=20, seed=0, state=tmp_path / "state.pt", mix=True)
    assert report["reverse_share"] == pytest.approx(p, rel=1e-3)
    assert min(report["held_out_kl"]) < 0.9 * report["held_out_kl"][0]


def test_a_diverging_run_stops_early_and_keeps_the_best_state(folder, tokens, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "LEARNING_RATE", -1.0)  # uphill
    model = student(folder)
    report = tune_model(model, tokens, teacher, steps=30, seed=0, state=tmp_path / "state.pt")
    assert report["steps"] < 30
    assert report["best_evaluation"] == 0
    assert mean_kl(model, tokens[-1:], teacher[-1:]) == pytest.approx(report["held_out_kl"][0], rel=1e-2)


def test_recomputed_activations_change_nothing(folder, tokens, teacher, tmp_path, monkeypatch):
    models = [student(folder), student(folder)]
    kls = []
    for limit, model in zip((1 << 30, 1), models, strict=True):
        monkeypatch.setattr(tune, "ACTIVATION_BYTES", limit)
        report = tune_model(model, tokens, teacher, steps=3, seed=0, state=tmp_path / f"{limit}.pt")
        kls.append(report["held_out_kl"])
    assert kls[0] == pytest.approx(kls[1], rel=1e-4)
    assert not models[1].is_gradient_checkpointing


def test_an_epoch_visits_every_window_once():
    seen = torch.cat([draw(12, 3, step, seed=5) for step in range(4)])
    assert sorted(seen.tolist()) == list(range(12))
    assert not torch.equal(draw(12, 3, 0, seed=5), draw(12, 3, 4, seed=5))


def quick(folder, **options):
    """One plane and no correction for shifted inputs: tuning has much to make good."""
    text = str(folder / "text.txt")
    solving = {"bits": 1, "group_size": 64, "calibration": text, "samples": 6, "seq_len": 32, "iterations": 2}
    return {**solving, "asymmetric": 0, "output_tokens": 0, "tune": "model", "tune_steps": 20, **options}


def stop_after(saves, monkeypatch):
    """Let the next run die as if killed, right after it has written its state `saves` times."""
    original, count = tune.save_state, iter(range(saves))

    def save(*args):
        original(*args)
        if next(count, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(tune, "save_state", save)


def test_a_stopped_run_goes_on_as_if_never_stopped(folder, tmp_path, monkeypatch):
    model = str(folder / "model")
    whole = bpdq_quantizer.quantize(model, tmp_path / "whole", **quick(folder))
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            bpdq_quantizer.quantize(model, tmp_path / "out", **quick(folder))
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "out.partial"}
    resumed = bpdq_quantizer.quantize(model, tmp_path / "out", **quick(folder), resume=True)
    assert resumed["tuning"]["held_out_kl"] == whole["tuning"]["held_out_kl"]
    tensors = [{f.name: f.read_bytes() for f in (tmp_path / name).glob("model*")} for name in ("whole", "out")]
    assert tensors[0] == tensors[1]
    assert not (tmp_path / "out.partial").exists()
    assert json.loads((tmp_path / "out" / "quantization_report.json").read_text())["tuning"] == resumed["tuning"]


def test_tuning_that_diverges_keeps_the_best_before(folder, tmp_path, monkeypatch, capsys):
    found, measure = [], tune.mean_kl

    def diverges(*given):
        found.append(measure(*given) if len(found) < 3 else math.nan)
        return found[-1]

    monkeypatch.setattr(tune, "mean_kl", diverges)
    report = bpdq_quantizer.quantize(str(folder / "model"), tmp_path / "out", **quick(folder))
    assert report["tuning"]["held_out_kl"] == found[:3]
    assert report["tuning"]["best_evaluation"] == found[:3].index(min(found[:3]))
    assert "tuning: the held-out KL is nan after 6 steps: the best before is kept" in capsys.readouterr().out


def test_a_kl_that_is_no_number_is_not_tuned(folder, tokens, teacher, tmp_path):
    given = {"steps": 4, "seed": 0, "state": tmp_path / "state.safetensors"}
    message = "--tune model: the KL to the 16-bit model is nan in torch.float32: check the model"
    with pytest.raises(bpdq_quantizer.InputError, match=message):
        tune_model(student(folder), tokens, teacher * math.nan, **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "add --resume, or remove the folder"),
        ({"resume": True, "tune_steps": 7}, "other options, tune_steps = 20 (now 7)"),
    ],
)
def test_a_stopped_run_is_neither_mixed_up_nor_lost(folder, tmp_path, monkeypatch, change, message):
    with monkeypatch.context() as patch:
        stop_after(0, patch)
        with pytest.raises(KeyboardInterrupt):
            bpdq_quantizer.quantize(str(folder / "model"), tmp_path / "out", **quick(folder))
    with pytest.raises(bpdq_quantizer.InputError) as error:
        bpdq_quantizer.quantize(str(folder / "model"), tmp_path / "out", **quick(folder, **change))
    assert message in str(error.value)
    assert (tmp_path / "out.partial" / "resume" / "tuning.safetensors").is_file()


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """The checkpoint of a whole run, and what one left that stopped when it had rewritten the first tuned block."""
    root, writes = tmp_path_factory.mktemp("tuned"), []
    whole = bpdq_quantizer.quantize(str(folder / "model"), root / "whole", **quick(folder))
    history = whole["tuning"]["held_out_kl"]
    assert min(history) < history[0], "tuned blocks would be those that were there"
    original = block_files.write_tensors

    def write(file, *args):
        writes.append(file.name)
        if writes.count("model-00003-of-00003.safetensors") == 2:
            raise KeyboardInterrupt
        return original(file, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_files, "write_tensors", write)
        with pytest.raises(KeyboardInterrupt):
            bpdq_quantizer.quantize(str(folder / "model"), root / "out", **quick(folder))
    return root


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        (None, None),
        ("resume/tuning.safetensors", "starting again from the first block"),
        ("resume/teacher.safetensors", "running the 16-bit model again"),
        ("resume/tuned.json", "starting again from the first block"),
        ("model-00002-of-00003.safetensors", "starting again from the first block"),
    ],
)
def test_a_run_that_stops_between_tuned_blocks_goes_on_to_the_same_tensors(
    folder, tuned, tmp_path, capsys, damaged, said
):
    left = shutil.copytree(tuned / "out.partial", tmp_path / "out.partial")
    if damaged:
        content = bytearray((left / damaged).read_bytes())
        content[-7] ^= 1
        (left / damaged).write_bytes(content)
    bpdq_quantizer.quantize(str(folder / "model"), tmp_path / "out", **quick(folder), resume=True)
    tensors = [{f.name: f.read_bytes() for f in path.glob("model*")} for path in (tuned / "whole", tmp_path / "out")]
    assert tensors[0] == tensors[1]
    again = [line for line in capsys.readouterr().err.splitlines() if " again" in line]
    assert len(again) == (said is not None)
    assert said is None or (str(left / damaged) in again[0] and again[0].endswith(said))


def test_tuning_starts_again_where_its_state_is_damaged(folder, tuned, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            bpdq_quantizer.quantize(str(folder / "model"), tmp_path / "out", **quick(folder))
    state = tmp_path / "out.partial" / "resume" / "tuning.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    bpdq_quantizer.quantize(str(folder / "model"), tmp_path / "out", **quick(folder), resume=True)
    tensors = [{f.name: f.read_bytes() for f in path.glob("model*")} for path in (tuned / "whole", tmp_path / "out")]
    assert tensors[0] == tensors[1]
    assert "tuning starts again" in capsys.readouterr().err


def test_one_window_is_too_few(folder, tmp_path):
    with pytest.raises(bpdq_quantizer.InputError, match="needs two calibration windows"):
        bpdq_quantizer.quantize(str(folder / "model"), tmp_path / "out", **quick(folder, samples=1))
