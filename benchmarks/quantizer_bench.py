"""Quantizer benchmark: CPU seconds per million weights in each part of the solver, for layers of models of any size.

    OMP_NUM_THREADS=1 python -m benchmarks.quantizer_bench                  # layers of 135M, 7B and 72B models
    python -m benchmarks.quantizer_bench --layers 576x1536 --methods compiled torch gptq --repeats 3

Weights are random, inputs have a few strong directions. Some rows of a layer are solved, and what grows with the rows
is scaled to all of them; Hessian and factor do not. `compiled` is what `bpdq quantize` runs, `torch` its readable form,
`gptq` llm-compressor's `quantize_weight` on the same W and H where that can be imported (the environment of
`quality_bench --gptq-python` can run this file too). Times are medians of this process's CPU seconds.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_solver import random_inputs, random_weights
from benchmarks.serve_bench import machine
from benchmarks.serve_report import COLORS
from bpdq_kernels.layout import GROUP_SIZES, MAX_PLANES
from bpdq_quantizer.algorithm import cpu_solver, refine, solver
from bpdq_quantizer.algorithm.hessian import accumulate, symmetrize
from bpdq_quantizer.run.options import COEFFICIENT_BITS

LAYERS = {
    "135M o": (576, 576),
    "135M gate_up": (3072, 576),
    "135M down": (576, 1536),
    "7B o": (3584, 3584),
    "72B o": (8192, 8192),
}
TIMED: dict[str, tuple[ModuleType, str]] = {  # part -> the function that is all of it
    "factor": (solver, "upper_factor"),
    "groups": (solver, "one_pass"),
    "fit": (refine, "joint_fit"),
    "descent": (refine, "descend"),
}
PARTS = ["hessian", *TIMED, "other"]
ONCE = {"hessian", "factor"}  # for all rows of a layer
METHODS = ("compiled", "torch", "gptq")
WINDOW = 2048
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.quantizer_bench", *(sys.argv[1:] if argv is None else argv)]
        ),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "calibration_tokens": args.tokens,
        "rows": [],
    }
    for row in measure(args):
        report["rows"].append(row)
        print(f"{row['layer']}, k = {row['bits']}, G = {row['group_size']}, {row['method']}: {row['total']:.3f}")
        (args.output / "quantizer.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.output / "quantizer.md").write_text(table(report["rows"]) + "\n")
    if args.plot:
        plot(report["rows"], args.output / "quantizer.png")
    print(table(report["rows"]))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizer_bench", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", metavar="NxK", help="outputs x inputs (135M to 72B)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["compiled", "torch"], help="(%(default)s)")
    parser.add_argument("--bits", nargs="+", type=int, default=[2], choices=range(1, MAX_PLANES + 1), metavar="K")
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[64], choices=GROUP_SIZES, metavar="G")
    parser.add_argument("--rows", type=int, default=512, help="solved of each layer (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128 * 2048, help="of calibration, for Hessians (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--plot", action="store_true", help="draw quantizer.png too")
    parser.add_argument("--output", type=Path, default=Path("bench-output"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(argv)
    if args.layers:
        sizes = [shape.split("x") for shape in args.layers]
        if not all(len(shape) == 2 and all(size.isdecimal() and int(size) for size in shape) for shape in sizes):
            parser.error("--layers: write outputs x inputs, such as 4096x4096")
        args.layers = {shape: tuple(map(int, size)) for shape, size in zip(args.layers, sizes, strict=True)}
    else:
        args.layers = LAYERS
    if min(args.rows, args.tokens, args.repeats) < 1:
        parser.error("--rows, --tokens and --repeats must be at least 1")
    return args


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """A row for each layer, k, G and method: seconds per million weights by part, and the loss per row."""
    for name, (n, k_in) in args.layers.items():
        H, seconds_per_token = hessian(k_in)
        W = random_weights(min(n, args.rows), k_in, "cpu")
        for bits, group_size, method in product(args.bits, args.group_sizes, args.methods):
            solve = SOLVE[method]
            if method == "gptq" and not gptq_is_there():
                print("gptq: llm-compressor can't be imported here", file=sys.stderr)
                continue
            solve(W[:32], H, bits, group_size)  # compiles and loads libraries
            found = [solve(W, H, bits, group_size) for _ in range(args.repeats)]
            parts = {part: statistics.median(times[part] for times, _ in found) for part in found[0][0]}
            parts["hessian"] = seconds_per_token * args.tokens
            scaled = {part: t / (n if part in ONCE else len(W)) / k_in * 1e6 for part, t in parts.items()}
            yield {
                "layer": name,
                "n": n,
                "k": k_in,
                "rows": len(W),
                "bits": bits,
                "group_size": group_size,
                "method": method,
                "seconds": sum(t for part, t in parts.items() if part != "hessian"),
                "per_million_weights": scaled,
                "total": sum(scaled.values()),
                "loss_per_row": found[0][1] / len(W),
            }


def hessian(k_in: int) -> tuple[Tensor, float]:
    """H [k_in, k_in] of random inputs, and its CPU seconds per token."""
    random, windows = torch.Generator().manual_seed(0), 2 + 2 * k_in // WINDOW
    H, seconds = torch.zeros(k_in, k_in), []
    for _ in range(windows):
        x = random_inputs(WINDOW, k_in, random)
        start = time.process_time()
        accumulate(H, x, windows * WINDOW)
        seconds.append(time.process_time() - start)
    return symmetrize(H), statistics.median(seconds) / WINDOW


@contextmanager
def timed_parts(seconds: Counter[str]) -> Iterator[None]:
    """Add the CPU seconds of each of TIMED to `seconds` while the context lasts."""

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.process_time()
            try:
                return call(*args)
            finally:
                seconds[part] += time.process_time() - start

        return run

    with ExitStack() as stack:
        for part, (module, name) in TIMED.items():
            stack.enter_context(mock.patch.object(module, name, timed(part, getattr(module, name))))
        yield


def solve_compiled(W: Tensor, H: Tensor, bits: int, group_size: int) -> tuple[dict[str, float], float]:
    """CPU seconds by part, and the loss."""
    seconds: Counter[str] = Counter()
    start = time.process_time()
    with timed_parts(seconds):
        solution = solver.quantize_linear(W, H, bits, group_size, COEFFICIENT_BITS["refined"])
    seconds["other"] = time.process_time() - start - seconds.total()
    return dict(seconds), solution.loss.sum().item()


def solve_in_torch(W: Tensor, H: Tensor, bits: int, group_size: int) -> tuple[dict[str, float], float]:
    """As `solve_compiled`, without the library."""
    with mock.patch.object(cpu_solver, "library", return_value=None):
        return solve_compiled(W, H, bits, group_size)


def gptq_is_there() -> bool:
    try:
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # noqa: F401
    except ImportError:
        return False
    return True


def solve_by_gptq(W: Tensor, H: Tensor, bits: int, group_size: int) -> tuple[dict[str, float], float]:
    """As `solve_compiled`, all of it under "other": GPTQ on a min-max grid of integers per group of a row."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    start = time.process_time()
    grid = QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=group_size)
    groups = W.float().unflatten(1, (-1, group_size))
    scale, zero = calculate_qparams(groups.amin(2), groups.amax(2), grid)
    W_hat = quantize_weight(W.float()[None], H.clone()[None], scale[None], zero[None], None, grid)[0][0]
    seconds = time.process_time() - start
    error = W - W_hat
    return {"other": seconds}, ((error @ H) * error).sum().item()


SOLVE = {"compiled": solve_compiled, "torch": solve_in_torch, "gptq": solve_by_gptq}


def table(rows: list[Row]) -> str:
    """The rows as a markdown table."""
    heads = ["layer", "N x K", "k", "G", "method", *(f"{part}, s" for part in PARTS), "sum, s", "loss per row"]
    lines = ["CPU seconds per million weights", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["layer"], f"{row['n']} x {row['k']}", row["bits"], row["group_size"], row["method"]]
        cells += [f"{row['per_million_weights'].get(part, 0):.3f}" for part in PARTS]
        cells += [f"{row['total']:.3f}", f"{row['loss_per_row']:.4g}"]
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def plot(rows: list[Row], file: Path) -> None:
    """Stacked bars: seconds per million weights by part, a bar for each row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['layer']}, k={row['bits']}, G={row['group_size']}, {row['method']}" for row in rows]
    left = [0.0] * len(rows)
    for part, color in zip(PARTS, COLORS, strict=False):
        widths = [row["per_million_weights"].get(part, 0) for row in rows]
        axes.barh(names, widths, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("CPU seconds per million weights")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
