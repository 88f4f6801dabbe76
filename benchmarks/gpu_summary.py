"""The parts' figures (`gpu_check`), each in a sentence."""

from collections.abc import Callable
from statistics import median
from typing import Any

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


SUMMARIES: dict[str, Callable[[Row], str]] = {"fast": fast, "rates": rates, "model": model, "quantizer": quantizer}
