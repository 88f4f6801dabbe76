"""The rows of a stage, an embedding or an LM head, solved by several workers (`--devices`), on one machine or more.

Rows are independent given H, or, where covariances of outputs are known, chunks of them are, and so are the matrices of
several experts, each with its H. Rank 0 runs the pipeline; for every stage it sends each worker H and its share of the
rows (with their covariances), or its share of the matrices, solves its own, and collects codes and coefficients: two
messages with each worker (`run.links`), for which a scheduler like Ray would have nothing to schedule.

    rank 0      job, H, rows -> each       solves its share       <- damping or error, codes, c, loss, energy
    a worker    waits for a job            solves its share       -> damping or error, codes, c, loss, energy

Workers that this process starts inherit a pair of connected sockets: nobody else can reach those, and no port is open.
Workers that torchrun starts, perhaps on other machines, connect over TCP and must know a secret, that of SECRET or a
random one in torchrun's store, which whoever reaches that store can read. A message can't run anything, whoever sent
it. Nothing is encrypted.

BLAS rounds a column differently in a matrix of another width. On CPUs shares are therefore whole chunks of ROWS rows,
or those of the covariances, which are solved one by one whoever does it, so that results do not depend on the number of
workers, one included. On CUDA, where a step takes as long for a few rows as for many, a share is solved at once, and
results with another number of workers differ by rounding. Workers use as many CPU threads as rank 0.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bpdq_quantizer.algorithm.grid import Start, paper_start, range_start, residual_start
from bpdq_quantizer.algorithm.solution import Solution, joined, joined_rows
from bpdq_quantizer.algorithm.solver import STARTS, quantize_linear
from bpdq_quantizer.errors import InputError, WorkerError
from bpdq_quantizer.run.links import DTYPES, authenticate, receive, send

ROWS = 1024
SERVE_JOBS = (
    "import socket, sys; from bpdq_quantizer.run.workers import serve_jobs; "
    "serve_jobs(socket.socket(fileno=0), int(sys.argv[1]), sys.argv[2])"
)
STARTUP = timedelta(minutes=5)  # for all workers to come up
GREETING = 10  # seconds in which whoever connects must prove to be a worker
SECRET = "BPDQ_SECRET"
NAMED_STARTS = {start.__name__: start for start in (paper_start, range_start, residual_start)}


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
    links, children = [], []
    try:
        if _launched():
            links = _gather()
        else:
            for number, device in enumerate(devices[1:], 1):
                own, theirs = socket.socketpair()
                links.append(own)
                with theirs:
                    children.append(_spawn(number, device, theirs))
            _wait_for_all(links, children)

        yield partial(_solve_together, links, children)
        with suppress(OSError):  # of a worker that is gone when all is done
            for link in links:
                send(link, None)
        for child in children:
            child.wait(STARTUP.total_seconds())
    finally:
        for child in children:
            child.kill()
            child.wait()
        for link in links:
            link.close()


def _spawn(number: int, device: torch.device, link: socket.socket) -> subprocess.Popen:
    # in a session of its own: Ctrl-C is for rank 0
    argv = [sys.executable, "-c", SERVE_JOBS, str(number), str(device)]
    return subprocess.Popen(argv, stdin=link, start_new_session=True)


def _wait_for_all(links: list[socket.socket], children: list[subprocess.Popen]) -> None:
    """Before anything waits without a limit: every worker has said its number, or WorkerError."""
    for link in links:
        link.settimeout(STARTUP.total_seconds())
        try:
            receive(link)
        except OSError as e:
            raise WorkerError(
                f"not all workers of --devices have started{_exits(children)}: see their messages above"
            ) from e
        link.settimeout(None)


def _gather() -> list[socket.socket]:
    """Connections to the workers that torchrun started, in the order of their ranks."""
    with _reached("torchrun's store"):
        store, _, size = next(dist.rendezvous("env://", timeout=STARTUP))
        alone = os.environ.get("LOCAL_WORLD_SIZE") == str(size)  # on this machine
        dual = not alone and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("127.0.0.1" if alone else "", 0), family=family, dualstack_ipv6=dual) as server:
            secret = os.environ.get(SECRET)
            shared = secret or secrets.token_hex(32)
            host = "127.0.0.1" if alone else os.environ["MASTER_ADDR"]
            store.set("bpdq", json.dumps([host, server.getsockname()[1], None if secret else shared]))
            known = f"the secret of {SECRET}" if secret else f"a secret from torchrun's store, as {SECRET} is not set"
            warning = f"workers connect with {known}, and unencrypted: the network must be trusted"
            print(f"bpdq: warning: {warning}", file=sys.stderr)
            return admit(server, size, shared.encode())


def admit(server: socket.socket, size: int, secret: bytes) -> list[socket.socket]:
    """Connections to workers 1 to size - 1, in that order; whoever doesn't know the secret is turned away.

    Raises WorkerError where one doesn't come."""
    deadline, found = time.monotonic() + STARTUP.total_seconds(), {}
    while len(found) < size - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            link, (address, *_) = server.accept()
        except TimeoutError as e:
            raise WorkerError(f"{len(found) + 1} of torchrun's {size} processes have come: see their messages") from e
        link.settimeout(GREETING)
        try:
            authenticate(link, secret, b"rank 0", b"worker")
            number, _ = receive(link)
        except OSError as e:
            print(f"bpdq: warning: turned away a connection from {address}: {e}", file=sys.stderr)
            link.close()
            continue
        link.settimeout(None)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        found[number] = link
    return [found[number] for number in range(1, size)]


def join_torchrun(device: torch.device) -> None:
    """`serve_jobs`, where torchrun started this process. Raises WorkerError if rank 0 is not found."""
    with _reached("rank 0"):
        store, number, _ = next(dist.rendezvous("env://", timeout=STARTUP))
        host, port, secret = json.loads(store.get("bpdq"))
        link = socket.create_connection((host, port), STARTUP.total_seconds())
        secret = os.environ.get(SECRET) or secret
        if secret is None:
            raise PermissionError(f"it has a secret: set {SECRET} here too")
        authenticate(link, secret.encode(), b"worker", b"rank 0")
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    serve_jobs(link, number, device)


@contextmanager
def _reached(whom: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as e:  # torch's are RuntimeErrors
        raise WorkerError(f"no connection to {whom}: {e}") from e


def _exits(children: list[subprocess.Popen]) -> str:
    time.sleep(0.5 if children else 0)  # a connection closes a moment before its process ends
    ended = [f"number {i} with exit status {c.poll()}" for i, c in enumerate(children, 1) if c.poll() is not None]
    return f" ({', '.join(ended)})" if ended else ""


def _unit(device: torch.device) -> int | None:
    return ROWS if device.type == "cpu" else None


def _solve_together(
    links: list[socket.socket],
    children: list[subprocess.Popen],
    W: Tensor,
    H: Tensor,
    bits: int,
    group_size: int,
    coefficient_bits: int = 16,
    *,
    covariances: Sequence[Tensor] = (),
    starts: Sequence[Start] = STARTS,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Solution:
    unit = _unit(W.device)
    options |= {"bits": bits, "group_size": group_size, "coefficient_bits": coefficient_bits, "rows": unit}
    batch, members = W.ndim == 3, len(links) + 1
    if covariances:
        shares = [*_split(covariances, shares_of(len(covariances), members, 1))]
        counts = [sum(map(len, share)) for share in shares]
    else:
        shares = [[]] * members
        counts = shares_of(len(W), members, 1 if batch else unit or 1)
    hessians = H.split(counts) if batch else [H] * members
    jobs = [(w, h, *share) for w, h, share in zip(W.split(counts), hessians, shares, strict=True)]
    busy = [(number, link) for number, link in enumerate(links, 1) if counts[number]]
    job = {"threads": torch.get_num_threads(), "starts": [start.__name__ for start in starts], "dtype": str(dtype)}
    with _connected(children):
        for number, link in busy:
            send(link, job | {"options": options}, *jobs[number])
    w, h, *share = jobs[0]
    parts = [quantize_linear(w, h, covariances=share, starts=starts, dtype=dtype, **options)]
    with _connected(children):
        replies = [(number, *receive(link)) for number, link in busy]
    for number, reply, tensors in replies:
        if "error" in reply:
            raise WorkerError(f"worker {number} of --devices: {reply['error']}")
        codes, c, loss, energy, *s = (tensor.to(W.device) for tensor in tensors)
        parts.append(Solution(codes, c, loss, energy, torch.tensor(reply["damping"], dtype=torch.float64), *s))
    return joined(parts, torch.cat) if batch else joined_rows(parts)


def _split(items: Sequence[Tensor], counts: Sequence[int]) -> Iterator[Sequence[Tensor]]:
    """So many of them in turn."""
    rest = iter(items)
    return ([*islice(rest, count)] for count in counts)


@contextmanager
def _connected(children: list[subprocess.Popen]) -> Iterator[None]:
    """Turn what a broken connection raises into a WorkerError."""
    try:
        yield
    except OSError as e:
        raise WorkerError(f"a worker of --devices is gone{_exits(children)}: {e}") from e


def shares_of(rows: int, workers: int, unit: int) -> list[int]:
    """Rows, or matrices, for each worker, in whole units but for the last one, as even as that allows."""
    units = -(-rows // unit)
    bounds = [min(rows, -(-units * number // workers) * unit) for number in range(workers + 1)]
    return [stop - start for start, stop in pairwise(bounds)]


def serve_jobs(link: socket.socket, number: int, device: torch.device | str) -> None:
    """Solve what rank 0 hands out, on `device`, until it says that all is done or its connection closes."""
    torch.set_float32_matmul_precision("highest")
    with closing(link):
        try:
            send(link, number)
            while (job := receive(link))[0] is not None:
                reply, tensors = _solved(*job, device)
                send(link, reply, *tensors)
        except OSError as e:
            sys.exit(f"bpdq: worker {number} ends, as rank 0 is gone ({e})")


def _solved(
    job: dict[str, Any], tensors: list[Tensor], device: torch.device | str
) -> tuple[dict[str, Any], list[Tensor]]:
    torch.set_num_threads(job["threads"])
    try:
        W, H, *covariances = (tensor.to(device) for tensor in tensors)
        starts, dtype = [NAMED_STARTS[name] for name in job["starts"]], DTYPES[job["dtype"]]
        solution = quantize_linear(W, H, covariances=covariances, starts=starts, dtype=dtype, **job["options"])
    except Exception as e:  # whatever it is, rank 0 must learn of it
        return {"error": f"{type(e).__name__}: {e}"}, []
    tensors = [solution.codes, solution.c, solution.loss, solution.energy]
    return {"damping": solution.damping.tolist()}, tensors if solution.s is None else [*tensors, solution.s]
