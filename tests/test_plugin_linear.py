"""Loading BPDQ layers into vLLM's own layers, over simulated tensor-parallel ranks, without an engine."""

import functools
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.models.llama4 import Llama4ForCausalLM

import vllm_bpdq.linear
from bpdq_kernels.layout import Stored
from ranks import become, config, finish, load, stored

QKV = {"q": 128, "k": 64, "v": 64}  # 4 query and 2 key/value heads of 32
LAST = {16: "", 8: r", m\.up_proj\.s"}  # of a layer's tensors
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


@pytest.fixture
def rank(monkeypatch):
    become(monkeypatch, 0, 1)
    return functools.partial(become, monkeypatch)


@pytest.fixture(params=[16, 8])
def width(request):
    """Of coefficients."""
    return request.param


def weight(layer: LinearBase) -> torch.Tensor:
    """The weight [N, K] of this rank, read off its outputs."""
    k_in = layer.quant_method.in_features
    return layer.quant_method.apply(layer, torch.eye(k_in, dtype=layer.params_dtype), None).T


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
