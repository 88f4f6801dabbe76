"""Linears as a CPU multiplies them fastest: where it has no 16-bit products torch's own take ten times as long as fp32,
and where it has, oneDNN's fp32 takes half the time of torch's (`algorithm.products`)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from bpdq_kernels.compiled import instruction_set
from bpdq_quantizer.algorithm.products import linear, quick

TOKENS = 4096  # at a time in fp32


class OneDNNProducts(TorchFunctionMode):
    """Within it, Linears in fp32 are oneDNN's, but for those of which a gradient is wanted."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and _is_for_onednn(*args):
            return linear(*args)
        return function(*args, **(kwargs or {}))


def _is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    graded = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return quick(x) and x.numel() > 0 and weight.dtype == x.dtype and weight.is_contiguous() and not graded


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


def quick_products(device: torch.device, dtype: torch.dtype | None = None) -> AbstractContextManager:
    """The context in which a forward pass on `device` is quickest, of a model in `dtype`, or in 16 bits if that isn't
    said: every call of torch within it takes a microsecond longer."""
    if device.type != "cpu":
        return nullcontext()
    if instruction_set() in ("avx2", "portable"):
        return FP32Products()
    return OneDNNProducts() if dtype == torch.float32 else nullcontext()
