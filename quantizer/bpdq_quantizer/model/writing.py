"""Text that a model writes itself, to calibrate it on: drawn from its own distribution, as it was trained on what it
then says (Williams et al., arXiv 2410.17170; LLM-QAT, arXiv 2305.17888).

Texts are short, as a model strays from what it began with, and every second one goes on from a sentence of `openings`:
after a random token alone models write what they like best, such as conversations, and little else.
"""

import random
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from bpdq_quantizer.model.openings import opening

# cuDNN, which torch prefers on an H100 or B200, plans anew for every length, and each token makes a new one
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
TEXT_TOKENS = 128  # of a text, its beginning included
BETWEEN = "\n\n"  # texts of a window
FREE = -1  # in place of a token that is drawn


class _Count(BaseStreamer):
    """Tokens on a progress bar."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def put(self, value: Tensor) -> None:
        self.bar.update(value.numel())

    def end(self) -> None:
        pass


class _Given(LogitsProcessor):
    """Of texts the tokens that are not drawn: `ids` [B, S], FREE where they are."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1]
        if place >= self.ids.shape[1]:
            return scores
        given = self.ids[:, place, None]
        only = torch.full_like(scores, -torch.inf).scatter(1, given.clamp(min=0), 0.0)
        return torch.where(given == FREE, scores, only)


def seed_of(seed: int, number: int) -> int:
    """Of the run's seed one for a text, or for the batch that begins with it; torch's generator takes 32 bits of it."""
    return random.Random(f"{seed} {number}").getrandbits(32)


def beginnings(tokenizer: PreTrainedTokenizerBase, numbers: range, seed: int) -> list[list[int]]:
    """Ids that the texts of these numbers begin with, by number and seed: even ones with an `opening`, odd ones with a
    token that is drawn from all but the added and special ones."""
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder))
    found = []
    for number in numbers:
        generator = torch.Generator().manual_seed(seed_of(seed, number))
        if number % 2:
            found.append([ordinary[int(torch.randint(len(ordinary), (), generator=generator))]])
        else:
            found.append(tokenizer(opening(generator), add_special_tokens=False)["input_ids"])
    return found


def write_on(
    lm: PreTrainedModel,
    lead: Sequence[int],
    starts: Sequence[Sequence[int]],
    length: int,
    seed: int,
    never: Collection[int] = (),
    bar: tqdm | None = None,
) -> Tensor:
    """Ids [B, length]: `starts`, and what the model goes on with after `lead` and those, each token drawn at
    temperature 1.

    An end of text does not end it: what comes then is the next one. never: ids that are not drawn; bar: counts tokens.
    The state of torch's random numbers stays as it was.
    """
    device, first = lm.device, len(lead)
    rows = [torch.tensor([*lead, *start][: first + length - 1]) for start in starts]
    given = pad_sequence(rows, batch_first=True, padding_value=FREE).to(device)
    ids = given[:, : min(len(row) for row in rows)]
    lm.generation_config = GenerationConfig()  # that of its files would keep to the likeliest tokens, or stop
    options = GenerationConfig(
        do_sample=True, top_k=0, max_length=first + length, pad_token_id=0, suppress_tokens=list(never) or None
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), sdpa_kernel(ATTENTION):
        torch.manual_seed(seed)
        found = lm.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=options,
            logits_processor=[_Given(given)],
            streamer=None if bar is None else _Count(bar),
        )
    return found[:, first:].cpu()


def texts_of_window(tokens: int, lead: int, between: int, length: int) -> int:
    """How many texts of so many tokens fill a window, the last one cut."""
    return -(-(length - lead + between) // (tokens + between))


def in_windows(texts: Tensor, lead: Sequence[int], between: Sequence[int], length: int) -> Tensor:
    """Ids [W, length]: `lead`, then texts [T, n], with `between` after each, as many as fill a window."""
    count = texts_of_window(texts.shape[1], len(lead), len(between), length)
    parted = torch.cat([texts, torch.tensor(between, dtype=torch.int64).expand(len(texts), -1)], dim=1)
    windows = parted.reshape(-1, count * parted.shape[1])[:, : length - len(lead)]
    return torch.cat([torch.tensor(lead, dtype=torch.int64).expand(len(windows), -1), windows], dim=1)
