"""Simulated tensor-parallel ranks: vLLM's layers loaded one rank at a time in one process."""

import torch
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.layers.linear import LinearBase

from bpdq_kernels import dequantize
from bpdq_kernels.format import Format, Scheme
from bpdq_kernels.layout import Stored
from tiny import narrowed, round_to_planes
from vllm_bpdq.config import BPDQConfig


def become(monkeypatch, tp_rank: int, tp_size: int) -> None:
    """Make vLLM's layers believe that this process is rank `tp_rank` of `tp_size`."""
    for module in vllm_linear, vllm_parameter:
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: tp_rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: tp_size)


def config(bits: int = 2, group_size: int = 64, width: int = 16) -> BPDQConfig:
    quant = BPDQConfig(Format(Scheme(bits, group_size, width)))
    quant.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return quant


def stored(
    n: int, k_in: int, group_size: int, bits: int = 2, dtype=torch.bfloat16, seed: int = 0, width: int = 16
) -> tuple[Stored, torch.Tensor]:
    """A random layer with coefficients in `dtype`, or in 8 bits with scales in it, and the weight [N, K] it is."""
    W = torch.randn(n, k_in, generator=torch.Generator().manual_seed(seed))
    layer = Stored(*round_to_planes(W, bits, group_size, dtype))
    if width == 8:
        c, s = narrowed(layer.c)
        layer = Stored(layer.B, c, s.to(dtype))
    return layer, dequantize(layer.B, layer.c, group_size, k_in, layer.s)


def load(layer: LinearBase, tensors: Stored, *shard) -> None:
    for name, tensor in tensors._asdict().items():
        if tensor is not None:
            param = getattr(layer, name)
            param.weight_loader(param, tensor, *shard)


def finish(layer: LinearBase) -> LinearBase:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def weight(layer: LinearBase) -> torch.Tensor:
    """The weight [N, K] of this rank, read off its outputs."""
    k_in = layer.quant_method.in_features
    return layer.quant_method.apply(layer, torch.eye(k_in, dtype=layer.params_dtype), None).T
