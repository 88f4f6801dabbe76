"""Perplexity."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bpdq_quantizer.errors import InputError


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor, lead: int = 0) -> float:
    """exp of the mean negative log-likelihood over windows [W, L] of token ids, of which `lead` are special tokens.

    Windows are independent: every token of text is predicted from those before it in the window, but for a window's
    first. NaN or infinite where the model is broken.
    """
    total, first = 0.0, max(1, lead)
    for window in tqdm(windows, desc="perplexity", unit="window"):
        ids = window.to(model.device)
        logits = model(ids[None], use_cache=False).logits[0, first - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[first:], reduction="sum").item()
    return of_mean(total / windows[:, first:].numel())


def of_mean(nll: float) -> float:
    """The perplexity of a mean negative log-likelihood; infinite where that is too large for it."""
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


@contextmanager
def runnable(model: str) -> Iterator[None]:
    """Raise InputError in place of what transformers' code raises for a model that its config.json does not fit."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise InputError(f"{model}: the model that its config.json describes can't be run ({reason})") from e


def finite(model: str, what: str, value: float) -> float:
    """`value`; raises InputError unless it is a finite number, as JSON has no word for others."""
    if not math.isfinite(value):
        raise InputError(
            f"{model}: its {what} is {value}: the weights are damaged, or too large for the dtype that it is run in: "
            "download or quantize the model again"
        )
    return value
