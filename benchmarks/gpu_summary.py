"""The parts' figures (`gpu_check`), each in a sentence; and the kernels' as docs/kernels.md has them.

python -m benchmarks.gpu_summary results/FILE.json
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.kernel_bench import markdown
from benchmarks.kernel_timing import decoder_ms

Row = dict[str, Any]

COPY_BAR, PREFILL_BAR = 0.8, 0.6
LARGE = ("qwen2.5-32b", "qwen2.5-72b")
DECODE_TOKENS, PREFILL_TOKENS = 64, 4096


def fast(figures: Row) -> str:
    """Shares of the copy's bandwidth and of matmul's rate, and where 16 bits are quicker."""
    rows = figures["rows"]
    told = []
    for tokens in (1, 8):
        shares = [row["of_copy_bandwidth"] for row in rows if row["tokens"] == tokens and row["model"] in LARGE]
        if shares:
            enough = sum(share >= COPY_BAR for share in shares)
            told.append(
                f"M = {tokens}: {min(shares):.2f} to {max(shares):.2f} of the copy's bandwidth for layers of 32B and "
                f"72B, {enough} of {len(shares)} at {COPY_BAR:.0%} or more"
            )
    prefill = [row["matmul_us"] / row["us"] for row in rows if row["tokens"] == PREFILL_TOKENS]
    if prefill:
        told.append(
            f"M = {PREFILL_TOKENS}: {min(prefill):.2f} to {max(prefill):.2f} of torch.matmul's FLOP/s "
            f"({'all' if min(prefill) >= PREFILL_BAR else 'not all'} at {PREFILL_BAR:.0%} or more)"
        )
    decode = [row for row in rows if row["tokens"] <= DECODE_TOKENS]
    slower = [
        f"{row['model']} {row['layer']['name']} M = {row['tokens']} ({row['matmul_us'] / row['us']:.2f} x)"
        for row in decode
        if row["us"] > row["matmul_us"]
    ]
    told.append(f"slower than 16 bits up to M = {DECODE_TOKENS}: {', '.join(slower) or 'nothing'}")
    one = [row for row in rows if row.get("alternatives_us")]
    for name in one[0]["alternatives_us"] if one else ():
        told.append(
            f"M = 1 by {name}: {median(row['alternatives_us'][name] / row['us'] for row in one):.2f} x the time"
        )
    return "; ".join(told)


def experts(figures: Row) -> str:
    """How many times as fast as evenly spread ones in 16 bits."""
    told: dict[str, list[str]] = {}
    for row in figures["rows"]:
        told.setdefault(row["model"], []).append(f"M = {row['tokens']} {row['matmul_us'] / row['us']:.2f}")
    return "; ".join(f"{model}, times 16 bits: {', '.join(gains)}" for model, gains in told.items())


def rates(figures: Row) -> str:
    """Instructions per clock and multiprocessor, and what the static model assumes."""
    found = {name: figures[name] for name in ("binary", "bf16") if name in figures}
    return "; ".join(
        f"{name} MMA {row['per_clock_and_multiprocessor']:.3f} per clock and multiprocessor (assumed {row['assumed']})"
        for name, row in found.items()
    )


def model(figures: Row) -> str:
    """Tokens/s of the fast path, times those of 16 bits."""
    told = []
    for name, rows in figures["models"].items():
        ways = {row["way"]: row["batches"] for row in rows}
        for batch, at in ways["tiled"].items():
            gain = at["tokens_per_s"] / ways["16 bits"][batch]["tokens_per_s"]
            told.append(f"{name}, batch {batch}: {at['tokens_per_s']:.0f} tokens/s, {gain:.2f} x 16 bits")
    return "; ".join(told)


def quantizer(figures: Row) -> str:
    """Agreement with the CPU, and hours for whole models."""
    agreement = figures["agreement"]
    told = [f"losses are {agreement['mean_ratio']:.4f} of the CPU's"]
    told += [f"{name}: {row['hours']:.2f} h" for name, row in figures["models"].items()]
    return "; ".join(told)


def vllm(figures: Row) -> str:
    """Speed against 16 bits, and tokens against transformers'."""
    times = {(row["weights"], row["batch"]): row for row in figures["runs"]}
    told = []
    for (weights, batch), row in times.items():
        if weights == "bpdq":
            gain = times["bf16", batch]["tpot_ms"] / row["tpot_ms"]
            told.append(f"7B, {row['mode']}, batch {batch}: {row['tpot_ms']:.2f} ms per token, {gain:.2f} x 16 bits")
    told += [f"{mode}: {row['equal']} of {row['tokens']} tokens equal" for mode, row in figures["tokens"].items()]
    return "; ".join(told)


SUMMARIES: dict[str, Callable[[Row], str]] = {
    "fast": fast,
    "experts": experts,
    "rates": rates,
    "model": model,
    "quantizer": quantizer,
    "vllm": vllm,
    "vllm-experts": vllm,
}


def kernel_table(figures: Row) -> str:
    """How many times as fast as torch.matmul in 16 bits, for each layer and number of tokens; of one and eight tokens
    the share of the copy's bandwidth too. The last lines: all Linears of a model's blocks."""
    tokens = sorted({row["tokens"] for row in figures["rows"]})
    layers: dict[tuple[str, str], dict[int, Row]] = {}
    for row in figures["rows"]:
        layers.setdefault((row["model"], row["layer"]["name"]), {})[row["tokens"]] = row
    lines = []
    for (model, name), at in layers.items():
        size = at[tokens[0]]["layer"]
        cells = [f"{model.removeprefix('qwen2.5-').upper()} {name}", f"{size['out_features']} x {size['in_features']}"]
        for m in tokens:
            share = f" ({at[m]['of_copy_bandwidth']:.0%})" if m in (1, 8) else ""
            cells.append(f"{at[m]['matmul_us'] / at[m]['us']:.2f}{share}")
        lines.append(cells)
    for model in dict.fromkeys(row["model"] for row in figures["rows"]):
        times = [[decoder_ms(figures["rows"], model, m, key) for key in ("us", "matmul_us")] for m in tokens]
        name = f"{model.removeprefix('qwen2.5-').upper()}, all blocks"
        lines.append([name, "ms", *(f"{ours:.1f} / {theirs:.1f}" for ours, theirs in times)])
    return markdown(["layer", "N x K", *map(str, tokens)], lines)


if __name__ == "__main__":
    print(kernel_table(json.loads(Path(sys.argv[1]).read_text())["parts"]["fast"]["figures"]))
