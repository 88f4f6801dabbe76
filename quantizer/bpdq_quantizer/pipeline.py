"""From a model folder to a BPDQ checkpoint: load, calibrate, quantize block by block, save."""

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from bpdq_kernels.format import Scheme
from bpdq_quantizer import checkpoint, kv_scales
from bpdq_quantizer.activations import head_inputs, linear_layers
from bpdq_quantizer.allocate import allocate, by_layer, most_common, other_bytes, parse_size, uniform
from bpdq_quantizer.blocks import original_states, quantize_blocks
from bpdq_quantizer.calibration import calibration_windows
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.grid import paper_start
from bpdq_quantizer.rotate import rotated
from bpdq_quantizer.sensitivity import sensitivities
from bpdq_quantizer.sources import check_source
from bpdq_quantizer.stream import Streamed, fill_block, fingerprint, open_model
from bpdq_quantizer.support import check_blocks, check_tokens
from bpdq_quantizer.tables import quantize_tables, table_schemes
from bpdq_quantizer.tokens import leading_tokens, load_tokenizer
from bpdq_quantizer.tune import tune_model
from bpdq_quantizer.work import (
    Clock,
    digest,
    load_progress,
    offload_folder,
    peak_memory,
    save_progress,
    shard,
    work_folder,
    write_json,
    write_tensors,
)
from bpdq_quantizer.workers import own_device, team

SOLVERS = {  # options of `quantize_linear`
    "refined": {"refinements": 2, "alpha": 1e-6, "damping": 0.01},
    "paper": {"refinements": 0, "alpha": 1e-4, "damping": 0.05, "starts": (paper_start,)},
}
ASYMMETRIC = {"refined": 0.5, "paper": 0.0}  # share of the shift of its inputs that a weight is corrected for
TUNE_STEPS = {"none": 0, "block": 30, "model": 200}  # for each block, or for the model


def quantize(
    model: str,
    output: str | Path,
    *,
    bits: int = 2,
    group_size: int = 128,
    embed_bits: int | None = None,
    head_bits: int | None = None,
    calibration: str = "default",
    samples: int = 128,
    seq_len: int = 2048,
    special_tokens: str = "auto",
    iterations: int = 10,
    solver: str = "refined",
    asymmetric: float | None = None,
    rotate: str = "none",
    tune: str = "none",
    tune_steps: int | None = None,
    tune_samples: int | None = None,
    tune_loss: str = "kl",
    target_bpw: float | None = None,
    target_size: str | None = None,
    kv_cache_scales: bool = False,
    offload_dir: str | None = None,
    seed: int = 0,
    device: str = "auto",
    devices: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Quantize a Hugging Face folder, hub id or `.gguf` file to a BPDQ checkpoint folder `output`.

    embed_bits, head_bits: bit-planes of the input embedding and the LM head (`bpdq_quantizer.tables`), by default left
    in 16 bits, as norms and biases always are; calibration: `default`, FILE.txt, FILE.jsonl or hf:NAME, cut into
    `samples` windows of `seq_len` tokens; special_tokens: `auto`, each begins with what the tokenizer puts before a
    text, or `none`; solver: a key of SOLVERS; asymmetric: 0 to 1, by default as in ASYMMETRIC;
    rotate: `none` or `hadamard` (`bpdq_quantizer.rotate`); tune: a key of TUNE_STEPS (`bpdq_quantizer.tune`), whose
    value is the default of tune_steps; tune_samples: windows to tune the model on, by default `samples`; tune_loss:
    `kl`, or `mix` with the reverse KL; target_bpw: bits per weight of the blocks' Linears, or target_size: of all
    tensors (`20GiB`), for which every layer gets bits and a group size of its own (`bpdq_quantizer.allocate`):
    `bits` is then not used, and `group_size` is that of the tables; kv_cache_scales: store scales for an fp8 KV
    cache (`bpdq_quantizer.kv_scales`); offload_dir: a folder for the hidden states of the calibration windows, by
    default in memory; device: `auto`, `cpu` or `cuda`; devices: a comma-separated list instead, for several workers
    (`bpdq_quantizer.workers`).
    Returns the report that is also saved as quantization_report.json. Raises InputError for input that can't be used;
    the folder `output` appears only when everything is written. Until then `output`.partial holds the finished blocks,
    from which `resume` goes on (`bpdq_quantizer.work`). The model's blocks are read from its files one at a time.
    """
    tune_steps = TUNE_STEPS[tune] if tune_steps is None else tune_steps
    asymmetric = ASYMMETRIC[solver] if asymmetric is None else asymmetric
    tune_samples = samples if tune_samples is None else tune_samples
    options = {k: v for k, v in locals().items() if k not in ("output", "resume")}
    scheme, *_ = [_scheme(k, group_size) for k in (bits, embed_bits, head_bits) if k is not None]
    if min(samples, seq_len, iterations) < 1 or tune_steps < (tune != "none"):
        raise InputError("--samples, --seq-len, --iterations and --tune-steps must be at least 1")
    if tune_loss != "kl" and tune != "model":
        raise InputError(f"--tune-loss {tune_loss} needs --tune model")
    if not 0 <= asymmetric <= 1:
        raise InputError(f"--asymmetric {asymmetric}: expected 0 (off) to 1")
    if target_bpw is not None and target_size is not None:
        raise InputError("--target-bpw and --target-size: give one of them")
    target = own_device(devices, device)
    if min(samples, tune_samples) < 1 + (tune != "none"):
        raise InputError(f"--tune {tune} needs two calibration windows or more: raise --samples and --tune-samples")
    torch.manual_seed(seed)
    check_source(model)
    tokenizer = load_tokenizer(model)
    wanted = max(samples, tune_samples) if tune == "model" else samples
    lead = leading_tokens(tokenizer, special_tokens)
    tokens = calibration_windows(calibration, tokenizer, wanted, seq_len, seed, lead)
    if len(tokens) < wanted:
        tqdm.write(f"{calibration}: holds {len(tokens)} windows of {seq_len} tokens, --samples asked for {wanted}")
    source = open_model(model)
    check_tokens(source.model, tokens, calibration)
    check_blocks(source)
    if rotate == "hadamard":
        source = rotated(source, seed)
    tables = table_schemes(source.model, embed_bits, head_bits, group_size)
    run = options | {"model files": fingerprint(model, source.model), "calibration tokens": digest(tokens)}
    with (
        team(devices) as solve,
        offload_folder(offload_dir, Path(output)) as offload,
        work_folder(Path(output), run, resume) as folder,
    ):
        shared = {"solve": solve, "iterations": iterations, **SOLVERS[solver]}
        settings = {"offload": offload, "asymmetric": asymmetric, **shared}
        if tune == "block":
            settings |= {"tune_steps": tune_steps, "seed": seed}
        teacher = _teacher(source, tokens[:tune_samples], target, folder, offload) if tune == "model" else None
        schemes, allocation = uniform(source, scheme), {"seconds": 0.0, "cpu_seconds": 0.0}
        budget = _budget(source, tables, target_bpw, target_size)
        if budget is not None:
            trial = {"offload": offload, **{key: SOLVERS[solver][key] for key in ("alpha", "damping")}}
            schemes, allocation = _allocate(source, tokens[:samples], budget, target, folder, **trial)
        layers, cost = _solve(source, tokens[:samples], schemes, target, folder, **settings)
        cost = {key: value + allocation[key] for key, value in cost.items()}
        report = {"model": model, "options": {k: v for k, v in options.items() if k != "model"}}
        if teacher is not None:
            report["tuning"] = _tune(
                source,
                tokens[:tune_samples],
                teacher,
                schemes,
                target,
                folder,
                steps=tune_steps,
                seed=seed,
                mix=tune_loss == "mix",
            )
            cost = {key: value + report["tuning"][key] for key, value in cost.items()}
        clock = Clock(cost)
        if tables:
            states = load_progress(folder, offload).states.quantized
            states = head_inputs(source.model, source.blocks, tokens[:samples], states)
            found = quantize_tables(source.model, states, tables, target, **shared)
            layers = layers + [dataclasses.asdict(table) for table in found]
        scales = {}
        if kv_cache_scales:
            read = partial(_read_block, source, schemes, folder)
            scales = kv_scales.calibrate(source, tokens[:samples], target, offload, read)
        report |= {
            "calibration_tokens": tokens[:samples].numel(),
            "special_tokens": tokenizer.convert_ids_to_tokens(lead),
            "bits_per_weight": mean_bits(layers),
            **clock.read(),
            "peak_host_memory_bytes": peak_memory(),
            "layers": layers,
        }
        ignore = [name for name in linear_layers(source.model) if name not in {layer["name"] for layer in layers}]
        default, alpha = most_common(schemes), SOLVERS[solver]["alpha"]
        others = {name: s for name, s in (schemes | tables).items() if s != default or name in tables}
        config = checkpoint.quantization_config(default, iterations, alpha, ignore, others, bool(scales))
        checkpoint.finish(folder, source, tokenizer, config, report, scales)
    return report


def _teacher(source: Streamed, tokens: Tensor, device: torch.device, folder: Path, offload: Path | None) -> Tensor:
    """What the 16-bit model's LM head reads, computed once."""
    file = folder / "resume" / "teacher.safetensors"
    if not file.is_file():
        write_tensors(file, {"states": original_states(source, tokens, device, offload)})
    return load_file(file)["states"]


def _budget(
    source: Streamed, tables: Mapping[str, Scheme], target_bpw: float | None, target_size: str | None
) -> int | None:
    """Bytes for the blocks' Linears, if a target says so."""
    if target_bpw is not None:
        if not 0 < target_bpw <= 16:
            raise InputError(f"--target-bpw {target_bpw}: expected bits per weight, such as 2.5")
        return int(target_bpw * sum(m.weight.numel() for m in linear_layers(source.blocks).values()) / 8)
    return None if target_size is None else parse_size(target_size) - other_bytes(source, tables)


def _allocate(
    source: Streamed, tokens: Tensor, budget: int, device: torch.device, folder: Path, **options: Any
) -> tuple[dict[str, Scheme], dict[str, float]]:
    """The scheme of every Linear, decided once, and what that cost. options: of `sensitivities`."""
    file, clock = folder / "resume" / "schemes.json", Clock({})
    if not file.is_file():
        stages = sensitivities(source, tokens, device, **options)
        schemes = by_layer(stages, allocate(stages, budget))
        write_json(file, {"schemes": {name: dataclasses.asdict(s) for name, s in schemes.items()}, **clock.read()})
    found = json.loads(file.read_text())
    return {name: Scheme(**scheme) for name, scheme in found.pop("schemes").items()}, found


def _solve(
    source: Streamed,
    tokens: Tensor,
    schemes: Mapping[str, Scheme],
    device: torch.device,
    folder: Path,
    offload: Path | None,
    **solver: Any,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Write the quantized blocks that `folder` lacks; returns the reports of all layers, and what they cost."""
    start, layers, before = load_progress(folder, offload)
    clock = Clock(before)
    if start is not None and start.block == len(source.blocks):
        return layers, before
    shapes = [m.weight.shape for m in linear_layers(source.blocks).values()]
    done = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    with tqdm(
        total=sum(shape.numel() for shape in shapes), initial=done, unit="weight", unit_scale=True, desc="quantizing"
    ) as bar:
        options = {"start": start, "offload": offload, **solver}
        for block, reports, states in quantize_blocks(source, tokens, schemes, device, **options):
            layers += [dataclasses.asdict(layer) for layer in reports]
            _write_block(source, states.block - 1, block, folder)
            save_progress(folder, states, layers, clock.read())
            bar.update(sum(layer.in_features * layer.out_features for layer in reports))
            last = reports[-1]
            bar.set_postfix_str(f"{last.name} loss {last.loss:.3g} ({last.relative_error:.2%})")
    return layers, clock.read()


def _write_block(source: Streamed, index: int, block: nn.Module, folder: Path) -> None:
    tensors = {f"{source.prefix}.{index}.{name}": tensor for name, tensor in block.state_dict().items()}
    write_tensors(shard(folder, index + 2, len(source.blocks) + 1), tensors)


def _read_block(source: Streamed, schemes: Mapping[str, Scheme], folder: Path, index: int) -> nn.Module:
    """Block `index` with what `_write_block` wrote, on the CPU."""
    stored, start = load_file(shard(folder, index + 2, len(source.blocks) + 1)), f"{source.prefix}.{index}."
    tensors, inside = ({n.removeprefix(start): v for n, v in named.items()} for named in (stored, schemes))
    fill_block(source.blocks[index], tensors, inside)
    return source.blocks[index]


def mean_bits(layers: list[dict[str, Any]]) -> float:
    """Bits per weight of several reports together."""
    weights = [layer["in_features"] * layer["out_features"] for layer in layers]
    return sum(n * layer["bits_per_weight"] for n, layer in zip(weights, layers, strict=True)) / sum(weights)


def _tune(
    source: Streamed,
    tokens: Tensor,
    teacher: Tensor,
    schemes: Mapping[str, Scheme],
    device: torch.device,
    folder: Path,
    **options: Any,
) -> dict[str, Any]:
    """Tune the coefficients in the blocks' files; returns a report."""
    lm = source.model
    for index in range(len(source.blocks)):
        _read_block(source, schemes, folder, index)
    report = tune_model(lm.to(device), tokens, teacher, state=folder / "resume" / "tuning.pt", **options)
    lm.to("cpu")
    for index, block in enumerate(source.blocks):
        _write_block(source, index, block, folder)
    return report


def _scheme(bits: int, group_size: int) -> Scheme:
    try:
        return Scheme(bits, group_size)
    except ValueError as e:
        raise InputError(f"--bits / --embed-bits / --head-bits / --group-size: {e}") from None
