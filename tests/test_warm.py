"""Loading compiles what requests run: by the keys under which Triton keeps compiled kernels, and for real (-m gpu)."""

import functools
import gc
from collections.abc import Iterator

import pytest
import torch
import triton

import bpdq_kernels
from bpdq_kernels import Activation, layout, tiled_linear, tiled_moe, triton_embedding, warm
from bpdq_kernels.triton_activation import activation_kernel
from bpdq_kernels.triton_dequantize import dequantize_kernel
from bpdq_kernels.triton_embedding import embedding_kernel
from bpdq_kernels.triton_expert_gemm import expert_gemm_kernel
from bpdq_kernels.triton_expert_gemv import expert_gemv_kernel
from bpdq_kernels.triton_gemm import gemm_kernel
from bpdq_kernels.triton_gemv import gemv_kernel
from bpdq_kernels.triton_linear import linear_kernel, stored_linear
from bpdq_kernels.triton_routing import combine_kernel, count_kernel, place_kernel
from test_moe import random_case
from test_tiled_moe import tiled as tiled_experts
from tests.offline import BF16, FP16, FP32, Layer, OfflineDriver

KERNELS = (dequantize_kernel, embedding_kernel, gemm_kernel, gemv_kernel, linear_kernel)
KERNELS += (activation_kernel, expert_gemm_kernel, expert_gemv_kernel, combine_kernel, count_kernel, place_kernel)


LAYERS = [
    Layer(2, 128, 4608, 3584, BF16),
    Layer(4, 256, 2048, 1856, FP16),  # 128 does not divide K
    Layer(3, 64, 1000, 1100, FP16),  # 16 divides neither
    Layer(1, 32, 70, 333, BF16),  # rows that are copied to be read in vectors
    Layer(2, 64, 1000, 1100, FP16, 8),
    Layer(2, 128, 1000, 1120, BF16, 8, trellis=True),
]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors taken for those of an RTX 3090: kernels can be compiled, not launched."""
    monkeypatch.setattr(triton.runtime.driver, "_active", OfflineDriver())
    yield
    for kernel in KERNELS:
        kernel.device_caches.pop("offline", None)


@pytest.fixture
def requested(offline: None, monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """The compilations that were asked for. None is done, and then Triton launches nothing; nor does torch multiply."""
    found = set()
    monkeypatch.setattr(torch, "mm", lambda *_, out: out)
    monkeypatch.setattr(torch, "addmm", lambda *_, out: out)

    def request(*, key: str, fn: object, **_: object) -> bool:
        found.add((fn.name, key))
        return True

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", request)
    return found


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels compiled, or read from Triton's folder, in the order in which they were ready."""
    found = []

    def ready(*, fn: object, **_: object) -> None:
        found.append(fn.name)

    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", ready)
    return found


def random_layer(layer: Layer) -> layout.Stored:
    generator = torch.Generator().manual_seed(0)
    shape = layout.plane_shape(layer.K, layer.N, layer.planes)
    B = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    shape = layout.coefficient_shape(layer.K, layer.N, layer.planes, layer.group, layer.trellis)
    if layer.coefficient_bits == 8:
        c = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        return layout.Stored(B, c, torch.rand(shape[1:], generator=generator).bfloat16())
    return layout.Stored(B, torch.randn(shape, generator=generator))


@functools.cache
def tiled(layer: Layer) -> bpdq_kernels.Prepared:
    """As `prepare` would pack it on a GPU, in CPU memory."""
    B, c, s = random_layer(layer)
    tiles = layout.to_tiles(B, c, layer.group, layer.dtype, s)
    return bpdq_kernels.Prepared(*tiles, layer.K, layer.N, layer.group)


def compile_ahead(prepared: bpdq_kernels.Prepared, bias: torch.Tensor | None) -> None:
    warm.compile_all(warm.launches(prepared, bias))


def zeros(layer: Layer, bias: torch.dtype | None) -> torch.Tensor | None:
    return None if bias is None else torch.zeros(layer.N, dtype=bias)


@pytest.mark.parametrize("machine", [(46, 86), (82, 86), (132, 90)], ids=str)
@pytest.mark.parametrize(("layer", "bias"), [*zip(LAYERS, (BF16, None, FP16, FP32, FP16, BF16), strict=True)], ids=str)
def test_no_batch_needs_a_kernel_that_loading_does_not_compile(
    layer: Layer,
    bias: torch.dtype | None,
    machine: tuple[int, int],
    requested: set[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(tiled_linear, "machine", lambda device: machine)
    prepared, b = tiled(layer), zeros(layer, bias)
    compile_ahead(prepared, b)
    ahead = requested.copy()
    requested.clear()
    x = torch.zeros(4096, layer.K, dtype=layer.dtype)
    for tokens in sorted({*range(1, 70), *range(128, 4097, 64), *range(129, 4097, 64)}):
        tiled_linear.tiled_linear(x[:tokens], layout.Tiles(*prepared[:4]), layer.N, layer.group, b)
    assert {kernel for kernel, _ in requested} == {"gemv_kernel", "gemm_kernel", "dequantize_kernel"}
    assert requested <= ahead


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_no_view_of_the_activations_needs_a_kernel_of_its_own(layer: Layer, requested: set[tuple[str, str]]):
    prepared = tiled(layer)
    compile_ahead(prepared, None)
    ahead = requested.copy()
    wide = torch.zeros(70, layer.K + 24, dtype=layer.dtype)
    for start in (0, 1, 8):
        for tokens in (1, 2, 70):
            x = wide[:tokens, start : start + layer.K]
            tiled_linear.tiled_linear(x, layout.Tiles(*prepared[:4]), layer.N, layer.group, None)
    assert requested == ahead


@pytest.mark.parametrize("bias", [None, FP32], ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_no_batch_of_an_fp32_model_needs_a_kernel_that_loading_does_not_compile(
    layer: Layer, bias: torch.dtype | None, requested: set[tuple[str, str]]
):
    stored, b = random_layer(layer), zeros(layer, bias)
    prepared = bpdq_kernels.Prepared(*stored, None, layer.K, layer.N, layer.group)
    compile_ahead(prepared, b)
    ahead = requested.copy()
    x = torch.zeros(130, layer.K)
    for tokens in (*range(1, 12), 63, 64, 65, 130):
        stored_linear(x[:tokens], stored.B, stored.c, layer.group, b, stored.s)
    assert {kernel for kernel, _ in requested} == {"linear_kernel"}
    assert requested == ahead


@pytest.mark.parametrize("machine", [(82, 86), (170, 120)], ids=str)
@pytest.mark.parametrize(
    ("inner", "activation", "weights_on_input"),
    [
        (32, Activation("silu"), False),
        (36, Activation("gelu", limit=1.0), False),
        (40, Activation("relu2_no_mul"), True),
    ],
    ids=str,
)
def test_no_batch_needs_a_kernel_of_experts_that_loading_does_not_compile(
    inner: int,
    activation: Activation,
    weights_on_input: bool,
    machine: tuple[int, int],
    requested: set[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
):
    for module in (tiled_linear, tiled_moe):
        monkeypatch.setattr(module, "machine", lambda device: machine)
    case = random_case(
        *(200, 2, 100, inner),
        dtype=BF16,
        activation=activation,
        biases=True,
        weights_on_input=weights_on_input,
        ids_dtype=torch.int64,
    )
    up, down = tiled_experts(case.up, BF16), tiled_experts(case.down, BF16)
    warm.compile_all(warm.expert_launches(up, down, activation, 2, *case[6:]))
    ahead = requested.copy()
    requested.clear()
    x = torch.zeros(200, 124, dtype=BF16)
    for tokens in (*range(1, 40), 63, 65, 200):
        for start in (0, 1, 8):
            batch = x[:tokens, start : start + 100], case.weights[:tokens], case.ids[:tokens]
            tiled_moe.tiled_moe(*batch, up, down, *case[5:])
    assert {kernel for kernel, _ in requested} >= {"expert_gemm_kernel", "place_kernel", "combine_kernel"}
    assert requested <= ahead


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_one_look_up_compiles_the_embedding_for_all(layer: Layer, requested: set[tuple[str, str]]):
    tiles = layout.Tiles(*tiled(layer)[:4])
    ids = torch.zeros(100, dtype=torch.int64)
    for part in (ids[:1], ids, ids[3:], ids[1:6], ids[::2]):
        triton_embedding.launch(part, tiles, layer.group, torch.empty(len(part), layer.K, dtype=layer.dtype))
    assert len(requested) == 1


def test_layers_that_are_alike_are_compiled_once(offline: None, compiled: list[str]):
    for _ in range(2):
        one_and_few = list(warm.launches(tiled(Layer(1, 128, 64, 128, BF16)), None))[:2]
        warm.compile_all(one_and_few)
        assert sorted(compiled) == ["gemm_kernel", "gemv_kernel"]


def test_threads_parse_kernels_while_no_finalizer_runs():
    """A finalizer that lets another thread parse made CPython 3.11 raise SystemError in one parse of some hundred."""
    collected = []
    warm.compile_all([lambda compile_only: collected.append(gc.isenabled())])
    assert collected == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_compiled_for_other_devices(device: str, requested: set[tuple[str, str]]):
    B, c, _ = random_layer(LAYERS[2])
    prepared = bpdq_kernels.prepare(B, c, LAYERS[2].group, LAYERS[2].K, FP16, device)
    bpdq_kernels.warm_up(prepared)
    bpdq_kernels.warm_up_embedding(prepared, FP16)
    assert not requested


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [LAYERS[0], *LAYERS[2:], Layer(2, 64, 1024, 1024, FP32)], ids=str)
def test_no_request_on_a_gpu_compiles_anything(layer: Layer, compiled: list[str]):
    for kernel in KERNELS:
        kernel.device_caches.clear()  # of other tests
    B, c, s = random_layer(layer)
    prepared = bpdq_kernels.prepare(B, c, layer.group, layer.K, layer.dtype, "cuda", s)
    bias = torch.zeros(layer.N, dtype=layer.dtype, device="cuda")
    bpdq_kernels.warm_up(prepared, bias)
    bpdq_kernels.warm_up_embedding(prepared, layer.dtype)
    ahead = len(compiled)
    assert {*compiled} >= (
        {"linear_kernel"} if layer.dtype == FP32 else {"embedding_kernel", "gemm_kernel", "gemv_kernel"}
    )
    bpdq_kernels.warm_up(prepared, bias)
    x = torch.zeros(2048, layer.K, dtype=layer.dtype, device="cuda")
    for tokens in (*range(1, 601), 1024, 2000, 2048):
        bpdq_kernels.linear(x[:tokens], prepared)
        bpdq_kernels.linear(x[:tokens], prepared, bias)
    ids = torch.arange(40, device="cuda")
    for part in (ids[3:4], ids.view(4, 10), ids[7:], ids[::2]):
        bpdq_kernels.embedding(part, prepared, layer.dtype)
    torch.cuda.synchronize()
    assert compiled[ahead:] == []
