"""What a stopped run left, damaged or of other circumstances; and a source that changes while a run is under way."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import bpdq_quantizer
from bpdq_quantizer.checkpoint import writer
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.run import identity, pipeline, steps
from tiny import tiny_model

FIRST, SECOND, REST = (f"model-0000{number}-of-00003.safetensors" for number in (2, 3, 1))
STATES = "resume/states.safetensors"


class Stop(Exception):  # noqa: N818, stands for a crash
    pass


def small(text, **options):
    return {"group_size": 64, "calibration": text, "samples": 4, "seq_len": 32, "iterations": 2, **options}


def tensors(folder):
    return {file.name: file.read_bytes() for file in folder.glob("model*")}


def stop(*args):
    raise Stop


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text):
    """A model, its checkpoint `whole`, and what a run left that stopped after both blocks."""
    folder = tmp_path_factory.mktemp("resume")
    tiny_model(folder / "model", dtype=torch.bfloat16)
    bpdq_quantizer.quantize(str(folder / "model"), folder / "whole", **small(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_tensors", stop)
        with pytest.raises(Stop):
            bpdq_quantizer.quantize(str(folder / "model"), folder / "both", **small(text))
    return folder


@pytest.fixture
def left(runs, tmp_path):
    """A copy of what a run left after both blocks."""
    return shutil.copytree(runs / "both.partial", tmp_path / "out.partial")


def resume(runs, output, text, **options):
    return bpdq_quantizer.quantize(runs / "model", output, **small(text, **options), resume=True)


def delete(file):
    file.unlink()


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def garble(file):
    file.write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("name", "damage"),
    [(FIRST, delete), (FIRST, flip), (SECOND, flip), (SECOND, cut), (FIRST, garble), (STATES, flip), (STATES, cut)],
)
def test_what_is_damaged_is_done_again(runs, left, text, capsys, name, damage):
    damage(left / name)
    resume(runs, left.with_name("out"), text)
    assert tensors(left.with_name("out")) == tensors(runs / "whole")
    said = [line for line in capsys.readouterr().err.splitlines() if "starting again from the first block" in line]
    assert len(said) == 1
    assert str(left / name) in said[0]


def test_the_shard_of_another_run_is_not_taken_for_this_ones(runs, left, text):
    shutil.copy(left / FIRST, left / SECOND)
    resume(runs, left.with_name("out"), text)
    assert tensors(left.with_name("out")) == tensors(runs / "whole")


def test_without_states_a_run_starts_anew(runs, left, text):
    (left / STATES).unlink()
    resume(runs, left.with_name("out"), text)
    assert tensors(left.with_name("out")) == tensors(runs / "whole")


def test_a_shard_that_is_not_of_the_run_is_refused(runs, left, text):
    stale = left / "model-00009-of-00009.safetensors"
    shutil.copy(left / FIRST, stale)
    with pytest.raises(InputError, match=rf"{stale.name} is not of this run: move it away, then go on with --resume"):
        resume(runs, left.with_name("out"), text)
    stale.unlink()
    resume(runs, left.with_name("out"), text)
    assert tensors(left.with_name("out")) == tensors(runs / "whole")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: flip(folder / FIRST), f"{FIRST} is not what was written"),
        (lambda folder: delete(folder / FIRST), f"{FIRST} is missing"),
        (lambda folder: garble(folder / "model-00009-of-00009.safetensors"), "model-00009.* is not of this run"),
    ],
)
def test_what_happens_to_the_files_until_the_end_is_noticed(runs, left, text, monkeypatch, harm, message):
    monkeypatch.setattr(pipeline, "peak_memory", lambda: harm(left))  # asked for when all blocks are there
    with pytest.raises(InputError, match=message) as refused:
        resume(runs, left.with_name("out"), text)
    assert "repeat the command with --resume" in refused.value.__notes__[0]
    assert not (left / "config.json").exists()
    assert not left.with_name("out").exists()


def test_other_threads_are_refused_with_both_numbers(runs, left, text):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(
            InputError, match=rf"threads = {threads} \(now {threads + 1}\): set OMP_NUM_THREADS={threads}"
        ):
            resume(runs, left.with_name("out"), text)
    finally:
        torch.set_num_threads(threads)


def test_another_release_is_refused(runs, left, text, monkeypatch):
    monkeypatch.setattr(identity, "version", lambda name: "9.9")
    with pytest.raises(InputError, match=r"release = .* \(now '9\.9'\): install vllm-bpdq "):
        resume(runs, left.with_name("out"), text)


@pytest.mark.parametrize("model", ["./model", "../{}/model", Path("model")])
def test_the_same_model_may_be_named_by_another_path(runs, left, text, monkeypatch, model):
    monkeypatch.chdir(runs)
    model = model if isinstance(model, Path) else model.format(runs.name)
    bpdq_quantizer.quantize(model, left.with_name("out"), **small(Path(text)), resume=True)
    assert tensors(left.with_name("out")) == tensors(runs / "whole")


def overwrite(file):
    flip(file)
    os.utime(file, (1, 1))


@pytest.mark.parametrize("change", [overwrite, cut, delete])
@pytest.mark.parametrize("block", [1, 2])
def test_a_source_that_changes_during_a_run_is_noticed(runs, tmp_path, text, monkeypatch, block, change):
    model = shutil.copytree(runs / "model", tmp_path / "model")
    original = steps.save_progress

    def save(folder, states, *args):
        original(folder, states, *args)
        if states.block == block:
            change(model / "model.safetensors")

    monkeypatch.setattr(steps, "save_progress", save)
    with pytest.raises(InputError, match=r"model: model\.safetensors has changed since the run began"):
        bpdq_quantizer.quantize(model, tmp_path / "out", **small(text))
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / STATES).is_file()


def test_files_have_the_permissions_of_the_umask(runs):
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (runs / "whole").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)
