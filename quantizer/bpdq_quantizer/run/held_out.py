"""What a run says of its own checkpoint: perplexity and KL to the original on text that it was not calibrated on."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import nn

from bpdq_quantizer.cost import Clock
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.evaluation.compare import summary, token_scores
from bpdq_quantizer.evaluation.logits import opened, run_dtype, streamed
from bpdq_quantizer.evaluation.perplexity import of_mean
from bpdq_quantizer.model.stream import Streamed
from bpdq_quantizer.run.block_files import BlockFiles
from bpdq_quantizer.run.prepare import Run


def evaluate(run: Run, files: BlockFiles, digests: Mapping[str, str]) -> dict[str, Any] | None:
    """`compare.summary` of the held-out windows, for which the original is opened again, with its perplexity and the
    seconds that this took; None if there are none. Raises InputError for figures that are no numbers.

    files, digests: of the blocks as they will be served; the rest of the model is in `run.source`, and stays as it is.
    """
    windows, clock = run.windows.held_out, Clock({})
    if windows is None:
        return None
    dtype = run_dtype(run.device)
    dtype = run.source.model.dtype if dtype == "auto" else dtype
    twin = _twin(run.source, dtype)
    load = partial(_load, replace(files, source=twin), {name: {digest} for name, digest in digests.items()}, dtype)
    o, lead = run.options, len(run.windows.special_tokens)
    with (
        opened(o.files.model, windows, run.device, o.text.calibration) as original,
        streamed(twin, windows, run.device, load, "the quantized model") as quantized,
    ):
        scores = token_scores(original, quantized, windows, lead)
    found = {
        **summary(scores, o.method.seed),
        "reference_perplexity": of_mean(scores.reference_nll.double().mean().item()),
    }
    for name, value in found.items():
        if name != "kl_interval" and not isfinite(value):
            raise InputError(
                f"--evaluate: {name} of the held-out text is {value} in {dtype}: check the model and its dtype, or "
                "finish without (--resume --evaluate 0)"
            )
    return {"windows": len(windows), "seq_len": windows.shape[1], **found, **clock.read()}


def _twin(source: Streamed, dtype: torch.dtype) -> Streamed:
    """The same in `dtype`, with tensors of its own."""
    model = copy.deepcopy(source.model).to(dtype)
    return source._replace(model=model, blocks=model.get_submodule(source.prefix))


def _load(files: BlockFiles, digests: Mapping[str, set[str]], dtype: torch.dtype, index: int) -> nn.Module:
    return files.read(digests, index).to(dtype)
