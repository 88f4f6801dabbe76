"""Several workers solve the rows of a stage: the same tensors as one, and a clear end when one fails."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpdq_quantizer import workers
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import WorkerError
from bpdq_quantizer.grid import range_start
from bpdq_quantizer.solver import Solution, quantize_linear
from tiny import TEXT, tiny_model

QUICK = ["--samples", "4", "--seq-len", "32", "--iterations", "2", "--group-size", "64"]
TABLES = ["--embed-bits", "4", "--head-bits", "3"]


def layer(rows=2500, inputs=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inputs, inputs, generator=generator)
    return torch.randn(rows, inputs, generator=generator), 2 * x.T @ x / len(x)


def same(a: Solution, b: Solution) -> bool:
    return a.damping == b.damping and all(torch.equal(x, y) for x, y in zip(a[:-1], b[:-1], strict=True))


@pytest.fixture(scope="module")
def pair():
    with pytest.MonkeyPatch.context() as patch:  # a worker unpickles what a test passes
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        with workers.team("cpu,cpu") as solve:
            yield solve


@pytest.mark.parametrize(("rows", "bits", "dtype"), [(2500, 2, torch.float32), (2049, 3, torch.bfloat16)])
def test_two_workers_give_the_tensors_of_one(pair, rows, bits, dtype):
    """The last chunk is of a width that BLAS treats in its own way."""
    W, H = layer(rows)
    options = {"iterations": 3, "dtype": torch.float16}
    with workers.team("cpu") as alone:
        one = alone(W.to(dtype), H, bits, 32, **options)
    assert same(pair(W.to(dtype), H, bits, 32, **options), one)
    whole = quantize_linear(W.to(dtype), H, bits, 32, **options)
    assert one.loss.sum().item() == pytest.approx(whole.loss.sum().item(), rel=1e-3)


def test_a_stage_of_one_chunk_leaves_a_worker_idle(pair):
    W, H = layer(40)
    assert same(pair(W, H, 2, 32), quantize_linear(W, H, 2, 32))


@given(rows=st.integers(1, 9000), count=st.integers(1, 9), unit=st.sampled_from([1, 64, 1024]))
def test_shares_are_whole_chunks_and_even(rows, count, unit):
    shares = workers.shares_of(rows, count, unit)
    assert len(shares) == count
    assert sum(shares) == rows
    ends = [sum(shares[: i + 1]) for i in range(count)]
    assert all(end % unit == 0 or end == rows for end in ends)
    assert max(shares) - min(shares) < 2 * unit


class FailsElsewhere(tuple):
    """Starts that only a worker can't read."""

    def __iter__(self):
        if "RANK" in os.environ:
            raise ArithmeticError("nothing to start from")
        return super().__iter__()


def test_an_error_of_a_worker_is_told_on_rank_0_and_leaves_it_alive(pair):
    W, H = layer(1500)
    with pytest.raises(WorkerError, match="worker 1 of --devices: ArithmeticError: nothing to start from"):
        pair(W, H, 2, 32, starts=FailsElsewhere((range_start,)))
    assert len(pair(W, H, 2, 32).codes) == 1500


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_does_not_start_ends_the_run(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match=r"have started \(number 1 with exit status 1\)"), workers.team("cpu,cpu"):
        pass


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a model whose MLP has three chunks of rows in its first stage, and a calibration text."""
    folder = tmp_path_factory.mktemp("workers")
    tiny_model(folder / "model", hidden=64, ffn=1056, layers=1, dtype=torch.bfloat16)
    (folder / "text.txt").write_text(TEXT)
    return folder


def command(root, out, *options):
    argv = ["quantize", root / "model", "--output", out, "--calibration", root / "text.txt", *QUICK, *options]
    return [str(a) for a in argv]


def tensors(folder):
    return {file.name: file.read_bytes() for file in folder.glob("model*")}


@pytest.fixture(scope="module")
def one(root):
    assert main([*command(root, root / "one", *TABLES), "--devices", "cpu"]) == 0
    return tensors(root / "one")


def run(*argv):
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # which sums depend on
    done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_checkpoint_of_two_workers_is_that_of_one(root, one, tmp_path):
    run("bpdq_quantizer", *command(root, tmp_path / "two", *TABLES, "--devices", "cpu,cpu"))
    assert tensors(tmp_path / "two") == one


@pytest.mark.slow
def test_workers_that_torchrun_starts_make_the_same_checkpoint(root, one, tmp_path):
    """As on several machines, where --nnodes and --rdzv-endpoint say which."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = run(*launcher, "-m", "bpdq_quantizer", *command(root, tmp_path / "two", *TABLES, "--json"))
    assert printed.count('"bits_per_weight"') == 1, "one process reports"
    assert tensors(tmp_path / "two") == one


def test_a_killed_worker_ends_the_command_with_one_line(tmp_path):
    tiny_model(tmp_path / "model", hidden=64, ffn=1056, layers=20, dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(TEXT)
    argv = [sys.executable, "-m", "bpdq_quantizer", *command(tmp_path, tmp_path / "out", "--devices", "cpu,cpu")]
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as process:
        while "quantizing" not in (line := process.stderr.readline()):  # workers are there by then
            assert line, "it ended before it began"
        (worker,) = children(process.pid)
        os.kill(worker, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("bpdq: error: ")]
    assert "a worker of --devices is gone (number 1 with exit status -9)" in line
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "cpu,tpu"], "--devices cpu,tpu: 'tpu' is none, expected cpu, cuda:0"),
        (["--devices", "cpu,meta"], "'meta' is none"),
        (["--devices", "cuda:0,cuda:99"], "CUDA devices, not cuda:"),
        (["--devices", ""], "'' is none"),
        (["--device", "cpu", "--devices", "cpu,cpu"], "--device cpu --devices cpu,cpu: give one of them"),
    ],
)
def test_devices_that_are_none_are_named(root, tmp_path, capsys, options, message):
    assert main(command(root, tmp_path / "out", *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.partial").exists()
