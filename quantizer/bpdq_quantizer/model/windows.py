"""What a model is calibrated on: pieces of text, and images with what is said of them."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

FEWEST_TOKENS, MOST_TOKENS = 4096, 16384  # whose gradients are taken by default


class Window(NamedTuple):
    """tokens: ids [1, L] int64; images: what else the model is called with, by argument, such as `pixel_values`."""

    tokens: Tensor
    images: Mapping[str, Tensor] = MappingProxyType({})


def text_windows(tokens: Tensor) -> list[Window]:
    """Windows of text alone, of ids [W, L]."""
    return [Window(ids) for ids in tokens.split(1)]


def all_tokens(windows: Iterable[Window]) -> Tensor:
    """The ids [W, L] of windows that are equally long."""
    return torch.cat([window.tokens for window in windows])


def as_tensors(windows: Iterable[Window]) -> dict[str, Tensor]:
    """All that windows hold, by the window's number, and for images by argument too."""
    numbered = list(enumerate(windows))
    images = {f"{i} {name}": tensor for i, window in numbered for name, tensor in window.images.items()}
    return images | {f"{i}": window.tokens for i, window in numbered}


def from_tensors(named: Mapping[str, Tensor]) -> list[Window]:
    """The windows of `as_tensors`."""
    images: dict[str, dict[str, Tensor]] = {name: {} for name in named if " " not in name}
    for name, tensor in named.items():
        number, _, argument = name.partition(" ")
        if argument:
            images[number][argument] = tensor
    return [Window(named[number], images[number]) for number in sorted(images, key=int)]


def token_count(windows: Iterable[Window]) -> int:
    return sum(window.tokens.numel() for window in windows)


def gradient_tokens(calibration: int) -> int:
    """How many tokens are followed backwards by default, of so many that a model is calibrated on: those of a quarter,
    or MOST_TOKENS, take little of the time of all."""
    return min(max(calibration // 4, FEWEST_TOKENS), MOST_TOKENS)


def first_tokens(windows: Sequence[Window], count: int) -> Sequence[Window]:
    """The first windows, at least one, as long as they hold no more than `count` tokens."""
    kept = 1
    while kept < len(windows) and token_count(windows[: kept + 1]) <= count:
        kept += 1
    return windows[:kept]


def arguments(model: PreTrainedModel, window: Window) -> dict[str, Any]:
    """What a model without its LM head is called with for a window: floats are of the model's dtype."""
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in window.images.items()}
    return {"input_ids": window.tokens, "use_cache": False, **given}


def image_token(model: PreTrainedModel) -> int:
    """The id that stands for a piece of an image; -1, which is no token's, for a model that sees none."""
    found = getattr(model.config, "image_token_id", None)
    return -1 if found is None else found
