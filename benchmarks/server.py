"""Start `vllm serve` for one model, wait until it answers, and stop it together with every process it started.

Shared by the demo, the serving benchmark and the tests that speak HTTP.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 900  # compiling takes 90 s on two CPU cores; a 72B checkpoint reads for minutes
STOP_SECONDS = 10  # a server that still compiles ignores the request to end
LOG_TAIL_LINES = 25
# of a log, the last line of a traceback, with or without the log's own prefix
ERROR = re.compile(r"(\([^)]*\) )?(ERROR [^\]]*\] )?(?P<error>[\w.]*(Error|Exception): .+)")


class ServerError(RuntimeError):
    """The server did not start; the message says why, and ends with the end of its log."""


@dataclass(frozen=True)
class Server:
    """A running `vllm serve`; base_url has no trailing slash and no /v1."""

    base_url: str
    command: tuple[str, ...]
    pid: int

    def memory_bytes(self) -> int:
        """Resident memory of the server's processes, in bytes; pages they share count once per process."""
        server = psutil.Process(self.pid)
        return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(model: str | Path, args: Sequence[str], log: Path, timeout: float = START_SECONDS) -> Iterator[Server]:
    """Run `vllm serve model *args` on a free port of 127.0.0.1, with its output in the file `log`.

    Yields once the server answers, and stops it on the way out, however that is. Raises ServerError if it ends or
    does not answer within `timeout` seconds.
    """
    port = free_port()
    vllm = str(Path(sys.executable).with_name("vllm"))
    command = (vllm, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *args)
    with log.open("w") as output:
        # Its own process group: a Ctrl-C meant for us reaches it through _stop, and _stop reaches its children.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        server = Server(f"http://127.0.0.1:{port}", command, process.pid)
        _wait_until_healthy(server, process, log, timeout)
        yield server
    finally:
        _stop(process)


def answers(base_url: str) -> bool:
    """Whether a vLLM server at base_url is up and ready for requests."""
    # The machine's HTTP proxy, if it has one, has no business between us and the server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base_url}/health", timeout=10):
            return True
    except OSError:
        return False


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes], log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not answers(server.base_url):
        if process.poll() is not None:
            raise ServerError(f"vllm serve ended with status {process.returncode} before it answered; {log_tail(log)}")
        if time.monotonic() > deadline:
            raise ServerError(f"vllm serve did not answer within {timeout:.0f} s; {log_tail(log)}")
        time.sleep(0.5)


def log_tail(log: Path) -> str:
    """Where a process's log is, its first error and how it ends, for the end of an error message."""
    lines = log.read_text(errors="replace").splitlines()
    tail = "\n".join(lines[-LOG_TAIL_LINES:])
    cause = next((f", says {found['error']}\n" for line in lines if (found := ERROR.match(line))), " ")
    return f"its log is {log}{cause}and ends with:\n{tail}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server's process group; kill what is left of it after STOP_SECONDS or at a second Ctrl-C."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(STOP_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
