"""What every number of planes and every group size would cost the model, for each stage of Linears.

To second order, errors e of a Linear's outputs raise the model's loss by e^T F e / 2. F is taken as diagonal, from the
gradients of the 16-bit model's loss (empirical Fisher information, as in RSAVQ, arXiv 2510.01240): output row i weighs
what its gradient's mean square is, and its error is the loss that the solver minimizes,

    cost = sum over rows i of E[(d loss / d y_i)^2] (W - W_hat)_i H (W - W_hat)_i^T

Rows are independent given H, so that SAMPLE_ROWS of each Linear, quantized once in every way, speak for all.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from tqdm import tqdm

from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import GROUP_SIZES, MAX_PLANES
from bpdq_quantizer.algorithm.grid import range_start
from bpdq_quantizer.algorithm.hessian import accumulate, inverse_factor, live_mean, symmetrize
from bpdq_quantizer.algorithm.order import group_aware_order
from bpdq_quantizer.algorithm.solver import one_pass, undamped, used_inputs
from bpdq_quantizer.model.activations import block_inputs, embed, find_stages, head_inputs, run_block, to_host
from bpdq_quantizer.model.stream import Streamed, drop_block, load_block
from bpdq_quantizer.passes.blocks import check_finite
from bpdq_quantizer.passes.tune import LOSS_ELEMENTS, log_probabilities, softcap
from bpdq_quantizer.storage.offload import Batches

SCHEMES = tuple(Scheme(bits, group_size) for group_size in GROUP_SIZES for bits in range(1, MAX_PLANES + 1))
SAMPLE_ROWS = 64  # of each Linear
ITERATIONS = 1  # of the solver: enough to compare schemes
GRADIENT_TOKENS = 4096  # the states of this many tokens are held for every block


class Stage(NamedTuple):
    """Linears that read the same input, and so share a scheme. names: theirs; shapes: (outputs, inputs) of each;
    costs: by scheme, see the module's docstring."""

    names: list[str]
    shapes: list[tuple[int, int]]
    costs: dict[Scheme, float]


def sensitivities(
    source: Streamed,
    tokens: Tensor,
    device: torch.device,
    *,
    alpha: float,
    damping: float,
    offload: Path | None = None,
) -> list[Stage]:
    """The stages of all decoder blocks in order, from windows [W, L]; reads each block twice, forwards and backwards.

    The Hessians are of all windows in the 16-bit model, the gradients of the first GRADIENT_TOKENS. alpha, damping: as
    of `quantize_linear`; offload: a folder for the hidden states of all windows, which else stay in memory.
    """
    few = tokens[: max(1, GRADIENT_TOKENS // tokens.shape[1])]
    sampled, states = row_losses(source, tokens, len(few), device, alpha, damping, offload)
    weights = gradient_energies(source, few, states, device)
    stages = []
    for found in sampled:
        shapes = {name: (len(weights[name]), inputs) for name, (inputs, _, _) in found.items()}
        costs = dict.fromkeys(SCHEMES, 0.0)
        for name, (_, rows, by_scheme) in found.items():
            for scheme, loss in by_scheme.items():
                costs[scheme] += (weights[name][rows] * loss).mean().item() * len(weights[name])
        stages.append(Stage(list(found), list(shapes.values()), costs))
    return stages


# of the Linears of a stage, by name: inputs, sampled rows, and their losses by scheme
RowLosses = dict[str, tuple[int, Tensor, dict[Scheme, Tensor]]]


@torch.no_grad()
def row_losses(
    source: Streamed,
    tokens: Tensor,
    keep: int,
    device: torch.device,
    alpha: float,
    damping: float,
    offload: Path | None,
) -> tuple[list[RowLosses], list[Tensor]]:
    """The losses of sampled rows of every stage, and the 16-bit model's states in front of every block and after the
    last, [keep, L, D] of the first `keep` windows, on the CPU."""
    calls = block_inputs(source.model, source.blocks, tokens[[0, -1]]).calls
    batches = embed(source.model, source.blocks, tokens, device, offload)
    sampled, states = [], [first_windows(batches, keep)]
    for index, call in enumerate(tqdm(calls, desc="measuring sensitivities", unit="block")):
        block, name = load_block(source, index, device), f"{source.prefix}.{index}"
        run = partial(run_block, block, send_to_device(call, device), device)
        stages = find_stages(block, run, batches[0][:1])
        hessians = all_hessians(block, [stage[0] for stage in stages], run, batches, tokens.numel())
        for stage in stages:
            H = hessians.pop(stage[0])
            linears = {f"{name}.{part}": block.get_submodule(part) for part in stage}
            check_finite({f"{full}.weight": linear.weight for full, linear in linears.items()}, H)
            rows = {full: sample_rows(linear.out_features, device) for full, linear in linears.items()}
            W = torch.cat([linears[full].weight[chosen] for full, chosen in rows.items()])
            found: RowLosses = {full: (W.shape[1], chosen.cpu(), {}) for full, chosen in rows.items()}
            for scheme, loss in try_schemes(W, H, alpha, damping):
                parts = loss.cpu().split([len(chosen) for chosen in rows.values()])
                for (_, _, by_scheme), part in zip(found.values(), parts, strict=True):
                    by_scheme[scheme] = part
            sampled.append(found)
        states.append(first_windows(batches, keep))
        drop_block(block)
    return sampled, states


def first_windows(batches: Batches, count: int) -> Tensor:
    """The first `count` windows [count, L, D] of batches [n, L, D]."""
    found: list[Tensor] = []
    for batch in batches:
        found += batch.split(1)
        if len(found) >= count:
            break
    return torch.cat(found[:count])


def all_hessians(
    block: nn.Module, names: Sequence[str], run: Callable[[Tensor], Tensor], batches: Batches, tokens: int
) -> dict[str, Tensor]:
    """H of the inputs of the block's Linears `names`, which read `tokens` tokens; `batches` become its outputs."""
    hessians, hooks = {}, []
    for name in names:
        linear = block.get_submodule(name)
        H = hessians[name] = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        hook = partial(lambda _, args, H: accumulate(H, args[0], tokens), H=H)
        hooks.append(linear.register_forward_pre_hook(hook))
    for i, batch in enumerate(batches):
        batches[i] = to_host(run(batch))
    for hook in hooks:
        hook.remove()
    return {name: symmetrize(H) for name, H in hessians.items()}


def sample_rows(count: int, device: torch.device) -> Tensor:
    """The same random rows of a Linear with `count` of them whenever asked."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:SAMPLE_ROWS].sort().values.to(device)


def try_schemes(W: Tensor, H: Tensor, alpha: float, damping: float) -> list[tuple[Scheme, Tensor]]:
    """Every scheme and the losses [N] with it of the rows of W [N, K] in the metric H, by one pass of the solver."""
    target = used_inputs(W, H.diagonal())
    found = []
    for group_size in GROUP_SIZES:
        steps = group_aware_order(H.diagonal(), group_size)
        U, used = inverse_factor(H, torch.cat([columns for _, columns in steps]), damping)
        d = used * live_mean(H.diagonal())
        for bits in range(1, MAX_PLANES + 1):
            codes, c, loss = one_pass(target, U, steps, bits, ITERATIONS, alpha, torch.bfloat16, (range_start,))
            found.append((Scheme(bits, group_size), undamped(loss, d, target, codes, c, group_size)))
    return found


def gradient_energies(
    source: Streamed, tokens: Tensor, states: list[Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Mean over tokens of the squared gradient of the loss at each Linear's outputs: fp32 [N] on the CPU, by name.

    tokens: [W, L]; states: as returned by `row_losses`. The loss is the sum over tokens of the negative log-likelihood.
    """
    _, calls = block_inputs(source.model, source.blocks, tokens[:1])
    gradients = loss_gradients(source, tokens, states[-1])
    energies: dict[str, Tensor] = {}
    for index in reversed(range(len(source.blocks))):
        block = load_block(source, index, device).requires_grad_(False)
        linears = {f"{source.prefix}.{index}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        for name, linear in linears.items():
            energies[name] = torch.zeros(linear.out_features, device=device)
        hooks = [m.register_forward_hook(partial(watch, energies[name])) for name, m in linears.items()]
        run = partial(run_block, block, send_to_device(calls[index], device), device)
        for i, gradient in enumerate(gradients):
            with torch.enable_grad():
                hidden = states[index][i : i + 1].to(device).requires_grad_()
                (gradients[i],) = torch.autograd.grad(run(hidden), hidden, gradient.to(device))
        for hook in hooks:
            hook.remove()
        drop_block(block)
    return {name: energy.cpu() / tokens.numel() for name, energy in energies.items()}


def watch(energy: Tensor, _: nn.Module, __: tuple, output: Tensor) -> None:
    """Forward hook that adds the squared gradient of each output, over tokens, to `energy` [N]."""

    def add(gradient: Tensor) -> None:
        energy.add_(gradient.float().square().sum(tuple(range(gradient.ndim - 1))))

    output.register_hook(add)


def loss_gradients(source: Streamed, tokens: Tensor, last: Tensor) -> list[Tensor]:
    """The gradient of the loss at the last block's output, a tensor [1, L, D] for every window of `last` [W, L, D]."""
    head, cap = source.model.get_output_embeddings(), softcap(source.model)
    step = max(1, LOSS_ELEMENTS // head.weight.shape[0])
    gradients = []
    for window, hidden in zip(tokens, last.split(1), strict=True):
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            (final,) = head_inputs(source.model, source.blocks, window[None], [hidden])
            states = final.detach()[0, :-1].requires_grad_()
            for rows, targets in zip(states.split(step), window[1:].split(step), strict=True):
                nll_loss(log_probabilities(rows, head, cap), targets, reduction="sum").backward()
            padded = torch.nn.functional.pad(states.grad[None], (0, 0, 0, 1))
            gradients.append(torch.autograd.grad(final, hidden, padded)[0])
    return gradients
