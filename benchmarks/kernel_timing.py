"""Kernels timed on a GPU against torch.matmul in 16 bits: `kernel_bench` without `--static`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cuda_core import cuda_core_linear
from benchmarks.dense_experts import dense_experts, even_experts
from benchmarks.kernel_static import Variant, config_for
from benchmarks.random_planes import random_experts, random_layer
from benchmarks.shapes import EXPERTS, MODELS, Layer
from bpdq_kernels import (
    Activation,
    Prepared,
    dequantize,
    linear,
    moe,
    prepare,
    prepare_experts,
    tiled_linear,
    warm_up,
    warm_up_experts,
)
from bpdq_kernels.dispatch import Matrix, experts_config, gemm_config
from bpdq_kernels.experts import routes
from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import Stored, Tiles, cdiv

Call = Callable[[], object]
Timer = Callable[[dict[str, list[Call]]], dict[str, float]]

ROUNDS = 15  # replays of each graph
MIN_CALLS = 20  # in a graph, so that starting it does not count
L2_SIZES = 8  # other bytes that are read before a weight is read again, in sizes of the L2 cache
ROUTINGS = 16  # of a batch's tokens to experts, in turn, so that a layer is read before an expert is read again
CHECKED_TOKENS = 4  # of a batch through experts
COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
TOLERANCE = 0.01  # of the outputs' norm; rounding weights and outputs to bf16 costs 0.003


class WrongResultError(RuntimeError):
    """A kernel whose outputs are wrong: its time must not be reported."""


class Settings(NamedTuple):
    """What is timed where."""

    bits: int
    group_size: int
    tokens: tuple[int, ...]
    dtype: torch.dtype
    device: str
    multiprocessors: int
    arch: int  # compute capability, 86 for 8.6
    l2_bytes: int
    coefficient_bits: int = 16

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group_size, self.coefficient_bits)


def graph_timer(contenders: dict[str, list[Call]]) -> dict[str, float]:
    """Median seconds of a contender's call. Its calls run one after the other in a CUDA graph; the contenders' graphs
    are replayed in turns, so that clocks and temperature are the same for all."""
    graphs, seconds = {}, {name: [] for name in contenders}
    for name, calls in contenders.items():
        for call in calls:  # compiles, and lets cuBLAS choose, outside the capture
            call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for i in range(rounded_up(MIN_CALLS, len(calls))):
                calls[i % len(calls)]()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(ROUNDS + 1):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / rounded_up(MIN_CALLS, len(contenders[name])))
    return {name: median(times[1:]) for name, times in seconds.items()}  # the first round warms up


def rounded_up(count: int, step: int) -> int:
    return cdiv(count, step) * step


def copies(size: int, l2_bytes: int) -> int:
    """How many tensors of `size` bytes to use in turn so that none is still in L2 when its turn comes again."""
    return max(2, 1 + cdiv(L2_SIZES * l2_bytes, size))


def size_of(prepared: Prepared) -> int:
    """Bytes of the planes, coefficients and scales."""
    return sum(field.nbytes for field in prepared if isinstance(field, Tensor))


def clone(prepared: Prepared) -> Prepared:
    return Prepared(*(field.clone() if isinstance(field, Tensor) else field for field in prepared))


def copy_bandwidth(device: str, timer: Timer, size: int = COPY_BYTES) -> float:
    """Bytes per second of a copy within the device's memory, reads and writes counted."""
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / timer({"copy": [partial(target.copy_, source)]})["copy"]


def matmul_rate(dtype: torch.dtype, device: str, timer: Timer, size: int = MATMUL_SIZE) -> float:
    """FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / timer({"matmul": [partial(torch.matmul, a, b)]})["matmul"]


def check_outputs(y: Tensor, x: Tensor, layer: Stored, settings: Settings, name: str) -> None:
    """Raise WrongResultError unless y's first and last outputs are x times the weights."""
    n, in_features = y.shape[1], x.shape[1]
    some = torch.cat([torch.arange(min(64, n)), torch.arange(max(0, n - 64), n)]).to(x.device)
    part = layer.outputs(some)
    weight = dequantize(part.B, part.c, settings.group_size, in_features, part.s)
    expected = x.double() @ weight.double().T
    error = float((y[:, some].double() - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise WrongResultError(f"{name}: the outputs are off by {error:.3g} of their norm, so no time is reported")


def time_layer(model: str, layer: Layer, settings: Settings, timer: Timer) -> Iterator[dict[str, Any]]:
    """Time a layer for every number of tokens; raises WrongResultError."""
    n, k, device = layer.out_features, layer.in_features, settings.device
    stored = random_layer(n, k, settings.scheme, torch.Generator(device))
    if stored.s is None:
        stored = stored._replace(c=stored.c.to(settings.dtype))
    prepared = prepare(stored.B, stored.c, settings.group_size, k, settings.dtype, device, stored.s)
    size = size_of(prepared)
    warm_up(prepared)
    clones = [clone(prepared) for _ in range(copies(size, settings.l2_bytes))]
    dense = [
        torch.randn(n, k, dtype=settings.dtype, device=device) for _ in range(copies(2 * n * k, settings.l2_bytes))
    ]
    for tokens in settings.tokens:
        x = torch.randn(tokens, k, device=device).to(settings.dtype)
        planes, group = settings.bits, settings.group_size
        config = config_for(
            tokens, layer, planes, group, settings.multiprocessors, settings.arch, settings.coefficient_bits
        )
        variant = Variant(planes, group, config, coefficient_bits=settings.coefficient_bits)
        check_outputs(
            linear(x, prepared), x, stored, settings, f"{model} {layer.name}, {tokens} tokens, {variant.name}"
        )
        contenders: dict[str, list[Call]] = {
            "bpdq": [partial(linear, x, weight) for weight in clones],
            "matmul": [partial(torch.matmul, x, weight.T) for weight in dense],
        }
        if tokens == 1 and device != "cpu":
            contenders |= one_token_alternatives(x, clones, stored, settings)
        seconds = timer(contenders)
        yield {
            "model": model,
            "layer": layer._asdict(),
            "tokens": tokens,
            "kernel": variant.name,
            "packed_bytes": size,
            "us": seconds["bpdq"] * 1e6,
            "matmul_us": seconds["matmul"] * 1e6,
            "bytes_per_s": size / seconds["bpdq"],
            "flops_per_s": 2 * tokens * n * k / seconds["bpdq"],
            "matmul_flops_per_s": 2 * tokens * n * k / seconds["matmul"],
            "alternatives_us": {name: s * 1e6 for name, s in seconds.items() if name not in ("bpdq", "matmul")},
        }


def one_token_alternatives(
    x: Tensor, clones: Sequence[Prepared], layer: Stored, settings: Settings
) -> dict[str, list[Call]]:
    """What else could multiply one token: the GEMM of 8 tokens, and FFMA instead of tensor cores."""
    n, group = layer.B.shape[2], settings.group_size
    y = x.new_empty(1, n)
    config = gemm_config(1, settings.bits, n, settings.multiprocessors)
    stored = [layer, Stored(*(None if tensor is None else tensor.clone() for tensor in layer))]
    return {
        "gemm": [partial(tiled_linear.launch, x, Tiles(*p[:4]), group, None, y, config) for p in clones],
        "cuda cores": [partial(cuda_core_linear, x, B, c, group, s) for B, c, s in stored],
    }


def time_experts(model: str, settings: Settings, timer: Timer) -> Iterator[dict[str, Any]]:
    """Time a layer's experts for every number of tokens, which choose theirs at random; in 16 bits as many of them,
    with the choices spread evenly. Raises WrongResultError."""
    name, count, chosen, hidden, inner = EXPERTS[model]
    group, device, dtype, act = settings.group_size, settings.device, settings.dtype, Activation("silu")
    shapes = (2 * inner, hidden), (hidden, inner)
    stored = [random_experts(count, n, k, settings.scheme, torch.Generator(device)) for n, k in shapes]
    prepared = [prepare_experts(s, group, k, dtype, device) for s, (_, k) in zip(stored, shapes, strict=True)]
    warm_up_experts(*prepared, act, chosen)
    dense = [0.02 * torch.randn(count, n, k, dtype=dtype, device=device) for n, k in shapes]
    each = sum(field.nbytes for matrix in prepared for field in matrix if isinstance(field, Tensor)) / count
    matrices = [Matrix(settings.bits, group, n, k, settings.coefficient_bits) for n, k in shapes]
    for tokens in settings.tokens:
        x = torch.randn(tokens, hidden, device=device).to(dtype)
        weights = torch.full((tokens, chosen), 1 / chosen, device=device)
        ids = [torch.rand(tokens, count, device=device).argsort(1)[:, :chosen].int() for _ in range(ROUTINGS)]
        config = experts_config(tokens, chosen, count, *matrices, True, settings.multiprocessors, settings.arch)
        kernel = Variant(settings.bits, group, config.up, "", settings.coefficient_bits, "gate_up").name
        y = moe(x, weights, ids[0], *prepared, act)
        check_experts(y, x, weights, ids[0], stored, settings, f"{model} {name}, {tokens} tokens, {kernel}")
        hit = round(sum(len(choice.unique()) for choice in ids) / len(ids))
        even = torch.randn(hit, cdiv(tokens * chosen, hit), hidden, device=device).to(dtype)
        parts = [slice(first, first + hit) for first in range(0, count - hit + 1, hit)]
        contenders: dict[str, list[Call]] = {
            "bpdq": [partial(moe, x, weights, choice, *prepared, act) for choice in ids],
            "matmul": [partial(even_experts, even, *(matrix[part] for matrix in dense)) for part in parts],
        }
        seconds, flops, size = timer(contenders), 2 * tokens * chosen * 3 * inner * hidden, each * hit
        yield {
            "model": model,
            "layer": Layer("experts", inner, hidden)._asdict(),
            "tokens": tokens,
            "kernel": kernel,
            "packed_bytes": size,
            "us": seconds["bpdq"] * 1e6,
            "matmul_us": seconds["matmul"] * 1e6,
            "bytes_per_s": size / seconds["bpdq"],
            "flops_per_s": flops / seconds["bpdq"],
            "matmul_flops_per_s": flops / seconds["matmul"],
            "alternatives_us": {},
        }


def check_experts(
    y: Tensor, x: Tensor, weights: Tensor, ids: Tensor, stored: Sequence[Stored], settings: Settings, name: str
) -> None:
    """Raise WrongResultError unless y's first tokens are what their experts `stored` (gate and up, down) make of x."""
    x, weights, ids = x[:CHECKED_TOKENS].float(), weights[:CHECKED_TOKENS], ids[:CHECKED_TOKENS].long()
    up, down = (
        {
            expert: dequantize(B[expert], c[expert], settings.group_size, k, None if s is None else s[expert])
            for expert in ids.unique().tolist()
        }
        for (B, c, s), k in zip(stored, (x.shape[1], stored[0].B.shape[-1] // 2), strict=True)
    )
    expected = dense_experts(x, weights, routes(ids, len(stored[0].B)), up, down)
    error = float((y[:CHECKED_TOKENS].float() - expected).norm() / expected.norm())
    if not error < TOLERANCE:
        raise WrongResultError(f"{name}: the outputs are off by {error:.3g} of their norm, so no time is reported")


def time_models(
    models: Sequence[str], settings: Settings, bandwidth: float, rate: float, timer: Timer = graph_timer
) -> Iterator[dict[str, Any]]:
    """Time all layers of the models; every row says which share of the copy's `bandwidth` (bytes/s) and of a large
    product's `rate` (FLOP/s) it reached."""
    for model in models:
        layers = (*MODELS[model].layers, MODELS[model].head) if model in MODELS else ()
        timings = [time_layer(model, layer, settings, timer) for layer in layers]
        for rows in timings or [time_experts(model, settings, timer)]:
            for row in rows:
                shares = {"of_copy_bandwidth": row["bytes_per_s"] / bandwidth}
                yield row | shares | {"of_matmul_rate": row["flops_per_s"] / rate}
            if settings.device != "cpu":
                torch.cuda.empty_cache()  # the next layer's copies need the room of this one's


def decoder_ms(rows: Sequence[dict[str, Any]], model: str, tokens: int, key: str) -> float:
    """Milliseconds of all decoder Linears of a model, without the LM head, or of one layer's experts; key "us" or
    "matmul_us"."""
    chosen = [
        row for row in rows if (row["model"], row["tokens"]) == (model, tokens) and row["layer"]["name"] != "head"
    ]
    blocks = MODELS[model].blocks if model in MODELS else 1
    return blocks * sum(row[key] for row in chosen) / 1e3
