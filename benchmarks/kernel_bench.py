"""Kernel benchmark: every layer of Qwen2.5 models, timed on a GPU or predicted from the machine code without one.

On a GPU, each layer's kernel against torch.matmul in 16 bits, with weights that can't stay in the L2 cache:

    python -m benchmarks.kernel_bench --model qwen2.5-7b --json kernels.json --plot kernels.png

Without a GPU, what the compiled kernels would need of an RTX 3090 (sm_86) or another architecture's model card:

    python -m benchmarks.kernel_bench --static sm_86 --plot kernels.png
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import triton

from benchmarks import expert_static, kernel_static, kernel_timing
from benchmarks.sass import MACHINES, Machine
from benchmarks.shapes import EXPERTS, MODELS, Layer
from bpdq_kernels.dispatch import Dense
from bpdq_kernels.layout import GROUP_SIZES, MAX_PLANES
from bpdq_kernels.tiled_linear import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GPU_TOKENS, STATIC_TOKENS = "1,2,4,8,16,32,64,128,512", "1,8,16,32,64,512"
PLOTTED_PLANES = (2, 3, 4)
CARD_BYTES = 24 << 30  # of an RTX 3090
COLORS = ("#d1495b", "#2a7f9e", "#6a994e")
Row = dict[str, Any]


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"kernel_bench: error: {message}\n")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 0, or 1 if a kernel's outputs were wrong."""
    args = parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "plot", "emit")}
    try:
        report = {"settings": settings} | (static(args) if args.static else timed(args))
    except kernel_timing.WrongResultError as e:
        print(f"kernel_bench: error: {e}", file=sys.stderr)
        return 1
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        (plot_static if args.static else plot_timed)(report).savefig(args.plot, dpi=150)
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m benchmarks.kernel_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", metavar="LIST", help=f"({','.join(MODELS)}; static also, timed if asked for: {','.join(EXPERTS)})"
    )
    parser.add_argument("--bits", type=int, default=2, metavar="K", help=f"bit-planes, 1 to {MAX_PLANES} (%(default)s)")
    parser.add_argument("--group-size", type=int, default=128, metavar="G", help=f"of {GROUP_SIZES} (%(default)s)")
    parser.add_argument(
        "--coefficient-bits", type=int, default=16, metavar="BITS", help="width of coefficients, 8 or 16 (%(default)s)"
    )
    parser.add_argument(
        "--code", default="planes", metavar="CODE", help="planes, or with --static trellis: of the planes (%(default)s)"
    )
    parser.add_argument("--tokens", metavar="LIST", help=f"batch sizes ({GPU_TOKENS}; static: {STATIC_TOKENS})")
    parser.add_argument("--dtype", default="bfloat16", help="of activations: bfloat16 or float16 (%(default)s)")
    parser.add_argument("--static", metavar="ARCH", help=f"compile and count, no GPU: {', '.join(MACHINES)}")
    parser.add_argument("--predict", action="store_true", help="timed: with the static model's figure beside each")
    parser.add_argument("--emit", type=Path, metavar="DIR", help="with --static: write cubins and manifest.json there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="timed: ms against tokens; static: predicted tokens/s"
    )
    args = parser.parse_args(argv)
    known = (*MODELS, *EXPERTS)
    args.model = args.model.split(",") if args.model else [*known] if args.static else [*MODELS]
    tokens = args.tokens or (STATIC_TOKENS if args.static else GPU_TOKENS)
    args.tokens = [int(m) if m.isdecimal() else 0 for m in tokens.split(",")]
    unknown = ", ".join(name or "no name" for name in args.model if name not in known)
    gpu = bool(args.static) or torch.cuda.is_available()
    problems = {
        f"--model: unknown {unknown!r}, choose from {', '.join(known)}": bool(unknown),
        f"--static: unknown {args.static!r}, choose from {', '.join(MACHINES)}": args.static not in (None, *MACHINES),
        "--code must be planes or trellis, and trellis needs --static": args.code != "planes"
        and (args.code != "trellis" or not args.static),
        f"--bits must be 1 to {MAX_PLANES}": not 1 <= args.bits <= MAX_PLANES,
        f"--bits must be 1 to {MAX_PLANES - 1} with a trellis": args.bits == MAX_PLANES and args.code == "trellis",
        f"--group-size must be one of {GROUP_SIZES}": args.group_size not in GROUP_SIZES,
        "--coefficient-bits must be 8 or 16": args.coefficient_bits not in (8, 16),
        "--dtype must be bfloat16 or float16": args.dtype not in ("bfloat16", "float16"),
        "--tokens must be numbers of at least 1, with commas between them": min(args.tokens) < 1,
        "--plot needs matplotlib: pip install 'vllm-bpdq[bench]'": bool(args.plot) and not find_spec("matplotlib"),
        "--json and --plot: no such folder": any(
            f and not f.absolute().parent.is_dir() for f in (args.json, args.plot)
        ),
        "--emit needs --static": bool(args.emit) and not args.static,
        "--predict is of timed runs": args.predict and bool(args.static),
        "no CUDA GPU here: --static sm_86 predicts from compiled code": not gpu,
    }
    for problem, found in problems.items():
        if found:
            parser.error(problem)
    return args


def static(args: argparse.Namespace) -> Row:
    """Compile, print the tables and return the figures; writes the cubins where --emit says."""
    machine, dtype = MACHINES[args.static], {"bfloat16": "bf16", "float16": "fp16"}[args.dtype]
    kernels = []
    dense, sparse = ([name for name in args.model if name in table] for table in (MODELS, EXPERTS))
    trellis = args.code == "trellis"
    scheme = (args.bits, args.group_size, machine, dtype, args.coefficient_bits, trellis)
    variants = kernel_static.variants(dense, args.tokens, *scheme) if dense else []
    variants += expert_static.variants(sparse, args.tokens, *scheme)
    for i, variant in enumerate(variants):
        print(f"\rcompiling {i + 1} of {len(variants)} kernels", end="", file=sys.stderr, flush=True)
        kernels.append(kernel_static.compile_kernel(variant, machine.arch))
    print(file=sys.stderr)
    if args.emit:
        kernel_static.emit(kernels, args.emit)
    report = {
        "triton": triton.__version__,
        "machine": machine._asdict(),
        "kernels": [kernel_static.kernel_row(kernel, machine) for kernel in kernels],
        "layers": [
            kernel_static.layer_row(layer, m, *scheme) | {"model": model}
            for model in dense
            for layer in (*MODELS[model].layers, MODELS[model].head)
            for m in args.tokens
            if modelled(args, m, layer, machine)
        ]
        + [row for model in sparse for m in args.tokens for row in expert_static.rows(model, m, *scheme)],
        "models": [
            kernel_static.model_row(model, k, *scheme[1:])
            for model in dense
            for k in PLOTTED_PLANES
            if k in kernel_static.stored_planes(trellis)
        ],
    }
    print(
        f"Static model of the {machine.name} ({machine.arch}), Triton {triton.__version__}; nothing was run on a GPU."
    )
    print("\nMain loop, time on each pipe / time in which DRAM delivers its weights; `!` marks a missed bar\n")
    print(kernel_table(report["kernels"]))
    print("\nLayers; x/W: activation bytes that blocks read from caches / packed bytes. Experts: of those chosen\n")
    print(layer_table(report["layers"]))
    print("\nOne-token decoding, all Linears and a 16-bit LM head\n")
    print(model_table(report["models"]))
    return report


def timed(args: argparse.Namespace) -> Row:
    """Time on the current GPU, print the table and return the figures."""
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    settings = kernel_timing.Settings(
        args.bits,
        args.group_size,
        tuple(args.tokens),
        getattr(torch, args.dtype),
        "cuda",
        *machine(torch.device("cuda")),
        device.L2_cache_size,
        args.coefficient_bits,
    )
    arch = f"sm_{settings.arch}"
    predicted = predictions(args, MACHINES[arch]) if args.predict and arch in MACHINES else {}
    bandwidth = kernel_timing.copy_bandwidth("cuda", kernel_timing.graph_timer)
    rate = kernel_timing.matmul_rate(settings.dtype, "cuda", kernel_timing.graph_timer)
    report = {
        "device": device.name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": bandwidth,
        "matmul_flops_per_s": rate,
        "rows": [],
    }
    for row in kernel_timing.time_models(args.model, settings, bandwidth, rate):
        row["predicted_us"] = predicted.get((row["model"], row["layer"]["name"], row["tokens"]))
        report["rows"].append(row)
        print(f"{layer_name(row)}, {row['tokens']} tokens: {row['us']:.1f} us", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(report) + "\n")
    print(f"{device.name}, torch {torch.__version__}, Triton {triton.__version__}; medians; copies within the GPU's")
    print(f"memory reach {bandwidth / 1e9:.0f} GB/s, a product of matrices of 8192 x 8192 {rate / 1e12:.0f} TFLOP/s\n")
    print(timed_table(report["rows"]))
    return report


def predictions(args: argparse.Namespace, machine: Machine) -> dict[tuple[str, str, int], float]:
    """Microseconds by the static model, by model, layer and tokens, where a kernel of ours multiplies; compiled in as
    many processes as there are cores."""
    dtype = {"bfloat16": "bf16", "float16": "fp16"}[args.dtype]
    dense, sparse = ([name for name in args.model if name in table] for table in (MODELS, EXPERTS))
    layers = [(model, layer) for model in dense for layer in (*MODELS[model].layers, MODELS[model].head)]
    wanted = [(model, layer, m) for m in args.tokens for model, layer in layers if modelled(args, m, layer, machine)]
    rest = (
        itertools.repeat(args.bits),
        itertools.repeat(args.group_size),
        itertools.repeat(machine),
        itertools.repeat(dtype),
        itertools.repeat(args.coefficient_bits),
    )
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        rows = pool.map(kernel_static.layer_row, [w[1] for w in wanted], [w[2] for w in wanted], *rest)
        found = [row["predicted_us"] for row in rows]
    times = {(model, layer.name, m): us for (model, layer, m), us in zip(wanted, found, strict=True)}
    for model, m in itertools.product(sparse, args.tokens):
        rows = expert_static.rows(model, m, args.bits, args.group_size, machine, dtype, args.coefficient_bits)
        times[model, "experts", m] = sum(row["predicted_us"] for row in rows)
    return times


def modelled(args: argparse.Namespace, tokens: int, layer: Layer, machine: Machine) -> bool:
    """Whether a kernel of ours multiplies, not torch.matmul, which the static model does not know."""
    sms, arch = machine.multiprocessors, machine.capability
    multiplied = args.bits + (args.code == "trellis")
    config = kernel_static.config_for(tokens, layer, multiplied, args.group_size, sms, arch)
    return not isinstance(config, Dense)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 2), "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def flags(row: Row) -> str:
    return "! " + "; ".join(row["missed"]) if row["missed"] else ""


def kernel_table(rows: Sequence[Row]) -> str:
    pipes = ("issue", "alu", "fmah", "fp32", "conv", "shfl", "redux", "lds", "ldg", "hmma32", "bmma")
    head = ["kernel", "registers", "spills", "shared B", "CTAs (warps) / SM", "instr / weight"]
    cells = []
    for row in rows:
        counts = [str(row[key]) for key in ("registers", "spills", "shared")]
        occupancy = f"{row['ctas_per_sm']} ({row['warps_per_sm']})"
        times = [f"{row['over_dram'][pipe]:.2f}" for pipe in (*pipes, "bmma_at_half_rate")]
        cells.append([row["name"], *counts, occupancy, f"{row['instructions_per_weight']:.2f}", *times, flags(row)])
    return markdown([*head, *pipes, "bmma at half rate", ""], cells)


def layer_name(row: Row) -> str:
    layer = row["layer"]
    return f"{row['model']} {layer['name']} {layer['out_features']}x{layer['in_features']}"


def layer_table(rows: Sequence[Row]) -> str:
    head = ["layer", "tokens", "kernel", "CTAs", "CTAs / SM", "idle", "KB in flight / SM", "x/W"]
    cells = []
    for row in rows:
        grid = [str(row["ctas"]), f"{row['waves']:.2f}", f"{row['idle']:.0%}", f"{row['bytes_in_flight'] / 1e3:.1f}"]
        times = [f"{row['dram_us']:.1f}", f"{row['pipe_us']:.1f} {row['pipe']}", f"{row['predicted_us']:.1f}"]
        traffic = f"{row['activation_bytes_over_weights']:.1f}"
        cells.append([layer_name(row), str(row["tokens"]), row["kernel"], *grid, traffic, *times, flags(row)])
    return markdown([*head, "DRAM us", "pipe us", "predicted us", ""], cells)


def model_table(rows: Sequence[Row]) -> str:
    head = ["model", "k", "G", "GB per token", "predicted tokens/s", "DRAM roofline", ""]
    cells = []
    for row in rows:
        size, fits = f"{row['bytes_per_token'] / 1e9:.2f}", row["bytes_in_memory"] <= CARD_BYTES
        rates = [f"{row[key]:.1f}" for key in ("tokens_per_s", "roofline_tokens_per_s")]
        cells.append(
            [row["model"], str(row["planes"]), str(row["group_size"]), size, *rates, "" if fits else "> 24 GiB"]
        )
    return markdown(head, cells)


def timed_table(rows: Sequence[Row]) -> str:
    head = ["layer", "tokens", "us", "matmul us", "speed-up", "predicted us", "GB/s", "of copy", "of 8192^3", "kernel"]
    cells = []
    for row in rows:
        times = [f"{row['us']:.1f}", f"{row['matmul_us']:.1f}", f"{row['matmul_us'] / row['us']:.2f}"]
        times += [f"{row['predicted_us']:.1f}" if row.get("predicted_us") else ""]
        rates = [f"{row['bytes_per_s'] / 1e9:.0f}", f"{row['of_copy_bandwidth']:.0%}", f"{row['of_matmul_rate']:.0%}"]
        cells.append([layer_name(row), str(row["tokens"]), *times, *rates, row["kernel"]])
    return markdown(head, cells)


def plot_static(report: Row) -> "Figure":
    """Predicted tokens/s of one-token decoding beside the DRAM roofline, for each model and number of planes."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    machine, rows = report["machine"], report["models"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        i = PLOTTED_PLANES.index(row["planes"])
        at = models.index(row["model"]) + 0.27 * (i - 1)
        hatch = "///" if row["bytes_in_memory"] > CARD_BYTES else None
        axes.bar(at, row["tokens_per_s"], 0.24, color=COLORS[i], hatch=hatch, edgecolor="white", linewidth=0)
        axes.hlines(row["roofline_tokens_per_s"], at - 0.13, at + 0.13, color="#222222", linewidth=1.5)
        axes.annotate(f"{row['tokens_per_s']:.0f}", (at, row["roofline_tokens_per_s"] + 3), ha="center", fontsize=8)
    legend = [Patch(color=color, label=f"k = {k}") for k, color in zip(PLOTTED_PLANES, COLORS, strict=True)]
    legend += [axes.hlines([], 0, 0, color="#222222", label=f"DRAM roofline, {machine['gbps']:.0f} GB/s")]
    legend += [Patch(facecolor="#bbbbbb", hatch="///", edgecolor="white", label="does not fit in 24 GiB")]
    axes.legend(handles=legend, frameon=False, fontsize=8)
    axes.set_xticks(range(len(models)), models)
    axes.set_xlabel(f"model, G = {rows[0]['group_size']}: all Linears in bit-planes, LM head in 16 bits, nothing else")
    axes.set_ylabel("tokens/s, one sequence")
    axes.set_title(f"Static prediction for the {machine['name']} from compiled code, not measured", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def plot_timed(report: Row) -> "Figure":
    """Measured milliseconds of a model's decoder Linears, or of a layer's experts, against the number of tokens,
    bit-planes and 16 bits."""
    from matplotlib.figure import Figure

    models, tokens = report["settings"]["model"], sorted(report["settings"]["tokens"])
    figure = Figure(figsize=(4.5 * len(models), 4.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for key, label, color in (("us", "bit-planes", COLORS[0]), ("matmul_us", "torch.matmul, 16 bits", COLORS[1])):
            times = [kernel_timing.decoder_ms(report["rows"], model, m, key) for m in tokens]
            axes.plot(tokens, times, label=label, color=color, marker="o")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(tokens, [str(m) for m in tokens])
        axes.set_title(model, fontsize=11)
        axes.set_xlabel("tokens")
        axes.set_ylabel("all decoder Linears, ms" if model in MODELS else "experts of one layer, ms")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.25)
    settings = report["settings"]
    figure.supxlabel(f"{report['device']}, k = {settings['bits']}, G = {settings['group_size']}", fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
