"""Modules that hold their weights as bit-planes and coefficients, in place of a model's own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import bpdq_kernels
from bpdq_kernels.layout import Stored, has_trellis
from bpdq_kernels.reference import rows
from bpdq_kernels.skeleton import embedding_names, is_tied


class Packed(nn.Module):
    """Holds a layer as a checkpoint stores it, also where the model is turned into another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        stored = {id(tensor) for tensor in held(self)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in stored and moved.dtype != tensor.dtype else moved

        return super()._apply(move, recurse)


class BPDQLinear(Packed):
    """A Linear [N, K] held as a checkpoint stores it, with an optional bias [N]."""

    def __init__(self, stored: Stored, group_size: int, in_features: int, bias: Tensor | None) -> None:
        super().__init__()
        self.group_size, self.in_features, self.out_features = group_size, in_features, stored.B.shape[2]
        hold(self, stored)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return bpdq_kernels.stored_linear(x, self.B, self.c, self.group_size, self.bias, self.s)

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] that is held, in fp32: code of some models reads it (nanochat, GPT-BigCode)."""
        return bpdq_kernels.dequantize(self.B, self.c, self.group_size, self.in_features, self.s)

    def extra_repr(self) -> str:
        code = ", trellis" if has_trellis(self.B, self.c) else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.B.shape[1]}{code}, "
            f"group_size={self.group_size}"
        )


class BPDQEmbedding(Packed):
    """An embedding [N, K] of N tokens held as a BPDQLinear is; rows come in `dtype`, times `scale` (Gemma)."""

    def __init__(self, stored: Stored, group_size: int, in_features: int, dtype: torch.dtype, scale: float) -> None:
        super().__init__()
        self.group_size, self.in_features, self.out_features = group_size, in_features, stored.B.shape[2]
        hold(self, stored)
        self.embed_scale = scale
        self.register_buffer("scale", torch.tensor(scale, dtype=dtype), persistent=False)  # follows model.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows `ids` (any shape): [*ids.shape, K]."""
        B, c, s = held(self).outputs(ids.flatten())
        return rows(B, c, self.group_size, self.in_features, self.scale.dtype, ids, s) * self.scale

    extra_repr = BPDQLinear.extra_repr


class TiedHead(nn.Module):
    """The LM head of a BPDQEmbedding. It holds no planes itself: buffers, unlike parameters, do not stay shared when a
    model is moved, and transformers ties parameters only."""

    def __init__(self, embedding: BPDQEmbedding, bias: Tensor | None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # not a submodule
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., N] of x [..., K], in x.dtype."""
        B, c, s = held(self.embedding)
        return bpdq_kernels.stored_linear(x, B, c, self.embedding.group_size, self.bias, s)


def hold(module: nn.Module, stored: Stored) -> None:
    """Give a module the buffers B, c and s."""
    for name, tensor in stored._asdict().items():
        module.register_buffer(name, tensor)


def held(module: nn.Module) -> Stored:
    """What `hold` gave."""
    return Stored(module.B, module.c, module.s)


def replace_linear(parent: nn.Module, name: str, stored: Stored, group_size: int) -> None:
    """Put a BPDQLinear where `parent` has the Linear, or BPDQLinear, `name`, with the same bias."""
    linear = parent.get_submodule(name)
    parent.set_submodule(name, BPDQLinear(stored, group_size, linear.in_features, linear.bias))


def looks_up_rows(embedding: nn.Module) -> bool:
    """Whether an input embedding looks up rows, perhaps times a constant, and does nothing else."""
    return type(embedding).forward is nn.Embedding.forward or hasattr(embedding, "scalar_embed_scale")


def replace(model: PreTrainedModel, name: str, stored: Stored, group_size: int) -> None:
    """Put bit-planes where the model has the Linear or embedding `name`; an LM head that is tied to it goes with it."""
    embedding, head = embedding_names(model)
    if name != embedding:
        replace_linear(model, name, stored, group_size)
        return
    module = model.get_submodule(name)
    scale = getattr(module, "scalar_embed_scale", 1.0)
    table = BPDQEmbedding(stored, group_size, module.weight.shape[1], module.weight.dtype, scale)
    if is_tied(model):
        model.set_submodule(head, TiedHead(table, model.get_submodule(head).bias))
        model._tied_weights_keys, model.all_tied_weights_keys = {}, {}  # no two tensors are left to tie
    model.set_submodule(name, table)
