"""The steps of the recipe that leave something in the run's folder, from which a stopped run goes on."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from bpdq_kernels.format import Scheme
from bpdq_quantizer.algorithm.solver import Solve
from bpdq_quantizer.cost import Clock
from bpdq_quantizer.model.stream import solved
from bpdq_quantizer.model.windows import first_tokens
from bpdq_quantizer.passes.allocate import allocate, by_layer, check_costs
from bpdq_quantizer.passes.blocks import original_states, quantize_blocks
from bpdq_quantizer.passes.experts import FILL
from bpdq_quantizer.passes.outputs import Outputs, energies, load_outputs, measure_outputs, save_outputs
from bpdq_quantizer.passes.sensitivity import Stage, choices, sensitivities
from bpdq_quantizer.passes.tune import tune_model
from bpdq_quantizer.run.block_files import BlockFiles
from bpdq_quantizer.run.options import SOLVERS
from bpdq_quantizer.run.prepare import Run, one_scheme
from bpdq_quantizer.run.progress import load_progress, save_progress
from bpdq_quantizer.run.recover import tuned_blocks
from bpdq_quantizer.run.statistics import SENSITIVITIES, load_stages, once, save_stages
from bpdq_quantizer.storage.files import read_json, read_sealed, tensors_digest, write_json, write_tensors


class Allocation(NamedTuple):
    """The scheme of every Linear of the blocks, by name, and the seconds that the choice took."""

    schemes: dict[str, Scheme]
    cost: dict[str, float]


class Solved(NamedTuple):
    """Reports of all layers, the seconds that they took, and the combined digest of each block's file, by its name."""

    layers: list[dict[str, Any]]
    cost: dict[str, float]
    digests: dict[str, str]


class Tuned(NamedTuple):
    """A report, with seconds, and the combined digests of the blocks' files afterwards, by name."""

    report: dict[str, Any]
    digests: dict[str, str]


def teacher_states(run: Run) -> Tensor:
    """What the 16-bit model's LM head reads of the windows to tune on, [W, L, D], computed once."""
    file = run.folder.resume / "teacher.safetensors"
    if not file.is_file():
        states = original_states(run.source, run.windows.tuning, run.device, run.folder.offload)
        write_tensors(file, {"states": states}, {})
    return read_sealed(file)[0]["states"]


def choose_schemes(run: Run) -> Allocation:
    """One scheme for all, or, where there is a budget, each layer's own, decided once."""
    if run.budget is None:
        return Allocation(one_scheme(run.source, run.options.schemes), {})
    file, clock = run.folder.resume / "schemes.json", Clock({})
    if not file.is_file():
        stages = known_stages(run)
        schemes = by_layer(stages, allocate(stages, run.budget))
        write_json(file, {"schemes": {name: asdict(s) for name, s in schemes.items()}, **clock.read()})
    found = read_json(file)
    return Allocation({name: Scheme(**scheme) for name, scheme in found.pop("schemes").items()}, found)


def known_stages(run: Run) -> list[Stage]:
    """What every scheme costs each stage, measured once if there is a folder to keep it in."""
    folder = run.options.execution.keep_statistics
    if folder is None:
        return measured_stages(run)
    known_outputs(run)  # before the folder is locked
    file = Path(folder) / SENSITIVITIES
    once([file], lambda: save_stages(file, measured_stages(run)))
    return load_stages(file)


def measured_stages(run: Run) -> list[Stage]:
    """What every scheme costs each stage, of all windows to solve on. Raises InputError for NaN, and zeros alone."""
    solver, scheme = SOLVERS[run.options.method.solver], run.options.schemes.scheme()
    stages = sensitivities(
        run.source,
        run.windows.solving,
        run.device,
        schemes=choices(scheme.coefficient_bits, scheme.code),
        alpha=solver["alpha"],
        damping=solver["damping"],
        offload=run.folder.offload,
        energies=known_energies(run),
    )
    check_costs(stages)
    return stages


def known_outputs(run: Run) -> Callable[[int], Mapping[str, Outputs]] | None:
    """What reads the `Outputs` of a block's Linears, which are measured once; None where that is not asked for."""
    o, source = run.options, run.source
    if not o.method.output_tokens:
        return None
    folder = Path(o.execution.keep_statistics or run.folder.resume)
    files = [folder / f"outputs-{i:05}.safetensors" for i in range(len(source.blocks))]
    windows = first_tokens(run.windows.solving, o.method.output_tokens)

    def measure() -> None:
        measure_outputs(source, windows, run.device, o.method.seed, lambda i, found: save_outputs(files[i], found))

    once(files, measure)
    return lambda index: load_outputs(files[index], run.device)


def known_energies(run: Run) -> dict[str, Tensor] | None:
    """What errors of all weights' outputs cost, by name; None unless `known_outputs` has all: it has no experts."""
    outputs = known_outputs(run)
    if outputs is None:
        return None
    found = {name: energies(known) for i in range(len(run.source.blocks)) for name, known in outputs(i).items()}
    return found if found.keys() == solved(run.source).keys() else None


def solve_blocks(run: Run, files: BlockFiles, solve: Solve) -> Solved:
    """Write the quantized blocks that the folder lacks."""
    o, source, folder = run.options, run.source, run.folder
    start, layers, before, digests = load_progress(folder.path, folder.offload)
    clock = Clock(before)
    if start is not None and start.block == len(source.blocks):
        return Solved(layers, before, digests)
    if source.carries:  # which is not kept: from the first block again
        start, layers, digests = None, [], {}
    weights = solved(source)
    total = sum(prod(weight.shape) for weight in weights.values())
    experts = {name for name, weight in weights.items() if weight.layer is not None}
    done = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    blocks = quantize_blocks(
        source,
        run.windows.solving,
        files.schemes,
        run.device,
        solve=solve,
        start=start,
        offload=folder.offload,
        asymmetric=o.method.asymmetric,
        outputs=known_outputs(run),
    )
    del start  # whose hidden states are replaced one by one
    with tqdm(total=total, initial=done, unit="weight", unit_scale=True, desc="quantizing") as bar:
        for block, reports, states in blocks:
            index = states.block - 1
            layers += [asdict(layer) for layer in reports]
            digests[files.path(index).name] = files.write(index, block)
            save_progress(folder.path, states, layers, clock.read(), digests)
            bar.set_description(f"block {states.block} of {len(source.blocks)}")
            bar.update(sum(layer.in_features * layer.out_features for layer in reports))
            if reports:
                last = reports[-1]
                bar.set_postfix_str(f"{last.name} loss {last.loss:.3g} ({last.relative_error:.2%})")
    if rare := {
        layer["name"]: layer["tokens"] for layer in layers if layer["name"] in experts and layer["tokens"] < FILL
    }:
        least = min(rare, key=rare.get)
        tqdm.write(
            f"{len(rare)} matrices of experts were fitted to fewer than {FILL} tokens of their own, {least} to "
            f"{rare[least]}: more --samples bring more"
        )
    return Solved(layers, clock.read(), digests)


def tune_blocks(run: Run, files: BlockFiles, digests: Mapping[str, str], teacher: Tensor) -> Tuned:
    """Tune the coefficients in the blocks' files, all together; digests: those of the files as they were solved."""
    source, o = run.source, run.options
    before = tuned_blocks(run.folder.path)  # by a run that was stopped while it wrote them
    allowed = {name: {digest, before.get(name, digest)} for name, digest in digests.items()}
    for index in range(len(source.blocks)):
        files.read(allowed, index)
    report = tune_model(
        source.model.to(run.device),
        run.windows.tuning,
        teacher,
        state=run.folder.resume / "tuning.safetensors",
        steps=o.tuning.tune_steps,
        seed=o.method.seed,
        mix=o.tuning.tune_loss == "mix",
    )
    source.model.to("cpu")
    tuned = {files.path(i).name: tensors_digest(files.tensors(i, b)) for i, b in enumerate(source.blocks)}
    write_json(run.folder.resume / "tuned.json", tuned)
    for index, block in enumerate(source.blocks):
        files.write(index, block)
    return Tuned(report, tuned)
