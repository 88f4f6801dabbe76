"""What a model calls its blocks with: hidden states, and what else it computes in front of them and between them."""

from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.products import quick_products
from bpdq_quantizer.model.windows import Window, arguments
from bpdq_quantizer.storage.offload import Batches

Run = Callable[[Tensor], Tensor]  # a block's outputs for a batch of its inputs; logits for those of the last


class Call(NamedTuple):
    """A block's arguments beside hidden states. added: what the model adds to those in front of the block, or None
    (Qwen3-VL's features of images)."""

    args: tuple
    kwargs: dict[str, Any]
    added: Tensor | None = None


class BlockInputs(NamedTuple):
    """hidden: what the first block reads, [1, L, D] per window, on the CPU; calls: of each block one for all windows,
    or one for each."""

    hidden: list[Tensor]
    calls: list[list[Call]]


class _StandIn(nn.Module):
    """In a block's place. width: of what it returns (`output_width`); attributes that it lacks are the block's."""

    def __init__(self, block: nn.Module, width: int) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule
        self.width = width

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


class _Recorder(_StandIn):
    """Passes hidden states through, or zeros, while the inputs of all blocks are recorded."""

    def __init__(self, block: nn.Module, width: int, zeros: bool = False) -> None:
        super().__init__(block, width)
        self.zeros = zeros
        self.seen: tuple[Tensor, Call] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        self.seen = hidden_states, Call(args, kwargs)
        return _returned(torch.zeros_like(hidden_states) if self.zeros else hidden_states, self.width)


class _Output(_StandIn):
    """In the last block's place: returns what it is given beforehand."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        return _returned(self.output, self.width)


def trunk(model: PreTrainedModel) -> nn.Module:
    """All of a model but the LM head."""
    if model.base_model is not model:
        return model.base_model
    return model.model if hasattr(model, "model") else trunk(model.language_model)  # Llama 4, and what gives it images


@contextmanager
def _standing_in(blocks: nn.ModuleList, modules: Sequence[nn.Module]) -> Iterator[None]:
    originals = list(blocks)
    try:
        for i, module in enumerate(modules):
            blocks[i] = module
        yield
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block


@torch.no_grad()
def output_width(model: PreTrainedModel, blocks: nn.ModuleList) -> int:
    """How many things the model takes from a block, of which the first are the hidden states: 0 for those alone, not in
    a tuple, 1 for the first of however many (GPT-J, Falcon), 2 for a pair (Bamba). Its blocks are not run.

    Of the tensor [1, L, D] that others expect, a model that reads tuples takes the first window and fails, or goes on
    without it.
    """
    ids = torch.zeros(1, 2, dtype=torch.int64)
    for width in (0, 1, 2):
        with _standing_in(blocks, [_Recorder(block, width) for block in blocks]):
            try:
                if trunk(model)(input_ids=ids, use_cache=False).last_hidden_state.ndim == 3:
                    return width
            except (RuntimeError, ValueError, IndexError):
                continue
    return 0


def _returned(hidden: Tensor, width: int) -> Tensor | tuple[Tensor | None, ...]:
    return (hidden, *[None] * (width - 1)) if width else hidden


@torch.no_grad()
def block_inputs(
    model: PreTrainedModel, blocks: nn.ModuleList, windows: Iterable[Window], by_window: bool = False
) -> BlockInputs:
    """Run windows through all but the blocks, recording what each block would be called with.

    The first window's calls serve all, if the last one's are the same and not `by_window`; else each window has its
    own, which share what is equal. Raises InputError for a model that does more than add between its blocks.
    """
    width = output_width(model, blocks)
    hidden, found = [], []
    for window in windows:
        states, calls = _record(model, blocks, window, width)
        hidden.append(states)
        found.append(calls if not found else [_sharing(*pair) for pair in zip(calls, found[0], strict=True)])
    if not by_window and not any(carries(call) for call in found[0]) and _same(found[0], found[-1]):
        found = found[:1]
    return BlockInputs(hidden, [list(calls) for calls in zip(*found, strict=True)])


def _record(model: PreTrainedModel, blocks: nn.ModuleList, window: Window, width: int) -> tuple[Tensor, list[Call]]:
    """The first block's hidden states of a window, and each block's call."""
    states, calls, final = _seen(model, blocks, window, width, zeros=False)
    if all(x is states[0] or torch.equal(x, states[0]) for x in states):
        return states[0], calls
    _, *added = _seen(model, blocks, window, width, zeros=True)[0]
    for before, after, difference in zip(states, states[1:], added, strict=False):
        if not torch.allclose(before + difference, after, rtol=1e-2, atol=1e-3):
            raise InputError(f"{type(model).__name__} does more than add something between its blocks: not supported")
    if not torch.allclose(head_inputs(model, blocks, [states[-1]])[0], final, rtol=1e-2, atol=1e-3):
        raise InputError(f"{type(model).__name__} adds something after its last block: not supported")
    return states[0], [
        call._replace(added=difference if difference.any() else None)
        for call, difference in zip(calls, [torch.zeros(()), *added], strict=True)
    ]


def _seen(
    model: PreTrainedModel, blocks: nn.ModuleList, window: Window, width: int, zeros: bool
) -> tuple[list[Tensor], list[Call], Tensor]:
    """What each block reads and is called with, and what the LM head would read."""
    recorders = [_Recorder(block, width, zeros) for block in blocks]
    with _standing_in(blocks, recorders):
        final = trunk(model)(**arguments(model, window)).last_hidden_state
    states, calls = zip(*(recorder.seen for recorder in recorders), strict=True)
    return list(states), list(calls), final


def head_inputs(model: PreTrainedModel, blocks: nn.ModuleList, hidden: Batches) -> Batches:
    """Turn the last block's outputs, batches [n, L, D], into what the LM head would read. The blocks are not run."""
    width = output_width(model, blocks)
    last = _Output(blocks[-1], width)
    with _standing_in(blocks, [*(_Recorder(block, width) for block in blocks[:-1]), last]):
        for i, batch in enumerate(hidden):
            states = []
            for last.output in batch.split(1):
                ids = torch.zeros(last.output.shape[:2], dtype=torch.int64)
                states.append(trunk(model)(input_ids=ids, use_cache=False).last_hidden_state)
            hidden[i] = torch.cat(states)
    return hidden


@contextmanager
def head_alone(model: PreTrainedModel, blocks: nn.ModuleList, device: torch.device) -> Iterator[Run]:
    """What turns the last block's outputs [n, L, D] into the model's logits [n, L, V], on `device`, to which all of the
    model but its blocks goes. The blocks are not run."""
    width = output_width(model, blocks)
    last = _Output(blocks[-1], width)
    with _standing_in(blocks, [*(_Recorder(block, width) for block in blocks[:-1]), last]):
        model.to(device)

        def logits(hidden: Tensor) -> Tensor:
            last.output = hidden.to(device)
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=device)
            with quick_products(device, hidden.dtype):
                return model(input_ids=ids, use_cache=False).logits

        yield logits


def carries(call: Call) -> bool:
    """Whether blocks leave something for later ones in an argument: the keys and values that Gemma 4's layers share."""
    return any(isinstance(value, UserDict) for value in call.kwargs.values())


def twins(calls: list[list[Call]]) -> list[list[Call]]:
    """The same calls for a second model, with mappings of their own for what blocks leave to later ones."""
    own: dict[int, UserDict] = {}

    def twin(value: Any) -> Any:
        return own.setdefault(id(value), UserDict(value)) if isinstance(value, UserDict) else value

    return [[call._replace(kwargs={k: twin(v) for k, v in call.kwargs.items()}) for call in block] for block in calls]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b


def _sharing(value: Any, other: Any) -> Any:
    """`value`, but with the tensors of `other` that equal its own."""
    if isinstance(value, Tensor):
        return other if isinstance(other, Tensor) and torch.equal(value, other) else value
    if isinstance(value, Call):
        return Call(*(_sharing(x, y) for x, y in zip(value, other, strict=True)))
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return tuple(_sharing(x, y) for x, y in zip(value, other, strict=True))
    if isinstance(value, dict) and isinstance(other, Mapping):
        return {key: _sharing(x, other.get(key)) for key, x in value.items()}
    return value


def run_block(block: nn.Module, call: Call, device: torch.device, hidden: Tensor) -> Tensor:
    args, kwargs, added = on_device(call, device)
    hidden = hidden.to(device, non_blocking=True)
    with quick_products(device, hidden.dtype):
        out = block(hidden if added is None else hidden + added, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def on_device(call: Call, device: torch.device) -> Call:
    """The call with its tensors on `device`; what blocks leave to later ones stays one mapping."""
    kwargs = {k: v if isinstance(v, UserDict) else send_to_device(v, device) for k, v in call.kwargs.items()}
    return Call(send_to_device(call.args, device), kwargs, send_to_device(call.added, device))


def block_runs(block: nn.Module, calls: list[Call], device: torch.device, batches: int) -> list[Run]:
    """For each batch what runs a block on `device` on it; calls: one for all, or one for each batch of one window."""
    if len(calls) == 1:
        return [partial(run_block, block, on_device(calls[0], device), device)] * batches
    return [partial(run_block, block, call, device) for call in calls]
