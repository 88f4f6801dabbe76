"""What a weight reads in a forward pass, and the residual stream that its outputs are added to.

Which that is, a forward pass tells, whatever the architecture: a tensor that a module of the block read before the
weight, and that differs by the weight's outputs, times a factor, from one that is read after it. Where outputs are
normed first, or added together with others', there is none.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bpdq_quantizer.model.calls import Run
from bpdq_quantizer.model.weights import Weight, hooked

TOKENS = 64  # of a window, that are compared
MISFIT = 0.05  # of the outputs, beside rounding
CLEAR = 3  # times what rounding may change


class Stream(NamedTuple):
    """What a weight's outputs, times `factor`, are added to: what the module `reader` of the block reads, "" the block
    itself, before the weight is reached."""

    reader: str
    factor: float


class Read(NamedTuple):
    """x: what a weight reads (`Weight.on_input`); stream: [..., D], where it is known, to which the weight's outputs
    are added times `factor`."""

    x: Any
    stream: Tensor | None = None
    factor: float = 1.0


class Reader(NamedTuple):
    """A weight of a block, and its stream, if it has one."""

    weight: Weight
    block: nn.Module | None = None
    stream: Stream | None = None

    def on_read(self, see: Callable[[Read], None]) -> Iterator[RemovableHandle]:
        """Show what every forward pass reads, before it is multiplied."""
        if self.stream is None:
            yield self.weight.on_input(lambda x: see(Read(x)))
            return
        passed: list[Tensor] = []

        def passes(_: nn.Module, args: tuple) -> None:
            passed.append(args[0].clone())  # some models add in place

        yield self.block.get_submodule(self.stream.reader).register_forward_pre_hook(passes)
        yield self.weight.on_input(lambda x: see(Read(x, passed.pop(), self.stream.factor)))


@torch.no_grad()
def find_streams(block: nn.Module, weights: Iterable[Weight], run: Run, hidden: Tensor) -> dict[str, Stream]:
    """The streams of those of a block's weights that have one, by name; hidden: [1, L, D] of a window."""
    read: list[tuple[str, Tensor]] = []  # by which module, in the order of the pass
    written: dict[str, tuple[int, Tensor]] = {}  # at which place of that, and the outputs

    def first(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])[:TOKENS].clone()

    def reads(name: str, _: nn.Module, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and is_stream(args[0]):
            read.append((name, first(args[0])))

    def writes(name: str, _: nn.Module, __: tuple, outputs: Tensor) -> None:
        if is_stream(outputs):
            written[name] = len(read), first(outputs)

    def is_stream(x: Tensor) -> bool:
        return x.is_floating_point() and x.shape[-1:] == hidden.shape[-1:] and x.numel() == hidden.numel()

    hooks = [m.register_forward_pre_hook(partial(reads, name)) for name, m in block.named_modules()]
    hooks += [w.linear.register_forward_hook(partial(writes, w.name)) for w in weights if w.layer is None]
    with hooked(hooks):
        read.append(("", first(run(hidden))))  # by the next block
    times = Counter(name for name, _ in read)
    found = {}
    for name, (place, outputs) in written.items():
        streams = (
            Stream(reader, factor)
            for reader, before in reversed(read[:place])
            if times[reader] == 1 or not reader
            for _, after in read[place:]
            if (factor := added(before, after, outputs)) is not None
        )
        if stream := next(streams, None):
            found[name] = stream
    return found


def added(before: Tensor, after: Tensor, outputs: Tensor) -> float | None:
    """The factor with which outputs [T, D] have been added to `before`, so that it is `after`, both [T, D]; None where
    that is not so, or less than their rounding."""
    before, after, outputs, precision = before.float(), after.float(), outputs.float(), torch.finfo(after.dtype).eps
    scale = (before.abs() + after.abs()).clamp(min=torch.finfo(torch.float32).tiny)
    change, outputs = (after - before) / scale, outputs / scale
    rounding = precision * change.numel() ** 0.5
    if not change.norm() > CLEAR * rounding:
        return None
    factor = ((change * outputs).sum() / outputs.square().sum()).item()
    factor = 1.0 if abs(factor - 1) < MISFIT else factor
    misfit = (change - factor * outputs).norm()
    return factor if misfit < MISFIT * change.norm() + rounding else None
