"""What `serve_bench` shows of its runs: which of them can't be believed, a table, and a plot."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Run = dict[str, Any]  # a result of `vllm bench serve`, with `model` (its name), `concurrency`, `chunks` and `doubts`
COLORS = ("#4c566a", "#d1495b", "#2a7f9e", "#e0a030", "#6a994e", "#8a5a9e")
MERGED = 0.95  # chunks a token below which TPOT is off; the busiest sound runs have a few merged ones
FASTER = 0.9  # share of the TPOT of fewer requests below which that of more is no result
SIGMAS = 3  # standard errors of the difference, which must also be exceeded


def doubts(run: Run, others: Sequence[Run]) -> list[str]:
    """Why a run's latencies can't be, a sentence each; others: runs of the same model."""
    found = []
    if run["median_tpot_ms"] <= 0:
        found.append("TPOT is 0: whole answers arrived at once, which is no streaming")
    elif run["chunks"] < MERGED * run["total_output_tokens"]:
        found.append(
            f"{run['total_output_tokens']} tokens arrived in {run['chunks']} chunks: TTFT is that of several tokens, "
            "and TPOT too low (the server or client is too slow for the stream, or drafts tokens)"
        )
    for other in others:
        if other["concurrency"] < run["concurrency"] and _is_faster(run, other):
            found.append(
                f"TPOT is lower than at concurrency {other['concurrency']} ({run['median_tpot_ms']:.1f} and "
                f"{other['median_tpot_ms']:.1f} ms): one of them was disturbed, or warmed up too little"
            )
    return found


def judged(runs: Sequence[Run]) -> list[Run]:
    """The runs with their `doubts`."""
    return [run | {"doubts": doubts(run, [r for r in runs if r["model"] == run["model"]])} for run in runs]


def _is_faster(run: Run, other: Run) -> bool:
    """Whether the TPOT of a run is lower than another's by more than both spread."""
    error = math.hypot(*(r["std_tpot_ms"] / math.sqrt(r["completed"]) for r in (run, other)))
    lower, upper = run["median_tpot_ms"], other["median_tpot_ms"]
    return lower < FASTER * upper and upper - lower > SIGMAS * error


def table(runs: Sequence[Run]) -> str:
    """The runs as text, models side by side at each concurrency; `ratio` is output tokens/s over the first model's, `!`
    stands behind what `doubts` names, and below are its sentences."""
    width = max(len(run["model"]) for run in runs)
    goodput = any(run.get("request_goodput") is not None for run in runs)
    head = f"{'':<{width}}{'':>13}{'TTFT, ms':>18}{'TPOT, ms':>18}{'output':>12}"
    names = f"{'model':<{width}}{'concurrency':>13}" + f"{'median':>9}{'p99':>9}" * 2 + f"{'tokens/s':>12}{'ratio':>8}"
    lines = [head + (f"{'':>8}{'good':>13}" if goodput else ""), names + (f"{'requests/s':>13}" if goodput else "")]
    doubted = []
    for run in sorted(runs, key=lambda run: run["concurrency"]):
        base = next(r for r in runs if r["concurrency"] == run["concurrency"])
        times = (run[f"{which}_{metric}_ms"] for metric in ("ttft", "tpot") for which in ("median", "p99"))
        lines.append(
            f"{run['model']:<{width}}{run['concurrency']:>13}"
            + "".join(f"{t:>9.1f}" for t in times)
            + ("!" if run["doubts"] else " ")
            + f"{run['output_throughput']:>11.1f}{run['output_throughput'] / base['output_throughput']:>8.2f}"
            + (f"{run['request_goodput']:>13.3f}" if goodput else "")
        )
        doubted += [f"! {run['model']} at concurrency {run['concurrency']}: {reason}" for reason in run["doubts"]]
    return "\n".join([*lines, *doubted])


def caption(report: dict[str, Any]) -> str:
    """One line that says what was measured where."""
    hardware, settings = report["machine"], report["settings"]
    device = ", ".join(hardware["gpus"]) or f"{hardware['cpu']}, {hardware['cores']} cores"
    good = f"; good: {', '.join(settings['goodput'])} ms at most" if settings.get("goodput") else ""
    return (
        f"{device}; vLLM {report['versions']['vllm']}; {settings['requests']} requests of "
        f"{settings['input_len']} + {settings['output_len']} tokens per concurrency{good}"
    )


def plot(report: dict[str, Any]) -> Figure:
    """Output tokens/s, TPOT (median solid, p99 dashed) and, if asked for, good requests/s against concurrency; one
    color per model, circles where `doubts` has something to say."""
    goodput = bool(report["settings"].get("goodput"))
    figure = Figure(figsize=(15 if goodput else 10, 4.8), layout="constrained")
    throughput, tpot, *good = figure.subplots(1, 3 if goodput else 2)
    models = list(dict.fromkeys(run["model"] for run in report["runs"]))
    for i, model in enumerate(models):
        runs = sorted((r for r in report["runs"] if r["model"] == model), key=lambda run: run["concurrency"])
        color = COLORS[i % len(COLORS)]
        _line(throughput, runs, "output_throughput", color, label=model)
        _line(tpot, runs, "median_tpot_ms", color)
        _line(tpot, runs, "p99_tpot_ms", color, linewidth=1, linestyle="--", markersize=4, alpha=0.7)
        for axes in good:
            _line(axes, runs, "request_goodput", color)
    ticks = sorted({run["concurrency"] for run in report["runs"]})
    _finish(throughput, "Output throughput (higher is better)", "output tokens/s", ticks)
    _finish(tpot, "Time per output token (lower is better)", "TPOT, ms: median, p99 dashed", ticks)
    for axes in good:
        _finish(axes, "Goodput (higher is better)", "good requests/s", ticks)
    figure.legend(loc="outside upper center", frameon=False, fontsize=9, ncols=min(len(models), 2))
    circles = "; circles: what can't be, as serve.json says" if any(run["doubts"] for run in report["runs"]) else ""
    figure.supxlabel(caption(report) + circles, fontsize=8, color="#666666")
    return figure


def _line(axes: Axes, runs: Sequence[Run], key: str, color: str, **style: Any) -> None:
    x, y = [run["concurrency"] for run in runs], [run[key] for run in runs]
    axes.plot(x, y, color=color, marker="o", **{"linewidth": 2} | style)
    doubted = [i for i, run in enumerate(runs) if run["doubts"]]
    if doubted:
        axes.plot([x[i] for i in doubted], [y[i] for i in doubted], "o", color=color, fillstyle="none", markersize=11)


def _finish(axes: Axes, title: str, unit: str, ticks: list[int]) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("concurrent requests")
    axes.set_ylabel(unit)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
