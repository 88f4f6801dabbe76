"""What errors of a Linear's outputs do to the model's loss: Fisher information, from gradients of the 16-bit model.

Two things of it steer the solver. Some tokens count more than others: those early in a window, which all later ones
attend to. And outputs go together, so that an error of one can be made good by another (`algorithm.in_turn`).
Labels are drawn from the model's own distribution, for which the second derivative of the KL divergence is E[g g^T] of
the gradients g. These have heavy tails: a few tokens would outweigh all others. Therefore each gradient is divided by
the square root of its length, and what a token counts is that length, not its square. Tokens whose gradients are not
known count what others do at their place in the window. Of few tokens much of what outputs seem to have in common is
chance, which is taken out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from bpdq_kernels.format import is_finite
from bpdq_quantizer.algorithm.hessian import add_square, symmetrize
from bpdq_quantizer.algorithm.in_turn import CHUNK
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.activations import kept_states, weighted
from bpdq_quantizer.model.stream import Streamed, solved
from bpdq_quantizer.model.windows import Window
from bpdq_quantizer.passes.gradients import all_states, backwards, loss_gradients
from bpdq_quantizer.storage.files import read_sealed, write_tensors


class Outputs(NamedTuple):
    """Of a weight's N outputs, from gradients g in some windows of at most L tokens. lengths: |g| fp32 [windows, L],
    zero behind a window's end; covariances: of chunks of at most CHUNK outputs E[g g^T / |g|] fp32 [n, n], `shrunk`."""

    lengths: Tensor
    covariances: list[Tensor]


class Sums:
    """`Outputs` in the making, of windows of at most `length` tokens."""

    def __init__(self, outputs: int, length: int, device: torch.device) -> None:
        sizes = [len(part) for part in torch.arange(outputs).tensor_split(-(-outputs // CHUNK))]
        self.covariances = [torch.zeros(size, size, device=device) for size in sizes]
        self.squares = torch.zeros(len(sizes), device=device)  # sums over tokens and i != j of (g_i g_j)^2
        self.length, self.lengths, self.tokens = length, [], 0

    def add(self, gradient: Tensor) -> None:
        """gradient [1, L, N] of a window."""
        g = gradient.reshape(-1, gradient.shape[-1])
        norm = torch.linalg.vector_norm(g, dim=1, dtype=torch.float32)
        self.lengths.append(pad(norm, (0, self.length - len(norm))))
        self.tokens += len(norm)
        parts = weighted(g, 1 / norm.clamp(min=torch.finfo(norm.dtype).tiny)).split(
            [len(G) for G in self.covariances], 1
        )
        for G, sums, part in zip(self.covariances, self.squares, parts, strict=True):
            add_square(G, part, 1.0)
            squares = part.float().square()
            sums += squares.sum(1).square().sum() - squares.square().sum()

    def read(self) -> Outputs:
        pairs = zip(self.covariances, self.squares, strict=True)
        covariances = [shrunk(symmetrize(G) / self.tokens, sums / self.tokens, self.tokens).cpu() for G, sums in pairs]
        return Outputs(torch.stack(self.lengths).cpu(), covariances)


def shrunk(G: Tensor, squares: Tensor, tokens: int) -> Tensor:
    """G [n, n], the mean of g g^T over so many tokens, with less beside its diagonal: times one minus the share of its
    squares there that is the variance of such means (Schaefer and Strimmer 2005, their target D); squares: the mean of
    the sum of (g_i g_j)^2 over i != j."""
    diagonal = G.diagonal()
    signal = G.square().sum() - diagonal.square().sum()
    noise = ((squares - signal) / tokens / signal.clamp(min=torch.finfo(G.dtype).tiny)).clamp(0, 1)
    return torch.where(torch.eye(len(G), dtype=torch.bool, device=G.device), G, (1 - noise) * G)


def smooth(profile: Tensor) -> Tensor:
    """profile [L] averaged over a quarter of the way to the window's start on both sides, and scaled to a mean of
    one."""
    places = torch.arange(len(profile), device=profile.device)
    low, high = places - places // 4, (places + places // 4 + 1).clamp(max=len(profile))
    sums = pad(profile.double().cumsum(0), (1, 0))
    means = (sums[high] - sums[low]) / (high - low)
    return (means / means.mean()).float() if means.any() else torch.ones_like(profile)


def measure_outputs(
    source: Streamed,
    windows: Sequence[Window],
    device: torch.device,
    seed: int,
    write: Callable[[int, Mapping[str, Outputs]], None],
) -> None:
    """Give `write` the `Outputs` of every block's Linears, by name, from the last block to the first.

    Experts have none: each sees tokens of its own. The hidden states in front of about 2 sqrt(blocks) blocks are held
    in host memory (`kept_states`), 2 bytes x tokens x width each. Raises InputError for NaN and infinity.
    """
    count = len(source.blocks)
    with tqdm(total=2 * count, desc="measuring outputs", unit="block") as bar:
        kept, states = kept_states(count), {}
        for index, hidden in enumerate(all_states(source, windows, device)):
            if index in kept:
                states[index] = hidden
            bar.update(index > 0)
        last = states.pop(count)
        gradients = loss_gradients(source, windows, last, torch.Generator(last[0].device).manual_seed(seed))
        del last
        length, sums = max(window.tokens.shape[1] for window in windows), {}
        alone = {name: weight for name, weight in solved(source).items() if weight.layer is None}

        def see(name: str, gradient: Tensor) -> None:
            if name in alone:
                if name not in sums:
                    sums[name] = Sums(alone[name].shape[0], length, device)
                sums[name].add(gradient)

        for index in backwards(source, windows, states, gradients, device, see):
            found = {name: known.read() for name, known in sums.items()}
            check_gradients(found)
            write(index, found)
            sums.clear()
            bar.update()


def check_gradients(found: Mapping[str, Outputs]) -> None:
    """Raise InputError for gradients that hold NaN or infinity."""
    for name, known in found.items():
        if not is_finite(known.lengths):
            raise InputError(
                f"{name}: gradients at its outputs hold NaN or infinity: convert the model to bfloat16 first, or leave "
                "them out: --output-tokens 0"
            )


def save_outputs(file: Path, outputs: Mapping[str, Outputs]) -> None:
    """Write what `load_outputs` reads, with covariances in bf16."""
    named = {f"{name}/lengths": found.lengths for name, found in outputs.items()}
    for name, found in outputs.items():
        named |= {f"{name}/{i:05}": G.bfloat16() for i, G in enumerate(found.covariances)}
    write_tensors(file, named, {})


def load_outputs(file: Path, device: torch.device) -> dict[str, Outputs]:
    """Those of a block's Linears, by name, on `device`; raises DamagedError."""
    named, found = read_sealed(file)[0], {}
    for name, keys in groupby(sorted(named), lambda key: key.rpartition("/")[0]):
        *covariances, lengths = (named[key].to(device, torch.float32) for key in keys)
        found[name] = Outputs(lengths, covariances)
    return found


def token_weights(outputs: Iterable[Outputs], windows: Sequence[int]) -> Tensor:
    """What every token counts for Linears with one input, about one on average: fp32 [T] of all windows of so many
    tokens, of which the first ones' gradients are known."""
    return torch.stack([relative(found.lengths, windows) for found in outputs]).mean(0)


def relative(lengths: Tensor, windows: Sequence[int]) -> Tensor:
    """lengths: |g| [n, L] in the first n of these windows; fp32 [T] for all of them, over their mean."""
    known, places = windows[: len(lengths)], torch.arange(lengths.shape[1], device=lengths.device)
    reach = torch.tensor(known, device=lengths.device).unsqueeze(1) > places
    profile, mean = smooth(lengths.sum(0) / reach.sum(0)), lengths.sum() / reach.sum()
    if not mean:
        return profile.new_ones(sum(windows))
    others = [torch.arange(size, device=profile.device).clamp(max=len(profile) - 1) for size in windows[len(known) :]]
    return torch.cat([lengths[reach] / mean, *(profile[here] for here in others)])


def energies(outputs: Outputs) -> Tensor:
    """E[|g|] E[g^2 / |g|] of each output [N], fp32 on the CPU, as of `sensitivity.gradient_energies`, but for a factor
    that all weights of a model share where windows differ in length."""
    return (outputs.lengths.mean() * torch.cat([G.diagonal() for G in outputs.covariances])).cpu()
