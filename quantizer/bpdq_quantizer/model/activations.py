"""What flows through a model during calibration: hidden states, stages, and statistics of a weight's inputs."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from math import isqrt
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bpdq_quantizer.algorithm.hessian import accumulate, accumulate_shift, in_16_bits, shift, symmetrize
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.calls import BlockInputs, Call, Run, block_inputs, block_runs
from bpdq_quantizer.model.residual import Read, Reader, Stream
from bpdq_quantizer.model.stream import Streamed
from bpdq_quantizer.model.weights import Weight, hooked, weights_in
from bpdq_quantizer.model.windows import Window
from bpdq_quantizer.storage.offload import Batches, Offloaded

ACTIVATION_BYTES = 1 << 30  # a calibration batch is as many windows as keep a block's activations within this
LOSS_ELEMENTS = 1 << 23  # logits at a time of a loss


class Statistics(NamedTuple):
    """Of a weight's inputs x [T, K], and x' in the 16-bit model: H [K, K] = (2 / T) x^T x, C [K, K] = (2 / T)
    (x' - x)^T x, and where the weight has a residual stream r [T, N], likewise, P [N, K] = (2 / T) (r' - r)^T x over
    the factor with which its outputs are added to that; fp32. C and P are None where they are not known."""

    H: Tensor
    C: Tensor | None = None
    P: Tensor | None = None


class _StageReached(Exception):  # noqa: N818, control flow
    pass


def to_host(hidden: Tensor) -> Tensor:
    """hidden in host memory; page-locked, in powers of two bytes, if it comes from a GPU, which will read it again."""
    if not hidden.is_cuda:
        return hidden.to("cpu")
    return torch.empty_like(hidden, device="cpu", pin_memory=True).copy_(hidden)


def kept_states(blocks: int) -> list[int]:
    """Those in front of which blocks, of so many, are held for a backward pass (`gradients.backwards`); `blocks` itself
    stands for those after the last: at most about 2 sqrt(blocks) are held at a time, and most blocks run once more."""
    return [*range(0, blocks, max(1, isqrt(blocks))), blocks]


def run_batches(runs: Sequence[Run], batches: Batches, see: Callable[[Tensor], None] | None = None) -> None:
    """Turn each of `batches` into what its run makes of it, in host memory; see: is shown that first."""
    for i, run in enumerate(runs):
        output = run(batches[i])
        if see is not None:
            see(output)
        batches[i] = to_host(output)


def find_stages(weights: Iterable[Weight], run: Run, hidden: Tensor) -> list[list[Weight]]:
    """Some weights of a block, grouped by the input that they share, in the order of the forward pass; those of the
    experts of a layer are a group.

    Raises InputError for a weight that it does not reach once.
    """
    weights, stages = list(weights), []
    experts = {name: list(w) for name, w in groupby(weights, lambda w: w.layer and w.layer.name) if name is not None}

    def record(weight: Weight, x: Tensor) -> None:
        if weight.layer is not None:
            stages.append((x, experts[weight.layer.name]))
        elif stages and stages[-1][0] is x:
            stages[-1][1].append(weight)
        else:
            stages.append((x, [weight]))

    seen = [w for w in weights if w.layer is None] + [members[0] for members in experts.values()]
    with hooked(weight.on_input(partial(record, weight)) for weight in seen):
        run(hidden)
    count = Counter(weight.name for _, stage in stages for weight in stage)
    odd = [weight.name for weight in weights if count[weight.name] != 1]
    if odd:
        raise InputError(f"the forward pass does not reach each weight of a block once: {', '.join(odd)}")
    return [stage for _, stage in stages]


def windows_per_batch(length: int, hidden_size: int, out_features: int, itemsize: int) -> int:
    """As many windows of `length` tokens as keep a block's activations, with `out_features` those of all its Linears,
    within ACTIVATION_BYTES, and at least one."""
    return max(1, ACTIVATION_BYTES // (length * (4 * hidden_size + out_features) * itemsize))


def outputs_at_once(weights: Iterable[Weight]) -> int:
    """Outputs of a token that a block's weights make: experts run one after the other."""
    return sum(weight.shape[0] for weight in weights if weight.layer is None or weight.expert == 0)


def embed(
    source: Streamed, windows: Sequence[Window], device: torch.device, offload: Path | None
) -> tuple[Batches, list[list[Call]]]:
    """What the first block, on `device`, reads of windows, and the calls of all blocks.

    The former in batches [n, L, D] of `windows_per_batch`, or of one where each has its own calls; in files of the
    folder `offload`, if there is one.
    """
    model, blocks = source.model, source.blocks
    hidden, calls = _recorded(source, windows)
    if len(calls[0]) > 1:  # to be kept in memory all the same
        parts = ([states] for states in hidden)
    else:
        out_features = max(outputs_at_once(weights_in(block).values()) for block in blocks)
        _, length, width = hidden[0].shape
        count = windows_per_batch(length, width, out_features, hidden[0].element_size())
        shares = (windows[i : i + count] for i in range(0, len(windows), count))
        parts = (block_inputs(model, blocks, share).hidden for share in shares)
    batches = [] if offload is None else Offloaded(offload)
    for part in parts:
        batches.append(to_host(torch.cat(part).to(device)))
    return batches, calls


def block_calls(source: Streamed, windows: Sequence[Window]) -> list[list[Call]]:
    """The calls of all blocks alone, as of `embed`."""
    return _recorded(source, windows).calls


def _recorded(source: Streamed, windows: Sequence[Window]) -> BlockInputs:
    """`block_inputs` of the first window and the last, or of all if their calls differ."""
    model, blocks = source.model, source.blocks
    if not source.by_window:
        found = block_inputs(model, blocks, [windows[0], windows[-1]])
        if len(found.calls[0]) == 1:
            return found
    return block_inputs(model, blocks, windows, by_window=True)


def capture_one(reader: Reader, run: Run, batch: Tensor) -> Read:
    """What a weight reads, in front of which the forward pass stops."""
    found = []

    def stop(read: Read) -> None:
        found.append(read)
        raise _StageReached

    with hooked(reader.on_read(stop)), suppress(_StageReached):
        run(batch)
    return found[0]


@torch.no_grad()
def input_statistics(
    weight: Weight,
    inputs: Iterable[Read],
    tokens: Sequence[int],
    original: Callable[[int], Read] | None,
    weights: Tensor | None = None,
) -> Statistics:
    """Of what a weight reads in all batches; tokens: those of each; `original(i)` gives what the 16-bit model's reads
    of batch i; weights [T]: what every token counts, if not one."""
    total, H = sum(tokens), torch.zeros(2 * weight.shape[1:], device=weight.matrix.device)
    C = None if original is None else torch.zeros_like(H)
    P = None
    counts = [None] * len(tokens) if weights is None else weights.split(tokens)
    for i, (read, count) in enumerate(zip(inputs, counts, strict=True)):
        x = weighted(read.x, count)
        accumulate(H, x, total)
        if C is None:
            continue
        before = original(i)
        accumulate_shift(C, weighted(shift(before.x, read.x), count), x, total)
        if read.stream is not None:
            P = torch.zeros(weight.shape, device=H.device) if P is None else P
            accumulate_shift(P, weighted(shift(before.stream, read.stream), count), x, read.factor * total)
    return Statistics(symmetrize(H), C, P)


def weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    """x [..., K] of some tokens, times the roots of what they count, weights [tokens], in fp32, or in bf16 where
    products are of it. An input that has no row for each of them counts the same everywhere."""
    if weights is None or x.shape[:-1].numel() != len(weights):
        return x
    roots = weights.sqrt().view(*x.shape[:-1], 1)
    return x * roots.to(x.dtype) if in_16_bits(x) else x.float() * roots


@torch.no_grad()
def expert_statistics(x: Tensor, original: Tensor | None, weights: Tensor) -> Statistics:
    """Of an expert's inputs x [n, K], of which each counts what `weights` [n, 1] says; original: those in the 16-bit
    model."""
    H, total, counts = torch.zeros(2 * x.shape[1:], device=x.device), weights.sum().item(), weights.flatten()
    C, rows = None if original is None else torch.zeros_like(H), weighted(x, counts)
    accumulate(H, rows, total)
    if C is not None:
        accumulate_shift(C, weighted(shift(original, x), counts), rows, total)
    return Statistics(symmetrize(H), C)


def capture(readers: Iterable[Reader], run: Run, batch: Tensor) -> tuple[dict[str, Read], Tensor]:
    """What weights read in a forward pass, by name, and its output."""
    found: dict[str, Read] = {}
    hooks = (hook for reader in readers for hook in reader.on_read(partial(found.__setitem__, reader.weight.name)))
    with hooked(hooks):
        return found, run(batch)


class Original:
    """The 16-bit block, to look up what the model that is not quantized feeds its weights.

    weights: the first of each stage, in order; streams: theirs, by name; batches: that model's hidden states before the
    block, which turn into those after it. Of a single batch all inputs are kept. Of several they are computed when
    asked for, which must be in the order of the stages: as far as the weight asked for, and for the last one to the
    end.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        weights: Sequence[Weight],
        streams: Mapping[str, Stream],
        calls: list[Call],
        device: torch.device,
        batches: Batches,
    ) -> None:
        self.batches, self.after = batches, set()  # batches that are after the block already
        self.last = weights[-1].name if weights else None
        self.at_once = len(batches) == 1
        self.block = block if self.at_once else copy.deepcopy(block)
        self.runs = block_runs(self.block, calls, device, len(batches))
        own = {weight.name: weight for weight in weights} if self.at_once else weights_in(self.block, name)
        self.readers = {w.name: Reader(own[w.name], self.block, streams.get(w.name)) for w in weights}
        if self.at_once:
            self.reads, self.output = capture(self.readers.values(), self.runs[0], batches[0])

    def read(self, name: str, batch: int) -> Read:
        """What the weight `name` reads of a batch; to be asked for once."""
        if self.at_once:
            return self.reads[name]
        reader = self.readers[name]
        if name != self.last:
            return capture_one(reader, self.runs[batch], self.batches[batch])
        reads, output = capture([reader], self.runs[batch], self.batches[batch])
        self.batches[batch] = to_host(output)
        self.after.add(batch)
        return reads[name]

    def outputs(self) -> Batches:
        """The 16-bit model's hidden states after the block, on the CPU, in place of those before it."""
        for i in set(range(len(self.batches))) - self.after:
            self.batches[i] = to_host(self.output if self.at_once else self.runs[i](self.batches[i]))
        return self.batches
