"""Other sizes of a model, from what a run kept: the same tensors as from the start, to the bit, without its work."""

import os
import shutil
import threading
from math import nan

import pytest
import torch

import bpdq_quantizer
from bpdq_kernels.format import Scheme
from bpdq_quantizer import InputError, requantize
from bpdq_quantizer.cli import main
from bpdq_quantizer.model import support
from bpdq_quantizer.model.windows import Window, as_tensors, from_tensors
from bpdq_quantizer.passes import sensitivity
from bpdq_quantizer.run import prepare, statistics, steps
from bpdq_quantizer.run.options import FIELDS
from bpdq_quantizer.run.statistics import OFFERED, once
from bpdq_quantizer.storage.files import write_tensors
from tiny import load_tensors, tiny_model


def stop(*_, **__):
    raise KeyboardInterrupt


def quantize(folder, output, **options):
    given = {"calibration": str(folder / "text.txt"), "samples": 4, "seq_len": 32, "iterations": 2, **options}
    return bpdq_quantizer.quantize(folder / "model", output, **given)


def same(first, second):
    """Whether two checkpoints have the same tensors, in the same files, and the same config."""
    names = sorted(file.name for file in first.glob("model*"))
    assert len(names) == 4  # with the index
    assert names == sorted(file.name for file in second.glob("model*"))
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in [*names, "config.json"])


@pytest.fixture(scope="module", autouse=True)
def fewer_schemes():
    """Enough for each layer to have its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "GROUP_SIZES", (32, 64))
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory, text):
    """A model, its text, a checkpoint of it, and what that run has kept."""
    folder = tmp_path_factory.mktemp("sizes")
    (folder / "model").symlink_to(tiny_model(folder / "stored", hidden=64, ffn=96, dtype=torch.bfloat16))
    shutil.copy(text, folder / "text.txt")
    quantize(folder, folder / "first", keep_statistics=folder / "kept", target_bpw=2.6, output_tokens=64, evaluate=2)
    return folder


@pytest.fixture
def kept(first, tmp_path):
    """A copy of what the run has kept."""
    return shutil.copytree(first / "kept", tmp_path / "kept")


@pytest.fixture
def requantize_alone(monkeypatch):
    """`requantize`, for which what the statistics spare is an error."""

    def alone(*given, **options):
        with monkeypatch.context() as patch:
            for name in ("sensitivities", "measure_outputs"):
                patch.setattr(steps, name, stop)
            for name in ("calibration_windows", "own_windows"):
                patch.setattr(prepare, name, stop)
            return requantize(*given, **options)

    return alone


def test_what_is_kept_changes_nothing(first, tmp_path):
    quantize(first, tmp_path / "plain", target_bpw=2.6, output_tokens=64, evaluate=2)
    assert same(first / "first", tmp_path / "plain")
    names = {"run.safetensors", "sensitivities.json", "measuring", *(f"outputs-0000{i}.safetensors" for i in (0, 1))}
    assert {path.name for path in (first / "kept").iterdir()} == names


@pytest.mark.parametrize(
    "options",
    [
        {"target_bpw": 3.3},
        {"target_size": "80KB", "embed_bits": 3},
        {"bits": 3},
        {"bits": 1, "tune": "model", "tune_steps": 2},  # one plane, which tuning improves whatever the last bits are
    ],
    ids=str,
)
def test_another_size_is_as_from_the_start(first, kept, tmp_path, requantize_alone, options):
    report = requantize_alone(kept, tmp_path / "other", **options)
    size = {} if options.keys() & {"bits", "target_size"} else {"target_bpw": 2.6}
    expected = quantize(first, tmp_path / "start", **{"output_tokens": 64, "evaluate": 2, **size, **options})
    assert same(tmp_path / "other", tmp_path / "start")
    assert not same(tmp_path / "other", first / "first")
    assert report["evaluation"]["kl"] == expected["evaluation"]["kl"]
    assert [report[key] for key in ("model", "options")] == [expected[key] for key in ("model", "options")]


def test_a_run_without_a_target_measures_once_for_all_targets(first, tmp_path, monkeypatch, requantize_alone):
    kept, tune = tmp_path / "kept", {"tune": "model", "tune_steps": 2, "tune_samples": 5, "tune_loss": "mix"}
    quantize(first, tmp_path / "two", keep_statistics=kept, **tune)
    assert not (kept / "sensitivities.json").exists()
    requantize(kept, tmp_path / "other", target_bpw=2.6, tune="none")
    quantize(first, tmp_path / "start", target_bpw=2.6)
    assert same(tmp_path / "other", tmp_path / "start")
    requantize_alone(kept, tmp_path / "third", target_bpw=3.3)
    monkeypatch.setattr(steps, "sensitivities", stop)
    quantize(first, tmp_path / "fourth", target_bpw=3.3, keep_statistics=kept, **tune)
    assert same(tmp_path / "third", tmp_path / "fourth")


def test_what_the_model_wrote_is_kept(first, tmp_path, requantize_alone):
    quantize(first, tmp_path / "two", keep_statistics=tmp_path / "kept", calibration="self")
    report = requantize_alone(tmp_path / "kept", tmp_path / "other", bits=3)
    expected = quantize(first, tmp_path / "start", calibration="self", bits=3)
    assert same(tmp_path / "other", tmp_path / "start")
    assert report["options"] == expected["options"]


def test_what_a_run_decides_itself_is_not_given_for_the_next(tmp_path, text, monkeypatch):
    monkeypatch.setattr(support, "SMALLEST_TABLE", 0)
    tiny_model(tmp_path / "model", hidden=64, ffn=96, dtype=torch.bfloat16, tie_word_embeddings=True)
    shutil.copy(text, tmp_path / "text.txt")
    assert quantize(tmp_path, tmp_path / "first", keep_statistics=tmp_path / "kept")["options"]["embed_bits"] == 4
    report = requantize(tmp_path / "kept", tmp_path / "other", head_bits=3)
    assert {layer["bits"] for layer in report["layers"] if "embed" in layer["name"]} == {3}
    quantize(tmp_path, tmp_path / "start", head_bits=3)
    assert same(tmp_path / "other", tmp_path / "start")


def test_tokens_for_gradients_are_a_share_of_the_text_that_there_is(first, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bpdq_quantizer.model.windows.FEWEST_TOKENS", 32)
    (words := tmp_path / "text.txt").write_text((first / "text.txt").read_text()[:2000])
    given = {"calibration": str(words), "samples": 999, "iterations": 1}
    report = quantize(first, tmp_path / "out", keep_statistics=tmp_path / "kept", **given)
    assert "holds" in capsys.readouterr().out
    assert report["options"]["output_tokens"] == report["calibration_tokens"] // 4 > 32
    again = requantize(tmp_path / "kept", tmp_path / "again")
    assert again["options"] == report["options"]
    assert same(tmp_path / "out", tmp_path / "again")
    quantize(first, tmp_path / "fewer", **given | {"samples": report["calibration_tokens"] // 32})
    assert same(tmp_path / "out", tmp_path / "fewer")


def test_a_stopped_size_goes_on(kept, tmp_path, requantize_alone, stops_after_a_block):
    requantize_alone(kept, tmp_path / "whole", target_bpw=3.3)
    with stops_after_a_block():
        requantize_alone(kept, tmp_path / "out", target_bpw=3.3)
    with pytest.raises(InputError, match=r"target_bpw = 3.3"):
        requantize(kept, tmp_path / "out", target_bpw=3.2, resume=True)
    requantize_alone(kept, tmp_path / "out", target_bpw=3.3, resume=True)
    assert same(tmp_path / "whole", tmp_path / "out")


def test_a_run_that_is_stopped_while_it_measures_keeps_what_is_whole(first, kept, tmp_path, monkeypatch):
    shutil.rmtree(kept)
    options = {"keep_statistics": kept, "target_bpw": 2.6, "output_tokens": 64, "evaluate": 2}
    with monkeypatch.context() as patch:
        save = steps.save_outputs
        patch.setattr(steps, "save_outputs", lambda file, found: save(file, found) if "1" in file.name else stop())
        with pytest.raises(KeyboardInterrupt):
            quantize(first, tmp_path / "out", **options)
    assert {path.name for path in kept.iterdir()} == {"run.safetensors", "measuring", "outputs-00001.safetensors"}
    with monkeypatch.context() as patch:
        patch.setattr(steps, "quantize_blocks", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(first, tmp_path / "out", **options)
    with monkeypatch.context() as patch:
        for name in ("sensitivities", "measure_outputs"):
            patch.setattr(steps, name, stop)
        quantize(first, tmp_path / "out", resume=True, **options)
    assert same(tmp_path / "out", first / "first")
    assert sorted(path.name for path in kept.iterdir()) == sorted(path.name for path in (first / "kept").iterdir())


def flip(file):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["run.safetensors", "sensitivities.json", "outputs-00000.safetensors"])
@pytest.mark.parametrize("damage", [flip, lambda file: os.truncate(file, 9), lambda file: file.write_bytes(b"")])
def test_damaged_statistics_are_named_before_any_work(first, kept, tmp_path, monkeypatch, name, damage):
    damage(kept / name)
    monkeypatch.setattr(prepare, "check_source", stop)
    with pytest.raises(InputError, match=f"{kept / name} .*: remove "):
        requantize(kept, tmp_path / "out", target_bpw=3.3)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["sensitivities.json", "outputs-00000.safetensors"])
def test_what_is_removed_is_measured_again(first, kept, tmp_path, name):
    (kept / name).unlink()
    requantize(kept, tmp_path / "out", target_bpw=2.6)
    assert same(tmp_path / "out", first / "first")


def foreign(folder):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def of_something_else(folder):
    folder.mkdir()
    write_tensors(folder / "run.safetensors", {}, {})


@pytest.mark.parametrize("make", [foreign, of_something_else, lambda folder: folder.write_text("a file")])
def test_a_folder_of_something_else_is_refused(first, tmp_path, make):
    make(tmp_path / "kept")
    with pytest.raises(InputError, match=r"kept.* holds no statistics: name a folder of"):
        requantize(tmp_path / "kept", tmp_path / "out", bits=3)
    with pytest.raises(InputError, match=r"kept.*: name a(nother)? folder"):
        quantize(first, tmp_path / "out", keep_statistics=tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_sensitivities_that_say_nothing_are_not_kept(first, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "with_costs", lambda *_: sensitivity.Stage(["a"], [(8, 8)], {Scheme(2, 32): nan}))
    with pytest.raises(InputError, match="a: what its errors cost is NaN or infinite: check the model and its dtype"):
        quantize(first, tmp_path / "out", target_bpw=2.6, output_tokens=64, keep_statistics=tmp_path / "kept")
    assert not (tmp_path / "kept" / "sensitivities.json").exists()


def test_a_folder_that_is_not_there_holds_no_statistics(tmp_path, capsys):
    assert main(["requantize", str(tmp_path / "kept"), "--bits", "3", "--output", str(tmp_path / "out")]) == 2
    assert "kept holds no statistics: name a folder of `bpdq quantize --keep-statistics`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["out", "out/kept", "out.partial", "out.partial/resume/kept"])
def test_statistics_are_kept_beside_the_checkpoint(first, tmp_path, place):
    with pytest.raises(InputError, match="is in the checkpoint's folder: name one beside it"):
        quantize(first, tmp_path / "out", keep_statistics=tmp_path / place)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 3}, "samples = 4 .now 3"),
        ({"seed": 1}, "seed = 0 .now 1"),
        ({"output_tokens": 0}, "output_tokens = 64 .now 0"),
        ({"special_tokens": "none"}, "special_tokens = 'auto' .now 'none'"),
        ({"calibration": "python"}, "calibration tokens = "),
    ],
)
def test_another_run_does_not_mix_with_what_is_kept(first, kept, tmp_path, options, message):
    with pytest.raises(InputError, match=f"kept is from a run with other options, {message}"):
        quantize(first, tmp_path / "out", **{"keep_statistics": kept, "output_tokens": 64, **options})
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_model_that_changed_is_named(first, tmp_path):
    shutil.copytree(first / "model", tmp_path / "model")
    shutil.copy(first / "text.txt", tmp_path / "text.txt")
    quantize(tmp_path, tmp_path / "two", keep_statistics=tmp_path / "kept")
    os.utime(tmp_path / "model" / "model.safetensors", (1, 1))
    with pytest.raises(InputError, match=r"kept is from a run with other options, model files = .*put the model back"):
        requantize(tmp_path / "kept", tmp_path / "out", bits=3)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match=f"{tmp_path / 'model'}"):
        requantize(tmp_path / "kept", tmp_path / "out", bits=3)


def test_statistics_of_another_release_are_refused(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "release", lambda: "9.9")
    with pytest.raises(InputError, match=r"kept was kept by vllm-bpdq .*, this is 9.9: install that"):
        requantize(kept, tmp_path / "out", bits=3)


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {*OFFERED, "output"}))
def test_what_the_statistics_depend_on_is_not_offered(kept, tmp_path, name, capsys):
    with pytest.raises(TypeError, match=f"requantize has no option '{name}'"):
        requantize(kept, tmp_path / "out", **{name: 1})
    with pytest.raises(SystemExit, match="2"):
        main(["requantize", str(kept), "--output", "out", f"--{name.replace('_', '-')}", "1"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_command_gives_what_it_is_given(kept, tmp_path, monkeypatch):
    found = []

    def record(*given, **options):
        found.append((given, options))
        raise InputError("stop here")

    monkeypatch.setattr("bpdq_quantizer.cli.requantize", record)
    assert main(["requantize", "d", "--target-size", "1MB", "--output", "o", "--kv-cache-scales"]) == 2
    assert found == [(("d",), {"target_size": "1MB", "output": "o", "kv_cache_scales": True})]


def test_the_command_prints_the_report(kept, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["requantize", str(kept), "--bits", "1", "--output", str(out), "--json"]) == 0
    assert '"bits": 1' in capsys.readouterr().out.splitlines()[-1]
    assert load_tensors(out)


def test_of_several_runs_one_measures(tmp_path):
    begun, go_on, written = threading.Event(), threading.Event(), []

    def measure():
        written.append(1)
        begun.set()
        assert go_on.wait(30)
        (tmp_path / "file").write_text("measured")

    threads = [threading.Thread(target=once, args=([tmp_path / "file"], measure)) for _ in range(2)]
    threads[0].start()
    assert begun.wait(30)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert written == [1]


def test_windows_come_back_as_they_were(tmp_path):
    windows = [Window(torch.full((1, i + 1), i)) for i in range(12)]
    windows[3] = Window(windows[3].tokens, {"pixel_values": torch.rand(2, 3), "image_grid_thw": torch.ones(1, 3)})
    found = from_tensors(dict(sorted(as_tensors(windows).items())))
    assert len(found) == 12
    for window, back in zip(windows, found, strict=True):
        assert torch.equal(window.tokens, back.tokens)
        assert window.images.keys() == back.images.keys()
        assert all(torch.equal(tensor, back.images[name]) for name, tensor in window.images.items())
