"""Compilation before the first request: every kernel that the dispatch can pick for a layer, several at a time.

Triton compiles when it first launches. Its passes and ptxas release the interpreter lock, so threads share that work;
then each kernel runs once, on a token of zeros, which loads its machine code. What Triton has compiled in this process
or finds in its folder is not compiled again, so that the layers of a model that are alike cost their launches alone.
Needs Triton 3.5 or newer.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from bpdq_kernels.activation import Activation
from bpdq_kernels.layout import PreparedExperts, Tiles
from bpdq_kernels.ops import Prepared, embedding, is_stored


def warm_up(prepared: Prepared, bias: Tensor | None = None) -> None:
    """Compile and load every kernel that `linear` can launch for this layer on its GPU, with and without `bias` [N]:
    of the ranks of tensor parallelism, one adds it. Elsewhere nothing is to be done."""
    if prepared.planes.is_cuda:
        with torch.cuda.device_of(prepared.planes):
            ahead = [*launches(prepared, None), *(launches(prepared, bias) if bias is not None else ())]
            compile_all(ahead)
            for launch in ahead:
                launch()


def warm_up_embedding(prepared: Prepared, dtype: torch.dtype) -> None:
    """Compile and load the kernel of `embedding` for int64 ids and rows in `dtype`. Elsewhere nothing is to be done."""
    if prepared.planes.is_cuda:
        embedding(torch.zeros(1, dtype=torch.int64, device=prepared.planes.device), prepared, dtype)


def warm_up_experts(
    up: PreparedExperts,
    down: PreparedExperts,
    activation: Activation,
    choices: int,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weights_on_input: bool = False,
) -> None:
    """Compile and load every kernel that `moe` can launch for these experts on their GPU, where each token chooses
    `choices` of them. Elsewhere, and in fp32, nothing is to be done."""
    if up.planes.is_cuda and not is_stored(up.planes[0]):
        with torch.cuda.device_of(up.planes):
            ahead = list(expert_launches(up, down, activation, choices, up_bias, down_bias, weights_on_input))
            compile_all(ahead)
            for launch in ahead:
                launch()


def expert_launches(
    up: PreparedExperts,
    down: PreparedExperts,
    activation: Activation,
    choices: int,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    weights_on_input: bool,
) -> Iterator[Callable[..., None]]:
    """Each kernel and configuration of a layer's experts, for one token; all take `compile_only`."""
    from bpdq_kernels import tiled_linear, tiled_moe
    from bpdq_kernels.dispatch import experts_configs

    device = up.planes.device
    x = torch.zeros(1, up.in_features, dtype=Tiles(*up[:4]).dtype, device=device)
    weights, y = torch.zeros(1, choices, device=device), torch.empty_like(x)
    ids = torch.zeros(1, choices, dtype=torch.int32, device=device)
    layer = (choices, len(up.planes), tiled_moe.matrix_of(up), tiled_moe.matrix_of(down), activation.is_gated)
    arguments = (x, weights, ids, up, down, activation, up_bias, down_bias, weights_on_input, y)
    for config in experts_configs(*layer, *tiled_linear.machine(device)):
        yield from tiled_moe.launches(*arguments, config)


def launches(prepared: Prepared, bias: Tensor | None) -> Iterator[Callable[..., None]]:
    """Each kernel and configuration of a layer, for one token; all take `compile_only`."""
    from bpdq_kernels import tiled_linear, triton_linear
    from bpdq_kernels.dispatch import linear_configs

    planes, coefficients, scales, ratios, in_features, out_features, group_size = prepared
    tiles = Tiles(planes, coefficients, scales, ratios)
    dtype = torch.float32 if is_stored(planes) else tiles.dtype
    x = torch.zeros(1, in_features, dtype=dtype, device=planes.device)
    y = x.new_empty(1, out_features)
    if is_stored(planes):
        for tile in triton_linear.TILES_FP32:
            yield partial(triton_linear.launch, x, planes, coefficients, scales, group_size, bias, y, tile)
        return
    machine = tiled_linear.machine(planes.device)
    layer = (tiles.multiplied, group_size, out_features, in_features)
    for config in linear_configs(*layer, *machine, tiles.coefficient_bits, tiles.has_trellis):
        yield partial(tiled_linear.launch, x, tiles, group_size, bias, y, config)


def compile_all(launches: Iterable[Callable[..., None]]) -> None:
    """Compile the kernels of `launches` in parallel."""
    from triton import AsyncCompileMode

    with uncollected(), ThreadPoolExecutor() as pool, AsyncCompileMode(pool):
        for launch in launches:
            launch(compile_only=True)


@contextmanager
def uncollected() -> Iterator[None]:
    """No cycles are collected meanwhile. Up to CPython 3.11 that may happen within `ast.parse`, run a finalizer there
    and with it another thread's `ast.parse`, and both then miscount their depth: SystemError, of sound source."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
