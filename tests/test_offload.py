"""Hidden states in files (`--offload-dir`): the same checkpoint, from a stopped run too, in less memory."""

import json
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

import bpdq_quantizer
from bpdq_kernels.format import Scheme
from bpdq_quantizer.algorithm.solver import quantize_linear
from bpdq_quantizer.model import activations
from bpdq_quantizer.model.activations import to_host
from bpdq_quantizer.model.stream import open_model
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.passes.blocks import States, quantize_blocks
from bpdq_quantizer.run import progress
from bpdq_quantizer.run.progress import load_progress, save_progress
from bpdq_quantizer.run.run_folder import offload_name
from bpdq_quantizer.storage.offload import Offloaded
from tiny import TEXT, tiny_model

TWO_WINDOWS = 2 * 32 * 2 * (4 * 128 + 128 + 2 * 64 + 128 + 2 * 352 + 128)  # of 32 tokens, in bytes of activations


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a model and a calibration text."""
    folder = tmp_path_factory.mktemp("offload")
    tiny_model(folder / "model", dtype=torch.bfloat16)
    (folder / "text.txt").write_text(TEXT * 4)
    return folder


@pytest.fixture(autouse=True)
def two_windows_at_a_time(monkeypatch):
    monkeypatch.setattr(activations, "ACTIVATION_BYTES", TWO_WINDOWS)


def quantize(root, output, **options):
    small = {"group_size": 64, "calibration": str(root / "text.txt"), "samples": 6, "seq_len": 32, "iterations": 2}
    small["output_tokens"] = 0  # of which a stopped run keeps something
    bpdq_quantizer.quantize(str(root / "model"), output, **small, **options)
    return {file.name: file.read_bytes() for file in output.glob("model*")}


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The tensors of a run in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "ACTIVATION_BYTES", TWO_WINDOWS)
        return quantize(root, tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize(
    "options",
    [
        {"asymmetric": 0.0},
        {"head_bits": 4, "kv_cache_scales": True},
        {"tune": "model", "tune_steps": 4},
    ],
)
def test_the_tensors_are_those_of_a_run_in_memory(root, tmp_path, options, monkeypatch):
    lengths, original = [], progress.save_progress

    def record(folder, states, *args):
        lengths.append({len(states.quantized), len(states.original)})
        original(folder, states, *args)

    monkeypatch.setattr("bpdq_quantizer.run.steps.save_progress", record)
    in_memory = quantize(root, tmp_path / "a", **options)
    assert quantize(root, tmp_path / "b", **options, offload_dir=str(tmp_path / "states")) == in_memory
    assert lengths[0] - {0} == {3}, "several batches"
    assert not list((tmp_path / "states").iterdir()), "nothing is left behind"


class Stop(Exception):  # noqa: N818, stands for a crash
    pass


@pytest.mark.parametrize("number", [2, 10, 12, 20])  # embedding, block, progress, states, the rest
def test_a_run_that_stops_anywhere_goes_on_to_the_same_tensors(root, whole, tmp_path, monkeypatch, number):
    original, writes = progress.write_tensors, []

    def write(file, *args):
        writes.append(file)
        if len(writes) == number:
            raise Stop
        return original(file, *args)

    offload = {"offload_dir": str(tmp_path / "states")}
    with monkeypatch.context() as patch:
        for module in ("storage.offload", "run.progress", "run.block_files", "checkpoint.writer"):
            patch.setattr(f"bpdq_quantizer.{module}.write_tensors", write)
        with pytest.raises(Stop):
            quantize(root, tmp_path / "out", **offload)
    assert number < 20 or writes[-1].name == "model-00001-of-00003.safetensors"
    finished = number > 11
    assert bool(list((tmp_path / "states").iterdir())) == finished, "states stay where there is a block to go on from"
    assert quantize(root, tmp_path / "out", **offload, resume=True) == whole
    assert not list((tmp_path / "states").iterdir())


def remove(file):
    file.unlink()


def change(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, change])
def test_a_stopped_run_starts_again_where_its_states_are_damaged(root, whole, tmp_path, monkeypatch, capsys, damage):
    offload = {"offload_dir": str(tmp_path / "states")}
    with monkeypatch.context() as patch:
        patch.setattr("bpdq_quantizer.checkpoint.writer.write_tensors", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(root, tmp_path / "out", **offload)
    damaged = max((tmp_path / "states").rglob("*.safetensors"))
    damage(damaged)
    assert quantize(root, tmp_path / "out", **offload, resume=True) == whole
    assert f"{damaged} is " in (error := capsys.readouterr().err)
    assert "starting again from the first block" in error


def test_files_of_the_users_own_stay_in_the_folder_of_the_states(root, tmp_path):
    """Its name can be foreseen."""
    folder = tmp_path / "states" / offload_name(tmp_path / "out")
    folder.mkdir(parents=True)
    (folder / "mine.safetensors").write_text("")
    quantize(root, tmp_path / "out", offload_dir=str(tmp_path / "states"), asymmetric=0.0)
    assert [file.name for file in folder.iterdir()] == ["mine.safetensors"]


def test_a_folder_that_can_not_be_written_is_named(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(bpdq_quantizer.InputError, match=r"--offload-dir .*/file can't be written"):
        quantize(root, tmp_path / "out", offload_dir=str(tmp_path / "file"))
    assert not (tmp_path / "out.partial").exists()


def test_a_copy_keeps_its_values_until_progress_is_saved(tmp_path):
    (tmp_path / "resume").mkdir()
    (tmp_path / "states").mkdir()
    first, second = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    states = Offloaded(tmp_path / "states")
    states.append(first)
    states.append(first)
    copy = states.copy()
    states[1] = second
    assert [batch.sum().item() for batch in states] == [0, 6]
    assert [batch.sum().item() for batch in copy] == [0, 0]
    save_progress(tmp_path, States(1, states, []), [], {}, {})
    assert len(list((tmp_path / "states").iterdir())) == 2
    loaded = load_progress(tmp_path, tmp_path / "states").states
    assert torch.equal(torch.cat(list(loaded.quantized)), torch.cat([first, second]))
    assert len(loaded.original) == 0


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_calibration_text(tmp_path):
    """16 and 256 windows of 0.5 MB of hidden states in two models: 0.25 GB more in memory, next to nothing in files."""
    (tmp_path / "text.txt").write_text(TEXT * 600)
    tiny_model(tmp_path / "model", hidden=1024, ffn=32, layers=1, heads=4, kv_heads=1, dtype=torch.bfloat16)
    code = "import sys; from bpdq_quantizer import cli; from bpdq_quantizer.model import activations; "
    code += "activations.ACTIVATION_BYTES = 1 << 23; sys.exit(cli.main(sys.argv[1:]))"
    offload = ["--offload-dir", tmp_path / "states"]
    peaks = {}
    for name, samples, option in (("few", 16, offload), ("files", 256, offload), ("memory", 256, [])):
        argv = ["quantize", tmp_path / "model", "--output", tmp_path / name, "--samples", samples, "--seq-len", 256]
        argv += ["--calibration", tmp_path / "text.txt", "--iterations", 1, "--json", *option]
        done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], stdout=subprocess.PIPE, check=True)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])["peak_host_memory_bytes"]
    assert peaks["files"] < peaks["few"] + 0.05e9, peaks
    assert peaks["memory"] > peaks["files"] + 0.15e9, peaks


def test_states_from_a_gpu_go_to_page_locked_memory(monkeypatch):
    class OnGPU(torch.Tensor):
        is_cuda = True

    asked = []
    real = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda x, device, pin_memory: asked.append((device, pin_memory)) or real(x, device=device)
    )
    states = torch.randn(2, 3, 4)
    assert torch.equal(to_host(states.as_subclass(OnGPU)), states)
    assert asked == [("cpu", True)]


@pytest.mark.gpu
def test_states_stay_page_locked(tmp_path):
    source = open_model(str(tiny_model(tmp_path / "model")))
    schemes = defaultdict(lambda: Scheme(2, 64))
    windows = text_windows(torch.randint(0, 384, (3, 32)))
    blocks = quantize_blocks(source, windows, schemes, torch.device("cuda"), solve=quantize_linear, asymmetric=0.5)
    for _, _, states in blocks:
        assert all(batch.is_pinned() for batch in [*states.quantized, *states.original])
