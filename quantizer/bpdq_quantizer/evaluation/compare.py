"""A model's next-token distributions against those of another, the reference."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bpdq_quantizer.evaluation.logits import CHUNK, Logits
from bpdq_quantizer.evaluation.perplexity import of_mean

RESAMPLES = 2000  # of windows, for the interval
LEVEL = 0.95  # of the interval


class TokenScores(NamedTuple):
    """Of every predicted token of windows, all [W, T] fp32 on the CPU. kl: KL(reference || model) of the distributions
    that predict it, in nats; same: 1 where their likeliest tokens are the same one; nll, reference_nll: minus the log
    of the probability that the model and the reference gave it."""

    kl: Tensor
    same: Tensor
    nll: Tensor
    reference_nll: Tensor


@torch.inference_mode()
def token_scores(reference: Logits, model: Logits, windows: Tensor, lead: int = 0) -> TokenScores:
    """Compare logits for windows [W, L] of ids, of which the first `lead` are special tokens, which are not predicted,
    nor is the first token of a window."""
    first, found = max(1, lead), []
    for i, window in enumerate(tqdm(windows, desc="comparing", unit="window")):
        targets = window.roll(-1).split(CHUNK)  # of the last token something, which is dropped
        parts = [_scores(*part) for part in zip(reference(i), model(i), targets, strict=True)]
        found.append(torch.cat(parts, dim=1)[:, first - 1 : -1])
    return TokenScores(*torch.stack(found, dim=1))


def _scores(reference: Tensor, model: Tensor, targets: Tensor) -> Tensor:
    """The four of TokenScores, [4, C], from logits [C, V]; targets: the tokens that came."""
    log_p, log_q = (logits.to(model.device).float().log_softmax(-1) for logits in (reference, model))
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    same = log_p.argmax(-1) == log_q.argmax(-1)
    ids = targets.to(model.device)[:, None]
    nll, reference_nll = (-logs.gather(1, ids)[:, 0] for logs in (log_q, log_p))
    return torch.stack([kl, same, nll, reference_nll]).cpu()


def summary(scores: TokenScores, seed: int = 0) -> dict[str, Any]:
    """perplexity; kl: the mean over tokens, in nats, and kl_interval: that of its bootstrap over windows, None where
    there is only one; kl_p99: the 99th percentile over tokens; top1_agreement: the share of `same`."""
    kl = scores.kl.double()
    ordered = kl.flatten().sort().values
    return {
        "perplexity": of_mean(scores.nll.double().mean().item()),
        "kl": kl.mean().item(),
        "kl_interval": None if len(kl) == 1 else interval(kl.mean(1), seed),
        "kl_p99": ordered[round(0.99 * (len(ordered) - 1))].item(),
        "top1_agreement": scores.same.double().mean().item(),
    }


def interval(values: Tensor, seed: int) -> list[float]:
    """The percentile bootstrap's interval, at LEVEL, for the mean of what values [W] are drawn from."""
    picks = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed))
    tail = (1 - LEVEL) / 2
    return values[picks].mean(1).quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
