"""What every number of planes and every group size would cost the model, for each stage of weights.

To second order, errors e of a weight's outputs raise the model's loss by e^T F e / 2. F is taken as diagonal, from the
gradients g of the 16-bit model's loss at the outputs (empirical Fisher information, as in RSAVQ, arXiv 2510.01240):
output row i weighs what its gradient's square is, and its error is the loss that the solver minimizes,

    cost = sum over rows i of E[|g|] E[g_i^2 / |g|] (W - W_hat)_i H (W - W_hat)_i^T

That would be E[g_i^2] if all gradients were equally long. They are not: in that mean a few tokens, the first ones of a
window, outweigh all others, and their inputs are unlike those that H is of.

Rows are independent given H, so that SAMPLE_ROWS of each weight, quantized once in every way, speak for all, and
SAMPLE_EXPERTS of a layer for its others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, product
from math import prod
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bpdq_kernels.format import PLAIN, WIDTHS, Scheme
from bpdq_kernels.layout import GROUP_SIZES, MAX_PLANES
from bpdq_quantizer.algorithm.grid import range_start
from bpdq_quantizer.algorithm.hessian import accumulate, symmetrize
from bpdq_quantizer.algorithm.products import matmul
from bpdq_quantizer.algorithm.refine import dequantize_columns, refine
from bpdq_quantizer.algorithm.solver import metric_of, one_pass
from bpdq_quantizer.model.activations import embed, find_stages, run_batches
from bpdq_quantizer.model.calls import Run, block_runs
from bpdq_quantizer.model.stream import Streamed, drop_block, load_block, solved
from bpdq_quantizer.model.weights import Weight, hooked
from bpdq_quantizer.model.windows import Window, first_tokens, token_count
from bpdq_quantizer.passes.gradients import backwards, first_windows, loss_gradients
from bpdq_quantizer.passes.layers import check_finite
from bpdq_quantizer.storage.offload import Batches

SAMPLE_ROWS = 64  # of each weight
SAMPLE_EXPERTS = 4  # of each layer
ITERATIONS = 1  # of the solver: enough to compare schemes
GRADIENT_TOKENS = 4096  # the states of this many tokens are held for every block


class Stage(NamedTuple):
    """Weights that read the same input, or are a layer's experts, and so share a scheme. names: theirs; shapes:
    (outputs, inputs) of each; costs: by scheme, see the module's docstring."""

    names: list[str]
    shapes: list[tuple[int, int]]
    costs: dict[Scheme, float]


class Sample(NamedTuple):
    """Some rows of a weight of `shape` (outputs, inputs), and their losses [len(rows)] by scheme, on the CPU."""

    shape: tuple[int, int]
    rows: Tensor
    losses: dict[Scheme, Tensor]


def choices(coefficient_bits: int, code: str = PLAIN) -> tuple[Scheme, ...]:
    """All plain schemes with coefficients of at least so many bits, and where the code is another one those of it,
    likewise."""
    widths = [width for width in WIDTHS[2] if width >= coefficient_bits]
    plain = [Scheme(*scheme) for scheme in product(range(1, MAX_PLANES + 1), GROUP_SIZES, widths)]
    return (*plain, *(replace(scheme, code=code) for scheme in plain if code != PLAIN and scheme.bits < MAX_PLANES))


def sensitivities(
    source: Streamed,
    windows: Sequence[Window],
    device: torch.device,
    *,
    schemes: Sequence[Scheme],
    alpha: float,
    damping: float,
    offload: Path | None = None,
    energies: Mapping[str, Tensor] | None = None,
) -> list[Stage]:
    """The stages of all decoder blocks in order, from windows; reads each block twice, forwards and backwards.

    schemes: `choices`; every stage gets the costs of those that are `schemes_for` its inputs. The Hessians are of all
    windows in the 16-bit model, the gradients of the first GRADIENT_TOKENS. alpha, damping: as of `quantize_linear`;
    offload: a folder for the hidden states of all windows, which else stay in memory; energies: as of
    `gradient_energies`, where they are known of every weight, for which nothing is followed backwards then.
    """
    few = [] if energies else first_tokens(windows, GRADIENT_TOKENS)
    sampled, states = row_losses(source, windows, len(few), device, schemes, alpha, damping, offload)
    energies = energies or gradient_energies(source, few, states, device)
    return [with_costs(samples, energies) for samples in sampled]


class Sampled(NamedTuple):
    """A stage's weights by name, with their shapes, and samples of those that speak for all, by name."""

    shapes: dict[str, tuple[int, int]]
    samples: dict[str, Sample]


def with_costs(stage: Sampled, energies: Mapping[str, Tensor]) -> Stage:
    """A stage from samples of its weights; energies: the mean squared gradients [N] of outputs, by name."""
    costs: dict[Scheme, float] = {}
    share = sum(map(prod, stage.shapes.values())) / sum(prod(sample.shape) for sample in stage.samples.values())
    for name, (shape, rows, losses) in stage.samples.items():
        for scheme, loss in losses.items():
            costs[scheme] = costs.get(scheme, 0.0) + (energies[name][rows] * loss).mean().item() * shape[0] * share
    return Stage(list(stage.shapes), list(stage.shapes.values()), costs)


@torch.no_grad()
def row_losses(
    source: Streamed,
    windows: Sequence[Window],
    keep: int,
    device: torch.device,
    schemes: Sequence[Scheme],
    alpha: float,
    damping: float,
    offload: Path | None,
) -> tuple[list[Sampled], list[list[Tensor]]]:
    """Every stage, and the 16-bit model's states in front of every block and after the
    last, [1, L, D] of each of the first `keep` windows, on the CPU."""
    batches, calls = embed(source, windows, device, offload)
    sampled, states = [], [first_windows(batches, keep)]
    for index, here in enumerate(tqdm(calls, desc="measuring sensitivities", unit="block")):
        block = load_block(source, index, device)
        runs = block_runs(block, here, device, len(batches))
        stages = find_stages(solved(source, index).values(), runs[0], batches[0][:1])
        parts = [sampled_parts(stage) for stage in stages]
        firsts = [weights[0] for part in parts for weights in part]
        hessians = all_hessians(firsts, runs, batches, token_count(windows))
        for stage, part in zip(stages, parts, strict=True):
            samples: dict[str, Sample] = {}
            for weights in part:
                samples |= sample_rows_of(weights, hessians.pop(weights[0].name), schemes, alpha, damping)
            sampled.append(Sampled({weight.name: weight.shape for weight in stage}, samples))
        states.append(first_windows(batches, keep))
        drop_block(block)
    return sampled, states


def sampled_parts(stage: list[Weight]) -> list[list[Weight]]:
    """Those weights of a stage that speak for all, by what they multiply."""
    layer = stage[0].layer
    if layer is None:
        return [stage]
    experts = {weight.expert for weight in stage}
    chosen = sorted(experts)[:: -(-len(experts) // SAMPLE_EXPERTS)]
    last = layer.module.names.down
    alike = groupby(stage, lambda weight: (weight.expert, weight.key == last))
    return [list(weights) for (expert, _), weights in alike if expert in chosen]


def sample_rows_of(
    stage: list[Weight], H: Tensor, schemes: Sequence[Scheme], alpha: float, damping: float
) -> dict[str, Sample]:
    """Samples of weights that have one input, by name, in its metric H [K, K]."""
    check_finite({f"{weight.name}.weight": weight.matrix for weight in stage}, H)
    rows = [sample_rows(weight.shape[0], H.device) for weight in stage]
    W = torch.cat([weight.matrix[chosen] for weight, chosen in zip(stage, rows, strict=True)])
    tried = try_schemes(W, H, schemes, alpha, damping)
    parts = {scheme: loss.cpu().split([len(chosen) for chosen in rows]) for scheme, loss in tried}
    return {
        weight.name: Sample(weight.shape, chosen.cpu(), {scheme: split[i] for scheme, split in parts.items()})
        for i, (weight, chosen) in enumerate(zip(stage, rows, strict=True))
    }


def all_hessians(weights: Sequence[Weight], runs: Sequence[Run], batches: Batches, tokens: int) -> dict[str, Tensor]:
    """H of the inputs of weights of a block, by name, which read `tokens` tokens, an expert's those that are routed to
    it; `batches` become the block's outputs."""
    hessians = {weight.name: torch.zeros(2 * weight.shape[1:], device=weight.matrix.device) for weight in weights}
    seen = dict.fromkeys(hessians, 0)

    def add(name: str, x: Tensor) -> None:
        accumulate(hessians[name], x, tokens)
        seen[name] += x.shape[:-1].numel()

    with hooked(weight.on_rows(partial(add, weight.name)) for weight in weights):
        run_batches(runs, batches)
    for weight in weights:
        if weight.layer is not None:
            hessians[weight.name] *= tokens / max(1, seen[weight.name])
    return {name: symmetrize(H) for name, H in hessians.items()}


def sample_rows(count: int, device: torch.device) -> Tensor:
    """The same random rows of a weight with `count` of them whenever asked."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:SAMPLE_ROWS].sort().values.to(device)


def try_schemes(
    W: Tensor, H: Tensor, schemes: Sequence[Scheme], alpha: float, damping: float
) -> list[tuple[Scheme, Tensor]]:
    """Every scheme that is for so many inputs, and the losses [N] with it of the rows of W [N, K] in the metric H, by
    one pass of the solver and a round of its refinement."""
    found = []
    tried = sorted(schemes_for(W.shape[1], schemes), key=by_planes)
    for (group_size, trellis), alike in groupby(tried, key=attrgetter("group_size", "trellis")):
        metric = metric_of(H, group_size, damping, trellis)
        target = metric.target(W)
        HW = matmul(metric.H, target)
        for planes, widths in groupby(alike, key=attrgetter("planes")):
            start = metric.R, metric.order, planes, ITERATIONS, alpha, torch.float32, (range_start,), trellis
            solved = one_pass(target, *start)
            for scheme in widths:
                dtype = torch.int8 if scheme.coefficient_bits == 8 else torch.bfloat16
                codes, c, loss, _ = refine(*solved, target, HW, metric.H, group_size, 1, alpha, dtype, trellis)
                error = target - dequantize_columns(codes, c, group_size)
                found.append((scheme, metric.undamped(loss, error).clamp(min=0)))
    return found


def schemes_for(in_features: int, schemes: Sequence[Scheme]) -> list[Scheme]:
    """Those that a layer of so many inputs can have, and without plain ones where a trellis has the same planes."""
    possible = [scheme for scheme in schemes if scheme.for_inputs(in_features) == scheme]
    coded = {scheme.bits for scheme in possible if scheme.trellis}
    return [scheme for scheme in possible if scheme.trellis or scheme.bits not in coded]


def by_planes(scheme: Scheme) -> tuple[int, bool, int, int]:
    """What schemes are sorted by, so that those of one pass follow each other."""
    return scheme.group_size, scheme.trellis, scheme.bits, scheme.coefficient_bits


def gradient_energies(
    source: Streamed, windows: Sequence[Window], states: list[list[Tensor]], device: torch.device
) -> dict[str, Tensor]:
    """E[|g|] E[g^2 / |g|] of the gradients g of the loss at each weight's outputs: fp32 [N] on the CPU, by name; an
    expert's times the share of tokens that are routed to it.

    states: as returned by `row_losses`, of these windows. The loss is the sum over tokens of the negative
    log-likelihood.
    """
    gradients, tokens = loss_gradients(source, windows, states[-1]), token_count(windows)
    squares = {name: torch.zeros(weight.shape[0], device=device) for name, weight in solved(source).items()}
    lengths = {name: torch.zeros((), device=device) for name in squares}
    rows = dict.fromkeys(squares, 0)

    def add(name: str, gradient: Tensor) -> None:
        g = gradient.reshape(-1, gradient.shape[-1]).float()
        length = torch.linalg.vector_norm(g, dim=1)
        squares[name] += (g.square() / length.clamp(min=torch.finfo(g.dtype).tiny).unsqueeze(1)).sum(0)
        lengths[name] += length.sum()
        rows[name] += len(g)

    for _ in backwards(source, windows, dict(enumerate(states)), gradients, device, add):
        pass
    return {name: (squares[name] * lengths[name]).cpu() / (max(1, rows[name]) * tokens) for name in squares}
