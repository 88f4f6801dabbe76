"""Perplexity."""

import math

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel


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
    try:
        return math.exp(total / windows[:, first:].numel())
    except OverflowError:
        return math.inf
