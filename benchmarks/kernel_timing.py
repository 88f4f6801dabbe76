"""Kernels timed on a GPU against torch.matmul in 16 bits: `kernel_bench` without `--static`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cuda_core import cuda_core_linear
from benchmarks.kernel_static import Variant, config_for
from benchmarks.random_planes import random_layer
from benchmarks.shapes import MODELS, Layer
from bpdq_kernels import Prepared, dequantize, linear, prepare, tiled_linear
from bpdq_kernels.dispatch import gemm_config
from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import Stored, Tiles, cdiv
from bpdq_kernels.warm import warm_up

Call = Callable[[], object]
Timer = Callable[[dict[str, list[Call]]], dict[str, float]]

ROUNDS = 15  # replays of each graph
MIN_CALLS = 20  # in a graph, so that starting it does not count
L2_SIZES = 8  # other bytes that are read before a weight is read again, in sizes of the L2 cache
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


def time_models(
    models: Sequence[str], settings: Settings, bandwidth: float, rate: float, timer: Timer = graph_timer
) -> Iterator[dict[str, Any]]:
    """Time all layers of the models; every row says which share of the copy's `bandwidth` (bytes/s) and of a large
    product's `rate` (FLOP/s) it reached."""
    for model in models:
        for layer in (*MODELS[model].layers, MODELS[model].head):
            for row in time_layer(model, layer, settings, timer):
                shares = {"of_copy_bandwidth": row["bytes_per_s"] / bandwidth}
                yield row | shares | {"of_matmul_rate": row["flops_per_s"] / rate}
            if settings.device != "cpu":
                torch.cuda.empty_cache()  # the next layer's copies need the room of this one's


def decoder_ms(rows: Sequence[dict[str, Any]], model: str, tokens: int, key: str) -> float:
    """Milliseconds of all decoder Linears of a model, without the LM head; key "us" or "matmul_us"."""
    chosen = [
        row for row in rows if (row["model"], row["tokens"]) == (model, tokens) and row["layer"]["name"] != "head"
    ]
    return MODELS[model].blocks * sum(row[key] for row in chosen) / 1e3
