"""The CPU kernels give the oracle's product on every instruction set."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpdq_kernels import cpu, dequantize, embedding, layout, linear, prepare
from bpdq_kernels.compiled import instruction_set
from bpdq_kernels.ops import embedding_anywhere, linear_anywhere
from cpu_kernels import ISAS, KERNELS, ROUNDING, using
from products import assert_product, random_layer, random_stored

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
STORED = [*DTYPES, torch.int8]

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler")


def strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The values of x [M, K] with other strides."""
    if how == "columns apart":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if how == "rows apart":
        return torch.cat([x, x + 1], dim=-1)[:, : x.shape[1]]
    return x.T.contiguous().T if how == "transposed" else x


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_products_are_the_oracles(isa, data):
    k, group = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(layout.GROUP_SIZES))
    n, in_features = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 700))
    trellis = data.draw(st.booleans())
    if trellis:
        k, in_features = min(k, 3), 32 * layout.cdiv(in_features, 32)
    tokens = data.draw(st.sampled_from([*range(1, 10), 17, 64, 100, 130]))
    x_dtype, c_dtype = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(STORED))
    seed = data.draw(st.integers(0, 9))
    B, c, s = random_stored(k, group, n, in_features, c_dtype, seed, trellis)
    torch.manual_seed(seed)
    x = torch.randn(tokens, in_features).to(x_dtype)
    x = strided(x, data.draw(st.sampled_from(["contiguous", "columns apart", "rows apart", "transposed"])))
    bias = torch.randn(n).to(x_dtype) if data.draw(st.booleans()) else None
    with using(isa, data.draw(st.sampled_from(KERNELS))):
        prepared = prepare(B, c, group, in_features, s=s)
        y = linear(x, prepared, bias)
        in_python = linear_anywhere(x, *prepared[:4], n, group, bias)
    assert torch.equal(y, in_python)
    rounded = isa in ROUNDING and x_dtype != torch.float32
    assert_product(y, x, dequantize(B, c, group, in_features, s), bias, rounded)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_are_rounded_to_nearest_even(isa, dtype):
    """Ties, subnormal numbers, overflow and what is no number: a bias that stands alone."""
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    outputs = torch.cat([exact, (exact + exact.roll(-1)) / 2, exact * (1 + 2**-20)])
    B, c = random_layer(1, 32, len(outputs), 32)
    with using(isa):
        y = linear(torch.zeros(1, 32, dtype=dtype), prepare(B, c, 32, 32), outputs)
    assert torch.equal(y[0].nan_to_num(7), outputs.to(dtype).nan_to_num(7))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trellis", [False, True])
def test_threads_change_no_bit(isa, kernel, dtype, trellis):
    B, c = random_layer(2, 128, 1000, 480, trellis=trellis)
    x = torch.randn(5, 480).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with using(isa, kernel):
            results.append(linear(x, prepare(B, c, 128, 480)))
    torch.set_num_threads(1)
    assert all(torch.equal(y, results[0]) for y in results[1:])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trellis", [False, True])
def test_tokens_change_no_bit_of_each_other(isa, kernel, dtype, trellis):
    """In a batch a token gets what it gets alone."""
    B, c = random_layer(2, 64, 100, 480, trellis=trellis)
    x = torch.randn(131, 480, generator=torch.Generator().manual_seed(0)).to(dtype)
    with using(isa, kernel):
        prepared = prepare(B, c, 64, 480)
        alone = torch.cat([linear(token, prepared) for token in x.split(1)])
        for tokens in (2, 3, 8, 9, 17, 64, 131):
            assert torch.equal(linear(x[:tokens], prepared), alone[:tokens])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
def test_bits_past_the_last_input_are_ignored(isa, kernel):
    B, c = random_layer(3, 64, 20, 70)
    zeroed = B.clone()
    zeroed[-1] &= (1 << 70 % 32) - 1
    x = torch.randn(3, 70)
    with using(isa, kernel):
        assert torch.equal(linear(x, prepare(B, c, 64, 70)), linear(x, prepare(zeroed, c, 64, 70)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("planes", "dtype", "trellis"),
    [
        (2, torch.bfloat16, False),
        *((k, torch.int8, trellis) for k in (1, 2, 3, 4) for trellis in (False, True)[: 5 - k]),
    ],
)
def test_identity_gives_the_exact_weights(isa, kernel, planes, dtype, trellis):
    """More tokens than a block of either kernel, more outputs than a block of tiles."""
    B, c, s = random_stored(planes, 32, 2100, 160, dtype, trellis=trellis)
    with using(isa, kernel):
        W = linear(torch.eye(160), prepare(B, c, 32, 160, s=s)).T
    torch.testing.assert_close(W, dequantize(B, c, 32, 160, s), rtol=0, atol=0 if kernel == "multiply" else 2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", layout.GROUP_SIZES)
@pytest.mark.parametrize("size", [1e-30, 1, 1e30])
@pytest.mark.parametrize("trellis", [False, True])
def test_inputs_of_any_size_that_bf16_holds_to_the_last_bit(isa, group, size, trellis):
    """Those of 8 bits whose largest is less than 32 times the smallest need no rounding."""
    B, c = random_layer(2, group, 64, 480, trellis=trellis)
    generator = torch.Generator().manual_seed(0)
    x = size * torch.rand(3, 480, generator=generator).add(0.04) * torch.randn(3, 480, generator=generator).sign()
    x = x.bfloat16()
    with using(isa):
        y = linear(x, prepare(B, c, group, 480))
    assert_product(y, x, dequantize(B, c, group, 480))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trellis", [False, True])
def test_infinite_and_nan_activations_stay_in_their_token(dtype, trellis):
    B, c = random_layer(2, 64, 40, 128, trellis=trellis)
    x = torch.randn(4, 128).to(dtype)
    x[1, 5], x[2, 100] = float("nan"), float("inf")
    for kernel in KERNELS:
        with using(instruction_set(), kernel):
            y = linear(x, prepare(B, c, 64, 128))
        assert torch.isfinite(y[[0, 3]]).all()
        assert not torch.isfinite(y[1]).any()
        assert not torch.isfinite(y[2]).any()


@pytest.mark.parametrize(("n", "in_features"), [(24, 40), (16, 576), (1000, 29568 // 16)])
@pytest.mark.parametrize("group", layout.GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("trellis", [False, True])
def test_packed_layers_are_the_size_of_stored_ones(n, in_features, group, dtype, trellis):
    """But for scales, which are few, and wider in memory."""
    in_features = 32 * layout.cdiv(in_features, 32) if trellis else in_features
    B, c, s = random_stored(2, group, n, in_features, dtype, trellis=trellis)
    prepared = prepare(B, c, group, in_features, s=s)
    rows = -(-n // 32) * 32 / n  # outputs come in tiles of 32
    assert prepared.planes.nbytes == B.nbytes * rows
    assert prepared.coefficients.nbytes == c.nbytes * rows
    assert prepared.coefficients.dtype == c.dtype
    assert s is None or prepared.scales.nbytes == 2 * s.nbytes * rows


@pytest.mark.parametrize(
    ("k", "group", "n", "in_features", "trellis"),
    [
        (1, 32, 17, 33, False),
        (2, 128, 40, 300, False),
        (4, 256, 64, 500, False),
        (1, 32, 17, 64, True),
        (2, 128, 40, 288, True),
        (3, 256, 64, 512, True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("isa", [*ISAS, None])
def test_rows_can_be_read_back_as_stored(k, group, n, in_features, trellis, dtype, isa):
    """For embeddings, which pick rows; also where there is no compiler."""
    stored = random_stored(k, group, n, in_features, dtype, trellis=trellis)
    ids = torch.randint(0, n, (3, 3))
    with using(isa) if isa else mock.patch.object(cpu, "library", return_value=None):
        B, c, s = cpu.stored_rows(
            *cpu.prepare(stored.B, stored.c, group, stored.s, cpu.pages().tensor), group, ids.flatten()
        )
        prepared = prepare(stored.B, stored.c, group, in_features, s=stored.s)
        in_python = embedding_anywhere(ids, *prepared, torch.float32)
        found = embedding(ids, prepared, torch.float32) if isa else in_python
    rows = stored.outputs(ids.flatten())
    assert torch.equal(B, rows.B)
    assert torch.equal(c, rows.c)
    assert c.dtype == dtype
    assert (s is None and rows.s is None) or torch.equal(s.float(), rows.s.float())
    W = dequantize(stored.B, stored.c, group, in_features, stored.s)
    assert torch.equal(in_python, W[ids])
    assert torch.equal(found, W[ids])


@pytest.mark.parametrize("trellis", [False, True])
def test_without_a_compiler_coefficients_in_8_bits_are_multiplied_all_the_same(trellis):
    B, c, s = random_stored(3, 64, 40, 224, torch.int8, trellis=trellis)
    x = torch.randn(5, 224)
    with mock.patch.object(cpu, "library", return_value=None):
        y = linear_anywhere(x, *prepare(B, c, 64, 224, s=s)[:4], 40, 64, None)
    assert_product(y, x, dequantize(B, c, 64, 224, s))


@pytest.mark.skipif(cpu.op_library() is None, reason="torch's stable interface for C++ is too old")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", [torch.tensor(3), torch.zeros(0, dtype=torch.int64), torch.tensor([[1, 39]]).int()])
def test_rows_of_an_embedding_in_any_shape_and_dtype(ids, dtype):
    B, c, s = random_stored(2, 64, 40, 224, torch.int8)
    found = embedding(ids, prepare(B, c, 64, 224, s=s), dtype)
    assert torch.equal(found, dequantize(B, c, 64, 224, s)[ids.long()].to(dtype))


@pytest.mark.skipif(cpu.op_library() is None, reason="torch's stable interface for C++ is too old")
@pytest.mark.parametrize("token", [-1, 40, 64])
def test_a_token_that_is_none_is_refused(token):
    """40 rows are padded to 64."""
    B, c, s = random_stored(2, 64, 40, 224, torch.int8)
    prepared = prepare(B, c, 64, 224, s=s)
    with pytest.raises(RuntimeError, match=f"token id {token} of 40"):
        embedding(torch.tensor([1, token]), prepared, torch.float32)
    with pytest.raises(RuntimeError, match=r"token ids from .* of 40"):
        embedding_anywhere(torch.tensor([1, token]), *prepared, torch.float32)


@pytest.mark.skipif(cpu.op_library() is None, reason="torch's stable interface for C++ is too old")
@pytest.mark.parametrize(
    ("x", "group", "bias", "words"),
    [
        (torch.ones(1, 96, dtype=torch.int8), 32, None, "fp32, fp16 or bf16 was expected"),
        (torch.ones(1, 96), 32, torch.ones(8), "a bias of 8 numbers for 40 outputs"),
        (torch.ones(1, 64), 32, None, "3 words and 3 groups of 64 outputs are no matrix of 64 inputs"),
        (torch.ones(1, 96), 64, None, "3 words and 3 groups of 64 outputs are no matrix of 96 inputs"),
    ],
)
def test_an_op_reads_and_writes_nothing_past_its_tensors(x, group, bias, words):
    B, c, s = random_stored(2, 32, 40, 96, torch.int8)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.bpdq.linear(x, *prepare(B, c, 32, 96, s=s)[:4], 40, group, bias)


@pytest.mark.parametrize("shape", [(0, 96), (96,), (2, 0, 96), (2, 3, 96)])
def test_inputs_of_any_shape(shape):
    B, c, s = random_stored(2, 32, 40, 96, torch.int8)
    x, bias = torch.randn(shape).bfloat16(), torch.randn(40).bfloat16()
    y = linear(x, prepare(B, c, 32, 96, s=s), bias)
    assert (y.shape, y.dtype) == ((*shape[:-1], 40), torch.bfloat16)
    if y.numel():
        assert_product(y.view(-1, 40), x.reshape(-1, 96), dequantize(B, c, 32, 96, s), bias, rounded=True)
