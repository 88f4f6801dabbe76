"""Quality benchmark: perplexity and closeness to the 16-bit model over models, methods, bits and group sizes.

Quantizes every combination in a process of its own, evaluates each, and writes a JSON file, a table and a plot:

    python -m benchmarks.quality_bench --models MODEL --calibration train.txt --text test.txt --output quality

Finished checkpoints stay in OUTPUT/checkpoints and are not made again. KL and top-1 agreement compare a model's
next-token distributions with those of its 16-bit original on the same text. `--tasks` adds lm-eval's tasks, run in
transformers or, with `--tasks-through vllm`, against `vllm serve`. GPTQ comes from llm-compressor, which
needs versions that vLLM does not: give it an environment of its own and name its interpreter with --gptq-python.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality_picture import plot
from benchmarks.serve_bench import machine
from benchmarks.server import ServerError
from benchmarks.tasks import through_vllm
from bpdq_kernels.format import Scheme
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.evaluation.compare import summary, token_scores
from bpdq_quantizer.evaluation.logits import Logits, opened
from bpdq_quantizer.evaluation.tasks import check_tasks, in_transformers
from bpdq_quantizer.model.calibration import file_windows
from bpdq_quantizer.model.support import FLOATS
from bpdq_quantizer.model.tokens import load_tokenizer

METHODS = {  # options of `bpdq quantize`; gptq has a script of its own
    "paper": ["--solver", "paper"],
    "bpdq": [],
    "bpdq-mixed": [],  # --target-bpw: as many bits as uniform k and G take
    "bpdq-rotated": ["--rotate", "hadamard"],
    "bpdq-tuned": ["--tune", "model"],
    "bpdq-mixed-tuned": ["--tune", "model"],
    "bpdq-rotated-tuned": ["--rotate", "hadamard", "--tune", "model"],
    "gptq": [],
}
CPU = torch.device("cpu")
Row = dict[str, Any]


class BenchError(RuntimeError):
    """A run that failed; the message is one sentence."""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 0 done, 1 a run failed, 2 bad input."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.quality_bench", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(),
        "rows": [],
    }
    try:
        if args.tasks:
            check_tasks(args.tasks, args.task_folder)
        for row in measure(args):
            report["rows"].append(row)
            (args.output / "quality.json").write_text(json.dumps(report, indent=2) + "\n")
    except InputError as e:
        print(f"quality_bench: error: {e}", file=sys.stderr)
        return 2
    except BenchError as e:
        print(f"quality_bench: error: {e}", file=sys.stderr)
        return 1
    (args.output / "quality.md").write_text(table(report["rows"]) + "\n")
    plot(report["rows"], "perplexity").savefig(args.output / "quality.png", dpi=150)
    print(table(report["rows"]))
    print(f"\n{args.output}/quality.json, quality.md, quality.png")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, metavar="DIR", help="16-bit models")
    parser.add_argument("--calibration", required=True, metavar="TEXT", help="as of `bpdq quantize`")
    parser.add_argument("--text", required=True, metavar="FILE", help="what perplexity is measured on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["paper", "bpdq"], help="(%(default)s)")
    parser.add_argument("--bits", nargs="+", type=int, default=[2], metavar="K", help="(%(default)s)")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[64], metavar="G", help="(%(default)s)")
    parser.add_argument("--coefficient-bits", type=int, default=8, help="of all but `paper`: 8 or 16 (%(default)s)")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows (%(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a calibration window (%(default)s)")
    parser.add_argument("--eval-seq-len", type=int, default=1024, help="tokens of a test window (%(default)s)")
    parser.add_argument("--windows", type=int, default=20, help="test windows (%(default)s)")
    parser.add_argument("--tune-steps", type=int, help="as of `bpdq quantize`")
    parser.add_argument("--tune-samples", type=int, help="likewise")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="lm-eval tasks to run too")
    parser.add_argument("--task-folder", metavar="DIR", help="of YAML files of tasks that lm-eval does not have")
    parser.add_argument("--tasks-limit", type=int, metavar="N", help="the first N documents of each (all)")
    parser.add_argument("--tasks-through", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--serve-args", default="", metavar="ARGS", help="options of `vllm serve`, in one string")
    parser.add_argument("--gptq-python", metavar="EXE", help="interpreter of an environment with llm-compressor")
    parser.add_argument("--output", type=Path, default=Path("quality"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    if "gptq" in args.methods and not args.gptq_python:
        parser.error(
            "--methods gptq needs --gptq-python: python -m venv gptq-env && gptq-env/bin/pip install llmcompressor, "
            "then --gptq-python gptq-env/bin/python"
        )
    names = [Path(model).name for model in args.models]
    if len(set(names)) < len(names):
        parser.error("--models: two folders have the same name, by which the results tell models apart; rename one")
    return args


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each 16-bit model, then for each of its quantized versions."""
    for model in args.models:
        tokens = file_windows(args.text, load_tokenizer(model), args.eval_seq_len, args.windows)
        named = {"model": Path(model).name}
        with opened(model, tokens, CPU, args.text) as reference:
            yield named | {"method": "16-bit", "bits_per_weight": 16.0} | evaluate(model, tokens, reference, args)
            for method, bits, group_size in product(args.methods, args.bits, args.group_sizes):
                scheme = Scheme(bits, group_size, width_of(method, args))
                print(f"{named['model']}: {method}, k = {bits}, G = {group_size}", flush=True)
                name = f"{named['model']}-{method}-k{bits}-g{group_size}-c{scheme.coefficient_bits}"
                checkpoint = args.output / "checkpoints" / name
                cost = quantize(model, method, scheme, checkpoint, args)
                quality = evaluate(str(checkpoint), tokens, reference, args)
                yield named | {"method": method} | vars(scheme) | cost | quality


def width_of(method: str, args: argparse.Namespace) -> int:
    """Bits of a method's coefficients."""
    return 16 if method in ("paper", "gptq") else args.coefficient_bits


def quantize(model: str, method: str, scheme: Scheme, checkpoint: Path, args: argparse.Namespace) -> Row:
    """Make `checkpoint` unless it is there; returns bits_per_weight, seconds, cpu_seconds and peak_memory_bytes."""
    settings = ["--output", checkpoint, "--bits", scheme.bits, "--group-size", scheme.group_size]
    settings += ["--calibration", args.calibration]
    settings += ["--samples", args.samples, "--seq-len", args.seq_len]
    if method == "gptq":
        command = [args.gptq_python, Path(__file__).with_name("gptq_peer.py"), model, *settings]
    else:
        command = [sys.executable, "-m", "bpdq_quantizer", "quantize", model, *settings, *METHODS[method], "--resume"]
        command += ["--special-tokens", "none"]  # as the GPTQ peer calibrates, and as perplexity is measured here
        command += ["--embed-bits", FLOATS]  # as peers leave the tables
        command += ["--coefficient-bits", scheme.coefficient_bits]
        if "-mixed" in method:
            command += ["--target-bpw", scheme.bits_per_weight]
        for option in ("tune_steps", "tune_samples"):
            if "--tune" in METHODS[method] and getattr(args, option):
                command += [f"--{option.replace('_', '-')}", getattr(args, option)]
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if not checkpoint.exists() and subprocess.run([str(part) for part in command]).returncode:
        raise BenchError(f"{checkpoint.name}: quantizing failed, its message is above")
    report = json.loads((checkpoint / "quantization_report.json").read_text())
    return {
        "bits_per_weight": report["bits_per_weight"],
        "seconds": report["seconds"],
        "cpu_seconds": report["cpu_seconds"],
        "peak_memory_bytes": report["peak_host_memory_bytes"],
    }


def evaluate(path: str, tokens: Tensor, reference: Logits, args: argparse.Namespace) -> Row:
    """Perplexity of a model, and how close it is to the 16-bit one (`evaluation.compare`), on windows [W, L] of ids;
    scores of `--tasks` under the key `tasks`."""
    started = time.perf_counter()
    with opened(path, tokens, CPU, args.text) as logits:
        found = summary(token_scores(reference, logits, tokens))
    return found | {"evaluation_seconds": time.perf_counter() - started} | run_tasks(path, args)


def run_tasks(path: str, args: argparse.Namespace) -> Row:
    if not args.tasks:
        return {}
    how = args.tasks, args.task_folder, args.tasks_limit
    if args.tasks_through == "transformers":
        return {"tasks": in_transformers(load_model(path, torch.float32), load_tokenizer(path), *how)}
    serve_args, log = shlex.split(args.serve_args), args.output / f"{Path(path).name}.log"
    try:
        return {"tasks": through_vllm(path, *how, serve_args, log)}
    except ServerError as e:
        raise BenchError(f"{path}: {e}") from e


def table(rows: list[Row]) -> str:
    """The rows as a markdown table."""
    names = list(rows[0].get("tasks", {}))
    heads = ["model", "method", "k", "G", "bits/weight", "perplexity", "KL, nats", "same top token", "seconds"]
    heads += ["CPU seconds", "peak GB", *names]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in rows:
        cost = ["", "", ""]
        if "seconds" in r:
            peak = r["peak_memory_bytes"]  # None where the system does not say
            cost = [f"{r['seconds']:.0f}", f"{r['cpu_seconds']:.0f}", "" if peak is None else f"{peak / 1e9:.2f}"]
        cells = [r["model"], r["method"], r.get("bits", ""), r.get("group_size", ""), f"{r['bits_per_weight']:.3f}"]
        cells += [f"{r['perplexity']:.2f}", f"{r['kl']:.4f}", f"{r['top1_agreement']:.1%}", *cost]
        cells += [f"{r['tasks'][name]:.4g}" for name in names]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
