"""CPU benchmark: BPDQ linear layers against torch's 16-bit and fp32 ones, and BPDQ models against 16-bit ones in vLLM.

    python -m benchmarks.cpu_bench                              # layers of Qwen2.5-7B and 72B
    python -m benchmarks.cpu_bench --layers 8192x8192 --tokens 1 8
    python -m benchmarks.cpu_bench --code plain trellis         # trellis-coded planes beside plain ones
    python -m benchmarks.cpu_bench --models MODEL MODEL-bpdq    # the first is the baseline
    python -m benchmarks.cpu_bench --random-models 1.5B         # of Qwen2.5-1.5B's shape, written to --output first
    python -m benchmarks.cpu_bench --random-models 1.5B --llama Q2_K Q4_0       # and llama.cpp's types of the first
    python -m benchmarks.cpu_bench --random-models 30B-A3B --eager      # two blocks of Qwen3-30B-A3B's shape

Times are medians over rounds; a round times every candidate, so that a slower minute of the machine hits all. A
candidate has copies of a layer, more than the caches hold, and multiplies by one after the other, as decoding does.
"""

import argparse
import functools
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.dense_experts import dense_experts
from benchmarks.llama_peer import DECODE_TOKENS, PREFILL_TOKENS, PROMPT_TOKENS, check, peer_rows
from benchmarks.packed_models import RANDOM_MODELS, write_random_models
from benchmarks.random_planes import random_experts, random_layer
from benchmarks.serve_bench import BenchError, machine, versions
from benchmarks.serve_report import COLORS
from benchmarks.shapes import EXPERTS, Experts, Layer
from bpdq_kernels import Activation, layout, linear, moe, prepare, prepare_experts
from bpdq_kernels.compiled import instruction_set
from bpdq_kernels.experts import routes
from bpdq_kernels.format import CODE_OPTIONS, Scheme

LAYERS = (
    Layer("7B qkv", 4608, 3584),
    Layer("7B o", 3584, 3584),
    Layer("7B gate_up", 37888, 3584),
    Layer("7B down", 3584, 18944),
    Layer("72B qkv", 10240, 8192),
    Layer("72B o", 8192, 8192),
    Layer("72B gate_up", 59136, 8192),
    Layer("72B down", 8192, 29568),
    *EXPERTS.values(),
)
TURN_BYTES = 128 << 20  # of a layer's copies, at least, so that none is in the cache since its last turn
MOST_COPIES = 2048  # of layers so small that it makes no difference
ROUTINGS = 16  # of a layer's experts, likewise
SECONDS_IN_TURN = 0.02  # of calls that are timed together: what ran before them has emptied the caches, too
COPY_BYTES = 1 << 29  # read and written
SECONDS_PER_ROW = 20  # after which no further round starts, but MIN_ROUNDS are always run
MIN_ROUNDS = 3
REQUESTS, REQUEST_TOKENS = (1, 4, 8), 128  # at once, until each has its first token
OF_LAYERS = ("layers", "tokens", "rounds", "cpu_time")  # options
OF_PLANES = ("bits", "group_size", "coefficient_bits", "code")  # that are made: those of --models are there

Row = dict[str, Any]
Measured = Callable[[int], tuple[dict[str, Callable[[], Tensor]], dict[str, float]]]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.engine:
        print(json.dumps(measure_engine(args.engine, args.eager)))
        return 0
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.cpu_bench", *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine() | {"instruction_set": instruction_set(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    kind, measured = ("models", model_rows(args)) if args.models or args.random_models else ("layers", layer_rows(args))
    file, report[kind] = args.output / f"cpu-{kind}.json", []
    try:
        for row in measured:
            report[kind].append(row)
            file.write_text(json.dumps(report, indent=2) + "\n")
    except BenchError as e:
        kept = f"; {file} has the models before it" if report[kind] else ""
        print(f"cpu_bench: error: {e}{kept}", file=sys.stderr)
        return 1
    if kind == "layers":
        plot(report).savefig(file.with_suffix(".png"), dpi=150)
    table = layer_table if kind == "layers" else model_table
    print(f"{table(report[kind])}\n\n{caption(report)}\n{file}")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="NxK",
        help="outputs x inputs, or experts x chosen ones x hidden x inner size (those of Qwen2.5-7B and 72B, "
        "Qwen3-30B-A3B and Qwen3-Next-80B-A3B)",
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 512], metavar="M")
    parser.add_argument("--bits", type=int, default=2, choices=range(1, layout.MAX_PLANES + 1), help="(%(default)s)")
    parser.add_argument("--group-size", type=int, default=128, choices=layout.GROUP_SIZES, help="(%(default)s)")
    parser.add_argument("--coefficient-bits", type=int, default=16, choices=(8, 16), help="(%(default)s)")
    parser.add_argument("--code", nargs="+", default=["plain"], choices=CODE_OPTIONS, help="of planes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="at most, per layer and number of tokens (%(default)s)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="of layers, for busy machines: of all threads, so take OMP_NUM_THREADS=1",
    )
    parser.add_argument(
        "--eager", action="store_true", help="models without vLLM's compilation, and their blocks' times"
    )
    parser.add_argument(
        "--llama", nargs="+", metavar="TYPE", help="llama.cpp's types, such as Q2_K, of the first model"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--models", nargs="+", metavar="DIR", help="serve these one after the other; first = baseline")
    source.add_argument("--random-models", choices=RANDOM_MODELS, help="the same for random weights of this shape")
    source.add_argument("--engine", metavar="DIR", help=argparse.SUPPRESS)  # one model, in a process of its own
    parser.add_argument("--output", type=Path, default=Path("bench-output"), metavar="DIR", help="(%(default)s)")
    not_given = argparse.Namespace(**dict.fromkeys(OF_LAYERS + OF_PLANES))  # None, in the place of their defaults
    args = parser.parse_args(argv, not_given)
    for name in OF_LAYERS + OF_PLANES:
        if getattr(args, name) is None:
            setattr(args, name, parser.get_default(name))
        elif args.models or (args.random_models and name in OF_LAYERS):
            source_option = "--models" if args.models else "--random-models"
            parser.error(f"--{name.replace('_', '-')} is not for {source_option}: leave it out")
    if args.random_models and len(args.code) > 1:
        parser.error("--code: --random-models takes one")
    names = [Path(model).name for model in args.models or []]
    if len(set(names)) < len(names):
        parser.error("--models: two folders have the same name, by which the results tell models apart; rename one")
    try:
        args.layers = [parse_layer(shape) for shape in args.layers] if args.layers else LAYERS
    except (TypeError, ValueError):
        parser.error("--layers: write outputs x inputs, such as 4096x4096, or four numbers, such as 128x8x2048x768")
    if (args.eager or args.llama) and not (args.models or args.random_models or args.engine):
        parser.error("--eager and --llama are for --models and --random-models")
    if min(args.rounds, *args.tokens) < 1:
        parser.error("--tokens and --rounds must be at least 1")
    if "trellis" in args.code and args.bits == layout.MAX_PLANES:
        parser.error(f"--code trellis: store at most {layout.MAX_PLANES - 1} planes, one more is multiplied")
    if "trellis" in args.code and any(inputs % layout.WORD for layer in args.layers for inputs in layer[-2:]):
        parser.error(f"--code trellis: inputs must be a multiple of {layout.WORD}")
    return args


def parse_layer(shape: str) -> Layer | Experts:
    """Raises TypeError or ValueError for other than two or four numbers."""
    sizes = [int(size) for size in shape.split("x")]
    return Experts(shape, *sizes) if len(sizes) > 2 else Layer(shape, *sizes)


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter, calls: int = 1) -> float:
    """Of a call, where so many follow each other."""
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def large_copy() -> Callable[[], Tensor]:
    """Copies COPY_BYTES / 2, much more than the caches hold."""
    source = torch.ones(COPY_BYTES // 2, dtype=torch.int8)
    return functools.partial(torch.empty_like(source).copy_, source)


def layer_rows(args: argparse.Namespace) -> Iterator[Row]:
    copy = large_copy()
    for layer in args.layers:
        yield from measure_layer(layer, copy, args)


def measure_layer(layer: Layer | Experts, copy: Callable[[], Tensor], args: argparse.Namespace) -> list[Row]:
    """Milliseconds of one layer for every number of tokens: BPDQ and torch on bf16 x, of a Linear torch on fp32 x, and
    of a copy, as what memory gives changes by the minute where others use it too. For every code a row, whose
    candidates were all timed in turn."""
    scheme = Scheme(args.bits, args.group_size, args.coefficient_bits)
    measured = (linear_candidates if isinstance(layer, Layer) else expert_candidates)(layer, scheme, args.code)
    clock, rows = time.process_time if args.cpu_time else time.perf_counter, []
    for tokens in args.tokens:
        candidates, packed_bytes = measured(tokens)
        candidates["copy"] = copy
        times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
        once = {candidate: min(seconds(run) for _ in range(2)) for candidate, run in candidates.items()}
        calls = {candidate: max(1, min(ROUTINGS, int(SECONDS_IN_TURN / each))) for candidate, each in once.items()}
        end = time.perf_counter() + SECONDS_PER_ROW
        while len(times["bf16"]) < args.rounds and (len(times["bf16"]) < MIN_ROUNDS or time.perf_counter() < end):
            for candidate, run in candidates.items():
                times[candidate].append(seconds(run, clock, calls[candidate]))
        for code in args.code:
            name = f"{layer.name}, trellis" if code == "trellis" else layer.name
            row: Row = {"layer": name, "shape": " x ".join(map(str, layer[1:])), "tokens": tokens, "code": code}
            row["rounds"] = len(times[code])
            named = {"bpdq": times[code]} | {other: times[other] for other in times if other not in CODE_OPTIONS}
            row |= {f"{candidate}_ms": statistics.median(values) * 1e3 for candidate, values in named.items()}
            row |= {f"{candidate}_min_ms": min(values) * 1e3 for candidate, values in named.items()}
            row["packed_gb_s"] = packed_bytes[code] / row["bpdq_ms"] / 1e6
            row["copy_gb_s"] = COPY_BYTES / row["copy_ms"] / 1e6
            if code != args.code[0]:
                row["of_first_code"] = row["packed_gb_s"] / rows[-1]["packed_gb_s"]
            rows.append(row)
            print(f"{name}, {tokens} tokens: {row['bpdq_ms']:.2f} ms, bf16 {row['bf16_ms']:.2f} ms", file=sys.stderr)
    return rows


def linear_candidates(layer: Layer, scheme: Scheme, codes: Sequence[str]) -> Measured:
    """For a number of tokens what is timed, by name, and the bytes that BPDQ reads, by code."""
    _, n, k_in = layer
    packed, packed_bytes = {}, {}
    for code in codes:
        stored = random_layer(n, k_in, replace(scheme, code=CODE_OPTIONS[code]), torch.default_generator)
        packed_bytes[code] = stored.B.nbytes + stored.c.nbytes
        make = functools.partial(prepare, stored.B, stored.c, scheme.group_size, k_in, s=stored.s)
        packed[code] = in_turn(make, packed_bytes[code])
    half = torch.randn(n, k_in, dtype=torch.bfloat16)
    dense = {"bf16": in_turn(half.clone, half.nbytes), "fp32": in_turn(half.float, 2 * half.nbytes)}

    def measured(tokens: int) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
        x = {"fp32": torch.randn(tokens, k_in)}
        x["bf16"] = x["fp32"].bfloat16()
        ours = {code: functools.partial(multiply, linear, x["bf16"], turns) for code, turns in packed.items()}
        theirs = {
            dtype: functools.partial(multiply, torch.nn.functional.linear, x[dtype], turns)
            for dtype, turns in dense.items()
        }
        return ours | theirs, packed_bytes

    return measured


def in_turn(make: Callable[[], Any], nbytes: int) -> Iterator[Any]:
    """Copies of a matrix of so many bytes, one after the other without end."""
    return itertools.cycle([make() for _ in range(min(MOST_COPIES, -(-TURN_BYTES // nbytes)))])


def multiply(op: Callable[[Tensor, Any], Tensor], x: Tensor, matrices: Iterator[Any]) -> Tensor:
    return op(x, next(matrices))


def expert_candidates(layer: Experts, scheme: Scheme, codes: Sequence[str]) -> Measured:
    """As `linear_candidates`, for tokens that choose experts at random; in bf16 as vLLM does it, one after another."""
    _, count, chosen, hidden, inner = layer
    shapes = (2 * inner, hidden), (hidden, inner)
    prepared = {code: [] for code in codes}
    for code, (n, k_in) in itertools.product(codes, shapes):
        coded = replace(scheme, code=CODE_OPTIONS[code])
        stored = random_experts(count, n, k_in, coded, torch.default_generator)
        prepared[code].append(prepare_experts(stored, scheme.group_size, k_in))
    half = [0.02 * torch.randn(count, n, k_in, dtype=torch.bfloat16) for n, k_in in shapes]
    packed_bytes = {
        code: sum(m.planes.nbytes + m.coefficients.nbytes for m in matrices) / count
        for code, matrices in prepared.items()
    }

    def measured(tokens: int) -> tuple[dict[str, Callable[[], Tensor]], dict[str, float]]:
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        weights = torch.full((tokens, chosen), 1 / chosen)
        ids = [torch.rand(tokens, count).argsort(1)[:, :chosen] for _ in range(ROUTINGS)]
        turns = {candidate: itertools.cycle(ids) for candidate in (*codes, "bf16")}

        def packed(code: str) -> Tensor:
            return moe(x, weights, next(turns[code]), *prepared[code], Activation("silu"))

        candidates = {code: functools.partial(packed, code) for code in codes} | {
            "bf16": lambda: dense_experts(x, weights, routes(next(turns["bf16"]), count), *half),
        }
        used = statistics.mean(len(choice.unique()) for choice in ids)
        return candidates, {code: each * used for code, each in packed_bytes.items()}

    return measured


def model_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Rows of --models or --random-models, and of --llama; raises BenchError for one that fails."""
    models = args.models
    if args.random_models:
        scheme = Scheme(args.bits, args.group_size, args.coefficient_bits, CODE_OPTIONS[args.code[0]])
        models = write_random_models(args.random_models, args.output, scheme)
    if args.llama:
        check(Path(models[0]), args.llama)
    for model in models:
        yield run_engine(model, args.eager)
    if args.llama:
        yield from peer_rows(Path(models[0]), args.llama, args.output)


def run_engine(model: str, eager: bool) -> Row:
    """`measure_engine` in a process of its own, so that memory is this model's alone."""
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-m", "benchmarks.cpu_bench", "--engine", model, *(["--eager"] if eager else [])]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise BenchError(f"{model}: vLLM ended with status {done.returncode}, its messages above say why")
    return {"model": Path(model).name} | json.loads(done.stdout.splitlines()[-1])


def measure_engine(model: str, eager: bool) -> Row:
    """Prefill and decode tokens/s of a model in vLLM, and the process's resident memory after loading it; eager: also
    milliseconds of a decoder block for a token, as nothing is compiled."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enforce_eager=eager,
        max_model_len=1024,
        max_num_batched_tokens=1024,
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
    )
    row: Row = {"weight_bytes": llm.apply_model(weight_bytes)[0], "resident_bytes": psutil.Process().memory_info().rss}

    def generate(batch: int, prompt_tokens: int, new_tokens: int) -> float:
        prompts = [{"prompt_token_ids": [(7 * i + b) % 1000 + 10 for i in range(prompt_tokens)]} for b in range(batch)]
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        return seconds(lambda: llm.generate(prompts, sampling, use_tqdm=False))

    generate(1, PREFILL_TOKENS, 1)
    row["prefill_tokens_s"] = PREFILL_TOKENS / statistics.median(generate(1, PREFILL_TOKENS, 1) for _ in range(5))
    for requests in REQUESTS:
        generate(requests, REQUEST_TOKENS, 1)
        times = [generate(requests, REQUEST_TOKENS, 1) for _ in range(5)]
        row[f"first_of_{requests}_ms"] = 1e3 * statistics.median(times)
    blocks: list[float] = []
    if eager:
        llm.apply_model(functools.partial(time_blocks, blocks))
    for batch in (1, 8):
        generate(batch, PROMPT_TOKENS, 4)
        blocks.clear()
        # what the prompts take is in both times
        times = [
            generate(batch, PROMPT_TOKENS, 1 + DECODE_TOKENS) - generate(batch, PROMPT_TOKENS, 1) for _ in range(5)
        ]
        row[f"decode_{batch}_tokens_s"] = batch * DECODE_TOKENS / statistics.median(times)
        if eager:
            row[f"block_{batch}_ms"] = 1e3 * statistics.median(blocks)
    return row


def time_blocks(times: list[float], model: torch.nn.Module) -> None:
    """Append the seconds of every decoder block's forward pass to `times`."""
    for block in model.model.layers:
        started = []
        block.register_forward_pre_hook(lambda *_, started=started: started.append(time.perf_counter()))
        block.register_forward_hook(lambda *_, started=started: times.append(time.perf_counter() - started.pop()))


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all that a model holds, tied tensors once."""
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def layer_table(rows: Sequence[Row]) -> str:
    """Rows as markdown; `vs bf16` is how many times faster than torch's bf16 layer, and in brackets stand the packed
    bytes over those of the first code. A copy's bytes are those read and written. Shape: outputs x inputs, or experts x
    chosen ones x hidden x inner size."""
    lines = [
        "| layer | shape | tokens | BPDQ, ms | bf16, ms | fp32, ms | vs bf16 | packed GB/s | copy, GB/s | of copy |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        full = f"{row['fp32_ms']:.2f}" if "fp32_ms" in row else ""
        ratio = f" ({row['of_first_code']:.2f})" if "of_first_code" in row else ""
        lines.append(
            f"| {row['layer']} | {row['shape']} | {row['tokens']} | {row['bpdq_ms']:.2f} | "
            f"{row['bf16_ms']:.2f} | {full} | {row['bf16_ms'] / row['bpdq_ms']:.2f} | "
            f"{row['packed_gb_s']:.1f}{ratio} | {row['copy_gb_s']:.1f} | {row['packed_gb_s'] / row['copy_gb_s']:.0%} |"
        )
    return "\n".join(lines)


def model_table(rows: Sequence[Row]) -> str:
    """Rows as markdown, in brackets how many times as fast as the first model."""
    head = ["model", "decode tokens/s, batch 1", "batch 8", "prefill tokens/s"]
    head += [f"first tokens of {REQUESTS[0]} x {REQUEST_TOKENS}, ms", *(str(requests) for requests in REQUESTS[1:])]
    head += ["a block, ms", "batch 8", "weights, MB", "resident, MB"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        speeds = [
            f"{row[key]:.1f} ({row[key] / rows[0][key]:.2f})" for key in ("decode_1_tokens_s", "decode_8_tokens_s")
        ]
        times = [*(f"first_of_{requests}_ms" for requests in REQUESTS), "block_1_ms", "block_8_ms"]
        times = [f"{row[key]:.3g} ({rows[0][key] / row[key]:.2f})" if key in row else "" for key in times]
        prefill = f"{row['prefill_tokens_s']:.1f} ({row['prefill_tokens_s'] / rows[0]['prefill_tokens_s']:.2f})"
        memory = [f"{row[key] / 1e6:.0f}" for key in ("weight_bytes", "resident_bytes")]
        lines.append(f"| {' | '.join([row['model'], *speeds, prefill, *times, *memory])} |")
    return "\n".join(lines)


def caption(report: dict[str, Any]) -> str:
    """One line that says what was measured where."""
    hardware = report["machine"]
    return (
        f"{hardware['cpu']}, {hardware['threads']} threads, {hardware['instruction_set']}; "
        f"torch {report['versions']['torch']}; {report['command']}"
    )


def plot(report: dict[str, Any]) -> Figure:
    """How many times faster than torch's bf16 layer, against the number of tokens; one line per layer."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    ticks = sorted({row["tokens"] for row in report["layers"]})
    for i, layer in enumerate(dict.fromkeys(row["layer"] for row in report["layers"])):
        rows = [row for row in report["layers"] if row["layer"] == layer]
        ratios = [row["bf16_ms"] / row["bpdq_ms"] for row in rows]
        style = {"color": COLORS[i % len(COLORS)], "linestyle": "-" if i < len(COLORS) else "--", "marker": "o"}
        axes.plot([row["tokens"] for row in rows], ratios, label=layer, linewidth=2, **style)
    axes.axhline(1, color="#666666", linewidth=1)
    axes.set(title="Speed of a BPDQ layer over torch's bf16 layer", xlabel="tokens", ylabel="times faster")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption(report), fontsize=6, color="#666666")
    return figure


if __name__ == "__main__":
    sys.exit(main())
