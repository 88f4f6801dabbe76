"""The 16-bit model's loss followed backwards, block by block: its gradients at the outputs of every weight."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import nll_loss, pad

from bpdq_quantizer.model.activations import LOSS_ELEMENTS, embed, run_batches
from bpdq_quantizer.model.calls import Call, block_inputs, block_runs, head_inputs
from bpdq_quantizer.model.products import quick_products
from bpdq_quantizer.model.stream import Streamed, drop_block, load_block, solved
from bpdq_quantizer.model.weights import hooked
from bpdq_quantizer.model.windows import Window, image_token
from bpdq_quantizer.passes.layers import check_output
from bpdq_quantizer.passes.tune import log_probabilities, softcap
from bpdq_quantizer.storage.offload import Batches


def first_windows(batches: Batches, count: int) -> list[Tensor]:
    """The first `count` windows [1, L, D] of batches [n, L, D]."""
    found: list[Tensor] = []
    for batch in batches:
        if len(found) == count:
            break
        found += [window.clone() for window in batch[: count - len(found)].split(1)]
    return found


@torch.no_grad()
def all_states(source: Streamed, windows: Sequence[Window], device: torch.device) -> Iterator[list[Tensor]]:
    """The 16-bit model's states in front of every block and after the last, [1, L, D] of each window, on the CPU.

    Raises InputError where they hold NaN or infinity, with the weight that does.
    """
    batches, calls = embed(source, windows, device, None)
    yield first_windows(batches, len(windows))
    for index, here in enumerate(calls):
        block = load_block(source, index, device)
        runs = block_runs(block, here, device, len(batches))
        run_batches(runs, batches, partial(check_output, source, index, "the 16-bit model"))
        drop_block(block)
        yield first_windows(batches, len(windows))


@torch.no_grad()
def fill_states(
    source: Streamed, calls: list[list[Call]], states: dict[int, list[Tensor]], index: int, device: torch.device
) -> None:
    """Add the states in front of block `index`, and on the way there, from those of the nearest block before it."""
    for here in range(max(known for known in states if known <= index), index):
        block = load_block(source, here, device)
        runs = block_runs(block, calls[here], device, len(states[here]))
        states[here + 1] = [run(hidden).cpu() for run, hidden in zip(runs, states[here], strict=True)]
        drop_block(block)


def backwards(
    source: Streamed,
    windows: Sequence[Window],
    states: dict[int, list[Tensor]],
    gradients: list[Tensor],
    device: torch.device,
    see: Callable[[str, Tensor], None],
) -> Iterator[int]:
    """Show the gradients [1, L, N] of every weight's outputs in every window, a block after the other from the last one
    on; yields the block's index when `see` has had all of its weights'.

    states: those in front of blocks by window, as of `all_states`, by the block's index: of the first block at least,
    others are computed again where they are missing; used up. gradients: those at the last block's output, which become
    those at the first one's input.
    """
    calls = block_inputs(source.model, source.blocks, windows, source.by_window).calls
    for index in reversed(range(len(source.blocks))):
        fill_states(source, calls, states, index, device)
        here = states.pop(index)
        block = load_block(source, index, device).requires_grad_(False)
        runs = block_runs(block, calls[index], device, len(gradients))
        with hooked(weight.on_gradient(partial(see, name)) for name, weight in solved(source, index).items()):
            for i, gradient in enumerate(gradients):
                with torch.enable_grad():
                    hidden = here[i].detach().to(device).requires_grad_()
                    (gradients[i],) = torch.autograd.grad(runs[i](hidden), hidden, gradient.to(device))
        drop_block(block)
        yield index


def loss_gradients(
    source: Streamed, windows: Sequence[Window], last: list[Tensor], sampled: torch.Generator | None = None
) -> list[Tensor]:
    """The gradient of the negative log-likelihood of the windows' tokens, summed, at the last block's output: a tensor
    [1, L, D] for every window, as `last` is. No model predicts an image's tokens.

    sampled: instead of the tokens, those that the model itself would draw, each after the window's own.
    """
    head, cap = source.model.get_output_embeddings(), softcap(source.model)
    step, ignored = max(1, LOSS_ELEMENTS // head.weight.shape[0]), image_token(source.model)
    gradients = []
    for window, hidden in zip(windows, last, strict=True):
        with torch.enable_grad(), quick_products(hidden.device):
            hidden = hidden.detach().requires_grad_()
            (final,) = head_inputs(source.model, source.blocks, [hidden])
            states = final.detach()[0, :-1].requires_grad_()
            for rows, targets in zip(states.split(step), window.tokens[0, 1:].split(step), strict=True):
                log_p = log_probabilities(rows, head, cap)
                if sampled is not None:
                    targets = torch.where(targets == ignored, ignored, draw(log_p.detach(), sampled))
                nll_loss(log_p, targets, reduction="sum", ignore_index=ignored).backward()
            gradients.append(torch.autograd.grad(final, hidden, pad(states.grad[None], (0, 0, 0, 1)))[0])
    return gradients


def draw(log_p: Tensor, generator: torch.Generator) -> Tensor:
    """A token [n] from each of log_p [n, V]: on a CPU in a tenth of `torch.multinomial`'s time."""
    sums = log_p.exp().cumsum(1)
    where = torch.rand(len(sums), 1, generator=generator, device=sums.device) * sums[:, -1:]
    return torch.searchsorted(sums, where, right=True)[:, 0].clamp(max=sums.shape[1] - 1)
