"""Checkpoints that don't fit: one sentence that names the layer, the tensor and the remedy, before anything runs."""

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ranks import config, finish, load, stored

QKV = {"q": 128, "k": 64, "v": 64}
LAYER = "model.layers.0.self_attn.qkv_proj"
TENSORS = [("B", 16), ("c", 16), ("B", 8), ("c", 8), ("s", 8)]  # and the width of coefficients


@pytest.fixture
def qkv(rank):
    return QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=config(), prefix=LAYER)


@pytest.mark.parametrize("shard", QKV)
@pytest.mark.parametrize(("tensor", "width"), TENSORS)
def test_a_missing_tensor_of_a_fused_layer_is_named(rank, shard, tensor, width):
    """Any bits are a legal B, and any bytes a legal c in 8 bits, so uninitialised memory would serve noise."""
    layer = QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=config(width=width), prefix=LAYER)
    for part, n in QKV.items():
        tensors, _ = stored(n, 128, 64, width=width)
        load(layer, tensors._replace(**{tensor: None}) if part == shard else tensors, part)
    name = rf"model\.layers\.0\.self_attn\.{shard}_proj\.{tensor}"
    with pytest.raises(ValueError, match=rf"^{name} not in the checkpoint.*download or quantize it again"):
        finish(layer)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear, ReplicatedLinear])
@pytest.mark.parametrize(("tensor", "width"), TENSORS)
def test_a_missing_tensor_of_a_plain_layer_is_named(rank, kind, tensor, width):
    layer = kind(128, 64, bias=False, quant_config=config(width=width), prefix="model.layers.0.mlp.down_proj")
    load(layer, stored(64, 128, 64, width=width)[0]._replace(**{tensor: None}))
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.mlp\.down_proj\.{tensor} not in the checkpoint"):
        finish(layer)


@pytest.mark.parametrize(("tensor", "width"), [("c", 16), ("s", 8)])
def test_a_layer_that_is_wholly_missing_is_named(rank, tensor, width):
    layer = QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=config(width=width), prefix=LAYER)
    with pytest.raises(ValueError, match=rf"^{LAYER}.{tensor} holds NaN .* was not in the checkpoint"):
        finish(layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("tensor", "width"), [("c", 16), ("s", 8)])
def test_coefficients_that_are_not_numbers_are_refused(rank, tensor, width, value):
    layer = ColumnParallelLinear(128, 64, bias=False, quant_config=config(width=width), prefix="m.up_proj")
    tensors, _ = stored(64, 128, 64, width=width)
    getattr(tensors, tensor).view(-1)[70] = value
    load(layer, tensors)
    with pytest.raises(
        ValueError, match=rf"^m\.up_proj\.{tensor} holds NaN or infinity.*download or quantize it again"
    ):
        finish(layer)


MISSHAPEN = {
    "fewer inputs": lambda t: t[:-1],
    "more inputs": lambda t: torch.cat([t, t]),
    "a few stray words": lambda t: torch.cat([t, t[:1]]),
    "fewer outputs": lambda t: t[..., :-1],
    "more outputs": lambda t: torch.cat([t, t], -1),
    "another number of planes": lambda t: t[..., 1:, :],
    "a missing dimension": lambda t: t[0],
    "another dtype": lambda t: t.int() if t.dtype != torch.int32 else t.float(),
    "a scalar": lambda t: t.flatten()[0],
}
EXPECTED = {"B": r"int32 \(4, 2, 64\)", "c": r".*\(2, 3, 64\)", "s": r"16-bit floats \(3, 64\)"}


@pytest.mark.parametrize(
    "kind", [ColumnParallelLinear, RowParallelLinear, ReplicatedLinear, MergedColumnParallelLinear]
)
@pytest.mark.parametrize(("tensor", "width"), TENSORS)
@pytest.mark.parametrize("damage", MISSHAPEN.values(), ids=MISSHAPEN)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_misshapen_tensor_is_named_with_both_shapes(rank, kind, tensor, width, damage, tp_size):
    rank(tp_size - 1, tp_size)
    merged = kind is MergedColumnParallelLinear
    prefix = "m.gate_up_proj" if merged else "m.down_proj"
    layer = kind(128, [64, 64] if merged else 64, bias=False, quant_config=config(width=width), prefix=prefix)
    bad = damage(getattr(stored(64, 128, 64, width=width)[0], tensor))
    param = getattr(layer, tensor)
    name = r"m\.up_proj" if merged else r"m\.down_proj"
    message = rf"^{name}\.{tensor} is .*, expected {EXPECTED[tensor]}: .*download or quantize"
    with pytest.raises(ValueError, match=message):
        param.weight_loader(param, bad, *([1] if merged else []))


@pytest.mark.parametrize(("declared", "found"), [(16, 8), (8, 16)])
def test_coefficients_of_another_width_than_the_config_says_are_refused(rank, declared, found):
    layer = ColumnParallelLinear(128, 64, bias=False, quant_config=config(width=declared), prefix="m.up_proj")
    with pytest.raises(ValueError, match=r"^m\.up_proj\.c is .*, expected (16-bit floats|int8) \(2, 3, 64\)"):
        load(layer, stored(64, 128, 64, width=found)[0])


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("shard", QKV)
def test_a_head_of_the_wrong_size_is_refused_on_every_rank(rank, tp_size, shard):
    rank(tp_size - 1, tp_size)
    layer = QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=config(), prefix=LAYER)
    (B, _, _), _ = stored(QKV[shard] + 32, 128, 64)
    with pytest.raises(
        ValueError, match=rf"{shard}_proj\.B is .* \(4, 2, {QKV[shard] + 32}\), expected .* {QKV[shard]}\)"
    ):
        layer.B.weight_loader(layer.B, B, shard)


def test_ranks_that_would_split_a_word_are_refused_with_the_numbers(rank):
    rank(0, 2)
    with pytest.raises(ValueError, match=r"^m\.down_proj: .* 176 of 352 inputs.* 32: use a smaller --tensor-parallel"):
        RowParallelLinear(352, 64, bias=False, quant_config=config(), prefix="m.down_proj")


def test_fused_layers_in_two_precisions_are_refused(qkv):
    load(qkv, stored(128, 128, 64, dtype=torch.float16)[0], "q")
    load(qkv, stored(64, 128, 64, dtype=torch.bfloat16)[0], "k")
    load(qkv, stored(64, 128, 64, dtype=torch.float16)[0], "v")
    with pytest.raises(ValueError, match=r"k_proj\.c is torch\.bfloat16, but vLLM fuses .* torch\.float16"):
        finish(qkv)


def test_fused_layers_whose_scales_differ_in_precision_are_loaded(rank):
    """Scales are held in fp32, and each is what it was."""
    layer = QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=config(width=8), prefix=LAYER)
    parts = [
        stored(n, 128, 64, dtype=dtype, width=8)
        for n, dtype in zip(QKV.values(), [torch.float16, torch.bfloat16, torch.float16], strict=True)
    ]
    for shard, (tensors, _) in zip(QKV, parts, strict=True):
        load(layer, tensors, shard)
    W = finish(layer).quant_method.apply(layer, torch.eye(128)).T
    assert torch.equal(W, torch.cat([W for _, W in parts]))
