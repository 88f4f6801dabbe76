"""Calibration on text that a model writes itself: drawn from its distribution, kept for a resumed run, and refused
where the model does not fit."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import bpdq_quantizer
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.images import standing_ids
from bpdq_quantizer.model.openings import SENTENCES
from bpdq_quantizer.model.stream import open_model
from bpdq_quantizer.model.writing import beginnings, in_windows, seed_of, texts_of_window, write_on
from bpdq_quantizer.run import identity, own_text, pipeline, prepare
from bpdq_quantizer.run.own_text import cached_numbers
from bpdq_quantizer.storage.files import read_sealed
from tiny import load_tensors, tiny_model, tiny_tokenizer
from vision import seeing_model

QUICK = {"group_size": 64, "samples": 4, "seq_len": 32, "iterations": 1, "solver": "paper"}
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and its checkpoint calibrated on its own text."""
    root = tmp_path_factory.mktemp("own")
    tiny_model(root / "model")
    bpdq_quantizer.quantize(root / "model", root / "whole", **QUICK)
    return root


@pytest.fixture
def lm(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def free(monkeypatch, size):
    monkeypatch.setattr(own_text.psutil, "virtual_memory", lambda: SimpleNamespace(available=size))


def equal(folder, other):
    found, expected = load_tensors(folder), load_tensors(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def written(output):
    """The text of a run that was stopped."""
    return read_sealed(output.with_name(f"{output.name}.partial") / "resume" / own_text.WRITTEN)[0]["texts"]


def test_it_is_the_default_and_the_seed_says_what_is_written(folder, tmp_path):
    report = json.loads((folder / "whole" / "quantization_report.json").read_text())
    assert (report["options"]["calibration"], report["calibration_tokens"]) == ("self", 128)
    assert 0 < report["seconds_by_part"]["writing text"] < report["seconds"]
    for name, seed in (("again", 0), ("other", 1)):
        bpdq_quantizer.quantize(folder / "model", tmp_path / name, **QUICK, seed=seed)
        assert equal(tmp_path / name, folder / "whole") == (seed == 0)
    assert not (folder / "whole" / "resume").exists()


def test_each_token_is_drawn_from_the_models_distribution(lm):
    """Of 4096 tokens after one, as many are each token as the model says, within 5 standard deviations."""
    count = 4096
    found = write_on(lm, [], [[7]] * count, 2, seed=3)
    assert found.shape == (count, 2)
    with torch.no_grad():
        p = lm(torch.tensor([[7]])).logits[0, 0].double().softmax(-1)
    share = torch.bincount(found[:, 1], minlength=len(p)) / count
    assert ((share - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1 / count).all()


def test_what_the_models_files_say_of_generating_is_put_aside(lm):
    """An end of text everywhere, the likeliest token only: neither stops it, nor makes texts alike."""
    expected = write_on(lm, [], [[7]] * 3, 24, seed=0)
    lm.generation_config = GenerationConfig(eos_token_id=list(range(384)), top_k=1, max_new_tokens=2)
    assert torch.equal(write_on(lm, [], [[7]] * 3, 24, seed=0), expected)
    assert len({tuple(row) for row in expected.tolist()}) == 3


def test_tokens_that_stand_for_images_are_not_drawn_and_random_numbers_go_on(lm):
    never, before = list(range(0, 384, 2)), torch.get_rng_state()
    found = write_on(lm, [], [[7]] * 8, 64, 0, never)
    assert not set(found.flatten().tolist()) & set(never)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("lead", [[], [5, 6]])
def test_texts_begin_as_they_are_told_however_long_that_is(lm, lead):
    starts = [[7], list(range(20, 33)), list(range(40, 80))]
    found = write_on(lm, lead, starts, 24, seed=1)
    assert found.shape == (3, 24)
    for row, start in zip(found.tolist(), starts, strict=True):
        given = min(len(start), 23)
        assert row[:given] == start[:given]
    assert len({tuple(row[13:]) for row in found.tolist()}) == 3


def test_every_second_text_begins_with_an_opening_the_others_with_a_drawn_token():
    tokenizer = tiny_tokenizer()
    found = beginnings(tokenizer, range(400), 0)
    openings, drawn = found[::2], found[1::2]
    said = [tokenizer.decode(ids) for ids in openings]
    assert len(set(said)) > 190
    assert all(len(ids) > 8 for ids in openings)
    assert {len(ids) for ids in drawn} == {1}
    assert len({ids[0] for ids in drawn}) > 50
    assert tokenizer.eos_token_id not in {ids[0] for ids in drawn}
    assert beginnings(tokenizer, range(100, 108), 0) == found[100:108]
    assert beginnings(tokenizer, range(400), 1) != found


@pytest.mark.parametrize("sentence", SENTENCES)
def test_an_opening_has_one_place_for_a_name_and_is_not_finished(sentence):
    assert sentence.count("{}") == 1
    assert sentence[-1] not in ". "


@pytest.mark.parametrize(("lead", "between", "length"), [([], [], 8), ([1, 2], [3], 9), ([1], [2, 3], 4)])
def test_windows_are_filled_with_texts_the_last_one_cut(lead, between, length):
    count = texts_of_window(3, len(lead), len(between), length)
    texts = torch.arange(10, 10 + 3 * 2 * count).view(2 * count, 3)
    found = in_windows(texts, lead, between, length)
    for window, own in zip(found.tolist(), texts.split(count), strict=True):
        whole = [*lead, *(token for text in own.tolist() for token in [*text, *between])]
        assert window == whole[:length]
        assert len(lead) + count * 3 + (count - 1) * len(between) >= length  # no end of `between` but inside


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_cache_is_as_large_as_counted(tmp_path, kv_heads):
    lm = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "model", kv_heads=kv_heads))
    cache = lm(torch.zeros(1, 3, dtype=torch.int64), use_cache=True).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert cached_numbers(lm.config) == numbers / 3


def test_a_resumed_run_reads_what_was_written(folder, tmp_path, monkeypatch, stops_after_a_block):
    with stops_after_a_block():
        bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK)
    assert written(tmp_path / "out").shape == (own_text.AT_ONCE, 32)
    monkeypatch.setattr(own_text, "load_model", None)
    with pytest.raises(InputError, match="is from a run with other options, samples = 4"):
        bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK | {"samples": 3}, resume=True)
    bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK, resume=True)
    assert equal(tmp_path / "out", folder / "whole")


def test_a_resumed_run_takes_no_text_of_another_writer_and_keeps_its_own(folder, tmp_path, stops_after_a_block):
    tiny_model(tmp_path / "small", hidden=64, seed=1)
    with stops_after_a_block():
        bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK)
    options = QUICK | {"calibration": f"self:{tmp_path / 'small'}", "resume": True}
    with pytest.raises(InputError, match="is from a run with other options, calibration = "):
        bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **options)
    bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK, resume=True)
    assert equal(tmp_path / "out", folder / "whole")


def other_weights(model, monkeypatch):
    tiny_model(model, seed=1)


def other_threads(model, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)


def other_release(model, monkeypatch):
    monkeypatch.setattr(identity, "version", lambda _: "9.9")


@pytest.mark.parametrize(
    ("change", "key"), [(other_weights, "model files"), (other_threads, "threads"), (other_release, "release")]
)
@pytest.mark.parametrize("other", [False, True])
def test_text_that_was_written_in_other_circumstances_is_refused_and_kept(tmp_path, monkeypatch, change, key, other):
    """Of a run that was stopped before its first block; the model itself writes, or another one."""
    model, writer, out = tiny_model(tmp_path / "model"), tiny_model(tmp_path / "writer"), tmp_path / "out"
    options = QUICK | {"calibration": f"self:{writer}" if other else "self"}
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_parted", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bpdq_quantizer.quantize(model, out, **options)
    before = written(out)
    with monkeypatch.context() as patch:
        change(writer if other else model, patch)
        with pytest.raises(InputError, match=f"is from a run with other options, {key} = .*, or remove the folder$"):
            bpdq_quantizer.quantize(model, out, **options, resume=True)
    assert torch.equal(written(out), before)


def test_a_writer_may_be_named_by_another_path(folder, tmp_path, monkeypatch, stops_after_a_block):
    with stops_after_a_block():
        bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK)
    monkeypatch.chdir(folder)
    bpdq_quantizer.quantize("./model", tmp_path / "out", **QUICK, resume=True)
    assert equal(tmp_path / "out", folder / "whole")


def test_a_window_is_the_same_however_many_there_are(folder, tmp_path, monkeypatch, stops_after_a_block):
    """More held-out windows than the first batch leaves: from the start, and of a run that goes on with them."""
    monkeypatch.setattr(own_text, "AT_ONCE", 5)
    bpdq_quantizer.quantize(folder / "model", tmp_path / "none", **QUICK)
    for name, stopped in (("more", False), ("resumed", True)):
        if stopped:
            with stops_after_a_block():
                bpdq_quantizer.quantize(folder / "model", tmp_path / name, **QUICK)
            assert len(written(tmp_path / name)) == 5
        bpdq_quantizer.quantize(folder / "model", tmp_path / name, **QUICK, evaluate=4, resume=stopped)
        assert equal(tmp_path / name, tmp_path / "none")


@pytest.mark.parametrize(("after", "kept"), [("a batch", 2), ("the text", 4)])
def test_text_is_kept_of_a_run_that_is_stopped_before_its_first_block(folder, tmp_path, monkeypatch, after, kept):
    """A run goes on after the last whole batch, with other options too, and leaves nothing of the first one."""
    monkeypatch.setattr(own_text, "AT_ONCE", 2)
    model, out, calls = folder / "model", tmp_path / "out", []

    def write(*args):
        if after == "a batch" and calls:
            raise KeyboardInterrupt
        calls.append(args)
        return write_on(*args)

    def solve(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(own_text, "write_on", write)
        patch.setattr(pipeline, "solve_blocks", solve)
        with pytest.raises(KeyboardInterrupt) as stopped:
            bpdq_quantizer.quantize(model, out, **QUICK)
    assert "repeat the command with --resume" in stopped.value.__notes__[0]
    assert len(written(out)) == kept
    with pytest.raises(InputError, match="is from a run that was stopped: add --resume"):
        bpdq_quantizer.quantize(model, out, **QUICK, bits=3)
    calls.clear()
    after = "the rest"
    monkeypatch.setattr(own_text, "write_on", write)
    bpdq_quantizer.quantize(model, out, **QUICK, bits=3, resume=True)
    assert len(calls) == (4 - kept) / 2
    bpdq_quantizer.quantize(model, tmp_path / "whole", **QUICK, bits=3)
    assert equal(out, tmp_path / "whole")


def test_another_model_of_the_tokenizer_may_write(folder, tmp_path, stops_after_a_block):
    small = tiny_model(tmp_path / "small", hidden=64, layers=1, seed=1)
    starts = beginnings(tiny_tokenizer(), range(own_text.AT_ONCE), 0)
    expected = write_on(AutoModelForCausalLM.from_pretrained(small), [], starts, 32, seed_of(0, 0))
    with stops_after_a_block():
        bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK, calibration=f"self:{small}")
    assert torch.equal(written(tmp_path / "out"), expected)


def test_a_writer_of_other_tokens_is_refused(folder, tmp_path, capsys):
    other = tiny_model(tmp_path / "other")
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary["#"] = vocabulary["#"], vocabulary["!"]
    file.write_text(json.dumps(content))
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--seq-len", "32"]
    assert main([str(a) for a in [*argv, "--calibration", f"self:{other}"]]) == 2
    assert f"self:{other}: its tokenizer is not the model's: name one of the same family" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_with_both_sizes_and_the_remedies(folder, tmp_path, monkeypatch, capsys):
    free(monkeypatch, 1000)
    assert main(["quantize", str(folder / "model"), "--output", str(tmp_path / "out"), "--seq-len", "32"]) == 2
    said = capsys.readouterr().err
    assert f"{folder / 'model'} has to be in memory as a whole, 0.0 GB, and 0.0 GB are free" in said
    assert "bring a text (--calibration FILE.txt)" in said
    assert "self:MODEL" in said
    assert list(tmp_path.iterdir()) == []


def test_a_model_writes_where_it_fits(folder, monkeypatch):
    model, cuda, cpu = str(folder / "model"), torch.device("cuda"), torch.device("cpu")
    window = 4 * 1024 * cached_numbers(open_model(model).model.config)
    free(monkeypatch, GB)
    for on_card, place in ((GB, cuda), (1000, cpu)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, size=on_card: (size, GB))
        assert own_text.room(model, cuda, 1024) == (place, own_text.AT_ONCE)
    assert own_text.room(model, cpu, 1024) == (cpu, own_text.AT_ONCE)
    monkeypatch.setattr(own_text, "CACHE_BYTES", 3 * window)
    assert own_text.room(model, cpu, 1024) == (cpu, 3)


@pytest.mark.parametrize("on_card", [GB, 1000])
def test_the_host_holds_a_model_that_goes_to_the_card_and_one_that_does_not_all_of_it(folder, monkeypatch, on_card):
    model, cuda = str(folder / "model"), torch.device("cuda")
    weights = 4 * sum(parameter.numel() for parameter in open_model(model).model.parameters())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (on_card, GB))
    free(monkeypatch, weights - 1)
    with pytest.raises(InputError, match="has to be in memory as a whole"):
        own_text.room(model, cuda, 32)
    free(monkeypatch, weights)
    if on_card == GB:
        assert own_text.room(model, cuda, 32)[0] == cuda
    else:
        with pytest.raises(InputError, match="has to be in memory as a whole"):
            own_text.room(model, cuda, 32)


@pytest.mark.parametrize("options", [{"tune": "model", "tune_steps": 2}, {"target_bpw": 3.0}, {"output_tokens": 64}])
def test_gradients_are_taken_of_what_was_written(folder, tmp_path, options):
    report = bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK, **options)
    assert report["calibration_tokens"] == 128


def test_a_window_of_one_token_and_a_model_that_can_not_write_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--seq-len 1: expected 2 or more, of which the first is not predicted"):
        bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK | {"seq_len": 1})
    with pytest.raises(InputError, match="--seq-len 2: --calibration self begins with as many that are given"):
        own_text.own_windows("model", tiny_tokenizer(), None, torch.device("cpu"), (1, 2), [5], 0)

    def write(*_: object) -> None:
        raise ValueError("no cache")

    monkeypatch.setattr(own_text, "write_on", write)
    with pytest.raises(InputError, match=r"model can't write text \(no cache\): bring a text"):
        bpdq_quantizer.quantize(folder / "model", tmp_path / "out", **QUICK)


def test_a_model_that_sees_images_writes_text(tmp_path, stops_after_a_block):
    model = seeing_model(tmp_path / "model", "qwen3_5")
    never = standing_ids(open_model(str(model)).model.config)
    assert len(never) == 2
    with stops_after_a_block():
        bpdq_quantizer.quantize(model, tmp_path / "out", **QUICK | {"group_size": 32, "samples": 64})
    assert not set(written(tmp_path / "out").flatten().tolist()) & set(never)
