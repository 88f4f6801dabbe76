"""`--calibration self`: the windows that the model, or another one of its tokenizer, writes before it is quantized.

A token takes a pass through all weights, so the model is in memory as a whole: on the device if it fits there, else on
the host. What was written stays in the run's folder, and a resumed run reads it there.
"""

import gc
from collections.abc import Sequence
from math import prod

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.cost import Clock
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.kv_layers import heads, value
from bpdq_quantizer.model.images import standing_ids
from bpdq_quantizer.model.opening import plain_skeleton
from bpdq_quantizer.model.sources import check_source
from bpdq_quantizer.model.stream import trim_heap
from bpdq_quantizer.model.support import check_tokens
from bpdq_quantizer.model.tokens import load_tokenizer
from bpdq_quantizer.model.weights import check_numbers
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.model.writing import random_starts, write_on
from bpdq_quantizer.run.run_folder import RunFolder
from bpdq_quantizer.storage.files import DamagedError, read_sealed, write_tensors

AT_ONCE = 32  # windows that are written together, so that a step reads all weights once for them
CACHE_BYTES = 1 << 32  # of their keys and values
MARGIN = 1.1  # on a card, for activations
WRITTEN = "written.safetensors"
REMEDY = "bring a text (--calibration FILE.txt), or let a smaller model of the same tokenizer write (self:MODEL)"


def writer_of(calibration: str, model: str) -> str | None:
    """Who writes the text `calibration`: the model itself, another one, or None, as it is there already."""
    kind, _, name = calibration.partition(":")
    return (name or model) if kind == "self" else None


def own_windows(
    writer: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: RunFolder,
    device: torch.device,
    shape: tuple[int, int],
    lead: Sequence[int],
    seed: int,
) -> tuple[Tensor, dict[str, float]]:
    """Windows [W, L] of `shape` that the model `writer` writes, or wrote for the run of `folder`, and what that cost.

    tokenizer, lead: of the model that is quantized, and what its windows begin with. Raises InputError for a writer of
    other tokens, one that has no room, holds NaN, or can't write.
    """
    file, (count, length) = folder.resume / WRITTEN, shape
    try:
        tensors, notes = read_sealed(file)
        if notes["writer"] == writer and len(tensors["tokens"]) >= count:
            return tensors["tokens"][:count], notes["cost"]
    except DamagedError:
        pass
    clock = Clock({})
    check_source(writer)
    if load_tokenizer(writer).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--calibration self:{writer}: its tokenizer is not the model's: name one of the same family")
    place, at_once = room(writer, device, length)
    lm = load_model(writer).to(place)
    check_numbers(lm.state_dict())
    check_tokens(lm, text_windows(torch.zeros(1, length, dtype=torch.int64)), "--calibration self")
    tokens = _written(lm, writer, random_starts(tokenizer, count, lead, seed), length, at_once, seed)
    del lm
    gc.collect()
    trim_heap()
    if place.type == "cuda":
        torch.cuda.empty_cache()
    cost = clock.read()
    write_tensors(file, {"tokens": tokens}, {"writer": writer, "cost": cost})
    return tokens, cost


def room(writer: str, device: torch.device, length: int) -> tuple[torch.device, int]:
    """Where a model of 16 bits has room to write, and how many windows at once; raises InputError if nowhere."""
    skeleton = plain_skeleton(writer)
    itemsize = skeleton.dtype.itemsize
    weights = itemsize * sum(parameter.numel() for parameter in skeleton.parameters())
    window = length * itemsize * cached_numbers(skeleton.config)
    at_once = max(1, min(AT_ONCE, CACHE_BYTES // max(1, window)))
    needed = weights + at_once * window
    on_card = device.type == "cuda" and torch.cuda.mem_get_info(device)[0] >= MARGIN * needed
    host = psutil.virtual_memory().available  # which a model passes through on its way to a card
    if host < (weights if on_card else needed):
        raise InputError(
            f"--calibration self: to write text, {writer} has to be in memory as a whole, {needed / 1e9:.1f} GB, and "
            f"{host / 1e9:.1f} GB are free: {REMEDY}"
        )
    return device if on_card else torch.device("cpu"), at_once


def cached_numbers(config: PreTrainedConfig) -> int:
    """Those in the keys and values of a token; 0 of a model without attention, whose states are small."""
    text = config.get_text_config(decoder=True)
    if not value(text, "num_attention_heads"):
        return 0
    return 2 * sum(prod(heads(text, index)) for index in range(text.num_hidden_layers))


def _written(lm: PreTrainedModel, writer: str, starts: Tensor, length: int, at_once: int, seed: int) -> Tensor:
    if length <= starts.shape[1]:
        raise InputError(f"--seq-len {length}: --calibration self begins with as many that are given: raise it")
    try:
        return write_on(lm, starts, length, at_once, seed, standing_ids(lm.config))
    except (MemoryError, torch.OutOfMemoryError):
        raise InputError(f"--calibration self: {writer} has run out of memory while it wrote: {REMEDY}") from None
    except Exception as e:  # of as many kinds as there are models
        raise InputError(f"--calibration self: {writer} can't write text ({e}): {REMEDY}") from e
