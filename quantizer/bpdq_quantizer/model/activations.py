"""What flows through a model during calibration: block inputs, stages, and statistics of a weight's inputs."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpdq_quantizer.algorithm.hessian import accumulate, accumulate_shift, symmetrize
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.products import quick_products
from bpdq_quantizer.model.weights import Weight, hooked, weights_in
from bpdq_quantizer.storage.offload import Batches, Offloaded

ACTIVATION_BYTES = 1 << 30  # a calibration batch is as many windows as keep a block's activations within this


class BlockInputs(NamedTuple):
    """hidden: one tensor [1, L, D] per calibration window, on the CPU; calls: each block's other arguments."""

    hidden: list[Tensor]
    calls: list[tuple[tuple, dict[str, Any]]]


class _Recorder(nn.Module):
    """Stands in for a block while the inputs of all blocks are recorded: passes hidden states through.

    in_tuple: whether as the first of a tuple (`reads_tuples`).
    """

    def __init__(self, block: nn.Module, in_tuple: bool = False) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule
        self.in_tuple = in_tuple
        self.calls: list[tuple[Tensor, tuple, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        self.calls.append((hidden, args, kwargs))
        return (hidden,) if self.in_tuple else hidden


class _StageReached(Exception):  # noqa: N818, control flow
    pass


@torch.no_grad()
def reads_tuples(model: PreTrainedModel, blocks: nn.ModuleList) -> bool:
    """Whether the model takes the first of what a block returns: GPT-J, Falcon. Its blocks are not run.

    Of the tensor [1, L, D] that others expect, such a model takes the first window and fails, or goes on without it.
    """
    originals = list(blocks)
    _fill(blocks, [_Recorder(block) for block in originals])
    try:
        states = model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).last_hidden_state
        return states.ndim != 3
    except (RuntimeError, ValueError, IndexError):
        return True
    finally:
        _fill(blocks, originals)


@torch.no_grad()
def block_inputs(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> BlockInputs:
    """Run the windows [W, L] through embedding and rotary tables, recording what each block would be called with.

    The arguments besides hidden states (masks, position embeddings) must not depend on the tokens, so that the
    first window's serve all; raises InputError for an architecture where they do.
    """
    originals = list(blocks)
    in_tuple = reads_tuples(model, blocks)
    recorders = [_Recorder(block, in_tuple) for block in originals]
    _fill(blocks, recorders)
    try:
        for window in tokens:
            model.base_model(input_ids=window[None], use_cache=False)
    finally:
        _fill(blocks, originals)
    for recorder in recorders:
        first, last = recorder.calls[0][1:], recorder.calls[-1][1:]
        if not _same(first, last):
            raise InputError(f"{type(model).__name__} passes token-dependent arguments to its blocks: not supported")
    return BlockInputs([call[0] for call in recorders[0].calls], [r.calls[0][1:] for r in recorders])


class _Output(nn.Module):
    """Stands in for the last block: returns what it is given beforehand, `in_tuple` as for `_Recorder`."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        return (self.output,) if self.in_tuple else self.output


def head_inputs(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor, hidden: Batches) -> Batches:
    """Turn the last block's outputs for windows [W, L], batches [n, L, D], into what the LM head would read.

    The blocks themselves are not run.
    """
    in_tuple = reads_tuples(model, blocks)
    originals, last = list(blocks), _Output(in_tuple)
    _fill(blocks, [*(_Recorder(block, in_tuple) for block in originals[:-1]), last])
    rest = iter(tokens)
    try:
        for i, batch in enumerate(hidden):
            states = []
            for last.output in batch.split(1):
                states.append(model.base_model(input_ids=next(rest)[None], use_cache=False).last_hidden_state)
            hidden[i] = torch.cat(states)
    finally:
        _fill(blocks, originals)
    return hidden


def _fill(blocks: nn.ModuleList, modules: Sequence[nn.Module]) -> None:
    for i, module in enumerate(modules):
        blocks[i] = module


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b


def run_block(block: nn.Module, call: tuple[tuple, dict[str, Any]], device: torch.device, hidden: Tensor) -> Tensor:
    args, kwargs = call
    with quick_products(device):
        out = block(hidden.to(device, non_blocking=True), *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def to_host(hidden: Tensor) -> Tensor:
    """hidden in host memory; page-locked, in powers of two bytes, if it comes from a GPU, which will read it again."""
    if not hidden.is_cuda:
        return hidden.to("cpu")
    return torch.empty_like(hidden, device="cpu", pin_memory=True).copy_(hidden)


def run_batches(run: Callable[[Tensor], Tensor], batches: Batches) -> None:
    """Turn each of `batches` into what `run` makes of it, in host memory."""
    for i, batch in enumerate(batches):
        batches[i] = to_host(run(batch))


def find_stages(weights: Iterable[Weight], run: Callable[[Tensor], Tensor], hidden: Tensor) -> list[list[Weight]]:
    """Some weights of a block, grouped by the input that they share, in the order of the forward pass.

    Raises InputError for a weight that it does not reach once.
    """
    weights, stages = list(weights), []

    def record(weight: Weight, x: Tensor) -> None:
        if stages and stages[-1][0] is x:
            stages[-1][1].append(weight)
        else:
            stages.append((x, [weight]))

    with hooked(weight.on_input(partial(record, weight)) for weight in weights):
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


def embed(
    model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor, device: torch.device, offload: Path | None
) -> Batches:
    """What the first block, on `device`, reads of windows [W, L], in batches [n, L, D] of `windows_per_batch`; in files
    of the folder `offload`, if there is one."""
    (window,), _ = block_inputs(model, blocks, tokens[:1])
    out_features = sum(weight.shape[0] for weight in weights_in(blocks[0]).values())
    batches = [] if offload is None else Offloaded(offload)
    for part in tokens.split(windows_per_batch(*window.shape[1:], out_features, window.element_size())):
        batches.append(to_host(torch.cat(block_inputs(model, blocks, part).hidden).to(device)))
    return batches


def capture_one(weight: Weight, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """The input of a weight, in front of which the forward pass stops."""
    inputs = []

    def stop(x: Tensor) -> None:
        inputs.append(x)
        raise _StageReached

    with hooked([weight.on_input(stop)]), suppress(_StageReached):
        run(batch)
    return inputs[0]


@torch.no_grad()
def input_statistics(
    weight: Weight, inputs: Iterable[Tensor], tokens: int, original: Callable[[int], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """H and C (`accumulate_shift`) of a weight's inputs in all batches, which hold `tokens` tokens; `original(i)` gives
    the 16-bit model's inputs of batch i."""
    H = torch.zeros(2 * weight.shape[1:], device=weight.matrix.device)
    C = None if original is None else torch.zeros_like(H)
    for i, x in enumerate(inputs):
        accumulate(H, x, tokens)
        if C is not None:
            accumulate_shift(C, original(i), x, tokens)
    return symmetrize(H), C


def capture(
    weights: Iterable[Weight], run: Callable[[Tensor], Tensor], batch: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of weights in a forward pass, by name, and its output."""
    inputs: dict[str, Tensor] = {}
    with hooked(weight.on_input(partial(inputs.__setitem__, weight.name)) for weight in weights):
        return inputs, run(batch)


class Original:
    """The 16-bit block, to look up what the model that is not quantized feeds its weights.

    weights: the first of each stage, in order; batches: that model's hidden states before the block, which turn into
    those after it. Of a single batch all inputs are kept. Of several they are computed when asked for, which must be in
    the order of the stages: as far as the weight asked for, and for the last one to the end.
    """

    def __init__(
        self,
        block: nn.Module,
        name: str,
        weights: Sequence[Weight],
        call: tuple,
        device: torch.device,
        batches: Batches,
    ) -> None:
        self.batches, self.after = batches, set()  # batches that are after the block already
        self.last = weights[-1].name if weights else None
        self.at_once = len(batches) == 1
        self.block = block if self.at_once else copy.deepcopy(block)
        self.run = partial(run_block, self.block, call, device)
        if self.at_once:
            self.inputs, self.output = capture(weights, self.run, batches[0])
        else:
            self.weights = weights_in(self.block, name)

    def input(self, name: str, batch: int) -> Tensor:
        """The input of the weight `name` for a batch; to be asked for once."""
        if self.at_once:
            return self.inputs[name]
        weight = self.weights[name]
        if name != self.last:
            return capture_one(weight, self.run, self.batches[batch])
        inputs, output = capture([weight], self.run, self.batches[batch])
        self.batches[batch] = to_host(output)
        self.after.add(batch)
        return inputs[name]

    def outputs(self) -> Batches:
        """The 16-bit model's hidden states after the block, on the CPU, in place of those before it."""
        for i in set(range(len(self.batches))) - self.after:
            self.batches[i] = to_host(self.output if self.at_once else self.run(self.batches[i]))
        return self.batches
