"""Block by block over a model: calibrate, quantize, move on with the quantized block's outputs.

Within a block the Linears are grouped into stages, those that read the same tensor (q/k/v, o, gate/up, down), in
the order in which the forward pass reaches them. Each stage's Hessian is taken with all earlier stages already
quantized, and the rows of its Linears are solved together, as they share H.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm import tqdm

from bpdq_kernels import dequantize, layout
from bpdq_kernels.format import Scheme
from bpdq_quantizer.algorithm.hessian import accumulate, accumulate_shift, corrected, symmetrize
from bpdq_quantizer.algorithm.solver import Solution, Solve
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.activations import (
    Original,
    block_inputs,
    embed,
    find_stages,
    head_inputs,
    run_block,
    stage_statistics,
    to_host,
)
from bpdq_quantizer.model.modules import BPDQLinear
from bpdq_quantizer.model.stream import Streamed, drop_block, load_block, trim_heap
from bpdq_quantizer.passes.tune import tune_block
from bpdq_quantizer.storage.offload import Batches


class States(NamedTuple):
    """Hidden states in front of block `block`, in batches [n, L, D] on the CPU; `original`: the 16-bit model's."""

    block: int
    quantized: Batches
    original: Batches


@dataclass
class LayerReport:
    """One quantized Linear. loss: tr((W - W_hat) H (W - W_hat)^T) with H = (2/n) X X^T, which is twice the mean
    squared output error per token, summed over outputs; relative_error: loss / tr(W H W^T); seconds: this
    Linear's share of its stage."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    bits_per_weight: float
    loss: float
    relative_error: float
    damping: float
    seconds: float


def quantize_in_one_pass(
    block: nn.Module,
    stages: list[list[str]],
    run: Callable[[Tensor], Tensor],
    batch: Tensor,
    original: Original | None,
    stage_weights: Callable[[list[str], Tensor, Tensor | None], Tensor],
    quantize_stage: Callable[[list[str], Tensor, Tensor], None],
) -> Tensor:
    """The quantized block's output for a single batch: each stage is quantized while the pass waits in front of it."""

    def quantize_here(linear: nn.Linear, args: tuple, names: list[str]) -> None:
        tokens = batch.shape[:2].numel()
        H = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        accumulate(H, args[0], tokens)
        C = None
        if original is not None:
            C = torch.zeros_like(H)
            accumulate_shift(C, original.input(names[0], 0), args[0], tokens)
        W = stage_weights(names, symmetrize(H), C)
        del C
        quantize_stage(names, H, W)

    firsts = [(block.get_submodule(names[0]), names) for names in stages]
    hooks = [first.register_forward_pre_hook(partial(quantize_here, names=names)) for first, names in firsts]
    try:
        return run(batch)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def quantize_blocks(
    source: Streamed,
    tokens: Tensor,
    schemes: Mapping[str, Scheme],
    device: torch.device,
    *,
    solve: Solve,
    start: States | None = None,
    offload: Path | None = None,
    asymmetric: float = 0.0,
    tune_steps: int = 0,
    seed: int = 0,
) -> Iterator[tuple[nn.Module, list[LayerReport], States]]:
    """Quantize the model's decoder blocks one after the other, from the first or from `start`.

    Yields each block with its Linears replaced by BPDQLinear, a report for every one of them, and the states to go on
    from; when the next block is asked for, this one's tensors are dropped.
    tokens: [W, L]; schemes: of every Linear, by name, one for all that read the same input; offload: a folder for the
    hidden states, which else stay in memory. The model is on the CPU, one block at a time on `device`. If all windows
    fit one batch, a block takes one forward pass, otherwise about two for the four usual stages.
    With `asymmetric` > 0, every weight is first corrected for what quantization has done to its inputs, by that share
    (`hessian.corrected`). With `tune_steps`, each block's coefficients are then tuned towards the hidden states that
    the 16-bit model has after it. The reports are of the corrected weights, before tuning.
    """
    calls = block_inputs(source.model, source.blocks, tokens[[0, -1]]).calls
    if start is None:
        batches = embed(source.model, source.blocks, tokens, device, offload)
        start = States(0, batches, batches.copy() if asymmetric or tune_steps else [])
    first, batches, full = start
    del start
    for index in range(first, len(source.blocks)):
        block, name = load_block(source, index, device), f"{source.prefix}.{index}"
        call = send_to_device(calls[index], device)
        run = partial(run_block, block, call, device)
        stages = find_stages(block, run, batches[0][:1])
        original = Original(block, [names[0] for names in stages], call, device, full) if full else None
        lookup = original if asymmetric else None
        inputs = batches.copy() if tune_steps else []
        reports = quantize_block(name, block, stages, run, batches, lookup, asymmetric, schemes, solve)
        if original is not None:
            full = original.outputs()
            del original, lookup
        if tune_steps:
            block.to(device)
            tune_block(block, run, torch.cat(list(inputs)), torch.cat(list(full)), steps=tune_steps, seed=seed)
            for i, batch in enumerate(inputs):
                batches[i] = to_host(run(batch))
        yield block, reports, States(index + 1, batches, full)
        drop_block(block)


@torch.no_grad()
def final_batches(
    source: Streamed,
    tokens: Tensor,
    device: torch.device,
    offload: Path | None,
    load: Callable[[int], nn.Module],
    label: str,
) -> Batches:
    """What the LM head reads for windows [W, L], in batches [n, L, D] on the CPU, block by block.

    `load(i)` gives block i with its tensors, which are dropped afterwards; offload: as for `quantize_blocks`; label: of
    the progress bar.
    """
    calls = block_inputs(source.model, source.blocks, tokens[[0, -1]]).calls
    hidden = embed(source.model, source.blocks, tokens, device, offload)
    for index, call in enumerate(tqdm(calls, desc=label, unit="block")):
        block, call = load(index).to(device), send_to_device(call, device)
        for i, batch in enumerate(hidden):
            hidden[i] = to_host(run_block(block, call, device, batch))
        drop_block(block)
    return head_inputs(source.model, source.blocks, tokens, hidden)


def original_states(source: Streamed, tokens: Tensor, device: torch.device, offload: Path | None) -> Tensor:
    """What the LM head of the 16-bit model reads for windows [W, L]: [W, L, D] on the CPU (`final_batches`)."""
    load = partial(load_block, source, device=device)
    return torch.cat(list(final_batches(source, tokens, device, offload, load, "running the 16-bit model")))


def quantize_block(
    name: str,
    block: nn.Module,
    stages: list[list[str]],
    run: Callable[[Tensor], Tensor],
    batches: Batches,
    original: Original | None,
    asymmetric: float,
    schemes: Mapping[str, Scheme],
    solve: Solve,
) -> list[LayerReport]:
    """Quantize one block in place, and turn its inputs `batches` into its outputs; returns a report for each Linear."""
    packed: dict[str, BPDQLinear] = {}
    reports: list[LayerReport] = []

    def stage_weights(stage: list[str], H: Tensor, C: Tensor | None) -> Tensor:
        weights = {f"{name}.{part}.weight": block.get_submodule(part).weight for part in stage}
        check_finite(weights, H, *([] if C is None else [C]))
        W = torch.cat(list(weights.values()))
        return W if C is None else corrected(W, H, C, asymmetric)

    def quantize_stage(stage: list[str], H: Tensor, W: Tensor) -> None:
        trim_heap()
        started = time.perf_counter()
        linears = {f"{name}.{part}": block.get_submodule(part) for part in stage}
        scheme = schemes[f"{name}.{stage[0]}"]
        solution = solve_stage(f"{name}.{stage[0]}", W, H, scheme, solve)
        seconds = time.perf_counter() - started
        first = 0
        for part, (full_name, linear) in zip(stage, linears.items(), strict=True):
            rows = slice(first, first + linear.out_features)
            packed[part] = pack_rows(solution, rows, linear, scheme)
            reports.append(report(full_name, solution, rows, linear, scheme, seconds))
            first = rows.stop

    if len(batches) == 1:
        output = quantize_in_one_pass(block, stages, run, batches[0], original, stage_weights, quantize_stage)
        batches[0] = to_host(output)
    else:
        for stage in stages:
            lookup = None if original is None else partial(original.input, stage[0])
            H, C = stage_statistics(block.get_submodule(stage[0]), run, batches, lookup)
            W = stage_weights(stage, H, C)
            del C
            quantize_stage(stage, H, W)
            del H, W
        for i, batch in enumerate(batches):
            batches[i] = to_host(run(batch))
    for part, module in packed.items():
        block.set_submodule(part, module)
    return reports


def check_finite(weights: dict[str, Tensor], *statistics: Tensor) -> None:
    """Raise InputError for NaN or infinity in the weights, by name, or in statistics of their inputs: H, and C."""
    if not all(torch.isfinite(statistic).all() for statistic in statistics):
        first = next(iter(weights)).removesuffix(".weight")
        raise InputError(f"{first}: its calibration inputs hold NaN or infinity: check the model and its dtype")
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise InputError(f"{name} holds NaN or infinity: the model is damaged, download it again")


def solve_stage(name: str, W: Tensor, H: Tensor, scheme: Scheme, solve: Solve) -> Solution:
    """Quantize W [N, K], the stacked rows of Linears that share the input with Hessian H; `name`: of the first."""
    solution = solve(W, H, scheme.bits, scheme.group_size)
    if not torch.isfinite(solution.c).all():
        raise InputError(f"{name}: its coefficients overflow {solution.c.dtype}: convert the model to bfloat16 first")
    return solution


def pack_rows(solution: Solution, rows: slice, linear: nn.Linear, scheme: Scheme) -> BPDQLinear:
    """One Linear's packed module (on the CPU); the Linear's weight becomes the quantized one for later stages."""
    codes = solution.codes[rows]
    B = layout.pack(torch.stack([(codes >> p) & 1 for p in range(scheme.bits)]))
    c = solution.c[:, :, rows].contiguous()
    module = BPDQLinear(B.cpu(), c.cpu(), scheme.group_size, linear.in_features, linear.bias)
    linear.weight.copy_(dequantize(B, c, scheme.group_size, linear.in_features))
    return module


def report(
    name: str, solution: Solution, rows: slice, linear: nn.Linear, scheme: Scheme, stage_seconds: float
) -> LayerReport:
    loss, energy = solution.loss[rows].sum().item(), solution.energy[rows].sum().item()
    return LayerReport(
        name=name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        bits=scheme.bits,
        group_size=scheme.group_size,
        bits_per_weight=8 * scheme.stored_bytes(*linear.weight.shape) / linear.weight.numel(),
        loss=loss,
        relative_error=loss / energy if energy else 0.0,
        damping=solution.damping,
        seconds=stage_seconds * linear.out_features / solution.codes.shape[0],
    )
