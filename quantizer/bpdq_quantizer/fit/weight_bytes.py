"""Bytes of a model's weights in bit-planes: in a checkpoint, on a card, and of those what one token reads."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from bpdq_kernels.format import Scheme
from bpdq_quantizer.fit import hours
from bpdq_quantizer.fit.parts import Model, Shape

VOCABULARY_PADDING = 64  # model_executor/layers/vocab_parallel_embedding.py: DEFAULT_VOCAB_PADDING_SIZE


class Settings(NamedTuple):
    """scheme: of the Linears; embedding and head: None for 16 bits; gpu_memory in GiB; text_only: no images."""

    scheme: Scheme
    embedding: Scheme | None
    head: Scheme | None
    gpu_memory: float
    context: int
    text_only: bool = False


class Weights(NamedTuple):
    """Bytes by part."""

    linear: int
    embedding: int
    head: int
    other: int
    tower: int
    mtp: int


def checkpoint_bytes(m: Model, settings: Settings) -> Weights:
    """What `bpdq quantize` writes: planes and coefficients, everything else as the model has it."""
    weights = _weights(m, settings, Scheme.stored_bytes, m.itemsize, lambda n: n, m.linears)
    return weights._replace(other=weights.other + (4 - m.itemsize) * m.wide)


def card_bytes(m: Model, settings: Settings, active: bool = False) -> Weights:
    """The same in the arrangement of the CUDA kernels, vocabularies padded, everything else in 16 bits. Layers that
    vLLM fuses are padded one by one here, an upper bound where their outputs are no multiples of 64. active: without
    experts that a token does not choose."""

    def padded(n: int) -> int:
        return -(-n // VOCABULARY_PADDING) * VOCABULARY_PADDING

    linears = m.active_linears if active else m.linears
    weights = _weights(m, settings, Scheme.tiled_bytes, 2, padded, linears + m.doubled)
    if active:
        weights = weights._replace(other=weights.other - 2 * m.idle_others)
    return weights._replace(mtp=0, tower=0 if settings.text_only else weights.tower)


def _weights(
    m: Model, settings: Settings, packed: Any, itemsize: int, padded: Callable[[int], int], linears: list[Shape]
) -> Weights:
    def embedding(shape: Shape, scheme: Scheme | None) -> int:
        n, k = padded(shape[0]), shape[1]
        return n * k * itemsize if scheme is None else packed(scheme.for_inputs(k), n, k)

    return Weights(
        linear=sum(times * packed(settings.scheme.for_inputs(k), n, k) for (n, k), times in Counter(linears).items()),
        embedding=embedding(m.embedding, settings.embedding),
        head=0 if m.head is None else embedding(m.head, settings.head),
        other=m.others * itemsize,
        tower=m.tower.elements * itemsize,
        mtp=m.mtp * itemsize,
    )


def token_figures(m: Model, settings: Settings) -> dict[str, float]:
    """Parameters of the text model, and what one token needs of them: how many, their bytes on the card, without the
    embedding, and for how many tokens of one sequence a card could at most read these in a second."""
    tables = sum(n * k for n, k in (m.embedding, m.head or (0, 0)))
    idle = sum(n * k for n, k in m.linears) - sum(n * k for n, k in m.active_linears) + m.idle_others
    parameters = sum(n * k for n, k in m.linears) + tables + m.others
    weights = card_bytes(m, settings, active=True)
    active = weights.linear + weights.other + (weights.embedding if m.head is None else weights.head)
    return {
        "parameters": parameters,
        "active_parameters": parameters - idle,
        "active_bytes": active,
        "most_tokens_per_second": hours.RTX_3090.bytes / active,
    }
