"""Checkpoints that don't fit: one sentence that names the layer, the tensor and the remedy, before anything runs."""

import functools

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ranks import become, config, finish, load, stored

QKV = {"q": 128, "k": 64, "v": 64}
LAYER = "model.layers.0.self_attn.qkv_proj"


@pytest.fixture
def rank(monkeypatch):
    become(monkeypatch, 0, 1)
    return functools.partial(become, monkeypatch)


@pytest.fixture
def qkv(rank):
    return QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=config(), prefix=LAYER)


@pytest.mark.parametrize("shard", QKV)
@pytest.mark.parametrize("tensor", ["B", "c"])
def test_a_missing_tensor_of_a_fused_layer_is_named(qkv, shard, tensor):
    """Any bits are a legal B, so uninitialised memory would serve noise."""
    for part, n in QKV.items():
        B, c, _ = stored(n, 128, 64)
        if (part, tensor) != (shard, "B"):
            qkv.B.weight_loader(qkv.B, B, part)
        if (part, tensor) != (shard, "c"):
            qkv.c.weight_loader(qkv.c, c, part)
    name = rf"model\.layers\.0\.self_attn\.{shard}_proj\.{tensor}"
    with pytest.raises(ValueError, match=rf"^{name} not in the checkpoint.*download or quantize it again"):
        finish(qkv)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear, ReplicatedLinear])
@pytest.mark.parametrize("tensor", ["B", "c"])
def test_a_missing_tensor_of_a_plain_layer_is_named(rank, kind, tensor):
    layer = kind(128, 64, bias=False, quant_config=config(), prefix="model.layers.0.mlp.down_proj")
    B, c, _ = stored(64, 128, 64)
    present = {"B": c, "c": B}[tensor]
    param = {"B": layer.c, "c": layer.B}[tensor]
    param.weight_loader(param, present)
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.mlp\.down_proj\.{tensor} not in the checkpoint"):
        finish(layer)


def test_a_layer_that_is_wholly_missing_is_named(qkv):
    with pytest.raises(ValueError, match=rf"^{LAYER}.c holds NaN .* was not in the checkpoint"):
        finish(qkv)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_coefficients_that_are_not_numbers_are_refused(rank, value):
    layer = ColumnParallelLinear(128, 64, bias=False, quant_config=config(), prefix="m.up_proj")
    B, c, _ = stored(64, 128, 64)
    c[1, 2, 3] = value
    load(layer, B, c)
    with pytest.raises(ValueError, match=r"^m\.up_proj\.c holds NaN or infinity.*download or quantize it again"):
        finish(layer)


MISSHAPEN = {
    "fewer inputs": lambda B, c: (B[:-1], c[:-1]),
    "more inputs": lambda B, c: (torch.cat([B, B]), torch.cat([c, c])),
    "a few stray words": lambda B, c: (torch.cat([B, B[:1]]), c[:-1]),
    "fewer outputs": lambda B, c: (B[..., :-1], c[..., :-1]),
    "more outputs": lambda B, c: (torch.cat([B, B], 2), torch.cat([c, c], 2)),
    "another number of planes": lambda B, c: (B[:, :1], c[:, :2]),
    "a missing dimension": lambda B, c: (B[:, 0], c[:, 0]),
    "another dtype": lambda B, c: (B.float(), c.int()),
    "a scalar": lambda B, c: (B[0, 0, 0], c[0, 0, 0]),
}


@pytest.mark.parametrize(
    "kind", [ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, MergedColumnParallelLinear]
)
@pytest.mark.parametrize("tensor", ["B", "c"])
@pytest.mark.parametrize("damage", MISSHAPEN.values(), ids=MISSHAPEN)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_misshapen_tensor_is_named_with_both_shapes(rank, kind, tensor, damage, tp_size):
    rank(tp_size - 1, tp_size)
    merged = kind is MergedColumnParallelLinear
    prefix = "m.gate_up_proj" if merged else "m.down_proj"
    layer = kind(128, [64, 64] if merged else 64, bias=False, quant_config=config(), prefix=prefix)
    bad = dict(zip("Bc", damage(*stored(64, 128, 64)[:2]), strict=True))[tensor]
    param = getattr(layer, tensor)
    name = r"m\.up_proj" if merged else r"m\.down_proj"
    expected = r"\(4, 2, 64\)" if tensor == "B" else r"\(2, 3, 64\)"
    with pytest.raises(ValueError, match=rf"^{name}\.{tensor} is .*, expected .*{expected}: .*download or quantize"):
        param.weight_loader(param, bad, *([1] if merged else []))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("shard", QKV)
def test_a_head_of_the_wrong_size_is_refused_on_every_rank(rank, tp_size, shard):
    rank(tp_size - 1, tp_size)
    layer = QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=config(), prefix=LAYER)
    B, _, _ = stored(QKV[shard] + 32, 128, 64)
    with pytest.raises(
        ValueError, match=rf"{shard}_proj\.B is .* \(4, 2, {QKV[shard] + 32}\), expected .* {QKV[shard]}\)"
    ):
        layer.B.weight_loader(layer.B, B, shard)


def test_ranks_that_would_split_a_word_are_refused_with_the_numbers(rank):
    rank(0, 2)
    with pytest.raises(ValueError, match=r"^m\.down_proj: .* 176 of 352 inputs.* 32: use a smaller --tensor-parallel"):
        RowParallelLinear(352, 64, bias=False, quant_config=config(), prefix="m.down_proj")


def test_fused_layers_in_two_precisions_are_refused(qkv):
    load(qkv, *stored(128, 128, 64, dtype=torch.float16)[:2], "q")
    with pytest.raises(ValueError, match=r"k_proj\.c is torch\.bfloat16, but vLLM fuses .* torch\.float16"):
        load(qkv, *stored(64, 128, 64, dtype=torch.bfloat16)[:2], "k")
