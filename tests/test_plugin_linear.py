"""Loading BPDQ layers into vLLM's own layers, over simulated tensor-parallel ranks, without an engine."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.models.llama4 import Llama4ForCausalLM

import vllm_bpdq.linear
from bpdq_kernels.layout import Stored
from ranks import config, finish, load, stored, weight

QKV = {"q": 128, "k": 64, "v": 64}  # 4 query and 2 key/value heads of 32
ROW_SHAPES = [  # K, G, ranks, whether B is padded to 256 inputs as the authors do at G = 256
    (352, 128, 1, False),
    (320, 128, 2, False),
    (192, 128, 2, False),
    (256, 64, 4, False),
    (384, 256, 2, False),
    (384, 256, 2, True),
    (352, 256, 1, True),
    (448, 256, 2, True),
    (896, 256, 2, False),  # 3.5 groups, shares of 1.75: as Qwen2.5-72B's 29568 inputs, 115.5 groups, shares of 57.75
    (896, 256, 2, True),
]


def pad_to_256(tensors: Stored) -> Stored:
    return tensors._replace(B=torch.nn.functional.pad(tensors.B, (0, 0, 0, 0, 0, -tensors.B.shape[0] % 8)))


@pytest.mark.parametrize(("k_in", "group_size", "tp_size", "padded"), ROW_SHAPES)
def test_row_parallel_ranks_hold_their_slice_of_the_inputs(rank, width, k_in, group_size, tp_size, padded):
    tensors, W = stored(64, k_in, group_size, width=width)
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        layer = RowParallelLinear(k_in, 64, bias=False, quant_config=config(2, group_size, width), prefix="m.down_proj")
        load(layer, pad_to_256(tensors) if padded else tensors)
        share = k_in // tp_size
        assert torch.equal(weight(finish(layer)), W[:, tp_rank * share : (tp_rank + 1) * share])


def test_groups_are_refined_only_where_a_rank_starts_inside_one(rank, width):
    rank(1, 2)
    for k_in, group_size, expected in [(320, 128, 32), (384, 128, 64), (512, 128, 128), (29568, 256, 64)]:
        layer = RowParallelLinear(k_in, 64, bias=False, quant_config=config(2, group_size, width), prefix="m.down_proj")
        assert layer.quant_method.group_size == expected
    rank(0, 1)
    layer = RowParallelLinear(352, 64, bias=False, quant_config=config(2, 128, width), prefix="m.down_proj")
    assert layer.quant_method.group_size == 128


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_column_parallel_ranks_hold_their_slice_of_the_outputs(rank, width, tp_size, bits):
    tensors, W = stored(96, 352, 128, bits, width=width)  # 352 inputs: the last group is short
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        layer = ColumnParallelLinear(352, 96, bias=False, quant_config=config(bits, 128, width), prefix="m.up_proj")
        load(layer, tensors)
        assert torch.equal(weight(finish(layer)), W.chunk(tp_size)[tp_rank])


def test_latent_attention_gets_the_weight_that_it_absorbs(rank, width):
    tensors, W = stored(96, 128, 64, width=width)
    layer = ColumnParallelLinear(128, 96, bias=False, quant_config=config(2, 64, width), prefix="m.kv_b_proj")
    load(layer, tensors)
    assert torch.equal(get_and_maybe_dequant_weights(finish(layer), layer.params_dtype), W)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_qkv_with_fewer_key_heads_loads_each_head_on_the_right_rank(rank, width, tp_size):
    parts = {shard: stored(n, 128, 64, seed=i, width=width) for i, (shard, n) in enumerate(QKV.items())}
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        layer = QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=config(width=width), prefix="m.qkv_proj")
        for shard, (tensors, _) in parts.items():
            load(layer, tensors, shard)
        kv_rank = tp_rank * 2 // tp_size if tp_size > 2 else tp_rank  # at TP 4 two ranks share a key head
        expected = torch.cat(
            [
                parts["q"][1].chunk(tp_size)[tp_rank],
                parts["k"][1].chunk(min(tp_size, 2))[kv_rank],
                parts["v"][1].chunk(min(tp_size, 2))[kv_rank],
            ]
        )
        assert torch.equal(weight(finish(layer)), expected)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_rotated_pairs_of_llama_4_become_halves_of_heads(rank, width, tp_size):
    """As its model in vLLM has them, which reorders a `weight` alone."""
    from transformers import Llama4TextConfig

    parts = {shard: stored(n, 128, 64, seed=i, width=width) for i, (shard, n) in enumerate(QKV.items())}
    quant = config(width=width)
    quant.hf_config = Llama4TextConfig(num_attention_heads=4, num_key_value_heads=2)
    model = SimpleNamespace(config=quant.hf_config)
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        layer = QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=quant, prefix="m.qkv_proj")
        for shard, (tensors, _) in parts.items():
            load(layer, tensors, shard)
        expected = [
            Llama4ForCausalLM.permute_qk_weight_for_rotary(model, f"m.{shard}_proj.weight", W)[1].chunk(tp_size)[
                tp_rank
            ]
            for shard, (_, W) in parts.items()
        ]
        assert torch.equal(weight(finish(layer)), torch.cat(expected))


@pytest.mark.parametrize("tp_size", [1, 2])
def test_gate_and_up_load_into_their_halves_of_the_fused_layer(rank, width, tp_size):
    gate, up = stored(352, 128, 128, seed=1, width=width), stored(352, 128, 128, seed=2, width=width)
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        layer = MergedColumnParallelLinear(
            128, [352, 352], bias=False, quant_config=config(2, 128, width), prefix="m.gate_up_proj"
        )
        load(layer, gate[0], 0)
        load(layer, up[0], 1)
        expected = torch.cat([W.chunk(tp_size)[tp_rank] for W in (gate[1], up[1])])
        assert torch.equal(weight(finish(layer)), expected)


def test_layers_that_are_fused_in_the_checkpoint_load_whole(rank, width):
    tensors, W = stored(256, 128, 64, width=width)
    quant = config(width=width)
    quant.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    for tp_rank in range(2):
        rank(tp_rank, 2)
        layer = QKVParallelLinear(128, 32, 4, 2, bias=False, quant_config=quant, prefix="m.qkv_proj")
        load(layer, tensors)
        expected = torch.cat([part.chunk(2)[tp_rank] for part in W.split([128, 64, 64])])
        assert torch.equal(weight(finish(layer)), expected)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_replicated_layers_load_whole_on_every_rank(rank, width, tp_size):
    tensors, W = stored(48, 352, 256, width=width)
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        layer = ReplicatedLinear(352, 48, bias=False, quant_config=config(2, 256, width), prefix="m.proj")
        load(layer, pad_to_256(tensors))
        assert torch.equal(weight(finish(layer)), W)


def test_layers_with_tensor_parallelism_disabled_load_whole_on_every_rank(rank, width):
    tensors, W = stored(64, 352, 128, width=width)
    rank(1, 2)
    layer = ColumnParallelLinear(
        352, 64, bias=False, quant_config=config(2, 128, width), prefix="m.proj", disable_tp=True
    )
    load(layer, tensors)
    assert torch.equal(weight(finish(layer)), W)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c_dtype", [torch.float16, torch.bfloat16])
def test_coefficients_keep_the_precision_of_the_checkpoint(rank, width, model_dtype, c_dtype):
    tensors, W = stored(64, 128, 64, dtype=c_dtype, width=width)
    layer = ColumnParallelLinear(
        128, 64, bias=False, quant_config=config(width=width), prefix="m.up_proj", params_dtype=model_dtype
    )
    load(layer, tensors)
    finish(layer)
    assert layer.c.dtype == (c_dtype if width == 16 else torch.int8)
    assert torch.equal(weight(layer), W.to(model_dtype))


def test_bias_is_added_once_in_the_activations_dtype(rank, width):
    tensors, W = stored(64, 128, 64, width=width)
    layer = RowParallelLinear(
        128,
        64,
        bias=True,
        quant_config=config(width=width),
        prefix="m.o_proj",
        params_dtype=torch.bfloat16,
        return_bias=False,
    )
    load(layer, tensors)
    layer.bias.weight_loader(layer.bias, torch.arange(64.0))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    expected = torch.nn.functional.linear(x.float(), W, layer.bias.float())
    assert layer.bias[63] == 63
    y = finish(layer)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=1e-3)  # rounded once


def test_loaded_tensors_stay_parameters_of_the_layer(rank, width):
    layer = ColumnParallelLinear(128, 64, bias=False, quant_config=config(width=width), prefix="m.up_proj")
    load(layer, stored(64, 128, 64, width=width)[0])
    finish(layer)
    names = {"B", "c"} if width == 16 else {"B", "c", "s", "scales"}
    assert {name for name, _ in layer.named_parameters()} == names
    kept = sum(tensor.nbytes for tensor in layer.parameters())
    prepared = layer.quant_method.prepared(layer)
    assert kept == sum(tensor.nbytes for tensor in prepared if isinstance(tensor, torch.Tensor)), "no second copy"
    assert list(layer.buffers()) == []


def test_kernels_are_warmed_up_once_with_the_bias_of_the_layer(rank, width, monkeypatch):
    """On a GPU, a specialization that loading leaves out is compiled while the first request waits."""
    warmed = []
    monkeypatch.setattr(vllm_bpdq.linear, "warm_up", lambda prepared, bias: warmed.append((prepared, bias)))
    for bias in True, False:
        layer = ColumnParallelLinear(128, 64, bias=bias, quant_config=config(width=width), prefix="m.up_proj")
        load(layer, stored(64, 128, 64, width=width)[0])
        finish(finish(layer))
        ((prepared, warmed_bias),) = warmed
        assert prepared.planes.data_ptr() == layer.B.data_ptr()
        assert prepared[4:] == layer.quant_method.prepared(layer)[4:]
        assert warmed_bias is layer.bias
        warmed.clear()


def test_processing_a_loaded_layer_twice_changes_nothing(rank, width):
    tensors, W = stored(64, 384, 256, width=width)
    rank(1, 2)
    layer = RowParallelLinear(384, 64, bias=False, quant_config=config(2, 256, width), prefix="m.down_proj")
    load(layer, tensors)
    finish(finish(layer))
    assert torch.equal(weight(layer), W[:, 192:])


def test_dummy_weights_pass_the_checks_and_multiply(rank, width):
    model = torch.nn.Sequential(
        ColumnParallelLinear(
            128, 352, bias=False, quant_config=config(2, 128, width), prefix="m.up", return_bias=False
        ),
        RowParallelLinear(352, 64, bias=False, quant_config=config(2, 128, width), prefix="m.down", return_bias=False),
    )
    DummyModelLoader.load_weights(None, model, None)
    for layer in model:
        finish(layer)
    assert torch.isfinite(model(torch.randn(3, 128))).all()


def test_offloaded_layers_go_back_to_host_memory(rank, width):
    """To which vLLM's `device_loading_context` takes back those marked parameters that are no longer marked."""
    layer = ColumnParallelLinear(128, 64, bias=False, quant_config=config(width=width), prefix="m.up_proj")
    load(layer, stored(64, 128, 64, width=width)[0])
    for param in layer.parameters():
        param._vllm_is_uva_offloaded = True
    finish(layer)
    assert not any(hasattr(param, "_vllm_is_uva_offloaded") for param in layer.parameters())


def test_compiled_layers_share_one_graph_for_every_number_of_tokens(rank, width):
    """A branch on the number of tokens outside the op would be frozen into vLLM's graph."""
    layer = ColumnParallelLinear(
        128, 64, bias=True, quant_config=config(width=width), prefix="m.up_proj", return_bias=False
    )
    load(layer, stored(64, 128, 64, width=width)[0])
    layer.bias.data.fill_(1.0)
    finish(layer)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: torch.relu(layer(x)), backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for tokens in 2, 3, 17, 300:
            x = torch.randn(tokens, 128)
            torch.testing.assert_close(compiled(x), torch.relu(layer(x)))
    assert len(graphs) == 1
    ops = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert ops.count(torch.ops.bpdq.linear) == 1
    assert len(ops) == 2  # and the relu
