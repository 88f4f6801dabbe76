"""Checkpoints against the model that they were made of: a row of figures for each, and a plot of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bpdq_quantizer.checkpoint.inspection import inspect
from bpdq_quantizer.checkpoint.loader import is_checkpoint
from bpdq_quantizer.checkpoint.picture import blank
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.evaluation.compare import LEVEL, TokenScores, summary, token_scores
from bpdq_quantizer.evaluation.logits import Logits, opened
from bpdq_quantizer.evaluation.perplexity import finite, of_mean, runnable
from bpdq_quantizer.model.calibration import file_windows
from bpdq_quantizer.model.sources import check_source, is_gguf, local_folder, read_config, weight_files
from bpdq_quantizer.model.tokens import leading_tokens, load_tokenizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def compare_models(
    models: Sequence[str],
    reference: str,
    text: str,
    seq_len: int,
    limit: int | None,
    special_tokens: str,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """Compare models, one after the other, with `reference` on the windows of a text file.

    limit, special_tokens: as of `file_windows` and `leading_tokens`; seed: of the intervals (`compare.summary`).
    Returns the windows' number and special tokens, what is known of the reference, and of each model a row. Raises
    InputError before anything is run for models of other tokens than the reference's.
    """
    for model in (reference, *models):
        check_source(model)
    tokenizer = load_tokenizer(reference)
    lead = leading_tokens(tokenizer, special_tokens)
    windows = file_windows(text, tokenizer, seq_len, limit, lead)
    for model in models:
        own = load_tokenizer(model)
        check_vocabulary(model, own, reference, tokenizer)
        ids = file_windows(text, own, seq_len, limit, leading_tokens(own, special_tokens))
        if not torch.equal(ids, windows):
            raise InputError(f"{model}: its tokenizer gives {text} other tokens than that of --reference {reference}")
    rows = []
    with opened(reference, windows, device, text) as expected:
        for model in models:
            scores = _scores(model, expected, windows, len(lead), device, text)
            base = finite(reference, "perplexity", of_mean(scores.reference_nll.double().mean().item()))
            rows.append(_row(model, summary(scores, seed)))
    return {
        "windows": len(windows),
        "special_tokens": tokenizer.convert_ids_to_tokens(lead),
        "reference": {"model": reference, "bytes": weight_bytes(reference), "perplexity": base},
        "models": rows,
    }


def _scores(model: str, reference: Logits, windows: Tensor, lead: int, device: torch.device, text: str) -> TokenScores:
    with opened(model, windows, device, text) as logits, runnable(model):
        return token_scores(reference, logits, windows, lead)


def _row(model: str, found: dict[str, Any]) -> dict[str, Any]:
    for figure in ("perplexity", "kl"):
        finite(model, figure, found[figure])
    bits = inspect(model)["bits_per_weight"] if is_checkpoint(model) else None
    return {"model": model, "bytes": weight_bytes(model), "bits_per_weight": bits, **found}


def check_vocabulary(
    model: str, tokenizer: PreTrainedTokenizerBase, reference: str, other: PreTrainedTokenizerBase
) -> None:
    """Raise InputError where a model predicts more or fewer tokens than the reference, or an id is another."""
    own, theirs = ({i: token for token, i in t.get_vocab().items()} for t in (tokenizer, other))
    odd = min((i for i in own.keys() & theirs.keys() if own[i] != theirs[i]), default=None)
    sizes = [read_config(name).get_text_config(decoder=True).vocab_size for name in (model, reference)]
    if odd is not None:
        difference = f"token {odd} is {own[odd]!r} here and {theirs[odd]!r} there"
    elif sizes[0] != sizes[1]:
        difference = f"{sizes[0]} tokens here and {sizes[1]} there"
    else:
        return
    raise InputError(
        f"{model}: its vocabulary is not that of --reference {reference}, {difference}: name the model that it was "
        "made of"
    )


def weight_bytes(model: str) -> int:
    """Bytes of the files that hold a model's tensors."""
    files = [Path(model)] if is_gguf(model) else weight_files(local_folder(model))
    return sum(file.stat().st_size for file in files)


def draw(rows: Sequence[dict[str, Any]]) -> "Figure":
    """KL with its interval against bits per weight or, where a row lacks them, gigabytes; raises InputError where
    matplotlib is not installed."""
    figure = blank(6.4, 4.4)
    axes = figure.subplots()
    has_bits = all(row["bits_per_weight"] for row in rows)
    for row in rows:
        x = row["bits_per_weight"] if has_bits else row["bytes"] / 1e9
        low, high = row["kl_interval"] or (row["kl"], row["kl"])
        reach = [[max(0.0, row["kl"] - low)], [max(0.0, high - row["kl"])]]
        axes.errorbar(x, row["kl"], yerr=reach, marker="o", capsize=3, linestyle="", color="#2a7f9e")
        axes.annotate(Path(row["model"]).name, (x, row["kl"]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("bits per quantized weight" if has_bits else "GB of weights")
    axes.set_ylabel(f"KL to the reference, nats ({LEVEL:.0%} interval)")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
