"""Perplexity."""

import math

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood over windows [W, L] of token ids.

    Windows are independent: every token but the first of a window is predicted from those before it in the window.
    NaN or infinite where the model is broken.
    """
    total = 0.0
    for window in tqdm(windows, desc="perplexity", unit="window"):
        ids = window.to(model.device)
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    nll = total / (windows.shape[0] * (windows.shape[1] - 1))
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
