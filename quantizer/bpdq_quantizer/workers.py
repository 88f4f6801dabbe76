"""The rows of a stage or table, solved by several workers (`--devices`), on one machine or on several.

Rows are independent given H. Rank 0 runs the pipeline; for every stage it broadcasts H, sends each worker its share of
the rows, solves its own, and collects codes and coefficients. torch.distributed with gloo, which is a part of torch,
does that in one broadcast and one exchange with each worker; a scheduler like Ray would have nothing to schedule.

    rank 0      job, H  ->  all       rows -> each       solves its share       <- outcome, codes, c, loss, energy
    a worker    waits for a job       <- rows            solves its share       -> outcome, codes, c, loss, energy

BLAS rounds a column differently in a matrix of another width. On CPUs shares are therefore whole chunks of ROWS rows,
which are solved one by one whoever does it, so that results do not depend on the number of workers, one included. On
CUDA, where a step takes as long for a few rows as for many, a share is solved at once, and results with another number
of workers differ by rounding. Workers use as many CPU threads as rank 0.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bpdq_quantizer.errors import InputError, WorkerError
from bpdq_quantizer.solver import Solution, quantize_linear

ROWS = 1024
SERVE = "import sys; from bpdq_quantizer.workers import serve; serve(sys.argv[1])"
STARTUP = timedelta(minutes=5)  # for all workers to come up
PATIENCE = timedelta(days=30)  # of a worker that waits for rank 0, which may be tuning; a closed connection ends it


class Job(NamedTuple):
    """What a worker is told of a stage. shares: rows of each rank; options: for `quantize_linear`."""

    shares: list[int]
    inputs: int
    dtype: torch.dtype
    threads: int
    options: dict[str, Any]


def named_devices(names: str) -> list[torch.device]:
    """The devices of a comma-separated list; raises InputError for one that torch doesn't see."""
    devices = []
    for name in names.split(","):
        try:
            device = torch.device(name)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise InputError(f"--devices {names}: {name!r} is none, expected cpu, cuda:0, cuda:1, ...")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--devices {names}: torch sees {torch.cuda.device_count()} CUDA devices, not {name}")
        devices.append(device)
    return devices


def own_device(devices: str | None, device: str) -> torch.device:
    """Where this process computes: `device` (auto, cpu or cuda), or the first of `devices`; of several processes that
    torchrun starts on a machine, each has its own. Raises InputError."""
    if devices is not None and device != "auto":
        raise InputError(f"--device {device} --devices {devices}: give one of them")
    local = int(os.environ.get("LOCAL_RANK", 0)) if _launched() else 0
    if devices is not None:
        members = named_devices(devices)
        if local >= len(members):
            raise InputError(f"--devices {devices}: torchrun started more processes than that on this machine")
        return members[local]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device, use --device cpu")
    return torch.device(device, local) if device == "cuda" and _launched() else torch.device(device)


def rank() -> int:
    """This process's number where torchrun started it, else 0."""
    return int(os.environ["RANK"]) if _launched() else 0


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextmanager
def team(names: str | None) -> Iterator[Callable[..., Solution]]:
    """`quantize_linear` over workers: one for each of `named_devices` on this machine, the first being this process,
    or, where torchrun started this process as rank 0, those that it started too.

    Raises WorkerError, from here or from what is called in between, if one does not start, fails or ends.
    """
    devices = named_devices(names) if names is not None else []
    if len(devices) < 2 and not _launched():
        yield partial(quantize_linear, rows=_unit(devices[0])) if devices else quantize_linear
        return
    children, exits = [], ExitStack()
    try:
        if _launched():
            store, _, size = next(dist.rendezvous("env://", timeout=STARTUP))
        else:
            size = len(devices)
            store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, timeout=STARTUP, wait_for_workers=False)
            children = [_spawn(number, device, size, store.port) for number, device in enumerate(devices) if number]
        _wait_for_all(store, size, children)
        exits.enter_context(_group(store, 0, size))

        yield partial(_solve_together, children)
        with suppress(RuntimeError):  # of a worker that is gone when all is done
            dist.broadcast_object_list([None])
        for child in children:
            child.wait(STARTUP.total_seconds())
    finally:
        for child in children:
            child.kill()
            child.wait()
        exits.close()


@contextmanager
def _group(store: dist.Store, number: int, size: int) -> Iterator[None]:
    dist.init_process_group("gloo", store=store, rank=number, world_size=size, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _spawn(number: int, device: torch.device, size: int, port: int) -> subprocess.Popen:
    address = {"RANK": number, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = {**os.environ, **{name: str(value) for name, value in address.items()}}
    # in a session of its own: Ctrl-C is for rank 0
    return subprocess.Popen([sys.executable, "-c", SERVE, str(device)], env=env, start_new_session=True)


def _wait_for_all(store: dist.Store, size: int, children: list[subprocess.Popen]) -> None:
    """Before anything waits without a limit: every worker is there, or WorkerError."""
    deadline = time.monotonic() + STARTUP.total_seconds()
    while not store.check([f"worker {number}" for number in range(1, size)]):
        if any(child.poll() is not None for child in children) or time.monotonic() > deadline:
            raise WorkerError(f"not all workers of --devices have started{_exits(children)}: see their messages above")
        time.sleep(0.05)


def _exits(children: list[subprocess.Popen]) -> str:
    time.sleep(0.5 if children else 0)  # a connection closes a moment before its process ends
    ended = [f"number {i} with exit status {c.poll()}" for i, c in enumerate(children, 1) if c.poll() is not None]
    return f" ({', '.join(ended)})" if ended else ""


def _unit(device: torch.device) -> int | None:
    return ROWS if device.type == "cpu" else None


def _solve_together(
    children: list[subprocess.Popen], W: Tensor, H: Tensor, bits: int, group_size: int, **options: Any
) -> Solution:
    unit = _unit(W.device)
    options |= {"bits": bits, "group_size": group_size, "rows": unit}
    shares = shares_of(len(W), dist.get_world_size(), unit or 1)
    own, *others = W.split(shares)
    busy = [(number, rows) for number, rows in enumerate(others, 1) if len(rows)]
    with _connected(children):
        dist.broadcast_object_list([Job(shares, W.shape[1], W.dtype, torch.get_num_threads(), options)])
        dist.broadcast(H.cpu(), 0)
        for number, rows in busy:
            dist.send(rows.cpu().contiguous(), number)
    parts = [quantize_linear(own, H, **options)]
    with _connected(children):
        parts += [_receive(number, parts[0], len(rows)) for number, rows in busy]
    return Solution(
        codes=torch.cat([part.codes.to(W.device) for part in parts]),
        c=torch.cat([part.c.to(W.device) for part in parts], dim=2),
        loss=torch.cat([part.loss.to(W.device) for part in parts]),
        energy=torch.cat([part.energy.to(W.device) for part in parts]),
        damping=parts[0].damping,
    )


@contextmanager
def _connected(children: list[subprocess.Popen]) -> Iterator[None]:
    """Turn what torch says of a broken connection into a WorkerError."""
    try:
        yield
    except RuntimeError as e:
        raise WorkerError(f"a worker of --devices is gone{_exits(children)}: {e}") from e


def shares_of(rows: int, workers: int, unit: int) -> list[int]:
    """Rows for each worker, in whole units but for the last one, as even as that allows."""
    units = -(-rows // unit)
    bounds = [min(rows, -(-units * number // workers) * unit) for number in range(workers + 1)]
    return [stop - start for start, stop in pairwise(bounds)]


def _receive(number: int, like: Solution, rows: int) -> Solution:
    """The outcome of worker `number`, which raises its error as WorkerError; like: a part with other rows."""
    outcome = [None]
    dist.recv_object_list(outcome, number)
    if isinstance(outcome[0], str):
        raise WorkerError(f"worker {number} of --devices: {outcome[0]}")
    shapes = [(rows, like.codes.shape[1]), (*like.c.shape[:2], rows), (rows,), (rows,)]
    tensors = [torch.empty(shape, dtype=part.dtype) for shape, part in zip(shapes, like, strict=False)]
    for tensor in tensors:
        dist.recv(tensor.view(torch.uint8), number)
    return Solution(*tensors, outcome[0])


def serve(device: torch.device | str) -> None:
    """Solve what rank 0 hands out, on `device`, until it says that all is done or its connection closes."""
    torch.set_float32_matmul_precision("highest")
    store, number, size = next(dist.rendezvous("env://", timeout=STARTUP))
    store.set(f"worker {number}", "is there")
    with _group(store, number, size):
        try:
            while (job := _next_job()) is not None:
                _work(job, number, device)
        except RuntimeError as e:
            sys.exit(f"bpdq: worker {number} ends, as rank 0 is gone ({e})")


def _next_job() -> Job | None:
    box = [None]
    dist.broadcast_object_list(box)
    return box[0]


def _work(job: Job, number: int, device: torch.device | str) -> None:
    H = torch.empty(job.inputs, job.inputs)
    dist.broadcast(H, 0)
    if not job.shares[number]:
        return
    W = torch.empty(job.shares[number], job.inputs, dtype=job.dtype)
    dist.recv(W, 0)
    torch.set_num_threads(job.threads)
    try:
        solution = quantize_linear(W.to(device), H.to(device), **job.options)
    except Exception as e:  # whatever it is, rank 0 must learn of it
        dist.send_object_list([f"{type(e).__name__}: {e}"], 0)
        return
    dist.send_object_list([solution.damping], 0)
    for tensor in solution[:-1]:
        dist.send(tensor.cpu().contiguous().view(torch.uint8), 0)
