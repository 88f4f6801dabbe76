"""Text that a model writes itself, to calibrate it on: drawn from its own distribution, as it was trained on what it
then says (Williams et al., arXiv 2410.17170; LLM-QAT, arXiv 2305.17888)."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

# cuDNN, which torch prefers on an H100 or B200, plans anew for every length, and each token makes a new one
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class _Count(BaseStreamer):
    """Tokens on a progress bar."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def put(self, value: Tensor) -> None:
        self.bar.update(value.numel())

    def end(self) -> None:
        pass


def random_starts(tokenizer: PreTrainedTokenizerBase, count: int, lead: Sequence[int], seed: int) -> Tensor:
    """Ids [count, len(lead) + 1]: `lead`, then a token that is drawn from all but the added and special ones, so that
    no two texts are alike."""
    ordinary = torch.tensor(sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)))
    drawn = torch.randint(len(ordinary), (count, 1), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.tensor(lead, dtype=torch.int64).expand(count, -1), ordinary[drawn]], dim=1)


def write_on(
    lm: PreTrainedModel, starts: Tensor, length: int, at_once: int, seed: int, never: Collection[int] = ()
) -> Tensor:
    """Ids [W, length]: `starts` [W, S], and what the model goes on with, each token drawn at temperature 1.

    An end of text does not end a window: what comes after it is the next text. at_once: windows that share a step;
    never: ids that are not drawn. The state of torch's random numbers stays as it was.
    """
    lm.generation_config = GenerationConfig()  # that of its files would keep to the likeliest tokens, or stop
    options = GenerationConfig(
        do_sample=True, top_k=0, max_length=length, pad_token_id=0, suppress_tokens=list(never) or None
    )
    parts, device = [], lm.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        sdpa_kernel(ATTENTION),
        tqdm(total=starts.shape[0] * length, desc="writing text", unit="token") as bar,
    ):
        torch.manual_seed(seed)
        for rows in starts.to(device).split(at_once):
            mask = torch.ones_like(rows)
            parts.append(lm.generate(rows, attention_mask=mask, generation_config=options, streamer=_Count(bar)))
    return torch.cat(parts).cpu()
