"""A model's logits for windows of text, a window at a time: of a BPDQ checkpoint, which is held packed, or of any other
model, of which one decoder block at a time is read from its files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from bpdq_quantizer.checkpoint.loader import is_checkpoint, load_model
from bpdq_quantizer.model.calls import head_alone
from bpdq_quantizer.model.stream import Streamed, load_block, open_model
from bpdq_quantizer.model.support import check_blocks, check_tokens
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.passes.blocks import last_batches

CHUNK = 128  # tokens whose logits are compared at a time
Logits = Callable[[int], Iterator[Tensor]]  # of window i those of all tokens in order, in parts [CHUNK, V] and a rest


def run_dtype(device: torch.device) -> torch.dtype | str:
    """What models are evaluated in: fp32 on a CPU, elsewhere their own dtype."""
    return torch.float32 if device.type == "cpu" else "auto"


@contextmanager
def opened(model: str, windows: Tensor, device: torch.device, text: str) -> Iterator[Logits]:
    """The logits of a Hugging Face folder, hub id, `.gguf` file or BPDQ checkpoint for windows [W, L] of ids of `text`.

    A checkpoint is on `device` as a whole, packed. Of others, which are what `bpdq quantize` reads, the hidden states
    of all windows are kept on the CPU, [W, L, D]; one block at a time is on `device`, then the embedding and LM head.
    Raises InputError, also for models that can't be run block by block.
    """
    texts, dtype = text_windows(windows), run_dtype(device)
    if is_checkpoint(model):
        lm = load_model(model, dtype).to(device)
        check_tokens(lm, texts, text)
        yield lambda i: iter(lm(windows[i, None].to(device), use_cache=False).logits[0].split(CHUNK))
        return
    source = open_model(model, dtype)
    check_tokens(source.model, texts, text)
    source = check_blocks(source, texts[:1])
    if dtype != "auto":
        source.model.to(dtype)
    load = partial(_load, source, device, source.model.dtype)
    with streamed(source, windows, device, load, model) as logits:
        yield logits


def _load(source: Streamed, device: torch.device, dtype: torch.dtype, index: int) -> nn.Module:
    return load_block(source, index, device).to(dtype)


@contextmanager
def streamed(
    source: Streamed, windows: Tensor, device: torch.device, load: Callable[[int], nn.Module], name: str
) -> Iterator[Logits]:
    """The same of an open model whose block i `load(i)` gives (`last_batches`); name: what it is called."""
    batches = last_batches(source, text_windows(windows), device, None, load, name)
    states = [window for batch in batches for window in batch]
    with head_alone(source.model, source.blocks, device) as head:
        yield lambda i: (head(part[None])[0] for part in states[i].split(CHUNK))
