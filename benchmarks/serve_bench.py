"""Serving benchmark: time to first token (TTFT), time per output token (TPOT) and output tokens/s against concurrency.

Starts `vllm serve` for one model after the other, or attaches to a running server, drives it with
`vllm bench serve --dataset-name random`, and compares the models in a table, a JSON file and a plot:

    python -m benchmarks.serve_bench --models MODEL MODEL-bpdq --output bench-output
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.server import ServerError, answers, log_tail, serve

Run = dict[str, Any]  # a result of `vllm bench serve`, with `model` (its folder name) and `concurrency` added
COLORS = ("#4c566a", "#d1495b", "#2a7f9e", "#e0a030", "#6a994e", "#8a5a9e")


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
            report["runs"].append(run)
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
    source.add_argument("--base-url", help="measure the server that runs at this URL, without /v1")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 8], metavar="N", help="(%(default)s)")
    parser.add_argument("--input-len", type=int, default=512, help="prompt tokens per request (%(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="output tokens per request (%(default)s)")
    parser.add_argument("--requests", type=int, default=32, help="requests per concurrency (%(default)s)")
    parser.add_argument("--server-args", default="", help='one string: --server-args="--max-model-len 2048"')
    parser.add_argument("--output", type=Path, default=Path("bench-output"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    names = [Path(model).name for model in args.models or []]
    if len(set(names)) < len(names):
        parser.error("--models: two folders have the same name, by which the results tell models apart; rename one")
    if min(args.input_len, args.output_len, args.requests, *args.concurrency) < 1:
        parser.error("--concurrency, --input-len, --output-len and --requests must be at least 1")
    if args.base_url and args.server_args:
        parser.error("--server-args is for the servers of --models; the one at --base-url already runs")
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
    """Yield the runs against the server at --base-url; raises BenchError if none answers there."""
    if not answers(args.base_url):
        raise BenchError(f"no server answers at --base-url {args.base_url}")
    for concurrency in args.concurrency:
        run = bench(args.base_url, "server", concurrency, args)
        yield run | {"model": Path(run["model_id"]).name}


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
    command += ["--save-result", "--result-dir", str(result.parent), "--result-filename", result.name]
    with log.open("w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    if status or not result.exists():
        raise BenchError(f"{name} at concurrency {concurrency}: vllm bench serve failed; {log_tail(log)}")
    run = json.loads(result.read_text()) | {"model": name, "concurrency": concurrency}
    check(run, args.requests)
    return run


def check(run: Run, asked: int) -> None:
    """Raise BenchError unless all `asked` requests of the run were answered: throughput of the others is no result."""
    if run["failed"] or run["completed"] != asked:
        raise BenchError(
            f"{run['model']} at concurrency {run['concurrency']}: of {asked} requests {run['completed']} completed "
            f"and {run['failed']} failed, so its throughput means nothing"
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


def caption(report: dict[str, Any]) -> str:
    """One line that says what was measured where."""
    hardware, settings = report["machine"], report["settings"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    return (
        f"{device}; vLLM {report['versions']['vllm']}; {settings['requests']} requests of "
        f"{settings['input_len']} + {settings['output_len']} tokens per concurrency"
    )


def table(runs: Sequence[Run]) -> str:
    """The runs as text, models side by side at each concurrency; `ratio` is output tokens/s over the first model's."""
    width = max(len(run["model"]) for run in runs)
    head = f"{'':<{width}}{'':>13}{'TTFT, ms':>18}{'TPOT, ms':>18}{'output':>11}"
    lines = [
        head,
        f"{'model':<{width}}{'concurrency':>13}" + f"{'median':>9}{'p99':>9}" * 2 + f"{'tokens/s':>11}{'ratio':>8}",
    ]
    for run in sorted(runs, key=lambda run: run["concurrency"]):
        base = next(r for r in runs if r["concurrency"] == run["concurrency"])
        times = (run[f"{which}_{metric}_ms"] for metric in ("ttft", "tpot") for which in ("median", "p99"))
        lines.append(
            f"{run['model']:<{width}}{run['concurrency']:>13}"
            + "".join(f"{t:>9.1f}" for t in times)
            + f"{run['output_throughput']:>11.1f}{run['output_throughput'] / base['output_throughput']:>8.2f}"
        )
    return "\n".join(lines)


def plot(report: dict[str, Any]) -> Figure:
    """Output tokens/s, and TPOT (median solid, p99 dashed), against concurrency; one color per model."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    throughput, tpot = figure.subplots(1, 2)
    for i, model in enumerate(dict.fromkeys(run["model"] for run in report["runs"])):
        runs = sorted((r for r in report["runs"] if r["model"] == model), key=lambda run: run["concurrency"])
        x = [run["concurrency"] for run in runs]
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": "o"}
        throughput.plot(x, [run["output_throughput"] for run in runs], label=model, linewidth=2, **style)
        tpot.plot(x, [run["median_tpot_ms"] for run in runs], label=f"{model}, median", linewidth=2, **style)
        p99 = [run["p99_tpot_ms"] for run in runs]
        tpot.plot(x, p99, label=f"{model}, p99", linewidth=1, linestyle="--", markersize=4, alpha=0.7, **style)
    ticks = sorted({run["concurrency"] for run in report["runs"]})
    _finish(throughput, "Output throughput (higher is better)", "output tokens/s", ticks)
    _finish(tpot, "Time per output token (lower is better)", "TPOT, ms", ticks)
    figure.supxlabel(caption(report), fontsize=8, color="#666666")
    return figure


def _finish(axes: Axes, title: str, unit: str, ticks: list[int]) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel(unit)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.25)  # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a `kill` stops the server too
    sys.exit(main())
