"""Layers whose weights vLLM reloads while they are in use, over simulated tensor-parallel ranks, without an engine."""

import pytest
import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from bpdq_kernels.layout import Stored
from ranks import config, finish, load, stored, weight

LAST = {16: "", 8: r", m\.up_proj\.s"}  # of a layer's tensors


def test_weights_in_use_are_loaded_over_by_a_reload_only(rank, width):
    """Kernels and graphs have their order and their place in memory."""
    layer = ColumnParallelLinear(128, 64, bias=False, quant_config=config(width=width), prefix="m.up_proj")
    tensors, W = stored(64, 128, 64, width=width)
    load(layer, tensors)
    finish(layer)
    for tensor in tensors._fields[: 2 if width == 16 else 3]:
        param = getattr(layer, tensor)
        with pytest.raises(ValueError, match=r"m\.up_proj: its weights are in use: .* reload_weights"):
            param.weight_loader(param, getattr(tensors, tensor))
    assert torch.equal(weight(layer), W)


def test_layerwise_reload_replaces_the_weights_in_place(rank, width):
    """vLLM's `reload_weights`, and waking from sleep level 2."""
    layer = MergedColumnParallelLinear(
        128, [64, 64], bias=False, quant_config=config(width=width), prefix="m.gate_up_proj"
    )
    record_metadata_for_reloading(layer)
    for seed in 1, 2, 3:
        parts = stored(64, 128, 64, seed=seed, width=width), stored(64, 128, 64, seed=10 * seed, width=width)
        if seed > 1:
            initialize_layerwise_reload(layer)
        for i, (tensors, _) in enumerate(parts):
            load(layer, tensors, i)
        if seed == 1:
            finish(layer)
            addresses = [tensor.data_ptr() for tensor in layer.parameters()]
        else:
            finalize_layerwise_reload(layer, None)
        assert torch.equal(weight(layer), torch.cat([W for _, W in parts]))
        assert addresses == [tensor.data_ptr() for tensor in layer.parameters()]


def test_a_rank_inside_a_group_is_reloaded_once_all_has_arrived(rank, width):
    """vLLM counts elements, of which this rank has other numbers than the checkpoint."""
    rank(1, 2)
    layer = RowParallelLinear(320, 64, bias=False, quant_config=config(2, 128, width), prefix="m.down_proj")
    record_metadata_for_reloading(layer)
    load(layer, stored(64, 320, 128, width=width)[0])
    finish(layer)
    tensors, W = stored(64, 320, 128, seed=1, width=width)
    initialize_layerwise_reload(layer)
    load(layer, tensors._replace(B=None))
    assert get_layerwise_info(layer).can_load(), "B has not arrived"
    load(layer, Stored(tensors.B, None))
    assert not get_layerwise_info(layer).can_load()
    finalize_layerwise_reload(layer, None)
    assert torch.equal(weight(layer), W[:, 160:])


def test_a_reload_that_lacks_a_tensor_is_refused(rank, width):
    """Also after loads that lacked nothing: what arrived then says nothing about now."""
    layer = MergedColumnParallelLinear(
        128, [64, 64], bias=False, quant_config=config(width=width), prefix="m.gate_up_proj"
    )
    record_metadata_for_reloading(layer)
    tensors, _ = stored(64, 128, 64, width=width)
    for i in 0, 1:
        load(layer, tensors, i)
    finish(layer)
    for parts in (0, 1), (0,):
        initialize_layerwise_reload(layer)
        for i in parts:
            load(layer, tensors, i)
        if len(parts) == 2:
            finalize_layerwise_reload(layer, None)
    with pytest.raises(ValueError, match=rf"m\.up_proj\.B, m\.up_proj\.c{LAST[width]} not in the checkpoint"):
        finalize_layerwise_reload(layer, None)


def reloadable(width: int = 16, dtype: torch.dtype = torch.bfloat16) -> MergedColumnParallelLinear:
    """A layer of a gate and another projection with weights in use, which vLLM is about to reload."""
    layer = MergedColumnParallelLinear(
        128, [64, 64], bias=False, quant_config=config(width=width), prefix="m.gate_up_proj", return_bias=False
    )
    record_metadata_for_reloading(layer)
    for i in 0, 1:
        load(layer, stored(64, 128, 64, dtype=dtype, width=width)[0], i)
    finish(layer)
    return layer


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors._replace(B=None), r"m\.up_proj\.B not in the checkpoint"),
        (lambda tensors: tensors._replace(c=tensors.c * torch.nan), r"m\.gate_up_proj\.c holds NaN"),
        (lambda tensors: tensors._replace(c=tensors.c.bfloat16()), r"m\.up_proj\.c is torch\.bfloat16, but vLLM fuses"),
    ],
    ids=["missing", "NaN", "another dtype"],
)
def test_after_a_refused_reload_a_layer_answers_no_more(rank, damage, message):
    """What has arrived is in another order than the kernels read, past its end."""
    layer = reloadable(dtype=torch.float16)
    x = torch.randn(3, 128)
    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}  # as vLLM compiles
    compiled = torch.compile(layer, backend="eager", fullgraph=True, options=unguarded)
    with torch.inference_mode():
        compiled(x)
    initialize_layerwise_reload(layer)
    with pytest.raises(RuntimeError, match="a layer's weights are not loaded, as after a reload that was refused"):
        layer(x)  # as where the reload ends before this layer
    tensors, _ = stored(64, 128, 64, dtype=torch.float16)

    def reload() -> None:
        load(layer, tensors, 0)
        load(layer, damage(tensors), 1)
        finalize_layerwise_reload(layer, None)

    with pytest.raises(ValueError, match=message):
        reload()
    for run in layer, compiled:
        with torch.inference_mode(), pytest.raises(RuntimeError, match="reload that was refused: start the server"):
            run(x)


@pytest.mark.parametrize(("old", "new"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_a_reload_that_would_round_coefficients_is_refused(rank, old, new):
    """vLLM copies them into the memory of those in use."""
    layer = reloadable(dtype=old)
    initialize_layerwise_reload(layer)
    tensors, _ = stored(64, 128, 64, dtype=new)
    load(layer, tensors, 0)
    message = rf"^m\.gate_up_proj\.c is {new}, which a reload would round to {old}, .*: start the server with"
    with pytest.raises(ValueError, match=message):
        load(layer, tensors, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_reload_over_dummy_weights_in_fp32_is_exact(rank, dtype):
    layer = MergedColumnParallelLinear(128, [64, 64], bias=False, quant_config=config(), prefix="m.gate_up_proj")
    record_metadata_for_reloading(layer)
    DummyModelLoader.load_weights(None, layer, None)
    finish(layer)
    initialize_layerwise_reload(layer)
    tensors, W = stored(64, 128, 64, dtype=dtype)
    for i in 0, 1:
        load(layer, tensors, i)
    finalize_layerwise_reload(layer, None)
    assert torch.equal(weight(layer), torch.cat([W, W]))
