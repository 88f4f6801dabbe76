"""`--calibration self`: the windows that the model, or another one of its tokenizer, writes before it is quantized.

A token takes a pass through all weights, so the model is in memory as a whole: on the device if it fits there, else on
the host. Texts are written in batches of as many, so that the first ones are the same however many are wanted, and each
batch is kept in the run's folder, where a resumed run goes on from it.
"""

import gc
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.cost import Clock
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.kv_layers import heads, value
from bpdq_quantizer.model.images import standing_ids
from bpdq_quantizer.model.opening import plain_skeleton
from bpdq_quantizer.model.sources import check_source
from bpdq_quantizer.model.stream import stamps, trim_heap
from bpdq_quantizer.model.support import check_tokens
from bpdq_quantizer.model.tokens import load_tokenizer
from bpdq_quantizer.model.weights import check_numbers
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.model.writing import (
    BETWEEN,
    TEXT_TOKENS,
    beginnings,
    in_windows,
    seed_of,
    texts_of_window,
    write_on,
)
from bpdq_quantizer.run.identity import circumstances, resolved_model
from bpdq_quantizer.run.run_folder import WRITTEN, RunFolder, check_same, holds_work
from bpdq_quantizer.storage.files import DamagedError, read_sealed, write_tensors

AT_ONCE = 32  # texts that are written together, so that a step reads all weights once for them
CACHE_BYTES = 1 << 32  # of their keys and values
MARGIN = 1.1  # on a card, for activations
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

    A window is the same however many there are. tokenizer, lead: of the model that is quantized, and what its windows
    begin with. Raises InputError for a writer of other tokens, one that has no room, holds NaN, or can't write, and for
    a folder that has other text, or text that was written in other circumstances.
    """
    count, length = shape
    tokens = min(TEXT_TOKENS, length - len(lead))
    if tokens < 2:
        raise InputError(f"--seq-len {length}: --calibration self begins with as many that are given: raise it")
    between = tokenizer(BETWEEN, add_special_tokens=False)["input_ids"]
    needed = count * texts_of_window(tokens, len(lead), len(between), length)
    own = {"seed": seed, "lead": list(lead), "tokens of a text": tokens}
    source = _writer_identity(writer, tokenizer, device) | own
    texts, cost = _written(folder, source)
    if len(texts) < needed:
        clock = Clock(cost)
        lm, at_once = _opened(writer, device, len(lead) + tokens)
        total = -(-needed // at_once) * at_once * tokens
        with tqdm(total=total, initial=len(texts) * tokens, desc="writing text", unit="token") as bar:
            while len(texts) < needed:
                starts = beginnings(tokenizer, range(len(texts), len(texts) + at_once), seed)
                more = _draw(lm, writer, lead, starts, tokens, seed_of(seed, len(texts)), bar)
                texts, cost = torch.cat([texts, more]), clock.read()
                write_tensors(folder.resume / WRITTEN, {"texts": texts}, {"source": source, "cost": cost})
                folder.begun |= not holds_work(folder.path)
        del lm
        gc.collect()
        trim_heap()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return in_windows(texts[:needed], lead, between, length), cost


def _writer_identity(writer: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> dict[str, Any]:
    """What its text depends on, as JSON; raises InputError for a writer that can't be used, or has other tokens."""
    check_source(writer)
    if load_tokenizer(writer).get_vocab() != tokenizer.get_vocab():
        raise InputError(f"--calibration self:{writer}: its tokenizer is not the model's: name one of the same family")
    return {"calibration": f"self:{resolved_model(writer)}"} | circumstances(writer, device, stamps(writer))


def _written(folder: RunFolder, source: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """Texts [T, n] that a run of `folder` has from the same source, and what they cost; raises InputError where it has
    others."""
    nothing = torch.empty(0, source["tokens of a text"], dtype=torch.int64)
    try:
        tensors, notes = read_sealed(folder.resume / WRITTEN)
    except DamagedError:
        return nothing, {}
    check_same(folder.path, notes["source"], source)
    return tensors["texts"], notes["cost"]


def _opened(writer: str, device: torch.device, length: int) -> tuple[PreTrainedModel, int]:
    """The model that writes, where it has room, and how many texts of `length` tokens at once."""
    where, at_once = room(writer, device, length)
    lm = load_model(writer).to(where)
    check_numbers(lm.state_dict())
    check_tokens(lm, text_windows(torch.zeros(1, length, dtype=torch.int64)), "--calibration self")
    return lm, at_once


def room(writer: str, device: torch.device, length: int) -> tuple[torch.device, int]:
    """Where a model of 16 bits has room to write, and how many texts of `length` tokens at once; raises InputError if
    nowhere."""
    skeleton = plain_skeleton(writer)
    itemsize = skeleton.dtype.itemsize
    weights = itemsize * sum(parameter.numel() for parameter in skeleton.parameters())
    text = length * itemsize * cached_numbers(skeleton.config)
    at_once = max(1, min(AT_ONCE, CACHE_BYTES // max(1, text)))
    needed = weights + at_once * text
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


def _draw(
    lm: PreTrainedModel,
    writer: str,
    lead: Sequence[int],
    starts: Sequence[Sequence[int]],
    tokens: int,
    seed: int,
    bar: tqdm,
) -> Tensor:
    try:
        return write_on(lm, lead, starts, tokens, seed, standing_ids(lm.config), bar)
    except (MemoryError, torch.OutOfMemoryError):
        raise InputError(f"--calibration self: {writer} has run out of memory while it wrote: {REMEDY}") from None
    except Exception as e:  # of as many kinds as there are models
        raise InputError(f"--calibration self: {writer} can't write text ({e}): {REMEDY}") from e
