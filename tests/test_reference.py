"""The oracle against plain loops, and the contract of `prepare`, `linear` and the op behind them."""

import subprocess
import sys

import pytest
import torch

import bpdq_kernels
from bpdq_kernels.compiled import instruction_set
from cpu_kernels import ROUNDING
from products import assert_product, random_layer, random_stored

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weights_in_plain_python(B: torch.Tensor, c: torch.Tensor, group: int, in_features: int) -> torch.Tensor:
    words, coefficients = B.tolist(), c.double().tolist()
    k, n = B.shape[1:]
    W = torch.zeros(n, in_features, dtype=torch.float64)
    for out in range(n):
        for i in range(in_features):
            W[out, i] = coefficients[i // group][k][out]
            for p in range(k):
                if words[i // 32][p][out] >> (i % 32) & 1:
                    W[out, i] += coefficients[i // group][p][out]
    return W


@pytest.mark.parametrize(
    ("k", "group", "n", "in_features"),
    [(1, 32, 3, 40), (2, 64, 5, 96), (3, 128, 1, 200), (4, 256, 2, 300), (2, 256, 4, 31)],
)
def test_dequantized_weights_are_bias_plus_the_coefficients_of_set_bits(k: int, group: int, n: int, in_features: int):
    B, c = random_layer(k, group, n, in_features)
    W = bpdq_kernels.dequantize(B, c, group, in_features)
    assert W.dtype == torch.float32
    torch.testing.assert_close(W.double(), weights_in_plain_python(B, c, group, in_features), rtol=1e-6, atol=1e-6)


def test_weights_of_a_layer_larger_than_one_block_are_those_of_its_parts():
    B, c = random_layer(2, 64, 4096, 1000)
    W = bpdq_kernels.dequantize(B, c, 64, 1000)
    assert torch.equal(W[7:9], bpdq_kernels.dequantize(B[:, :, 7:9], c[:, :, 7:9], 64, 1000))
    assert torch.equal(W[:, 960:], bpdq_kernels.dequantize(B[30:], c[15:], 64, 40))


def test_words_that_the_authors_pad_change_nothing():
    B, c = random_layer(2, 256, 6, 352)
    padded = torch.nn.functional.pad(B, (0, 0, 0, 0, 0, -B.shape[0] % 8), value=-1)
    assert padded.shape[0] == 16
    assert torch.equal(bpdq_kernels.dequantize(padded, c, 256, 352), bpdq_kernels.dequantize(B, c, 256, 352))
    x = torch.randn(3, 352)
    prepared = bpdq_kernels.prepare(padded, c, 256, 352)
    assert prepared.planes.shape[:2] == B.shape[:2]
    assert torch.equal(bpdq_kernels.linear(x, prepared), bpdq_kernels.linear(x, bpdq_kernels.prepare(B, c, 256, 352)))


@pytest.mark.parametrize(
    ("words", "planes", "n", "groups", "rows"),
    [(2, 2, 8, 2, 3), (3, 2, 8, 1, 3), (3, 2, 8, 2, 2), (3, 2, 7, 2, 3), (3, 3, 8, 2, 3), (3, 2, 8, 3, 3)],
    ids=["few words", "few groups", "no bias row", "outputs differ", "planes differ", "many groups"],
)
def test_shapes_that_do_not_fit_together_are_refused(words: int, planes: int, n: int, groups: int, rows: int):
    B, c = torch.zeros(words, planes, n, dtype=torch.int32), torch.zeros(groups, rows, 8)
    message = r"don't describe 96 inputs at group size 64: expected int32 \(3, "
    with pytest.raises(ValueError, match=message):
        bpdq_kernels.dequantize(B, c, 64, 96)
    with pytest.raises(ValueError, match=message):
        bpdq_kernels.prepare(B, c, 64, 96)


def test_prepare_refuses_what_no_kernel_takes():
    B, c = random_layer(2, 64, 8, 96)
    with pytest.raises(ValueError, match=r"group_size 48 is not supported: use one of \(32, 64, 128, 256\)"):
        bpdq_kernels.prepare(B, c, 48, 96)
    with pytest.raises(ValueError, match=r"activations in torch.float64 are not supported: use float32, float16"):
        bpdq_kernels.prepare(B, c, 64, 96, dtype=torch.float64)
    for planes in (0, 5):
        with pytest.raises(ValueError, match=f"{planes} bit-planes: 1 to 4 are supported"):
            bpdq_kernels.prepare(*random_layer(planes, 32, 8, 96), 32, 96)
    with pytest.raises(ValueError, match=r"B torch.int64 \(3, 2, 8\) and c"):
        bpdq_kernels.prepare(B.long(), c, 64, 96)


def test_prepare_makes_slices_contiguous_and_keeps_the_stored_coefficients():
    B, c = random_layer(2, 64, 16, 96, torch.float16)
    prepared = bpdq_kernels.prepare(B[:, :, 4:12], c[:, :, 4:12], 64, 96, dtype=torch.bfloat16)
    assert prepared.planes.is_contiguous()
    assert prepared.coefficients.is_contiguous()
    assert prepared.coefficients.dtype == torch.float16
    assert prepared.group_size == 64
    x = torch.randn(2, 96)
    whole = bpdq_kernels.linear(x, bpdq_kernels.prepare(B, c, 64, 96))
    torch.testing.assert_close(bpdq_kernels.linear(x, prepared), whole[:, 4:12])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("k", "group", "in_features"), [(1, 256, 96), (2, 64, 200), (3, 128, 352), (4, 32, 33)])
def test_linear_is_that_of_a_layer_holding_the_dequantized_weights(
    k: int, group: int, in_features: int, bias: bool, dtype: torch.dtype
):
    B, c = random_layer(k, group, 24, in_features)
    x = torch.randn(2, 5, in_features).to(dtype)
    b = torch.randn(24).to(dtype) if bias else None
    y = bpdq_kernels.linear(x, bpdq_kernels.prepare(B, c, group, in_features, dtype=dtype), b)
    W = bpdq_kernels.dequantize(B, c, group, in_features)
    assert_product(y, x, W, b, rounded=instruction_set() in ROUNDING and dtype != torch.float32)
    torch.testing.assert_close(
        bpdq_kernels.stored_linear(x, B, c, group, b), torch.nn.functional.linear(x, W.to(dtype), b)
    )


@pytest.mark.parametrize("shape", [(96,), (0, 96), (1, 96), (2, 3, 4, 96)], ids=str)
def test_linear_takes_any_leading_dimensions(shape: tuple[int, ...]):
    prepared = bpdq_kernels.prepare(*random_layer(2, 64, 8, 96), 64, 96)
    x = torch.randn(shape)
    y = bpdq_kernels.linear(x, prepared)
    assert y.shape == (*shape[:-1], 8)
    torch.testing.assert_close(y.reshape(-1, 8), bpdq_kernels.linear(x.reshape(-1, 96), prepared))


@pytest.mark.parametrize("width", [64, 97, 128])
def test_activations_of_another_width_are_refused(width: int):
    prepared = bpdq_kernels.prepare(*random_layer(2, 64, 8, 96), 64, 96)
    with pytest.raises(ValueError, match=f"x has {width} inputs, but the layer was quantized with 96"):
        bpdq_kernels.linear(torch.randn(2, width), prepared)


@pytest.mark.parametrize("width", [64, 97, 300])
def test_activations_of_another_width_than_stored_tensors_have_are_refused(width: int):
    B, c = random_layer(2, 64, 8, 96)
    with pytest.raises(ValueError, match=f"don't describe {width} inputs at group size 64"):
        bpdq_kernels.stored_linear(torch.randn(2, width), B, c, 64)


@pytest.mark.parametrize("size", [(1,), (7,), (40,), (8, 1), ()], ids=str)
def test_a_bias_of_another_size_is_refused(size: tuple[int, ...]):
    B, c = random_layer(2, 64, 8, 96)
    x, bias = torch.randn(2, 96), torch.zeros(size)
    for multiply in (
        lambda: bpdq_kernels.linear(x, bpdq_kernels.prepare(B, c, 64, 96), bias),
        lambda: bpdq_kernels.stored_linear(x, B, c, 64, bias),
    ):
        with pytest.raises(ValueError, match=r"bias \(.*\) is not \(8,\), which the layer's outputs are"):
            multiply()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float64], ids=str)
def test_activations_that_no_kernel_multiplies_are_refused(dtype: torch.dtype):
    prepared = bpdq_kernels.prepare(*random_layer(2, 64, 8, 96), 64, 96)
    with pytest.raises(ValueError, match=f"x in {dtype} is not supported: use float32, float16 or bfloat16"):
        bpdq_kernels.linear(torch.ones(2, 96, dtype=dtype), prepared)


def test_inference_outside_no_grad_keeps_no_graph():
    prepared = bpdq_kernels.prepare(*random_layer(2, 64, 8, 96), 64, 96)
    x = torch.randn(2, 96, requires_grad=True)
    assert not bpdq_kernels.linear(x, prepared).requires_grad


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_op_is_registered_as_pytorch_asks(dtype: torch.dtype, bias: bool, stored: torch.dtype):
    B, c, s = random_stored(2, 64, 8, 96, stored)
    *tensors, _, n, group_size = bpdq_kernels.prepare(B, c, 64, 96, dtype, s=s)
    for shape in ((3, 96), (2, 3, 96)):
        x = torch.randn(shape).to(dtype)
        b = torch.randn(8).to(dtype) if bias else None
        results = torch.library.opcheck(torch.ops.bpdq.linear.default, (x, *tensors, n, group_size, b))
        assert set(results.values()) == {"SUCCESS"}
        results = torch.library.opcheck(torch.ops.bpdq.stored_linear.default, (x, B, c, group_size, b, s))
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
def test_embedding_gives_contiguous_rows_of_the_weight(shape: tuple[int, ...], stored: torch.dtype):
    B, c, s = random_stored(4, 64, 40, 96, stored)
    prepared = bpdq_kernels.prepare(B, c, 64, 96, s=s)
    ids = torch.randint(0, 40, shape)
    rows = bpdq_kernels.embedding(ids, prepared, torch.bfloat16)
    assert torch.equal(rows, bpdq_kernels.dequantize(B, c, 64, 96, s).bfloat16()[ids])
    assert rows.is_contiguous(), "vLLM's all-reduce takes no other"
    arguments = (ids, *prepared, torch.bfloat16)
    assert set(torch.library.opcheck(torch.ops.bpdq.embedding.default, arguments).values()) == {"SUCCESS"}


def test_compiled_models_keep_the_op_whole_and_serve_every_token_count_from_one_graph():
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    prepared = bpdq_kernels.prepare(*random_layer(2, 64, 8, 96), 64, 96)
    bias = torch.randn(8)

    @torch.compile(backend=backend, dynamic=True, fullgraph=True)
    def model(x: torch.Tensor) -> torch.Tensor:
        return bpdq_kernels.linear(x, prepared, bias).relu()

    for tokens in (5, 7, 9, 17, 512):  # none is a size of the layer, which dynamo would take for the same symbol
        x = torch.randn(tokens, 96)
        torch.testing.assert_close(model(x), bpdq_kernels.linear(x, prepared, bias).relu())
    assert len(graphs) == 1, "retraced for another token count"
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert calls.count("bpdq.linear") == 1
    assert not any("matmul" in call or "mm" in call for call in calls), "traced into the op"


def test_package_works_where_triton_is_not_installed():
    program = (
        "import sys; sys.modules['triton'] = None; import torch, bpdq_kernels; "
        "B, c = torch.full((1, 1, 4), -1, dtype=torch.int32), torch.ones(1, 2, 4); "
        "print(bpdq_kernels.linear(torch.ones(1, 32), bpdq_kernels.prepare(B, c, 32, 32)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[[64.0, 64.0, 64.0, 64.0]]", done.stderr
