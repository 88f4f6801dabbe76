"""One command that proves the project on an NVIDIA GPU: what is right, how fast it is, what it costs. `make gpu-check`.

    python -m benchmarks.gpu_check                  # everything, 8 minutes at most, the most informative parts first
    python -m benchmarks.gpu_check --dry-run        # what it would do

Each part is a command of its own with its own time limit, so that one that hangs or fails does not cost the rest.
Their figures go into results/<gpu>-<commit>.json. Exit status: 0 if all that could run passed, 1 if something failed,
2 for bad usage, 3 without a GPU.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from benchmarks.gpu_summary import SUMMARIES
from benchmarks.kernel_bench import markdown

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
SECONDS = 480
KERNEL_TESTS = (
    "test_tiled_linear",
    "test_tiled_moe",
    "test_triton_linear",
    "test_warm",
    "test_hessian",
    "test_solver",
    "test_triton_solver",
    "test_offload",
    "test_cuda",
)
TOKENS = "1,4,8,16,32,64,512,4096"
EXPERTS, EXPERTS_TOKENS = "qwen3-30b-a3b,qwen3-next-80b-a3b", "1,4,8,16,64,512,4096"
WIDTH = ("--coefficient-bits", "8")  # as `bpdq quantize` writes them
CANNOT_RUN = 3
TAIL = 120  # lines of a part's output that the report keeps


class Part(NamedTuple):
    """A command; `figures`, where it writes JSON, is its last argument. seconds: its limit."""

    name: str
    seconds: int
    command: Sequence[str]
    figures: bool = True


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpu_check: error: {message}\n")


def parts(cores: int) -> list[Part]:
    """All parts, the most informative first."""
    module = (sys.executable, "-u", "-m")
    spread = ("-n", str(max(1, min(14, cores - 2)))) if find_spec("xdist") else ()
    tests = [f"tests/{name}.py" for name in KERNEL_TESTS]
    vllm = (*module, "benchmarks.gpu_vllm", "--modes", "graphs")
    pytest = (*module, "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "-W", "ignore")
    return [
        Part("correct", 180, (*pytest, "-m", "gpu and not slow", *spread, *tests), figures=False),
        Part("fast", 110, (*module, "benchmarks.kernel_bench", *WIDTH, "--tokens", TOKENS, "--predict", "--json")),
        Part(
            "experts",
            90,
            (*module, "benchmarks.kernel_bench", *WIDTH, "--model", EXPERTS, "--tokens", EXPERTS_TOKENS, "--json"),
        ),
        Part("rates", 20, (*module, "benchmarks.mma_rates", "--json")),
        Part("model", 70, (*module, "benchmarks.gpu_model", "--json")),
        Part("quantizer", 80, (*module, "benchmarks.gpu_quantize", "--seconds", "60", "--json")),
        Part("sanitizer", 60, (*module, "benchmarks.gpu_sanitize", "--json")),
        Part("vllm-experts", 150, (*vllm, "--experts", "--seconds", "145", "--json")),
        Part("vllm", 200, (*vllm, "--seconds", "195", "--json")),
    ]


def run_part(part: Part, limit: float) -> Row:
    """Run a part for `limit` seconds at most; returns its entry in the report."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figures.json"
        command = [*part.command, *([str(file)] if part.figures else [])]
        start = time.monotonic()
        output, code = run_command(command, limit)
        figures = read_json(file)
    status = {None: "timed out", 0: "passed", CANNOT_RUN: "cannot run here"}.get(code, "failed")
    entry = {"status": status, "exit_status": code, "seconds": round(time.monotonic() - start, 1)}
    return entry | {"command": " ".join(part.command[2:]), "output": output.splitlines()[-TAIL:], "figures": figures}


def run_command(command: Sequence[str], limit: float) -> tuple[str, int | None]:
    """Output, and exit status: None where the command had to be stopped. Its children end with it."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, text=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        with suppress(ProcessLookupError):  # it left none behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        return output.read(), code


def read_json(file: Path) -> Row | None:
    """What a part wrote, if it did and was not stopped while it wrote."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def describe_machine(commit: str | None) -> Row:
    """The GPU, what drives it, and the commit: as given, else git's."""
    import torch
    import triton

    device = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
    git = ["git", "rev-parse", "--short=9", "HEAD"]
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "driver_and_power_limit": first_line(query),
        "commit": commit or first_line(git),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def first_line(command: Sequence[str]) -> str:
    """Of a command's output; "unknown" where there is none."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else "unknown"


def results_file(machine: Row) -> Path:
    """results/<gpu>-<commit>.json"""
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    return ROOT / "results" / f"{gpu}-{machine['commit']}.json"


def table(found: dict[str, Row]) -> str:
    """One line for each part: what became of it, and its figures in a sentence."""
    rows = [[name, row["status"], f"{row['seconds']:.0f}", summarize(name, row)] for name, row in found.items()]
    return markdown(["part", "status", "seconds", "found"], rows)


def summarize(name: str, row: Row) -> str:
    """A part's figures in a sentence; where it wrote none that can be read, the last line of its output."""
    summary: Callable[[Row], str] | None = SUMMARIES.get(name)
    last = next((line for line in reversed(row["output"]) if line.strip()), "")
    if summary is None or not row["figures"]:
        return last.strip("= ")
    try:
        return summary(row["figures"])
    except (KeyError, ValueError, IndexError):  # it was stopped before it had them
        return last


def last_line(found: dict[str, Row], file: Path) -> str:
    """What passed, what did not, where the figures are."""
    groups: dict[str, list[str]] = {}
    for name, row in found.items():
        groups.setdefault(row["status"], []).append(name)
    told = "; ".join(f"{status}: {', '.join(names)}" for status, names in groups.items())
    return f"gpu-check: {told}. Figures: {file}"


def parse_args(argv: list[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(names), metavar="LIST", help="in this order (%(default)s)")
    parser.add_argument("--seconds", type=int, default=SECONDS, metavar="N", help="for all parts (%(default)s)")
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="default: results/<gpu>-<commit>.json; what else is in it stays"
    )
    parser.add_argument("--commit", metavar="HASH", help="of this tree, where it is not a git checkout")
    parser.add_argument("--dry-run", action="store_true", help="list the parts, run nothing")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    unknown = [name for name in args.parts if name not in names]
    if unknown:
        parser.error(f"--parts: unknown {', '.join(unknown)!r}, choose from {', '.join(names)}")
    if args.seconds < 1:
        parser.error("--seconds must be at least 1")
    if args.results and not args.results.absolute().parent.is_dir():
        parser.error(f"--results {args.results}: no such folder")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    everything = parts(os.cpu_count() or 1)
    args = parse_args(argv, [part.name for part in everything])
    chosen = sorted((part for part in everything if part.name in args.parts), key=lambda p: args.parts.index(p.name))
    if args.dry_run:
        for part in chosen:
            print(f"{part.name:12} {part.seconds:4} s at most: python {' '.join(part.command[2:])}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: no NVIDIA GPU here that torch sees, so there is nothing to check", file=sys.stderr)
        return CANNOT_RUN
    machine = describe_machine(args.commit)
    file = args.results or results_file(machine)
    file.parent.mkdir(exist_ok=True)
    report = read_json(file) or {"parts": {}}
    report |= {"machine": machine}
    found: dict[str, Row] = {}
    end = time.monotonic() + args.seconds
    for part in chosen:
        limit = min(part.seconds, end - time.monotonic())
        print(f"gpu-check: {part.name}, {max(0, limit):.0f} s at most", file=sys.stderr, flush=True)
        no_time = {"status": "no time left", "exit_status": None, "seconds": 0.0, "output": [], "figures": None}
        found[part.name] = run_part(part, limit) if limit > 1 else no_time
        print(f"gpu-check: {part.name}: {found[part.name]['status']}", file=sys.stderr, flush=True)
        date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        report["parts"][part.name] = {"commit": machine["commit"], "date": date} | found[part.name]
        file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}, commit {machine['commit']}\n")
    print(table(found) + "\n")
    print(last_line(found, file))
    return int(any(row["status"] not in ("passed", "cannot run here") for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
