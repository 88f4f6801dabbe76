"""The picture of README.md and docs/results.md: KL to the 16-bit model against bits per weight.

    python -m benchmarks.quality_picture docs/results/quality.json

Writes quality.svg beside the JSON file, whose rows are those of `benchmarks.quality_bench`: model, method,
bits_per_weight and kl, in nats. A model's 16-bit row, whose KL is 0, is left out.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from benchmarks.serve_report import COLORS

AXIS = {"kl": "KL to the 16-bit model, nats (lower is better)", "perplexity": "perplexity"}


def main(argv: list[str] | None = None) -> int:
    """Draw; returns the exit status."""
    args = parse_args(argv)
    with matplotlib.rc_context({"svg.hashsalt": "quality", "svg.fonttype": "path"}):
        figure = plot(json.loads(args.report.read_text())["rows"], "kl")
        figure.savefig(args.report.with_suffix(".svg"), metadata={"Date": None, "Description": digest(args.report)})
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_picture", description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, metavar="FILE.json", help="rows of quality_bench")
    return parser.parse_args(argv)


def digest(report: Path) -> str:
    """What the picture says of the figures that it shows, by which a test knows whether it is theirs."""
    return f"sha256 of {report.name}: {hashlib.sha256(report.read_bytes()).hexdigest()}"


def plot(rows: list[dict[str, Any]], score: str) -> Figure:
    """A score (log scale), `kl` or `perplexity`, against bits per weight: a line for each model and method, dashes for
    the perplexity of 16 bits."""
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    series = dict.fromkeys((r["model"], r["method"]) for r in rows if r["method"] != "16-bit" or score != "kl")
    models = {model for model, _ in series}
    for i, (model, method) in enumerate(series):
        points = [(r["bits_per_weight"], r[score]) for r in rows if (r["model"], r["method"]) == (model, method)]
        label = f"{model}, {method}" if len(models) > 1 else method
        style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "label": label}
        if method == "16-bit":
            axes.axhline(points[0][1], linestyle="--", **style)
        else:
            axes.plot(*zip(*sorted(points), strict=True), marker="os^"[i // len(COLORS) % 3], **style)
    axes.set_yscale("log")
    axes.set_xlabel("bits per quantized weight")
    axes.set_ylabel(AXIS[score])
    axes.set_title(models.pop() if len(models) == 1 else "", fontsize=10, loc="left")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
