"""Where a decode step goes: the parts of a token of models in vLLM on this CPU, by torch's profiler.

    OMP_NUM_THREADS=2 python -m benchmarks.decode_profile MODEL MODEL-bpdq --output decode

Writes OUTPUT/decode.json and decode.svg. The profiler takes some of the time: a token's without it stands beside.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.quality_picture import digest
from benchmarks.serve_bench import machine, versions
from benchmarks.serve_report import COLORS

PARTS = {  # of a token, and what the names of their operations begin with
    "Linears of the blocks": ("bpdq::linear", "_C::onednn_mm"),
    "LM head": (),  # those of the same operations that have the vocabulary's size
    "embedding": ("bpdq::embedding", "aten::embedding"),
    "attention": ("_C::cpu_attention", "vllm::unified_attention", "_C::get_scheduler_metadata"),
    "writing the KV cache": ("_C::cpu_attn_reshape", "vllm::unified_kv_cache", "_C::compute_slot_mapping"),
    "norms, rotary, activations": ("## Call CompiledFxGraph",),
    "other operations": ("",),
}
REST = "Python, scheduler, sampling"
PROMPT_TOKENS, TOKENS, ROUNDS = 64, 64, 3
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Profile each model in a process of its own; returns the exit status."""
    args = parse_args(argv)
    if args.engine:
        print(json.dumps(measure(args.engine)))
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    words = ["python", "-m", "benchmarks.decode_profile", *(sys.argv[1:] if argv is None else argv)]
    report = {"command": shlex.join(words), "machine": machine(), "versions": versions()}
    report["rows"] = [run(model) for model in args.models]
    file = args.output / "decode.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    draw(file)
    for row in report["rows"]:
        print(f"{row['model']}: {row['token_ms']:.2f} ms a token, {row['profiled_ms']:.2f} with the profiler")
        print("".join(f"  {part:<30}{ms:>8.2f}\n" for part, ms in row["parts_ms"].items()), end="")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode_profile", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="DIR", help="models or checkpoints")
    parser.add_argument("--output", type=Path, default=Path("decode"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--engine", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.models and not args.engine:
        parser.error("name a model's folder")
    return args


def run(model: str) -> Row:
    """`measure` in a process of its own."""
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "benchmarks.decode_profile", "--engine", model]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return {"model": Path(model).name} | json.loads(done.stdout.splitlines()[-1])


def measure(model: str) -> Row:
    """Milliseconds of a decoded token, without the profiler, with it, and then by part."""
    from torch.profiler import profile
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
    )
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": [7 * i % 1000 + 10 for i in range(PROMPT_TOKENS)]}]

    def generate(tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - started

    def profiled(tokens: int) -> tuple[float, Counter[str]]:
        with profile(record_shapes=True) as found:
            seconds = generate(tokens)
        return seconds, parts(found.key_averages(group_by_input_shape=True), vocabulary)

    generate(TOKENS)
    alone = [generate(1 + TOKENS) - generate(1) for _ in range(ROUNDS)]
    profiled(1)
    (prompt, before), (whole, after) = profiled(1), profiled(1 + TOKENS)  # what the prompt takes is in both
    found = {part: 1e3 * (after[part] - before[part]) / TOKENS for part in PARTS}
    total = 1e3 * (whole - prompt) / TOKENS
    return {
        "token_ms": 1e3 * median(alone) / TOKENS,
        "profiled_ms": total,
        "parts_ms": found | {REST: total - sum(found.values())},
    }


def parts(events: Iterable[Any], vocabulary: int) -> Counter[str]:
    """Seconds of each of PARTS, of a profiler's events by name and shapes of inputs."""
    found: Counter[str] = Counter()
    for event in events:
        part = next(part for part, names in PARTS.items() if names and event.key.startswith(names))
        sizes = {size for shape in event.input_shapes for size in shape if isinstance(size, int)}
        if part == "Linears of the blocks" and max(sizes, default=0) >= vocabulary:
            part = "LM head"
        found[part] += event.self_cpu_time_total / 1e6
    return found


def draw(file: Path) -> None:
    """The picture of a report, beside it."""
    rows = json.loads(file.read_text())["rows"]
    with matplotlib.rc_context({"svg.hashsalt": "decode", "svg.fonttype": "path"}):
        plot(rows).savefig(file.with_suffix(".svg"), metadata={"Date": None, "Description": digest(file)})


def plot(rows: list[Row]) -> Figure:
    """A bar for each model, of its token's parts."""
    figure = Figure(figsize=(6.4, 1.6 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for part, color in zip((*PARTS, REST), (*COLORS, "#b0b0b0", "#d8d8d8"), strict=True):
        widths = [row["parts_ms"][part] for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=color, label=part, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a decoded token, with the profiler")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure


if __name__ == "__main__":
    sys.exit(main())
