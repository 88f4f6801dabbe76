"""Block by block over a model: calibrate, quantize, move on with the quantized block's outputs.

Within a block the weights are grouped into stages, those that read the same tensor (q/k/v, o, gate/up, down), in
the order in which the forward pass reaches them. Each stage's Hessian is taken with all earlier stages already
quantized, and the rows of its weights are solved together, as they share H. Experts have a Hessian each; those of a
layer are solved some at a time.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bpdq_kernels import dequantize
from bpdq_kernels.experts import Experts
from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import Stored
from bpdq_quantizer.algorithm.hessian import corrected
from bpdq_quantizer.algorithm.solver import Solution, Solve
from bpdq_quantizer.model.activations import (
    Original,
    Statistics,
    block_calls,
    capture_one,
    embed,
    expert_statistics,
    find_stages,
    input_statistics,
    run_batches,
)
from bpdq_quantizer.model.calls import Run, block_runs, head_inputs, twins
from bpdq_quantizer.model.products import quick_products
from bpdq_quantizer.model.residual import Read, Reader, find_streams
from bpdq_quantizer.model.stream import Streamed, drop_block, load_block, trim_heap
from bpdq_quantizer.model.weights import Weight, hooked, weights_in
from bpdq_quantizer.model.windows import Window, text_windows
from bpdq_quantizer.passes.experts import in_two, layer_tokens, slices
from bpdq_quantizer.passes.layers import LayerReport, check_finite, check_output, layer_report, solve_checked, stored
from bpdq_quantizer.passes.outputs import Outputs, token_weights
from bpdq_quantizer.storage.offload import Batches


class States(NamedTuple):
    """Hidden states in front of block `block`, in batches [n, L, D] on the CPU; `original`: the 16-bit model's."""

    block: int
    quantized: Batches
    original: Batches


@torch.no_grad()
def quantize_blocks(
    source: Streamed,
    windows: Sequence[Window],
    schemes: Mapping[str, Scheme],
    device: torch.device,
    *,
    solve: Solve,
    start: States | None = None,
    offload: Path | None = None,
    asymmetric: float = 0.0,
    outputs: Callable[[int], Mapping[str, Outputs]] | None = None,
) -> Iterator[tuple[nn.Module, list[LayerReport], States]]:
    """Quantize the model's decoder blocks one after the other, from the first or from `start`.

    Yields each block with its weights replaced by bit-planes, a report for every one of them, and the states to go on
    from; when the next block is asked for, this one's tensors are dropped.
    schemes: of the weights, by name, one for all that read the same input, and those that it lacks stay
    as they are; offload: a folder for the hidden states, which else stay in memory. The model is on the CPU, one block
    at a time on `device`. If all windows fit one batch, a block takes one forward pass, otherwise about two for the
    four usual stages.
    With `asymmetric` > 0, every weight is first corrected for what quantization has done to its inputs, and to the
    residual stream that its outputs are added to, by that share (`hessian.corrected`). The reports are of the corrected
    weights. outputs(i): of block i's Linears, by name, what errors of their outputs do to the model.
    """
    if start is None:
        batches, calls = embed(source, windows, device, offload)
        start = States(0, batches, batches.copy() if asymmetric else [])
    else:
        calls = block_calls(source, windows)
    first, batches, full = start
    del start
    original_calls = twins(calls)
    lengths, count = [window.tokens.shape[1] for window in windows], len(batches[0])
    lengths = [lengths[i : i + count] for i in range(0, len(lengths), count)]
    for index in range(first, len(source.blocks)):
        block, name = load_block(source, index, device), f"{source.prefix}.{index}"
        runs = block_runs(block, calls[index], device, len(batches))
        weights = [weight for weight in weights_in(block, name).values() if weight.name in schemes]
        stages = find_stages(weights, runs[0], batches[0][:1])
        firsts = [stage[0] for stage in stages]
        alone = [stage[0] for stage in stages if len(stage) == 1]
        streams = find_streams(block, alone, runs[0], batches[0][:1]) if full else {}
        original = Original(block, name, firsts, streams, original_calls[index], device, full) if full else None
        known = {} if outputs is None else outputs(index)
        solver = StageSolver(schemes, solve, lengths, asymmetric, original, known)
        readers = [Reader(first, block, streams.get(first.name)) for first in firsts]
        see = partial(check_output, source, index, "the quantized model")
        quantize_block(stages, readers, runs, batches, solver, see)
        if original is not None:
            full = original.outputs()
            solver.original = original = None
        yield block, solver.reports, States(index + 1, batches, full)
        drop_block(block)


class Problem(NamedTuple):
    """Weights that are solved together, as they share their inputs. W [N, K]: what their rows are to come close to;
    H [K, K]: of their inputs; tokens: that it is of; covariances: of chunks of their outputs, as of `solve_in_turn`, if
    they are known."""

    weights: list[Weight]
    W: Tensor
    H: Tensor
    tokens: int
    covariances: Sequence[Tensor] = ()


class StageSolver:
    """Solves the stages of a block in the order of its forward pass.

    A solved weight goes on as the matrix that its bit-planes stand for, which later stages' inputs are of; `finish`
    puts the bit-planes in its place. reports: of the weights solved so far. lengths: tokens of the windows of every
    batch; original: the 16-bit block, for `asymmetric` calibration, or None; outputs: what errors of the Linears'
    outputs do to the model, by name, where that is known.
    """

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        solve: Solve,
        lengths: Sequence[Sequence[int]],
        asymmetric: float,
        original: Original | None,
        outputs: Mapping[str, Outputs],
    ) -> None:
        self.schemes, self.solve, self.lengths = schemes, solve, lengths
        self.asymmetric, self.original, self.outputs = asymmetric, original, outputs
        self.reports: list[LayerReport] = []
        self.packed: list[tuple[Weight, Stored, int]] = []

    def quantize(self, stage: list[Weight], inputs: Iterable[Read]) -> None:
        """Solve a stage from what it reads in every batch."""
        original = None if self.original is None else partial(self.original.read, stage[0].name)
        if stage[0].layer is None:
            known = [self.outputs[weight.name] for weight in stage if weight.name in self.outputs]
            weights = token_weights(known, list(chain.from_iterable(self.lengths))) if known else None
            tokens = [sum(lengths) for lengths in self.lengths]
            statistics = input_statistics(stage[0], inputs, tokens, original, weights)
            problem = self._problem(stage, statistics, sum(tokens))
            covariances = [G for outputs in known for G in outputs.covariances]
            self._solve([problem._replace(covariances=covariances)])
        else:
            self._solve_experts(stage, stage[0].layer.module, inputs, original)

    def _solve_experts(
        self,
        stage: list[Weight],
        layer: Experts,
        inputs: Iterable[Read],
        original: Callable[[int], Read] | None,
    ) -> None:
        """Solve a layer's experts, some at a time, the matrix that reads the others' outputs last."""
        routed = (read.x for read in inputs)
        tokens = layer_tokens(layer.num_experts, routed, None if original is None else lambda i: original(i).x)
        for part in slices(in_two(stage, layer.names.down), tokens):
            samples, problems = [], []
            for expert in part:
                sample = tokens.of(expert.number)
                if expert.first:
                    statistics = expert_statistics(sample.x, sample.original, sample.weights)
                    problems.append(self._problem(expert.first, statistics, sample.routed))
                with quick_products(tokens.device):
                    middle = None if sample.original is None else layer.middle(expert.number, sample.original)
                samples.append(sample._replace(original=middle))
            self._solve(problems)
            for expert, sample in zip(part, samples, strict=True):
                if expert.last:
                    with quick_products(tokens.device):
                        x = layer.middle(expert.number, sample.x)
                    statistics = expert_statistics(x, sample.original, sample.weights)
                    problems.append(self._problem(expert.last, statistics, sample.routed))
            self._solve(problems)

    def _problem(self, weights: list[Weight], statistics: Statistics, tokens: int) -> Problem:
        """statistics: of so many tokens."""
        H, C, P = statistics
        matrices = {f"{weight.name}.weight": weight.matrix for weight in weights}
        check_finite(matrices, *(found for found in statistics if found is not None))
        W = torch.cat(list(matrices.values()))
        return Problem(weights, W if C is None else corrected(W, H, C, self.asymmetric, P), H, tokens)

    def _solve(self, problems: list[Problem]) -> None:
        """Solve problems that are alike at once, and forget them."""
        if not problems:
            return
        trim_heap()
        started = time.perf_counter()
        weights, targets, hessians, tokens, (covariances, *_) = zip(*problems, strict=True)
        alone = len(problems) == 1
        W, H = (tensors[0] if alone else torch.stack(tensors) for tensors in (targets, hessians))
        problems.clear()
        del targets, hessians
        scheme = self.schemes[weights[0][0].name]
        solve = partial(self.solve, covariances=covariances) if covariances else self.solve
        solutions = solve_checked([stage[0].name for stage in weights], W, H, scheme, solve)
        seconds_per_row = (time.perf_counter() - started) / W.shape[:-1].numel()
        for stage, solution, count in zip(weights, solutions, tokens, strict=True):
            self._keep(stage, solution, scheme, seconds_per_row, count)

    def _keep(
        self, stage: list[Weight], solution: Solution, scheme: Scheme, seconds_per_row: float, tokens: int
    ) -> None:
        """Go on with the solution of a stage's rows, which took so long and is fitted to so many tokens."""
        first = 0
        for weight in stage:
            rows = slice(first, first + weight.shape[0])
            layer = stored(solution, scheme, rows)
            weight.assign(dequantize(layer.B, layer.c, scheme.group_size, weight.shape[1], layer.s))
            self.packed.append((weight, layer.to("cpu"), scheme.group_size))
            loss, energy = (part[rows].sum().item() for part in (solution.loss, solution.energy))
            damping, seconds = solution.damping.item(), seconds_per_row * weight.shape[0]
            self.reports.append(layer_report(weight.name, weight.shape, scheme, loss, energy, damping, seconds, tokens))
            first = rows.stop

    def finish(self) -> None:
        """Put bit-planes in the place of all that was solved."""
        while self.packed:
            weight, layer, group_size = self.packed.pop()
            weight.replace(layer, group_size)


def quantize_block(
    stages: list[list[Weight]],
    readers: list[Reader],
    runs: list[Run],
    batches: Batches,
    solver: StageSolver,
    see: Callable[[Tensor], None],
) -> None:
    """Quantize one block in place, and turn its inputs `batches` into its outputs, which `see` is shown; readers: the
    first weight of each stage.

    Of a single batch each stage is solved while the pass waits in front of it.
    """
    if len(batches) == 1:
        solve = [partial(lambda stage, read: solver.quantize(stage, [read]), stage) for stage in stages]
        pairs = zip(readers, solve, strict=True)
        with hooked(hook for reader, quantize in pairs for hook in reader.on_read(quantize)):
            run_batches(runs, batches, see)
    else:
        for stage, reader in zip(stages, readers, strict=True):
            inputs = (capture_one(reader, run, batches[i]) for i, run in enumerate(runs))
            solver.quantize(stage, inputs)
        run_batches(runs, batches, see)
    solver.finish()


@torch.no_grad()
def last_batches(
    source: Streamed,
    windows: Sequence[Window],
    device: torch.device,
    offload: Path | None,
    load: Callable[[int], nn.Module],
    model: str,
    *,
    check: bool = False,
) -> Batches:
    """What the last block makes of windows, in batches [n, L, D] on the CPU, block by block.

    `load(i)` gives block i with its tensors, which are dropped afterwards; offload: as for `quantize_blocks`; model:
    what it is called; check: raise InputError for NaN and infinity.
    """
    hidden, calls = embed(source, windows, device, offload)
    for index, here in enumerate(tqdm(calls, desc=f"running {model}", unit="block")):
        block = load(index).to(device)
        see = partial(check_output, source, index, model) if check else None
        run_batches(block_runs(block, here, device, len(hidden)), hidden, see)
        drop_block(block)
    return hidden


def original_states(source: Streamed, tokens: Tensor, device: torch.device, offload: Path | None) -> Tensor:
    """What the LM head of the 16-bit model reads for windows [W, L]: [W, L, D] on the CPU. Raises InputError for NaN
    and infinity."""
    load = partial(load_block, source, device=device)
    hidden = last_batches(source, text_windows(tokens), device, offload, load, "the 16-bit model", check=True)
    return torch.cat(list(head_inputs(source.model, source.blocks, hidden)))
