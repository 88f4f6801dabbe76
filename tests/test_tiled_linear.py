"""The fast CUDA kernels, in three ways: interpreted from their source (inline assembly by its portable twins), as the
PTX that Triton emits for sm_86 executed on the CPU, and for real (-m gpu)."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bpdq_kernels
from benchmarks.sass import read_cubin
from bpdq_kernels import layout, reference, triton_dequantize, triton_embedding
from bpdq_kernels.dispatch import Dense, Gemm, Gemv
from bpdq_kernels.layout import cdiv, to_tiles
from bpdq_kernels.tiled_linear import aligned, in_words, machine, tiled_linear
from tests.offline import BF16, FP16, GEMM, GEMM_ONE_TILE, GEMV, Layer, compile_tiled, fits, name
from tests.ptx import launch


class Problem(NamedTuple):
    x: torch.Tensor
    B: torch.Tensor
    c: torch.Tensor
    bias: torch.Tensor | None
    s: torch.Tensor | None = None

    def tiles(self, layer: Layer) -> layout.Tiles:
        return to_tiles(self.B, self.c, layer.group, layer.dtype, self.s)

    def weight(self, layer: Layer) -> torch.Tensor:
        """[N, K] fp32, the oracle's."""
        return reference.dequantize(self.B, self.c, layer.group, layer.K, self.s)


def problem(layer: Layer, tokens: int, bias: bool, device: str = "cpu") -> Problem:
    """Random bits past K too; activations and coefficients of several magnitudes, as some layers have them. The scales
    of coefficients in 8 bits are powers of two apart, with which all is exact, and 0 for one output."""
    generator = torch.Generator().manual_seed(tokens + layer.planes)
    shape = layout.plane_shape(layer.K, layer.N, layer.planes)
    B = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    shape = layout.coefficient_shape(layer.K, layer.N, layer.planes, layer.group, layer.trellis)
    magnitudes, s = torch.logspace(-4, 1, layer.N), None
    if layer.coefficient_bits == 8:
        c = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        exponents = torch.randint(0, 8, shape[1:], generator=generator)
        s = ((magnitudes / 64).bfloat16() * 2.0**-exponents).to(device, torch.bfloat16)
        s[:, layer.N // 2] = 0
    else:
        c = (torch.randn(shape, generator=generator) * magnitudes).to(layer.dtype)
    x = torch.randn(tokens, layer.K, generator=generator) * torch.logspace(-2, 0.5, tokens).unsqueeze(1)
    b = torch.randn(layer.N, generator=generator).to(device, layer.dtype) if bias else None
    return Problem(x.to(device, layer.dtype), B.to(device), c.to(device), b, s)


def tolerance(layer: Layer, p: Problem, y: torch.Tensor, arch: int) -> torch.Tensor:
    """What each output may be off by: rounding of y, fp32 sums, and the rounding of x (one token, up to sm_90) or of
    the weights."""
    numbers = layout.coefficients(p.c, p.s).abs()
    ones = p.B.new_full((p.B.shape[0], layer.multiplied, layer.N), -1)
    magnitudes = reference.dequantize(ones, numbers, layer.group, layer.K).double()  # sum |c|
    x = p.x.double().abs()
    if len(x) == 1 and arch < 100:
        units = torch.nn.functional.pad(x[0], (0, -layer.K % 128)).view(-1, 128)
        largest = units.amax(1, keepdim=True).expand_as(units).flatten()[: layer.K]
        rounding = 2**-15 * largest @ magnitudes.T
    else:
        rounding = (layer.multiplied + 2) * torch.finfo(layer.dtype).eps / 2 * x @ magnitudes.T
    result = torch.finfo(y.dtype)
    own = result.eps * y.double().abs().clamp(min=result.tiny)
    return rounding + 2e-6 * x @ magnitudes.T + own + 1e-30


def compare(layer: Layer, p: Problem, y: torch.Tensor, arch: int = 86) -> None:
    expected = p.x.double() @ p.weight(layer).double().T
    if p.bias is not None:
        expected += p.bias.double()
    assert expected.to(layer.dtype).isfinite().all(), "a product that the dtype can't hold shows no error"
    excess = (y.double() - expected).abs() / tolerance(layer, p, y, arch)
    assert y.shape == expected.shape
    assert (excess <= 1).all(), f"{layer}: error {excess.max():.2f} of what rounding explains"


# --- interpreted ----------------------------------------------------------------------------------------------------

INTERPRETED = [
    (Layer(2, 128, 40, 256, BF16), 1),
    (Layer(2, 64, 70, 333, FP16), 1),
    (Layer(1, 32, 17, 100, BF16), 1),
    (Layer(3, 256, 33, 520, FP16), 1),
    (Layer(4, 128, 16, 384, BF16), 1),
    (Layer(2, 128, 40, 256, BF16), 3),
    (Layer(2, 256, 17, 136, FP16), 8),
    (Layer(1, 32, 40, 100, FP16), 11),
    (Layer(4, 64, 33, 72, BF16), 16),
    (Layer(3, 32, 20, 40, FP16), 19),
    (Layer(3, 64, 36, 136, BF16), 70),
    (Layer(2, 128, 40, 200, BF16, 8), 1),
    (Layer(3, 64, 33, 333, FP16, 8), 1),
    (Layer(1, 32, 17, 100, BF16, 8), 1),
    (Layer(4, 256, 33, 520, FP16, 8), 1),
    (Layer(2, 64, 70, 136, FP16, 8), 2),
    (Layer(2, 128, 17, 136, BF16, 8), 8),
    (Layer(1, 32, 40, 100, FP16, 8), 9),
    (Layer(4, 128, 33, 72, BF16, 8), 17),
    (Layer(3, 256, 20, 40, FP16, 8), 64),
    (Layer(2, 128, 36, 600, FP16, 8), 65),
    (Layer(2, 128, 40, 256, BF16, trellis=True), 1),
    (Layer(1, 32, 17, 96, FP16, trellis=True), 1),
    (Layer(3, 64, 33, 352, BF16, trellis=True), 1),
    (Layer(2, 128, 40, 352, BF16, trellis=True), 3),
    (Layer(1, 256, 33, 544, FP16, trellis=True), 12),
    (Layer(3, 64, 36, 160, BF16, trellis=True), 70),
    (Layer(2, 256, 33, 288, FP16, 8, trellis=True), 1),
    (Layer(1, 128, 40, 128, BF16, 8, trellis=True), 1),
    (Layer(3, 32, 17, 96, FP16, 8, trellis=True), 1),
    (Layer(2, 64, 33, 160, FP16, 8, trellis=True), 8),
    (Layer(3, 256, 20, 352, BF16, 8, trellis=True), 20),
]


def interpret(layer: Layer, tokens: int) -> None:
    p = problem(layer, tokens, bias=tokens % 2 == 1)
    y = tiled_linear(p.x, p.tiles(layer), layer.N, layer.group, p.bias)
    assert y.dtype == layer.dtype
    compare(layer, p, y)


def interpret_views() -> None:
    """Any view of x gives the same rows, and other leading dimensions their shape."""
    for inputs in (64, 128):  # part of a unit, and a whole one
        interpret_views_of(Layer(2, 64, 20, inputs, FP16))


def interpret_views_of(layer: Layer) -> None:
    p = problem(layer, 6, bias=True)
    tiles = p.tiles(layer)

    def linear(x: torch.Tensor) -> torch.Tensor:
        return tiled_linear(x, tiles, layer.N, layer.group, p.bias)

    y = linear(p.x)
    wide = torch.full((6, 3 * layer.K), float("nan"), dtype=FP16)
    wide[:, 1 : layer.K + 1] = p.x
    assert torch.equal(linear(wide[:, 1 : layer.K + 1]), y), "rows of a wider tensor, not aligned"
    assert torch.equal(linear(p.x.T.contiguous().T), y), "transposed"
    assert torch.equal(linear(p.x.view(2, 3, layer.K)).view(6, -1), y)
    assert linear(p.x[:0]).shape == (0, layer.N)
    assert torch.equal(linear(wide[3, 1 : layer.K + 1]), linear(p.x[3:4])[0]), "one token without batch dimension"


def interpret_one_token_without_binary_tensor_cores() -> None:
    some = (Layer(2, 64, 20, 100, FP16), Layer(4, 32, 33, 256, BF16))  # rows aligned to 16 bytes or not
    for layer in (*some, Layer(2, 128, 33, 224, BF16, 8, trellis=True)):
        p = problem(layer, 1, bias=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bpdq_kernels.tiled_linear.machine", lambda _: (1, 120))
            y = tiled_linear(p.x, p.tiles(layer), layer.N, layer.group, p.bias)
        compare(layer, p, y, arch=120)


def interpret_infinity() -> None:
    layer = Layer(2, 128, 16, 256, BF16)
    p = problem(layer, 1, bias=False)
    for bad in (float("inf"), float("-inf"), float("nan")):
        p.x[0, 130] = bad
        y = tiled_linear(p.x, p.tiles(layer), layer.N, layer.group, None)
        assert y.isnan().all(), f"{bad} in x became {y}"
    p.x[0] = 0
    assert not tiled_linear(p.x, p.tiles(layer), layer.N, layer.group, None).any()


def interpret_embedding() -> None:
    for layer in (
        Layer(4, 64, 40, 200, BF16),
        Layer(3, 256, 33, 640, FP16),
        Layer(1, 32, 17, 40, BF16),
        Layer(2, 64, 40, 200, BF16, 8),
        Layer(3, 32, 17, 72, FP16, 8),
        Layer(1, 64, 40, 224, BF16, trellis=True),
        Layer(2, 256, 33, 544, FP16, trellis=True),
        Layer(3, 128, 17, 160, FP16, 8, trellis=True),
    ):
        p = problem(layer, 1, bias=False)
        ids = torch.tensor([0, layer.N - 1, 7, 8, 7, -1, layer.N])
        y = torch.full((7, layer.K), float("nan"))
        triton_embedding.launch(ids, p.tiles(layer), layer.group, y)
        W = p.weight(layer)
        torch.testing.assert_close(y[:5], W[ids[:5]], rtol=2e-6, atol=1e-6 * W.abs().max().item())
        assert not y[5:].any(), "rows that the weight does not have"


def interpret_dense() -> None:
    for layer in (
        Layer(2, 128, 70, 256, BF16),
        Layer(3, 32, 33, 136, FP16),
        Layer(1, 64, 50, 100, FP16),
        Layer(2, 64, 50, 136, BF16, 8),
        Layer(4, 32, 33, 136, FP16, 8),
        Layer(2, 128, 33, 352, FP16, trellis=True),
        Layer(1, 32, 33, 96, BF16, 8, trellis=True),
        Layer(3, 64, 50, 160, FP16, 8, trellis=True),
    ):
        p = problem(layer, 5, bias=True)
        tiles = p.tiles(layer)
        y = torch.full((5, layer.N), float("nan"), dtype=layer.dtype)
        triton_dequantize.launch(p.x, tiles, layer.group, p.bias, y, Dense(32))
        compare(layer, p, y)
        if layer.dtype == FP16:  # to bf16 the interpreter truncates
            weight = torch.full((16, layer.K), float("nan"), dtype=FP16)
            triton_dequantize.dequantize(tiles, layer.group, 16, weight)
            W = p.weight(layer)[16:32]
            if layer.coefficient_bits == 8:  # products with scales are rounded to fp32 before
                torch.testing.assert_close(weight.float(), W, rtol=2.0**-11 * 1.1, atol=2.0**-24)
            else:
                assert torch.equal(weight, W.half()), "not rounded once"


def interpret_embedding_of_strided_ids() -> None:
    layer = Layer(2, 64, 40, 64, BF16)
    p = problem(layer, 1, bias=False)
    ids = torch.randint(0, layer.N, (5, 3), generator=torch.Generator().manual_seed(0))
    y = torch.full((5, layer.K), float("nan"))
    triton_embedding.launch(ids[:, 1], p.tiles(layer), layer.group, y)
    W = p.weight(layer)
    torch.testing.assert_close(y, W[ids[:, 1]], rtol=2e-6, atol=1e-6 * W.abs().max().item())


@pytest.mark.parametrize(("layer", "tokens"), INTERPRETED, ids=str)
def test_interpreted_kernels_agree_with_the_oracle(layer: Layer, tokens: int, interpreter: ProcessPoolExecutor):
    interpreter.submit(interpret, layer, tokens).result()


def test_interpreted_kernels_take_any_view_of_x(interpreter: ProcessPoolExecutor):
    interpreter.submit(interpret_views).result()


@given(start=st.integers(0, 9), step=st.integers(1, 3), K=st.integers(1, 40))
def test_one_token_is_copied_unless_words_can_read_it(start: int, step: int, K: int):
    x = torch.arange(256, dtype=BF16)[start::step][:K]
    found = in_words(x)
    assert torch.equal(found, x)
    assert found.is_contiguous()
    assert found.data_ptr() % 4 == 0
    assert (found.data_ptr() == x.data_ptr()) == (start % 2 == 0 and x.is_contiguous())


def test_one_token_on_an_architecture_without_binary_tensor_cores(interpreter: ProcessPoolExecutor):
    interpreter.submit(interpret_one_token_without_binary_tensor_cores).result()


def test_infinity_and_nan_are_passed_on_and_zeros_give_zeros(interpreter: ProcessPoolExecutor):
    interpreter.submit(interpret_infinity).result()


def test_embedding_rows_are_those_of_the_oracle(interpreter: ProcessPoolExecutor):
    interpreter.submit(interpret_embedding).result()


def test_weights_for_many_tokens_are_the_oracles(interpreter: ProcessPoolExecutor):
    interpreter.submit(interpret_dense).result()


def test_a_column_of_ids_looks_up_its_own_rows(interpreter: ProcessPoolExecutor):
    interpreter.submit(interpret_embedding_of_strided_ids).result()


# --- compiled for sm_86, executed on the CPU ------------------------------------------------------------------------


def emulate(config: Gemv | Gemm, layer: Layer, tokens: int, bias: bool) -> None:
    """Compile for sm_86, assert that no register is spilled, run the PTX on the CPU and compare: with an fp32 result,
    which shows more of an error."""
    kernel = compile_tiled(config, layer, bias, result=torch.float32)
    assert not read_cubin(kernel.asm["cubin"]).spills
    assert kernel.metadata.shared <= 99 * 1024
    p = problem(layer, tokens, bias)
    x = aligned(p.x) if isinstance(config, Gemm) else p.x
    tiles = p.tiles(layer)
    y = torch.full((tokens, layer.N), float("nan"))
    optional = [tensor for tensor in (tiles.ratio_pairs, p.bias) if tensor is not None]
    pointers = [x, tiles.planes, tiles.pairs, tiles.scales, *optional, y]
    if isinstance(config, Gemv):
        grid, sizes = (cdiv(layer.N, 16 * config.tiles),), [layer.N, layer.K]
    else:
        blocks = cdiv(layer.N, 16 * config.tiles * config.warps // config.split)
        grid, sizes = (cdiv(tokens, config.tokens), blocks), [tokens, layer.N, x.shape[1], x.stride(0)]
    report = launch(kernel.asm["ptx"], grid, 32 * config.warps, pointers + sizes, kernel.metadata.shared)
    assert not report.uninitialised
    assert not report.races
    assert not report.partial_warps
    compare(layer, p, y)


def combinations() -> Iterator[tuple[Gemv | Gemm, Layer, int, bool]]:
    """Every configuration that the dispatch can pick once; numbers of planes, group sizes and the rest take turns."""
    turns = itertools.cycle(
        [(BF16, 384, 72, True), (FP16, 333, 33, False), (BF16, 136, 100, False), (FP16, 256, 64, True)]
    )
    schemes = zip(itertools.cycle((4, 2, 3, 1)), itertools.cycle((32, 128, 64, 256, 128)), strict=False)
    for config, (dtype, K, N, bias) in zip(GEMV + GEMM, turns, strict=False):
        planes, group = next(scheme for scheme in schemes if fits(config, *scheme))
        tokens = 1 if isinstance(config, Gemv) else max(2, config.tokens - planes)
        yield config, Layer(planes, group, K=K, N=N, dtype=dtype), tokens, bias


IN_8_BITS = [
    (Gemv(4, 4), Layer(2, 128, 72, 384, BF16, 8), 1, True),
    (Gemv(1, 8), Layer(1, 32, 33, 333, FP16, 8), 1, False),
    (Gemv(2, 8), Layer(3, 256, 72, 136, FP16, 8), 1, True),
    (Gemm(8, 2, 8, 8), Layer(2, 64, 72, 384, FP16, 8), 5, True),
    (Gemm(16, 1, 8, 8), Layer(4, 128, 33, 136, BF16, 8), 12, False),
    (Gemm(64, 1, 4, 2), Layer(4, 32, 40, 136, BF16, 8), 61, True),
]
TRELLIS = [
    (Gemv(2, 8), Layer(2, 128, 72, 384, BF16, trellis=True), 1, True),
    (Gemv(1, 4), Layer(3, 64, 33, 352, FP16, 8, trellis=True), 1, False),
    (Gemv(2, 4), Layer(2, 64, 72, 160, BF16, 8, trellis=True), 1, True),
    (Gemv(4, 4), Layer(1, 256, 72, 160, BF16, trellis=True), 1, True),
    (Gemm(8, 2, 8, 8), Layer(2, 128, 72, 384, FP16, trellis=True), 5, True),
    (Gemm(8, 2, 16, 16), Layer(1, 64, 72, 160, BF16, trellis=True), 7, False),
    (Gemm(16, 1, 8, 8), Layer(3, 256, 33, 352, BF16, 8, trellis=True), 12, False),
    (Gemm(64, 2, 4, 4), Layer(1, 32, 33, 544, BF16, 8, trellis=True), 50, False),
    (Gemm(64, 2, 4, 2), Layer(2, 32, 40, 160, FP16, 8, trellis=True), 61, True),
]


@pytest.mark.parametrize(("config", "layer", "tokens", "bias"), [*combinations(), *IN_8_BITS, *TRELLIS], ids=name)
def test_ptx_for_rtx_3090_agrees_with_the_oracle_and_spills_no_register(
    config: Gemv | Gemm, layer: Layer, tokens: int, bias: bool
):
    emulate(config, layer, tokens, bias)


@pytest.mark.slow
@pytest.mark.parametrize("coefficient_bits", [16, 8])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(("planes", "coded"), [*((k, False) for k in (1, 2, 3, 4)), *((k, True) for k in (1, 2, 3))])
@pytest.mark.parametrize("config", GEMV + GEMM + GEMM_ONE_TILE, ids=name)
def test_ptx_of_every_group_size_and_dtype_agrees_with_the_oracle(
    config: Gemv | Gemm, planes: int, coded: bool, dtype: torch.dtype, coefficient_bits: int
):
    tokens = 1 if isinstance(config, Gemv) else max(2, config.tokens - planes)
    for group, K in itertools.product((32, 64, 128, 256), (160 if coded else 136, 512)):
        if fits(config, planes + coded, group, coefficient_bits, coded):
            emulate(config, Layer(planes, group, 72, K, dtype, coefficient_bits, coded), tokens, bias=True)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_activations_of_another_dtype_than_the_layer_was_prepared_for_are_refused(dtype: torch.dtype):
    p = problem(Layer(2, 64, 16, 64, FP16), 2, bias=False)
    with pytest.raises(
        ValueError, match=rf"prepared for torch.float16 activations, not {dtype}: pass dtype to prepare"
    ):
        tiled_linear(p.x.to(dtype), to_tiles(p.B, p.c, 64, FP16), 16, 64, None)


# --- for real -------------------------------------------------------------------------------------------------------


# on an H100 the first layer gets the largest tiles, the second the smallest
ON_A_GPU = [
    Layer(planes, group, 8448, 2048, dtype)
    for planes in (1, 2, 3, 4)
    for group in (32, 64, 128, 256)
    for dtype in (FP16, BF16)
] + [
    Layer(planes, group, 1000, 1100, (FP16, BF16)[(planes + i) % 2])
    for planes in (1, 2, 3, 4)
    for i, group in enumerate((32, 64, 128, 256))
]
ON_A_GPU += [Layer(k, group, 8448, 2048, dtype, 8) for k in (1, 2, 3, 4) for group, dtype in ((32, FP16), (128, BF16))]
ON_A_GPU += [Layer(k, (64, 256)[k % 2], 1000, 1100, (FP16, BF16)[k // 2 % 2], 8) for k in (1, 2, 3, 4)]
ON_A_GPU += [
    Layer(k, group, 8448, 2048, (FP16, BF16)[i % 2], (16, 8)[(k + i) % 2], trellis=True)
    for k in (1, 2, 3)
    for i, group in enumerate((32, 64, 128, 256))
]
ON_A_GPU += [Layer(k, (64, 256)[k % 2], 1000, 1120, (FP16, BF16)[k // 2 % 2], 8, trellis=True) for k in (1, 2, 3)]


@pytest.mark.gpu
@pytest.mark.parametrize("layer", ON_A_GPU, ids=str)
def test_kernels_on_a_gpu_agree_with_the_oracle(layer: Layer):
    """Every kernel with a bias for one of the layers: tokens of a bucket share it, so each compiles once."""
    p = problem(layer, 1024, bias=True, device="cuda")
    prepared = bpdq_kernels.prepare(p.B, p.c, layer.group, layer.K, layer.dtype, "cuda", p.s)
    _, arch = machine(p.x.device)
    for i, bucket in enumerate([(1,), (2, 8), (9, 16), (17, 32), (64, 65, 512, 1024)]):
        bias = p.bias if (i + layer.planes + layer.N // 8) % 2 else None
        for tokens in bucket:
            some = p._replace(x=p.x[-tokens:], bias=bias)
            compare(layer, some, bpdq_kernels.linear(some.x, prepared, bias), arch)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 70])
def test_kernels_replay_from_a_cuda_graph_with_new_inputs(tokens: int):
    layer = Layer(2, 128, 512, 1024, BF16)
    p = problem(layer, tokens, bias=True, device="cuda")
    prepared = bpdq_kernels.prepare(p.B, p.c, layer.group, layer.K, layer.dtype, "cuda", p.s)
    bpdq_kernels.linear(p.x, prepared, p.bias)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bpdq_kernels.linear(p.x, prepared, p.bias)
    p.x.normal_()
    graph.replay()
    assert torch.equal(y, bpdq_kernels.linear(p.x, prepared, p.bias))


@pytest.mark.gpu
def test_embedding_on_a_gpu_gives_the_oracles_rows():
    for layer in (Layer(4, 64, 1000, 1100, BF16), Layer(2, 128, 1000, 1120, BF16, 8, trellis=True)):
        embedding_on_a_gpu(layer)


def embedding_on_a_gpu(layer: Layer) -> None:
    p = problem(layer, 1, bias=False, device="cuda")
    prepared = bpdq_kernels.prepare(p.B, p.c, layer.group, layer.K, layer.dtype, "cuda", p.s)
    ids = torch.randint(0, layer.N, (3, 7), device="cuda")
    y = torch.ops.bpdq.embedding(ids, *prepared, torch.float32)
    W = p.weight(layer)
    torch.testing.assert_close(y, W[ids], rtol=2e-6, atol=1e-6 * W.abs().max().item())
