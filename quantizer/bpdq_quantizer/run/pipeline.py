"""From a model folder to a BPDQ checkpoint: load, calibrate, quantize block by block, save."""

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from bpdq_kernels.compiled import instruction_set
from bpdq_kernels.format import Scheme
from bpdq_quantizer.algorithm import cpu_solver
from bpdq_quantizer.algorithm.solver import Solution, Solve
from bpdq_quantizer.checkpoint import writer
from bpdq_quantizer.checkpoint.carried import carry_over, hub_commit
from bpdq_quantizer.checkpoint.writer import shard
from bpdq_quantizer.cost import Clock, peak_memory
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.activations import head_inputs
from bpdq_quantizer.model.calibration import calibration_windows
from bpdq_quantizer.model.sources import check_source
from bpdq_quantizer.model.stream import Stamps, Streamed, check_unchanged, fill_block, open_model, solved, stamps
from bpdq_quantizer.model.support import check_blocks, check_tokens
from bpdq_quantizer.model.tokens import leading_tokens, load_tokenizer
from bpdq_quantizer.model.weights import weights_in
from bpdq_quantizer.passes import kv_scales
from bpdq_quantizer.passes.allocate import (
    allocate,
    by_layer,
    check_budget,
    most_common,
    other_bytes,
    parse_size,
    uniform,
)
from bpdq_quantizer.passes.blocks import final_batches, original_states, quantize_blocks
from bpdq_quantizer.passes.embeddings import embedding_schemes, quantize_embeddings
from bpdq_quantizer.passes.rotate import rotated
from bpdq_quantizer.passes.sensitivity import sensitivities
from bpdq_quantizer.passes.tune import tune_model
from bpdq_quantizer.run.options import SOLVERS, resolved, scheme
from bpdq_quantizer.run.progress import load_progress, save_progress
from bpdq_quantizer.run.recover import recover, tuned_blocks
from bpdq_quantizer.run.work_folder import Work, begin, work_folder
from bpdq_quantizer.run.workers import own_device, team
from bpdq_quantizer.storage.files import (
    check_intact,
    read_json,
    read_sealed,
    tensor_digest,
    tensors_digest,
    write_json,
    write_tensors,
)
from bpdq_quantizer.storage.offload import Batches


class Job(NamedTuple):
    """What a run works on and with. solving, tuning: windows [W, L] of tokens to solve on, and to tune the model on;
    special_tokens: that each window begins with; budget: bytes for the blocks' Linears, None for one scheme for all;
    files: the source's, before it was opened."""

    options: dict[str, Any]
    source: Streamed
    solving: Tensor
    tuning: Tensor
    special_tokens: list[str]
    tables: dict[str, Scheme]
    budget: int | None
    device: torch.device
    work: Work
    files: Stamps


def quantize(
    model: str | Path,
    output: str | Path,
    *,
    bits: int = 2,
    group_size: int = 128,
    embed_bits: int | None = None,
    head_bits: int | None = None,
    calibration: str | Path = "default",
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
    offload_dir: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    devices: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Quantize a Hugging Face folder, hub id or `.gguf` file to a BPDQ checkpoint folder `output`.

    embed_bits, head_bits: bit-planes of the input embedding and the LM head (`passes.embeddings`), by default left
    in 16 bits, as norms and biases always are; calibration: `default`, FILE.txt, FILE.jsonl or hf:NAME, cut into
    `samples` windows of `seq_len` tokens; special_tokens: `auto`, each begins with what the tokenizer puts before a
    text, or `none`; solver: a key of SOLVERS; asymmetric: 0 to 1, by default as in ASYMMETRIC;
    rotate: `none` or `hadamard` (`passes.rotate`); tune: a key of TUNE_STEPS (`passes.tune`), whose
    value is the default of tune_steps; tune_samples: windows to tune the model on, by default `samples`; tune_loss:
    `kl`, or `mix` with the reverse KL; target_bpw: bits per weight of the blocks' Linears, or target_size: of all
    tensors (`20GiB`), for which every layer gets bits and a group size of its own (`passes.allocate`):
    `bits` is then not used, and `group_size` is that of the tables; kv_cache_scales: store scales for an fp8 KV
    cache (`passes.kv_scales`); offload_dir: a folder for the hidden states of the calibration windows, by
    default in memory; device: `auto`, `cpu` or `cuda`; devices: a comma-separated list instead, for several workers
    (`run.workers`).
    Returns the report that is also saved as quantization_report.json. Raises InputError for input that can't be used;
    the folder `output` appears only when everything is written. Until then `output`.partial holds the finished blocks,
    from which `resume` goes on (`run.work_folder`). The model's blocks are read from its files one at a time.
    """
    options = resolved({key: value for key, value in locals().items() if key != "output"})
    with work_folder(output, options["offload_dir"], options.pop("resume")) as work:
        job = _prepare(options, work)
        with team(devices) as solve:
            return _run(job, solve)


def _prepare(options: dict[str, Any], work: Work) -> Job:
    """Open the model and the text, and refuse what can't be done before any of it is; `work` is then this run's."""
    o = SimpleNamespace(**options)
    device = own_device(o.devices, o.device)
    torch.manual_seed(o.seed)
    check_source(o.model)
    tokenizer = load_tokenizer(o.model)
    lead = leading_tokens(tokenizer, o.special_tokens)
    tokens = _tokens(o, tokenizer, lead)
    files = stamps(o.model)
    source = open_model(o.model)
    check_tokens(source.model, tokens, o.calibration)
    check_blocks(source)
    if o.rotate == "hadamard":
        source = rotated(source, o.seed)
    tables = embedding_schemes(source.model, o.embed_bits, o.head_bits, o.group_size)
    budget = _budget(source, tables, o.target_bpw, o.target_size)
    if o.kv_cache_scales:
        kv_scales.check(source, tokens, device)
    carry_over(o.model, source.model, tokenizer, work.folder / writer.CARRIED)
    trial = _config(o, uniform(source, scheme(o.bits, o.group_size)), tables, [])
    writer.write_config(source, trial, work.folder / "resume")
    run = _identity(options, source, tokens, device) | {"model files": files or hub_commit(o.model)}
    begin(work, run, writer.contents(work.folder, len(source.blocks)))
    recover(work)
    windows = tokens[: o.samples], tokens[: o.tune_samples]
    return Job(options, source, *windows, tokenizer.convert_ids_to_tokens(lead), tables, budget, device, work, files)


def _tokens(o: SimpleNamespace, tokenizer: Any, lead: list[int]) -> Tensor:
    """The calibration windows [W, L] for solving and tuning; raises InputError where they are too few."""
    wanted = max(o.samples, o.tune_samples) if o.tune == "model" else o.samples
    tokens = calibration_windows(o.calibration, tokenizer, wanted, o.seq_len, o.seed, lead)
    if len(tokens) < 1 + (o.tune != "none"):
        raise InputError(
            f"--tune {o.tune} needs two calibration windows or more, and {o.calibration} holds {len(tokens)} of "
            f"{o.seq_len} tokens: bring more text or lower --seq-len"
        )
    if len(tokens) < wanted:
        tqdm.write(f"{o.calibration}: holds {len(tokens)} windows of {o.seq_len} tokens, --samples asked for {wanted}")
    return tokens


def _identity(options: dict[str, Any], source: Streamed, tokens: Tensor, device: torch.device) -> dict[str, Any]:
    """What the tensors of a run depend on, apart from the model's files."""
    model, offload = Path(options["model"]), options["offload_dir"]
    return {key: value for key, value in options.items() if key not in ("calibration", "model")} | {
        "model": str(model.resolve()) if model.exists() else options["model"],
        "offload_dir": None if offload is None else os.path.abspath(offload),
        "device": str(device),
        "calibration tokens": tensor_digest(tokens),
        "dtype": str(source.model.dtype),
        "threads": torch.get_num_threads(),
        "instruction set": instruction_set() if cpu_solver.library() else "none",
        "release": _release(),
        "torch": torch.__version__,
    }


def _release() -> str:
    try:
        return version("vllm-bpdq")
    except PackageNotFoundError:
        return "not installed"


def _config(
    o: SimpleNamespace, schemes: Mapping[str, Scheme], tables: Mapping[str, Scheme], ignore: list[str]
) -> dict[str, Any]:
    """The quantization_config of a checkpoint with these schemes of the blocks' Linears and of the tables."""
    default = most_common(schemes)
    others = {name: s for name, s in {**schemes, **tables}.items() if s != default or name in tables}
    alpha = SOLVERS[o.solver]["alpha"]
    return writer.quantization_config(default, o.iterations, alpha, ignore, others, o.kv_cache_scales)


def _run(job: Job, solve: Callable[..., Solution]) -> dict[str, Any]:
    """Quantize, tune and write what the folder lacks; returns the report."""
    o, (folder, offload), source = SimpleNamespace(**job.options), (job.work.folder, job.work.offload), job.source
    dtype = torch.float16 if source.model.dtype == torch.float16 else torch.bfloat16
    solve = partial(solve, iterations=o.iterations, dtype=dtype, **SOLVERS[o.solver])
    settings = {"asymmetric": o.asymmetric}
    teacher = _teacher(job) if o.tune == "model" else None
    schemes, allocation = uniform(source, scheme(o.bits, o.group_size)), {"seconds": 0.0, "cpu_seconds": 0.0}
    if job.budget is not None:
        schemes, allocation = _allocate(job)
    layers, cost, blocks = _solve(job, schemes, solve, **settings)
    cost = {key: value + allocation[key] for key, value in cost.items()}
    report = {"model": o.model, "options": {k: v for k, v in job.options.items() if k != "model"}}
    if teacher is not None:
        report["tuning"], blocks = _tune(job, teacher, schemes, blocks)
        cost = {key: value + report["tuning"][key] for key, value in cost.items()}
    clock = Clock(cost)
    read = partial(_read_block, source, schemes, folder, {name: {digest} for name, digest in blocks.items()})
    if job.tables:
        states = _head_inputs(job, read)
        found = quantize_embeddings(source.model, states, job.tables, job.device, solve)
        layers = layers + [dataclasses.asdict(table) for table in found]
    scales = {}
    if o.kv_cache_scales:
        scales = kv_scales.calibrate(source, job.solving, job.device, offload, read)
    report |= {
        "calibration_tokens": job.solving.numel(),
        "special_tokens": job.special_tokens,
        "bits_per_weight": mean_bits(layers),
        **clock.read(),
        "peak_host_memory_bytes": peak_memory(),
        "layers": layers,
    }
    ignore = [name for name in weights_in(source.model) if name not in {layer["name"] for layer in layers}]
    check_unchanged(o.model, job.files)
    writer.finish(folder, source, _config(o, schemes, job.tables, ignore), report, blocks, scales)
    return report


def _teacher(job: Job) -> Tensor:
    """What the 16-bit model's LM head reads, computed once."""
    file = job.work.folder / "resume" / "teacher.safetensors"
    if not file.is_file():
        states = original_states(job.source, job.tuning, job.device, job.work.offload)
        write_tensors(file, {"states": states}, {})
    return read_sealed(file)[0]["states"]


def _head_inputs(job: Job, read: Callable[[int], nn.Module]) -> Batches:
    """What the LM head reads in the model with quantized blocks, tuned ones if they are."""
    source, offload = job.source, job.work.offload
    if job.options["tune"] == "model":
        return final_batches(source, job.solving, job.device, offload, read, "running the tuned model")
    states = load_progress(job.work.folder, offload).states.quantized
    return head_inputs(source.model, source.blocks, job.solving, states)


def _budget(
    source: Streamed, tables: Mapping[str, Scheme], target_bpw: float | None, target_size: str | None
) -> int | None:
    """Bytes for the blocks' Linears, if a target says so; raises InputError if no scheme is as small."""
    if target_bpw is not None:
        budget = int(target_bpw * sum(prod(weight.shape) for weight in solved(source).values()) / 8)
    elif target_size is not None:
        budget = parse_size(target_size) - other_bytes(source, tables)
    else:
        return None
    check_budget(source, budget)
    return budget


def _allocate(job: Job) -> tuple[dict[str, Scheme], dict[str, float]]:
    """The scheme of every Linear, decided once, and what that cost."""
    file, clock = job.work.folder / "resume" / "schemes.json", Clock({})
    if not file.is_file():
        trial = {key: SOLVERS[job.options["solver"]][key] for key in ("alpha", "damping")}
        stages = sensitivities(job.source, job.solving, job.device, offload=job.work.offload, **trial)
        schemes = by_layer(stages, allocate(stages, job.budget))
        write_json(file, {"schemes": {name: dataclasses.asdict(s) for name, s in schemes.items()}, **clock.read()})
    found = read_json(file)
    return {name: Scheme(**scheme) for name, scheme in found.pop("schemes").items()}, found


def _solve(
    job: Job, schemes: Mapping[str, Scheme], solve: Solve, **settings: Any
) -> tuple[list[dict[str, Any]], dict[str, float], dict[str, str]]:
    """Write the quantized blocks that the folder lacks; returns the reports of all layers, what they cost, and the
    combined digest of each block's file, by name."""
    source, folder, offload = job.source, job.work.folder, job.work.offload
    start, layers, before, blocks = load_progress(folder, offload)
    clock = Clock(before)
    if start is not None and start.block == len(source.blocks):
        return layers, before, blocks
    total = sum(prod(weight.shape) for weight in solved(source).values())
    done = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    with tqdm(total=total, initial=done, unit="weight", unit_scale=True, desc="quantizing") as bar:
        options = {"solve": solve, "start": start, "offload": offload, **settings}
        for block, reports, states in quantize_blocks(source, job.solving, schemes, job.device, **options):
            layers += [dataclasses.asdict(layer) for layer in reports]
            file = _block_file(source, states.block - 1, folder)
            blocks[file.name] = write_tensors(file, _block_tensors(source, states.block - 1, block))
            save_progress(folder, states, layers, clock.read(), blocks)
            bar.update(sum(layer.in_features * layer.out_features for layer in reports))
            if reports:
                last = reports[-1]
                bar.set_postfix_str(f"{last.name} loss {last.loss:.3g} ({last.relative_error:.2%})")
    return layers, clock.read(), blocks


def _block_file(source: Streamed, index: int, folder: Path) -> Path:
    return shard(folder, index + 2, len(source.blocks) + 1)


def _block_tensors(source: Streamed, index: int, block: nn.Module) -> dict[str, Tensor]:
    return {f"{source.prefix}.{index}.{name}": tensor for name, tensor in block.state_dict().items()}


def _read_block(
    source: Streamed, schemes: Mapping[str, Scheme], folder: Path, digests: Mapping[str, Collection[str]], index: int
) -> nn.Module:
    """Block `index` with what was written, on the CPU; digests: those that its file may have, else InputError."""
    file, start = _block_file(source, index, folder), f"{source.prefix}.{index}."
    check_intact(file, digests[file.name])
    stored = load_file(file)
    tensors, inside = ({n.removeprefix(start): v for n, v in named.items()} for named in (stored, schemes))
    fill_block(source.blocks[index], tensors, inside)
    return source.blocks[index]


def mean_bits(layers: list[dict[str, Any]]) -> float:
    """Bits per weight of several reports together."""
    weights = [layer["in_features"] * layer["out_features"] for layer in layers]
    return sum(n * layer["bits_per_weight"] for n, layer in zip(weights, layers, strict=True)) / sum(weights)


def _tune(
    job: Job, teacher: Tensor, schemes: Mapping[str, Scheme], blocks: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Tune the coefficients in the blocks' files; returns a report, and the files' digests."""
    source, resume, lm = job.source, job.work.folder / "resume", job.source.model
    before = tuned_blocks(job.work.folder)  # by a run that was stopped while it wrote them
    digests = {name: {digest, before.get(name, digest)} for name, digest in blocks.items()}
    for index in range(len(source.blocks)):
        _read_block(source, schemes, job.work.folder, digests, index)
    o = SimpleNamespace(**job.options)
    options = {"steps": o.tune_steps, "seed": o.seed, "mix": o.tune_loss == "mix"}
    report = tune_model(lm.to(job.device), job.tuning, teacher, state=resume / "tuning.safetensors", **options)
    lm.to("cpu")
    files = {_block_file(source, i, job.work.folder): _block_tensors(source, i, b) for i, b in enumerate(source.blocks)}
    tuned = {file.name: tensors_digest(tensors) for file, tensors in files.items()}
    write_json(resume / "tuned.json", tuned)
    for file, tensors in files.items():
        write_tensors(file, tensors)
    return report, tuned
