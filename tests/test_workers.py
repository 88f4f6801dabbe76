"""Several workers solve the rows of a stage: the same tensors as one, and a clear end when one fails."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bpdq_quantizer.algorithm.grid import range_start
from bpdq_quantizer.algorithm.solver import Solution, quantize_linear
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import WorkerError
from bpdq_quantizer.run import links, workers
from tiny import TEXT, tiny_model

QUICK = ["--samples", "4", "--seq-len", "32", "--iterations", "2", "--group-size", "64"]
TABLES = ["--embed-bits", "4", "--head-bits", "3"]


def layer(rows=2500, inputs=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * inputs, inputs, generator=generator)
    return torch.randn(rows, inputs, generator=generator), 2 * x.T @ x / len(x)


def same(a: Solution, b: Solution) -> bool:
    if (a.s is None) != (b.s is None):
        return False
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


@pytest.fixture(scope="module")
def pair():
    with workers.team("cpu,cpu") as solve:
        yield solve


@pytest.mark.parametrize(
    ("rows", "bits", "width", "dtype"), [(2500, 2, 8, torch.float32), (2049, 3, 16, torch.bfloat16)]
)
def test_two_workers_give_the_tensors_of_one(pair, rows, bits, width, dtype):
    """The last chunk is of a width that BLAS treats in its own way."""
    W, H = layer(rows)
    options = {"iterations": 3, "dtype": torch.float16}
    with workers.team("cpu") as alone:
        one = alone(W.to(dtype), H, bits, 32, width, **options)
    assert same(pair(W.to(dtype), H, bits, 32, width, **options), one)
    whole = quantize_linear(W.to(dtype), H, bits, 32, width, **options)
    assert one.loss.sum().item() == pytest.approx(whole.loss.sum().item(), rel=1e-3)


def test_two_workers_share_chunks_that_know_of_each_others_errors(pair):
    W, H = layer(900)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(900, 8, generator=generator) @ torch.randn(8, 900, generator=generator)
    covariances = [(part.T @ part / 900).add_(torch.eye(part.shape[1])) for part in g.split([400, 300, 200], 1)]
    with workers.team("cpu") as alone:
        one = alone(W, H, 2, 32, 8, covariances=covariances)
    assert same(pair(W, H, 2, 32, 8, covariances=covariances), one)
    whole = quantize_linear(W, H, 2, 32, 8, covariances=covariances)
    assert one.loss.sum().item() == pytest.approx(whole.loss.sum().item(), rel=0.02)
    assert not same(one, quantize_linear(W, H, 2, 32, 8))


def test_a_stage_of_one_chunk_leaves_a_worker_idle(pair):
    W, H = layer(40)
    assert same(pair(W, H, 2, 32), quantize_linear(W, H, 2, 32))


@pytest.mark.parametrize(("count", "width"), [(3, 8), (1, 16)])
def test_two_workers_share_matrices_as_they_are(pair, count, width):
    """Each with its own H; of one, the other worker gets nothing."""
    W, H = (torch.stack(tensors) for tensors in zip(*(layer(40, seed=i) for i in range(count)), strict=True))
    H[-1, 3, 3] = -0.02 * H[-1].diagonal().mean()  # needs more damping
    together = pair(W, H, 2, 32, width)
    assert together.damping[-1] > 0.01
    for i in range(count):
        assert same(together.of(i), quantize_linear(W[i], H[i], 2, 32, width))


@given(rows=st.integers(1, 9000), count=st.integers(1, 9), unit=st.sampled_from([1, 64, 1024]))
def test_shares_are_whole_chunks_and_even(rows, count, unit):
    shares = workers.shares_of(rows, count, unit)
    assert len(shares) == count
    assert sum(shares) == rows
    ends = [sum(shares[: i + 1]) for i in range(count)]
    assert all(end % unit == 0 or end == rows for end in ends)
    assert max(shares) - min(shares) < 2 * unit


FAILS_ONCE = """
from bpdq_quantizer.run import workers
solve = workers.quantize_linear
def fail(*args, **options):
    workers.quantize_linear = solve
    raise ArithmeticError("nothing to start from")
workers.quantize_linear = fail
"""


def test_an_error_of_a_worker_is_told_on_rank_0_and_leaves_it_alive(monkeypatch):
    monkeypatch.setattr(workers, "SERVE_JOBS", FAILS_ONCE + workers.SERVE_JOBS)
    W, H = layer(1500)
    with workers.team("cpu,cpu") as solve:
        with pytest.raises(WorkerError, match="worker 1 of --devices: ArithmeticError: nothing to start from"):
            solve(W, H, 2, 32)
        assert len(solve(W, H, 2, 32).codes) == 1500


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def listening(pid: int) -> list[str]:
    """Addresses, in hexadecimal, at which a process takes TCP connections."""
    tables = [Path(f"/proc/{pid}/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    inodes = {f"socket:[{fields[9]}]": fields[1] for fields in rows if fields[3] == "0A"}
    opened = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            opened.append(str(fd.readlink()))
    return [inodes[name] for name in opened if name in inodes]


def test_workers_on_one_machine_open_no_port(pair):
    """Another user's process could join them, read weights and send what it likes."""
    with socket.create_server(("127.0.0.1", 0)):
        assert len(listening(os.getpid())) == 1, "this test would see a port"
    everyone = [os.getpid(), *children(os.getpid())]
    assert len(everyone) > 1
    assert [address for pid in everyone for address in listening(pid)] == []


def joining(server: socket.socket, secret: bytes, number: int) -> socket.socket:
    link = socket.create_connection(server.getsockname())
    links.authenticate(link, secret, b"worker", b"rank 0")
    links.send(link, number)
    return link


def test_a_stranger_does_not_join_and_keeps_nobody_out(monkeypatch, capsys):
    monkeypatch.setattr(workers, "GREETING", 0.2)
    with ThreadPoolExecutor() as pool, socket.create_server(("127.0.0.1", 0)) as server:
        admitted = pool.submit(workers.admit, server, 3, b"right")
        mute = socket.create_connection(server.getsockname())
        with pytest.raises(PermissionError, match="it has another secret"):
            joining(server, b"wrong", 1)
        with socket.create_connection(server.getsockname()) as echo, suppress(OSError):  # what it is told
            for size in (links.NONCE, 32):
                echo.sendall(echo.recv(size))
            echo.recv(1)
        own = [joining(server, b"right", number) for number in (2, 1)]
        for link in reversed(own):
            links.send(link, "here", torch.arange(3.0))
        for link, number in zip(admitted.result(timeout=30), (1, 2), strict=True):
            assert link.getpeername() == own[2 - number].getsockname()
            message, (tensor,) = links.receive(link)
            assert (message, tensor.tolist()) == ("here", [0, 1, 2])
            link.close()
        for link in (mute, *own):
            link.close()
    assert capsys.readouterr().err.count("bpdq: warning: turned away a connection from 127.0.0.1") == 3


def test_a_worker_of_torchrun_that_never_comes_ends_the_run(monkeypatch):
    monkeypatch.setattr(workers, "STARTUP", timedelta(seconds=0.1))
    missing = pytest.raises(WorkerError, match="1 of torchrun's 2 processes have come")
    with socket.create_server(("127.0.0.1", 0)) as server, missing:
        workers.admit(server, 2, b"right")


def test_messages_hold_json_and_tensors_only():
    """What pickle would run when it arrives."""
    a, b = socket.socketpair()
    with a, b:
        with pytest.raises(TypeError, match="not JSON serializable"):
            links.send(a, {"starts": range_start})
        sent = [torch.randn(3, 5).to(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
        sent += [torch.arange(7, dtype=torch.uint8), torch.empty(0, 4), torch.randn(4, 3).T]
        links.send(a, {"damping": 0.1, "error": "ä"}, *sent)
        message, tensors = links.receive(b)
        assert message == {"damping": 0.1, "error": "ä"}
        assert [t.dtype for t in tensors] == [t.dtype for t in sent]
        assert all(torch.equal(x, y) for x, y in zip(tensors, sent, strict=True))
        a.close()
        with pytest.raises(ConnectionError, match="it closed the connection"):
            links.receive(b)


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


def run(*argv, **env):
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())} | env  # threads: sums depend on their number
    done = subprocess.run([sys.executable, "-m", *argv], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_checkpoint_of_two_workers_is_that_of_one(root, one, tmp_path):
    run("bpdq_quantizer", *command(root, tmp_path / "two", *TABLES, "--devices", "cpu,cpu"))
    assert tensors(tmp_path / "two") == one


@pytest.mark.slow
@pytest.mark.parametrize("secret", [{}, {"BPDQ_SECRET": "of this run"}], ids=["no secret", "secret"])
def test_workers_that_torchrun_starts_make_the_same_checkpoint(root, one, tmp_path, secret):
    """As on several machines, where --nnodes and --rdzv-endpoint say which."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [*launcher, "-m", "bpdq_quantizer", *command(root, tmp_path / "two", *TABLES, "--json")]
    done = run(*argv, **secret)
    assert done.stdout.count('"bits_per_weight"') == 1, "one process reports"
    (warning,) = [line for line in done.stderr.splitlines() if "the network must be trusted" in line]
    assert ("the secret of BPDQ_SECRET" if secret else "BPDQ_SECRET is not set") in warning
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
