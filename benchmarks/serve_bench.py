"""Serving benchmark: time to first token (TTFT), time per output token (TPOT), output tokens/s and goodput.

All against concurrency; goodput is the requests/s that meet a target for their latencies.

Starts `vllm serve` for one model after the other, of whatever kind vLLM serves, or attaches to running servers, drives
them with `vllm bench serve --dataset-name random`, and compares the models in a table, a JSON file and a plot, with a
mark on latencies that can't be (`serve_report.doubts`):

    python -m benchmarks.serve_bench --models MODEL MODEL-bpdq MODEL-gptq --goodput ttft:500 tpot:50
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.serve_report import Run, caption, judged, plot, table
from benchmarks.server import ServerError, answers, log_tail, serve

TARGET = re.compile(r"(ttft|tpot|e2el):\d+(\.\d+)?")  # of `vllm bench serve --goodput`


class BenchError(RuntimeError):
    """A run whose numbers must not be reported; the message is one sentence and, where it helps, the end of a log."""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 0 all requests answered, 1 any failed, 130 interrupted."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.serve_bench", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "versions": versions(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("models", "output")},
        "runs": [],
    }
    try:
        for run in attached_runs(args) if args.base_url else served_runs(args):
            report["runs"] = judged([*report["runs"], run])
            (args.output / "serve.json").write_text(json.dumps(report, indent=2) + "\n")
    except (BenchError, ServerError) as e:
        print(f"serve_bench: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("serve_bench: interrupted; serve.json has the finished runs", file=sys.stderr)
        return 130
    plot(report).savefig(args.output / "serve.png", dpi=150)
    print(table(report["runs"]))
    print(f"\n{caption(report)}\n{args.output / 'serve.json'}, {args.output / 'serve.png'}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_bench", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--models", nargs="+", metavar="DIR", help="serve these one after the other; first = baseline")
    source.add_argument(
        "--base-url", nargs="+", metavar="URL", help="measure the servers that run there, without /v1; first = baseline"
    )
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 8], metavar="N", help="(%(default)s)")
    parser.add_argument("--input-len", type=int, default=512, help="prompt tokens per request (%(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="output tokens per request (%(default)s)")
    parser.add_argument("--requests", type=int, default=32, help="requests per concurrency (%(default)s)")
    parser.add_argument(
        "--goodput", nargs="+", metavar="NAME:MS", help="count requests that meet all of these: ttft, tpot, e2el in ms"
    )
    parser.add_argument("--server-args", default="", help='one string: --server-args="--max-model-len 2048"')
    parser.add_argument("--output", type=Path, default=Path("bench-output"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    names = [Path(model).name for model in args.models or []]
    if len(set(names)) < len(names):
        parser.error("--models: two folders have the same name, by which the results tell models apart; rename one")
    if min(args.input_len, args.output_len, args.requests, *args.concurrency) < 1:
        parser.error("--concurrency, --input-len, --output-len and --requests must be at least 1")
    if args.requests < max(args.concurrency):
        parser.error(f"--requests {args.requests}: fewer than --concurrency {max(args.concurrency)}; ask for as many")
    for target in args.goodput or ():
        if not TARGET.fullmatch(target):
            parser.error(f"--goodput {target}: expected ttft:MS, tpot:MS or e2el:MS")
    if args.base_url and args.server_args:
        parser.error("--server-args is for the servers of --models; those at --base-url already run")
    return args


def served_runs(args: argparse.Namespace) -> Iterator[Run]:
    """Serve each of --models in turn and yield its runs."""
    for model in args.models:
        name = Path(model).name
        print(f"{name}: starting vllm serve", flush=True)
        # A prompt seen before would be answered from the cache and flatter TTFT.
        server_args = ["--no-enable-prefix-caching", *shlex.split(args.server_args)]
        with serve(model, server_args, args.output / f"{name}.server.log") as server:
            for concurrency in args.concurrency:
                yield bench(server.base_url, name, concurrency, args)


def attached_runs(args: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs against the servers at --base-url, by the names of their models; raises BenchError if none answers
    at one, or two serve the same name."""
    for url in args.base_url:
        if not answers(url):
            raise BenchError(f"no server answers at --base-url {url}")
    names: dict[str, str] = {}
    for i, url in enumerate(args.base_url):
        for concurrency in args.concurrency:
            run = bench(url, f"server{i + 1}", concurrency, args)
            name = Path(run["model_id"]).name
            if names.setdefault(name, url) != url:
                raise BenchError(f"{names[name]} and {url} both serve {name}: start one with --served-model-name")
            yield run | {"model": name}


def bench(base_url: str, name: str, concurrency: int, args: argparse.Namespace) -> Run:
    """One `vllm bench serve` at one concurrency; raises BenchError if it or any of its requests fails."""
    print(f"{name}: {args.requests} requests at concurrency {concurrency}", flush=True)
    result, log = (args.output / f"{name}.c{concurrency}.{suffix}" for suffix in ("json", "log"))
    result.unlink(missing_ok=True)
    command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--base-url", base_url]
    command += ["--dataset-name", "random", "--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    command += ["--num-prompts", str(args.requests), "--max-concurrency", str(concurrency), "--temperature", "0"]
    # Warm up at the measured batch size; new prompts for each concurrency, for servers that cache prefixes.
    command += ["--num-warmups", str(concurrency), "--seed", str(concurrency), "--disable-tqdm"]
    command += ["--goodput", *args.goodput] if args.goodput else []
    command += [
        "--save-result",
        "--save-detailed",
        "--result-dir",
        str(result.parent),
        "--result-filename",
        result.name,
    ]
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status or not result.exists():
        raise BenchError(f"{name} at concurrency {concurrency}: vllm bench serve failed; {log_tail(log)}")
    run = summed(json.loads(result.read_text())) | {"model": name, "concurrency": concurrency}
    check(run, args.requests, args.output_len)
    return run


def summed(result: Run) -> Run:
    """A result without its lists of requests, which stay in its own file, and with the `chunks` that all answers came
    in: gaps between chunks, and the first of each."""
    chunks = sum(len(gaps) + 1 for gaps, ttft in zip(result["itls"], result["ttfts"], strict=True) if ttft)
    return {key: value for key, value in result.items() if not isinstance(value, list)} | {"chunks": chunks}


def check(run: Run, requests: int, output_len: int) -> None:
    """Raise BenchError unless all requests of the run were answered in full: throughput of the others is no result."""
    place = f"{run['model']} at concurrency {run['concurrency']}"
    if run["failed"] or run["completed"] != requests:
        raise BenchError(
            f"{place}: of {requests} requests {run['completed']} completed and {run['failed']} failed, so its "
            "throughput means nothing"
        )
    if run["total_output_tokens"] != requests * output_len:
        raise BenchError(
            f"{place}: {run['total_output_tokens']} tokens came, not the {requests * output_len} of {requests} whole "
            "answers, so its figures mean nothing: the server's log says why it cut answers short"
        )


def machine() -> dict[str, Any]:
    """Names of the processor and GPUs, and the cores this process may use."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    return {"cpu": names[0] if names else platform.machine(), "cores": len(os.sched_getaffinity(0)), "gpus": gpus}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("vllm-bpdq", "vllm", "torch", "transformers")} | {
        "python": platform.python_version()
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a `kill` stops the server too
    sys.exit(main())
