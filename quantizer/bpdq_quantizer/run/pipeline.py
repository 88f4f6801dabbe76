"""From a model folder to a BPDQ checkpoint: the recipe."""

import inspect
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bpdq_quantizer.algorithm.solver import Solve
from bpdq_quantizer.checkpoint import hub, writer
from bpdq_quantizer.checkpoint.card import Made, origin
from bpdq_quantizer.checkpoint.config_names import config_names
from bpdq_quantizer.checkpoint.heads import head_patterns
from bpdq_quantizer.cost import Clock, peak_memory, total
from bpdq_quantizer.model.calibration import text_name
from bpdq_quantizer.model.calls import head_inputs
from bpdq_quantizer.model.stream import check_unchanged
from bpdq_quantizer.model.weights import kept, weights_in
from bpdq_quantizer.model.windows import Window, token_count
from bpdq_quantizer.passes import kv_scales
from bpdq_quantizer.passes.blocks import last_batches
from bpdq_quantizer.passes.embeddings import quantize_embeddings
from bpdq_quantizer.run.block_files import BlockFiles
from bpdq_quantizer.run.fields import described, signature
from bpdq_quantizer.run.held_out import evaluate
from bpdq_quantizer.run.identity import release
from bpdq_quantizer.run.options import FIELDS, SOLVERS, Options
from bpdq_quantizer.run.prepare import Run, checkpoint_config, prepare
from bpdq_quantizer.run.progress import load_progress
from bpdq_quantizer.run.resolved import command, resolved
from bpdq_quantizer.run.run_folder import run_folder
from bpdq_quantizer.run.statistics import OFFERED, other_size
from bpdq_quantizer.run.steps import choose_schemes, solve_blocks, teacher_states, tune_blocks
from bpdq_quantizer.run.workers import team
from bpdq_quantizer.storage.offload import Batches


def quantize(model: str | Path, output: str | Path, **options: Any) -> dict[str, Any]:
    """Quantize a Hugging Face folder, hub id or `.gguf` file, in 16 bits or quantized, to a BPDQ checkpoint `output`.

    Returns the report that is also saved as quantization_report.json. Raises InputError for input that can't be used;
    the folder `output` appears only when everything is written. Until then `output`.partial holds the finished blocks,
    from which `resume` goes on (`run.run_folder`). The model's blocks are read from its files one at a time.

    The options are those of `bpdq quantize`, of which docs/quantize.md says more.
    """
    return make(resolved(model=model, output=output, **options))


quantize.__signature__ = signature(FIELDS.values())
quantize.__doc__ = f"{inspect.getdoc(quantize)}\n\n{described(FIELDS.values())}"


def requantize(statistics: str | Path, output: str | Path, **options: Any) -> dict[str, Any]:
    """Another size of a model, from what `quantize` with `keep_statistics` kept in the folder `statistics`.

    The same tensors as of `quantize` from the start, with the options of the first run but for those given here.
    Returns
    the report, and raises InputError, as `quantize` does. What may be given, as of `quantize`:
    """
    return make(*other_size(statistics, output=output, **options))


requantize.__doc__ = (
    f"{inspect.getdoc(requantize)}\n\n{described((FIELDS[name] for name in OFFERED), with_defaults=False)}"
)


def make(o: Options, windows: list[Window] | None = None) -> dict[str, Any]:
    """See `quantize`. windows: to calibrate on, of a run before."""
    publishing = o.publishing
    with run_folder(o.files.output, o.execution.offload_dir, o.execution.resume) as folder:
        if publishing.push_to_hub is not None:
            hub.check(publishing.push_to_hub, publishing.private, publishing.force)
        with team(o.execution.devices) as members:  # which would not wait for a text that is yet to be written
            run = prepare(o, folder, windows)
            dtype = torch.float16 if run.source.model.dtype == torch.float16 else torch.bfloat16
            solver = SOLVERS[o.method.solver]
            found = follow(run, partial(members, iterations=o.method.iterations, dtype=dtype, **solver))
    if publishing.push_to_hub is not None:
        hub.push(o.files.output, publishing.push_to_hub, publishing.private, publishing.force)
    return found


def follow(run: Run, solve: Solve) -> dict[str, Any]:
    """Solve, tune and write what the run's folder lacks; returns the report."""
    o, source, folder = run.options, run.source, run.folder
    teacher = teacher_states(run) if o.tuning.tune == "model" else None
    schemes, choosing = choose_schemes(run)
    files = BlockFiles(source, schemes, folder.path)
    layers, solving, digests = solve_blocks(run, files, solve)
    tuning = None
    if teacher is not None:
        tuning, digests = tune_blocks(run, files, digests, teacher)
    writing = run.windows.cost
    parts = seconds_by_part(writing, choosing, solving, tuning or {}, layers)
    clock = Clock(total(writing, choosing, solving, tuning or {}))
    read = partial(files.read, {name: {digest} for name, digest in digests.items()})
    if run.embeddings:
        rest = quantize_embeddings(source.model, head_states(run, read), run.embeddings, run.device, solve)
        layers = layers + [asdict(layer) for layer in rest]
    scales = {}
    if o.schemes.kv_cache_scales:
        scales = kv_scales.calibrate(source, run.windows.solving, run.device, folder.offload, read)
    before = clock.read()["seconds"]
    evaluation = evaluate(run, files, digests)
    parts |= {"embedding, LM head, KV scales": before - sum(parts.values())}
    shown = made(run.asked, evaluation)
    found = report(run, layers, tuning, shown, parts, clock.read())
    kept = [name for name in weights_in(source.model) if name not in {layer["name"] for layer in layers}]
    ignore = [*config_names(source, dict.fromkeys(kept, True)), *head_patterns(run.heads, source.model)]
    check_unchanged(o.files.model, run.stamps)
    config = checkpoint_config(run.source, o, schemes, run.embeddings, ignore)
    writer.finish(folder.path, source, config, found, digests, scales, run.heads, shown)
    return found


def made(o: Options, evaluation: dict[str, Any] | None) -> Made:
    """What the model card says that the report does not; o: as they were given."""
    source, text = origin(o.files.model), text_name(o.text.calibration)
    return Made(Path(o.files.output).name, source, command(o, source.name), release(), text, evaluation)


def seconds_by_part(
    writing: dict[str, float],
    choosing: dict[str, float],
    solving: dict[str, float],
    tuning: dict[str, Any],
    layers: list[dict[str, Any]],
) -> dict[str, float]:
    """What was spent on the text and the blocks, from the seconds of each step and the solver's, of each layer."""
    solver = sum(layer["seconds"] for layer in layers)
    return {
        "writing text": writing.get("seconds", 0.0),
        "sensitivities": choosing.get("seconds", 0.0),
        "forward passes and Hessians": solving["seconds"] - solver,
        "solver": solver,
        "tuning": tuning.get("seconds", 0.0),
    }


def report(
    run: Run,
    layers: list[dict[str, Any]],
    tuning: dict[str, Any] | None,
    shown: Made,
    parts: dict[str, float],
    cost: dict[str, float],
) -> dict[str, Any]:
    """What quantization_report.json says, to whoever reads the checkpoint: no paths. layers, tuning: their own reports;
    parts: seconds before the evaluation."""
    return {
        "model": shown.origin.name,
        "options": run.options.public(),
        "source_quantization": run.source.quantization,
        **({} if tuning is None else {"tuning": tuning}),
        **({} if shown.evaluation is None else {"evaluation": shown.evaluation}),
        "calibration_tokens": token_count(run.windows.solving),
        "calibration_windows_with_images": sum(bool(window.images) for window in run.windows.solving),
        "special_tokens": run.windows.special_tokens,
        "bits_per_weight": mean_bits([layer for layer in layers if layer["name"] not in run.embeddings]),
        **cost,
        "left_in_16_bits": left_in_16_bits(run, layers),
        "seconds_by_part": parts | {"evaluation": cost["seconds"] - sum(parts.values())},
        "peak_host_memory_bytes": peak_memory(),
        "layers": layers,
    }


def left_in_16_bits(run: Run, layers: list[dict[str, Any]]) -> dict[str, str]:
    """The Linears of blocks that are not among `layers`, and of heads for multi-token prediction, by name, and why."""
    blocks = run.source.model.get_submodule(run.source.prefix)
    weights = weights_in(blocks, run.source.prefix)
    reasons, done = kept(weights), {layer["name"] for layer in layers}
    matrices = [name for name, entry in run.heads.items() if len(entry.shape) == 2]
    return {
        **{name: reasons.get(name, "--ignore") for name in weights if name not in done},
        **{name.removesuffix(".weight"): "multi-token prediction" for name in matrices},
    }


def head_states(run: Run, read: Callable[[int], nn.Module]) -> Batches:
    """What the LM head reads in the model with quantized blocks, tuned ones if they are. `read(i)` gives block i."""
    source, solving, offload = run.source, run.windows.solving, run.folder.offload
    if run.options.tuning.tune == "model":
        states = last_batches(source, solving, run.device, offload, read, "the tuned model", check=True)
    else:
        states = load_progress(run.folder.path, offload).states.quantized
    return head_inputs(source.model, source.blocks, states)


def mean_bits(layers: list[dict[str, Any]]) -> float:
    """Bits per weight of several reports together."""
    weights = [layer["in_features"] * layer["out_features"] for layer in layers]
    return sum(n * layer["bits_per_weight"] for n, layer in zip(weights, layers, strict=True)) / sum(weights)
