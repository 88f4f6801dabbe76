"""Scales of an 8-bit KV cache: what a layer's keys and values are divided by before they are rounded to fp8 (e4m3).

They are calibrated last, in the model as it will be served, with tuned coefficients and a quantized embedding: one more
forward pass over the calibration windows, in which a cache that keeps nothing counts what it is given.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.activations import embed, run_batches
from bpdq_quantizer.model.calls import Call, block_inputs, block_runs, run_block
from bpdq_quantizer.model.stream import Streamed, drop_block, load_block
from bpdq_quantizer.model.windows import Window

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
# Of the magnitudes that stay in range; the rest saturate. SmolLM2-135M at 2 bits, keys and values rounded to e4m3, 8 x
# 1024 tokens of WikiText-2 test: perplexity 156.8 with 0.99, 113.8 with 0.999, 115.2 with 0.9999, 116.6 with 1, 116.0
# with a scale of 1, and 114.8 with a 16-bit cache: clipping much hurts, and from 0.999 on nothing but chance differs.
PERCENTILE = 0.9999
MAGNITUDES = 1 << 15  # of bfloat16, in the order of their bits
BLOCK_BYTES = 8  # of the scales that `calibrate` gives for a block


class _CountingCache(DynamicCache):
    """Stands in for the KV cache of a block. counts [2, MAGNITUDES] int64: how often each magnitude, in bfloat16, was
    among the keys (after rotation) and among the values."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(2, MAGNITUDES, dtype=torch.int64)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for counts, states in zip(self.counts, (keys, values), strict=True):
            bits = states.to(torch.bfloat16).abs().view(torch.int16)
            counts += torch.bincount(bits.flatten(), minlength=MAGNITUDES).cpu()
        return keys, values


def scale(counts: Tensor) -> float:
    """The scale with which PERCENTILE of the magnitudes counted in [MAGNITUDES] stay within fp8; 1 if all are zero."""
    reached = counts.cumsum(0) >= PERCENTILE * counts.sum()
    largest = reached.int().argmax().to(torch.int16).view(torch.bfloat16).item()
    return largest / LARGEST or 1.0


@torch.no_grad()
def calibrate(
    source: Streamed,
    windows: Sequence[Window],
    device: torch.device,
    offload: Path | None,
    load: Callable[[int], nn.Module],
) -> dict[str, Tensor]:
    """`k_scale` and `v_scale`, fp32 [1], of every attention layer, by their names in the checkpoint.

    offload: a folder for the hidden states, which else stay in memory; `load(i)` gives block i with its quantized
    tensors on the CPU, which are dropped afterwards; one block at a time is on `device`. Raises InputError for a block
    whose attention isn't one module that fills transformers' cache, as `check` does beforehand.
    """
    hidden, calls = embed(source, windows, device, offload)
    scales = {}
    for index, here in enumerate(tqdm(calls, desc="calibrating the KV cache", unit="block")):
        block, cache = load(index).to(device), _CountingCache()
        run_batches(block_runs(block, [_with_cache(call, cache) for call in here], device, len(hidden)), hidden)
        drop_block(block)
        name = _attention(source, index, cache)
        for kind, counts in zip("kv", cache.counts, strict=True):
            scales[f"{source.prefix}.{index}.{name}.{kind}_scale"] = torch.tensor([scale(counts)])
    return scales


@torch.no_grad()
def check(source: Streamed, windows: Sequence[Window], device: torch.device) -> None:
    """Raise InputError for a model whose keys and values `calibrate` can't see, by what the first block of each kind
    caches of the first window, or of which vLLM caches something else."""
    text = source.model.config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None) and text.model_type != "minicpm3":  # models/minicpm3.py caches keys
        raise InputError(
            f"--kv-cache-scales: {type(source.model).__name__} has latent attention, of which vLLM caches the latent "
            "states and not keys and values: leave the option out"
        )
    hidden, calls = block_inputs(source.model, source.blocks, windows[:1])
    caches: dict[str, _CountingCache] = {}
    for index, (block, (call, *_)) in enumerate(zip(source.blocks, calls, strict=True)):
        kind = repr(block)
        if kind not in caches:
            caches[kind] = _CountingCache()
            load_block(source, index, device)
            try:
                run_block(block, _with_cache(call, caches[kind]), device, hidden[0])
            except Exception as e:  # of states, which such a cache does not hold
                raise InputError(
                    f"--kv-cache-scales: what {source.prefix}.{index} caches can't be seen ({e}): leave the option out"
                ) from e
            finally:
                drop_block(block)
        _attention(source, index, caches[kind])


def _with_cache(call: Call, cache: DynamicCache) -> Call:
    return call._replace(kwargs={**call.kwargs, "past_key_values": cache})


def _attention(source: Streamed, index: int, cache: _CountingCache) -> str:
    """The name of the attention layer within block `index`, which has filled a cache; raises InputError."""
    names = [name for name, module in source.blocks[index].named_modules() if name and hasattr(module, "layer_idx")]
    if len(names) != 1 or not cache.counts.any():
        raise InputError(
            f"--kv-cache-scales: {source.prefix}.{index} has no attention layer whose keys and values can be seen: "
            "leave the option out"
        )
    return names[0]
