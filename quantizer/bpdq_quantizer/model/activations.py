"""What flows through a model during calibration: block inputs, stages, and statistics of a Linear's inputs."""

import copy
from collections.abc import Callable, Sequence
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
from bpdq_quantizer.storage.offload import Batches, Offloaded

ACTIVATION_BYTES = 1 << 30  # a calibration batch is as many windows as keep a block's activations within this


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


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


def find_stages(block: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor) -> list[list[str]]:
    """Names of the block's Linears, grouped by the input tensor they share, in the order of the forward pass."""
    stages: list[tuple[Tensor, list[str]]] = []

    def record(name: str, x: Tensor) -> None:
        if stages and stages[-1][0] is x:
            stages[-1][1].append(name)
        else:
            stages.append((x, [name]))

    linears = linear_layers(block)
    hooks = [m.register_forward_pre_hook(lambda _, args, n=name: record(n, args[0])) for name, m in linears.items()]
    run(hidden)
    for hook in hooks:
        hook.remove()
    reached = [name for _, names in stages for name in names]
    if sorted(reached) != sorted(linears):
        odd = sorted(set(linears).symmetric_difference(reached)) or "a Linear that runs twice"
        raise InputError(f"the forward pass does not reach each Linear of a block once: {odd}")
    return [names for _, names in stages]


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
    out_features = sum(linear.out_features for linear in linear_layers(blocks[0]).values())
    batches = [] if offload is None else Offloaded(offload)
    for part in tokens.split(windows_per_batch(*window.shape[1:], out_features, window.element_size())):
        batches.append(to_host(torch.cat(block_inputs(model, blocks, part).hidden).to(device)))
    return batches


def capture_one(linear: nn.Linear, run: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """The input of a Linear, in front of which the forward pass stops."""
    inputs = []

    def stop(_: nn.Module, args: tuple) -> None:
        inputs.append(args[0])
        raise _StageReached

    hook = linear.register_forward_pre_hook(stop)
    try:
        with suppress(_StageReached):
            run(batch)
    finally:
        hook.remove()
    return inputs[0]


@torch.no_grad()
def stage_statistics(
    linear: nn.Linear,
    run: Callable[[Tensor], Tensor],
    batches: Batches,
    original: Callable[[int], Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """H and C (`accumulate_shift`) of a Linear's inputs; `original(i)` gives the 16-bit model's inputs of batch i."""
    tokens = sum(batch.shape[:2].numel() for batch in batches)
    H = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
    C = None if original is None else torch.zeros_like(H)
    for i, batch in enumerate(batches):
        x = capture_one(linear, run, batch)
        accumulate(H, x, tokens)
        if C is not None:
            accumulate_shift(C, original(i), x, tokens)
    return symmetrize(H), C


def capture(
    block: nn.Module, names: list[str], run: Callable[[Tensor], Tensor], batch: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of the block's Linears `names` in a forward pass, and its output."""
    inputs: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple, name: str) -> None:
        inputs[name] = args[0]

    hooks = [block.get_submodule(name).register_forward_pre_hook(partial(keep, name=name)) for name in names]
    output = run(batch)
    for hook in hooks:
        hook.remove()
    return inputs, output


class Original:
    """The 16-bit block, to look up what the model that is not quantized feeds its Linears.

    names: of the first Linear of each stage, in order; batches: that model's hidden states before the block, which turn
    into those after it. Of a single batch all inputs are kept. Of several they are computed when asked for, which must
    be in the order of the stages: as far as the Linear asked for, and for the last one to the end.
    """

    def __init__(self, block: nn.Module, names: list[str], call: tuple, device: torch.device, batches: Batches) -> None:
        self.batches, self.last, self.inputs = batches, names[-1], {}
        self.after: set[int] = set()  # batches that are after the block already
        self.block = block if len(batches) == 1 else copy.deepcopy(block)
        self.run = partial(run_block, self.block, call, device)
        if len(batches) == 1:
            self.inputs, self.output = capture(block, names, self.run, batches[0])

    def input(self, name: str, batch: int) -> Tensor:
        """The input of the Linear `name` for a batch; to be asked for once."""
        if self.inputs:
            return self.inputs[name]
        if name != self.last:
            return capture_one(self.block.get_submodule(name), self.run, self.batches[batch])
        inputs, output = capture(self.block, [name], self.run, self.batches[batch])
        self.batches[batch] = to_host(output)
        self.after.add(batch)
        return inputs[name]

    def outputs(self) -> Batches:
        """The 16-bit model's hidden states after the block, on the CPU, in place of those before it."""
        for i in set(range(len(self.batches))) - self.after:
            self.batches[i] = to_host(self.output if self.inputs else self.run(self.batches[i]))
        return self.batches
