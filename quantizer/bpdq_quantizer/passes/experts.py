"""What the experts of a layer are calibrated on: each on the tokens that are routed to it.

A token's error is multiplied by its routing weight, so that it counts the square of that, relative to the others'. An
expert that few tokens chose would be fitted to those few. It is filled up with tokens of the layer that others chose:
FILL_WEIGHT of a token each, to FILL tokens in all.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from bpdq_kernels.experts import Routed, routes
from bpdq_quantizer.algorithm.refine import matrices_at_once
from bpdq_quantizer.model.activations import ACTIVATION_BYTES
from bpdq_quantizer.model.weights import Weight

FILL, FILL_WEIGHT = 256, 0.1


class Expert(NamedTuple):
    """Weights of an expert. first: those that read its inputs; last: the one that reads their outputs. Either may be
    missing."""

    number: int
    first: list[Weight]
    last: list[Weight]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) that are solved together."""
        stages = [stage for stage in (self.first, self.last) if stage]
        return [(sum(weight.shape[0] for weight in stage), stage[0].shape[1]) for stage in stages]


class Sample(NamedTuple):
    """What an expert is calibrated on. x: its inputs [n, H] in the model that is quantized so far; original: in the
    16-bit model, or None; weights: what each counts, [n, 1] fp32; routed: how many were routed to it."""

    x: Tensor
    original: Tensor | None
    weights: Tensor
    routed: int


class LayerTokens(NamedTuple):
    """All tokens of a layer's experts, [T, H] in both models, in host memory; routed: for each expert the rows that
    were routed to it, and what each counts, fp32; device: on which they are asked for."""

    x: Tensor
    original: Tensor | None
    routed: dict[int, tuple[Tensor, Tensor]]
    device: torch.device

    def count(self, expert: int) -> int:
        """How many an expert is calibrated on, at most."""
        return max(FILL, len(self.routed[expert][0]) if expert in self.routed else 0)

    def of(self, expert: int) -> Sample:
        """Those of an expert, and others to fill it up."""
        rows, weights = self.routed.get(expert, (torch.empty(0, dtype=torch.int64), torch.empty(0)))
        missing = max(0, FILL - len(rows))
        others = spread(len(self.x), missing + len(rows)) if missing else rows[:0]
        others = others[~torch.isin(others, rows)][:missing]
        weights = torch.cat((weights, torch.full((len(others),), FILL_WEIGHT)))
        rows, routed = torch.cat((rows, others)), len(rows)
        original = None if self.original is None else self.original[rows].to(self.device)
        return Sample(self.x[rows].to(self.device), original, weights[:, None].to(self.device), routed)


def in_two(weights: Iterable[Weight], last: str) -> list[Expert]:
    """A layer's experts from all their weights; last: the key of the last one."""
    found = []
    for number, members in groupby(weights, attrgetter("expert")):
        own = list(members)
        lasts = [weight for weight in own if weight.key == last]
        found.append(Expert(number, [weight for weight in own if weight.key != last], lasts))
    return found


def slices(experts: Iterable[Expert], tokens: LayerTokens) -> Iterator[list[Expert]]:
    """Experts that are solved at once: as many as `matrices_at_once` of each of their shapes, and as have what their
    matrices read in ACTIVATION_BYTES, or one."""
    part: list[Expert] = []
    taken = 0
    for expert in experts:
        size = 2 * tokens.count(expert.number) * max(k for _, k in expert.shapes) * tokens.x.itemsize
        most = min(matrices_at_once(*shape) for shape in expert.shapes)
        if part and (len(part) >= most or taken + size > ACTIVATION_BYTES):
            yield part
            part, taken = [], 0
        part.append(expert)
        taken += size
    yield part


def spread(count: int, wanted: int) -> Tensor:
    """At most `wanted` of `count` rows, in a random order that is always the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted]


def layer_tokens(experts: int, inputs: Iterable[Routed], original: Callable[[int], Routed] | None) -> LayerTokens:
    """From what a layer's `experts` are given in every batch; original(i): in batch i in the 16-bit model, whose
    routing is then the one that counts."""
    tokens, originals, chosen, weights = [], [], [], []
    for i, routed in enumerate(inputs):
        before = None if original is None else original(i)
        _, index, counts = routed if before is None else before
        used = (index < experts).any(-1)
        if before is not None:  # Llama 4's are zero where they are not routed
            used &= routed.tokens.any(-1)
            originals.append(before.tokens[used].cpu())
        tokens.append(routed.tokens[used].cpu())
        chosen.append(index[used].cpu())
        weights.append(counts[used].float().cpu())
    weights = torch.cat(weights)
    found = {
        i: (rows, relative_squares(weights[rows, places])) for i, rows, places in routes(torch.cat(chosen), experts)
    }
    device = routed.tokens.device
    return LayerTokens(torch.cat(tokens), torch.cat(originals) if originals else None, found, device)


def relative_squares(weights: Tensor) -> Tensor:
    """The squares of weights [n], over their mean, which is not zero."""
    squares = weights.square()
    return squares / squares.mean() if squares.any() else torch.ones_like(squares)
