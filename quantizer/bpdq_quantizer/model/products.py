"""16-bit products on a CPU that has none: torch's own take ten times as long as fp32 there."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bpdq_kernels.compiled import instruction_set

TOKENS = 4096  # at a time in fp32


class FP32Products(TorchFunctionMode):
    """Within it, Linears in fp16 or bf16 multiply in fp32 and round their output once, as a 16-bit product does."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and args[0].dtype in (torch.float16, torch.bfloat16):
            return _linear(*args)
        return function(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    W, b = weight.float(), None if bias is None else bias.float()
    parts = [F.linear(part.float(), W, b).to(x.dtype) for part in x.reshape(-1, x.shape[-1]).split(TOKENS)]
    return torch.cat(parts).view(*x.shape[:-1], len(W))


def quick_products(device: torch.device) -> AbstractContextManager:
    """The context in which a model's forward pass on `device` is quickest."""
    slow = device.type == "cpu" and instruction_set() in ("avx2", "portable")
    return FP32Products() if slow else nullcontext()
