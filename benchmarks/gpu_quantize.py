"""Part of the GPU check: the quantizer on CUDA, against the CPU's losses, `bpdq plan`'s memory, and the clock.

    python -m benchmarks.gpu_quantize --json quantize.json --seconds 120

k = 2, G = 128, the default solver, random weights. First a narrow model on both devices; then what the solver's pieces
take at the widths of Qwen2.5 7B, 32B and 72B; then blocks of 7B and stages of the larger ones, from short to long, as
many as fit into --seconds. What does not fit is extrapolated from the pieces, and marked so. SmolLM2 is quantized whole
where --smollm2 says where it is; that takes time of its own.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from math import log
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from benchmarks.gpu_part import Parser, Row, finish, new_report, save
from benchmarks.gpu_solver import REFINED_INPUTS, SCHEME, Pieces, launches, measure_pieces, measure_stage, stage_seconds
from benchmarks.kernel_bench import markdown
from benchmarks.random_models import VOCABULARY, write_model
from benchmarks.shapes import MODELS, Layer, Model
from bpdq_quantizer import quantize
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.evaluation.perplexity import perplexity
from bpdq_quantizer.fit import plan
from bpdq_quantizer.model.calibration import file_windows
from bpdq_quantizer.model.tokens import load_tokenizer

# Of the layers' geometric mean, and of one layer: rounding decides between two levels equally near, and the rest of the
# row follows from that. Noise of 1e-6 in H alone moves the 14 losses by 0.5 % on average, one of them by 4 %.
LOSS_TOLERANCE, LAYER_TOLERANCE = 0.01, 0.1
PERPLEXITY_TOLERANCE = 0.02
TEXT = "python"  # the same on every device, which what a model writes is not
CALIBRATION_TOKENS = 128 * 2048  # defaults of `bpdq quantize`, for the hours
MARGIN = 1.3  # of a stage's estimate, that must be left to measure it
TINY = {
    "tiny": Model(1, (Layer("qkv", 128, 64), Layer("down", 64, 160)), Layer("head", VOCABULARY, 64)),
    "tiny, wider": Model(2, (Layer("down", 128, 160),), Layer("head", VOCABULARY, 128)),
}
FORMULA = (
    "hours = blocks x (calibration + sum over stages of the measured seconds, or else factor(K) + ceil(K / G) x "
    "turns(N) x group(N) + ceil(N / rows) x refine(K)) / 3600; factor(K): the Cholesky factor of H; turns(N): in which "
    "N rows are solved; group(N): the paper's pass over a group of a turn's rows; refine(K): the refinement of `rows` "
    f"rows, as many as are refined at once, in proportion to K where K > {REFINED_INPUTS}; calibration: "
    f"{CALIBRATION_TOKENS} tokens x the seconds per token of H and of the cross term, summed over K; without gradients"
)


def compare_losses(expected: list[Row], found: list[Row]) -> Row:
    """Layers of two reports: the losses of `found` over those of `expected`, their geometric mean and the worst."""
    ratios = {a["name"]: b["loss"] / a["loss"] for a, b in zip(expected, found, strict=True)}
    worst = max(ratios, key=lambda name: abs(log(ratios[name])))
    return {"mean_ratio": geometric_mean(ratios.values()), "worst_layer": worst, "ratios": ratios}


def disagreement(found: Row, device: str) -> list[str]:
    """What is wrong with `compare_losses`, a line each."""
    mean, worst = found["mean_ratio"], found["worst_layer"]
    lines = []
    if not abs(mean - 1) <= LOSS_TOLERANCE:
        lines.append(f"losses on {device} are {mean:.4f} of the CPU's in the geometric mean")
    if not abs(found["ratios"][worst] - 1) <= LAYER_TOLERANCE:
        lines.append(f"{worst}: its loss on {device} is {found['ratios'][worst]:.3f} of the CPU's")
    return lines


def agreement(name: str, device: str, folder: Path) -> Row:
    """A narrow model quantized on the CPU and on `device`."""
    model = write_model(folder / name, name, "cpu")
    options = {"bits": SCHEME.bits, "group_size": SCHEME.group_size, "samples": 8, "seq_len": 512}
    options |= {"calibration": TEXT, "output_tokens": 0}  # gradients' labels are drawn
    seconds, reports = {}, []
    for number, where in enumerate(("cpu", device)):
        started = time.perf_counter()
        reports.append(quantize(str(model), folder / f"{name}-{number}", device=where, **options)["layers"])
        seconds[where] = time.perf_counter() - started
    return compare_losses(*reports) | {"model": name, "seconds": seconds}


def quantize_blocks(name: str, blocks: int, device: str, folder: Path, samples: int, seq_len: int) -> Row:
    """`bpdq quantize` on a model of that many blocks: seconds by kind of layer, peak bytes and what plan says."""
    made = time.perf_counter()
    model = write_model(folder / "blocks", name, device, num_hidden_layers=blocks, vocab_size=VOCABULARY)
    made = time.perf_counter() - made
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    report = quantize(
        str(model),
        folder / "blocks-bpdq",
        bits=SCHEME.bits,
        group_size=SCHEME.group_size,
        calibration=TEXT,
        samples=samples,
        seq_len=seq_len,
        device=device,
    )
    row = {"model": name, "blocks": blocks, "written_s": made, "seconds": report["seconds"]}
    row["calibration_tokens"] = report["calibration_tokens"]
    row["seconds_by_stage"] = seconds_by_stage(report["layers"], blocks)
    row["peak_host_bytes"] = report["peak_host_memory_bytes"]
    row["planned_device_bytes"] = plan.quantize_device_bytes(plan.read_model(str(model)))
    if device == "cuda":
        row["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return row


STAGE_OF = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up"}
STAGE_OF |= {"up_proj": "gate_up", "down_proj": "down"}


def seconds_by_stage(layers: list[Row], blocks: int) -> dict[str, float]:
    """Seconds of a block's stages, mean over `blocks` blocks."""
    seconds: dict[str, float] = defaultdict(float)
    for layer in layers:
        seconds[STAGE_OF[layer["name"].rpartition(".")[2]]] += layer["seconds"] / blocks
    return dict(seconds)


def model_hours(model: Model, pieces: Pieces, measured: dict[tuple[int, int], float]) -> Row:
    """FORMULA, with each stage's seconds. measured: by (outputs, inputs)."""
    stages = {}
    for layer in model.layers:
        shape = layer.out_features, layer.in_features
        stages[layer.name] = {
            "shape": shape,
            "seconds": measured.get(shape, stage_seconds(*shape, pieces)),
            "source": "measured" if shape in measured else "extrapolated",
        }
    calibration = CALIBRATION_TOKENS * sum(pieces.token[layer.in_features] for layer in model.layers)
    block = calibration + sum(stage["seconds"] for stage in stages.values())
    return {
        "stages": stages,
        "calibration_seconds_per_block": calibration,
        "blocks": model.blocks,
        "hours": model.blocks * block / 3600,
    }


def affordable_stages(models: dict[str, Model], pieces: Pieces, left: Callable[[], float]) -> Iterator[tuple[int, int]]:
    """Shapes of the models' stages, from short to long by their estimates, while those fit into what is `left`."""
    shapes = {(layer.out_features, layer.in_features) for model in models.values() for layer in model.layers}
    for seconds, shape in sorted((stage_seconds(*shape, pieces), shape) for shape in shapes):
        if MARGIN * seconds > left():
            return
        yield shape


def smollm2(args: argparse.Namespace, folder: Path) -> Row:
    """SmolLM2 quantized at k = 2, G = 64 on the device, and its perplexity in fp32 (docs/results.md)."""
    started = time.perf_counter()
    quantize(
        args.smollm2,
        folder / "smollm2",
        bits=2,
        group_size=64,
        calibration=args.calibration,
        samples=32,
        seq_len=512,
        device=args.device,
    )
    seconds = time.perf_counter() - started
    tokens = file_windows(args.text, load_tokenizer(args.smollm2), 1024, 20)
    model = load_model(str(folder / "smollm2"), torch.float32).to(args.device)
    found = perplexity(model, tokens)
    return {"seconds": seconds, "perplexity": found, "expected": args.smollm2_perplexity}


def table(report: Row) -> str:
    """A line for each stage of each model."""
    lines = []
    for name, model in report["models"].items():
        for kind, stage in model["stages"].items():
            n, k = stage["shape"]
            lines.append([f"{name} {kind}", f"{n} x {k}", f"{stage['seconds']:.2f}", stage["source"]])
        lines.append([name, f"{model['blocks']} blocks", f"{model['hours'] * 3600:.0f}", f"{model['hours']:.2f} hours"])
    return markdown(["stage", "N x K", "seconds", ""], lines)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("gpu_quantize", __doc__)
    parser.add_argument("--seconds", type=float, default=120, help="for all but SmolLM2 (%(default)s)")
    parser.add_argument("--smollm2", metavar="DIR", help="SmolLM2-135M's folder or .gguf file; without it, left out")
    parser.add_argument("--calibration", metavar="FILE.txt", help="for --smollm2: WikiText-2's validation text")
    parser.add_argument("--text", metavar="FILE.txt", help="for --smollm2: WikiText-2's test text")
    parser.add_argument("--smollm2-perplexity", type=float, metavar="P", default=37.34, help="the CPU's (%(default)s)")
    args = parser.parse_args(argv)
    if args.smollm2 and not (args.calibration and args.text):
        parser.error("--smollm2 needs --calibration and --text")
    missing = [path for path in (args.smollm2, args.calibration, args.text) if path and not Path(path).exists()]
    if missing:
        parser.error(f"{missing[0]}: no such file or folder")
    return args


def run(args: argparse.Namespace, report: Row, folder: Path) -> Iterator[str]:
    """Fill in `report`; yields after every step with what it was."""
    end = time.monotonic() + args.seconds
    failures, device = report["failures"], args.device
    models = TINY if args.tiny else MODELS

    found = report["agreement"] = agreement("tiny" if args.tiny else "narrow", device, folder)
    failures += disagreement(found, device)
    yield f"a narrow model: losses on {device} are {found['mean_ratio']:.4f} of the CPU's"

    report["launches"] = launches(device) if device == "cuda" else "not counted: they need a GPU"
    yield f"launches: {report['launches']}"
    pieces, rows = measure_pieces(models, device)
    report["pieces"] = rows
    measured: dict[tuple[int, int], float] = {}
    hours = {name: model_hours(model, pieces, measured) for name, model in models.items()}
    report |= {"formula": FORMULA, "models": hours}
    yield "the solver's pieces"

    first, *_ = models
    block = sum(stage["seconds"] for stage in hours[first]["stages"].values())
    blocks = max(0, min(2, int((end - time.monotonic()) / (MARGIN * block))))
    if blocks:
        tokens = (4, 64) if args.tiny else (16, 2048)
        found = report["blocks"] = quantize_blocks(first, blocks, device, folder, *tokens)
        if found.get("peak_device_bytes", 0) > found["planned_device_bytes"]:
            failures.append(f"{first}: {found['peak_device_bytes']} bytes on the device, more than plan says")
        for layer in models[first].layers:
            measured[layer.out_features, layer.in_features] = found["seconds_by_stage"][layer.name]
    else:
        report["blocks"] = f"skipped: a block of {first} takes {block:.0f} s"
    yield f"{blocks} blocks of {first}"

    others = {name: model for name, model in models.items() if name != first}
    report["stages"] = []
    for n, k in affordable_stages(others, pieces, lambda: end - time.monotonic()):
        found = measure_stage(n, k, device) | {"estimated_s": stage_seconds(n, k, pieces)}
        report["stages"].append(found)
        measured[n, k] = found["seconds"]
        yield f"{n} x {k} in {found['seconds']:.1f} s"
    report["models"] = {name: model_hours(model, pieces, measured) for name, model in models.items()}

    if args.smollm2:
        found = report["smollm2"] = smollm2(args, folder)
        if abs(found["perplexity"] / found["expected"] - 1) > PERPLEXITY_TOLERANCE:
            failures.append(f"SmolLM2: perplexity {found['perplexity']:.2f}, on the CPU {found['expected']:.2f}")
        yield f"SmolLM2: perplexity {found['perplexity']:.2f}"
    else:
        report["smollm2"] = "skipped: no --smollm2"


def main(argv: list[str] | None = None) -> int:
    """Run the part; returns the exit status."""
    args = parse_args(argv)
    torch.set_float32_matmul_precision("highest")  # as the command does
    report: dict[str, Any] = new_report(args)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for done in run(args, report, Path(folder)):
                print(done, file=sys.stderr, flush=True)
                save(report, args.json)
    except InputError as e:
        print(f"gpu_quantize: error: {e}", file=sys.stderr)
        return 2
    print(table(report))
    return finish(report, args.json)


if __name__ == "__main__":
    sys.exit(main())
