"""What the dispatch picks, compiled for every architecture: no register is spilled, no instruction emulated."""

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from bpdq_kernels.activation import Activation
from bpdq_kernels.dispatch import Config, Dense, Gemm, Gemv, linear_config
from bpdq_kernels.triton_linear import TILES_16BIT, TILES_FP32, Tile
from tests.offline import (
    BF16,
    EXPERT_GEMM,
    EXPERT_GEMV,
    FP16,
    FP32,
    GEMM,
    GEMM_ONE_TILE,
    GEMV,
    ExpertLayer,
    Layer,
    fits,
    flaws,
    name,
)

ARCHITECTURES = [80, 86, 89, 90, 100, 120]
GROUPS = (32, 64, 128, 256)
SCHEMES = list(itertools.product((1, 2, 3, 4), GROUPS))  # planes, group size
TRELLISES = list(itertools.product((1, 2, 3), GROUPS))


@pytest.fixture(scope="module")
def compilers() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("arch", [86, 90, 120])
def test_kernels_of_a_common_layer_spill_and_emulate_nothing(arch: int, compilers: ProcessPoolExecutor):
    layer = Layer(2, 128, 37888, 3584, BF16)
    tokens = (1, 8, 16, 32, 64)
    kernels = {linear_config(m, layer.planes, layer.group, layer.N, layer.K, 82, arch) for m in tokens}
    jobs = [(kernel, layer) for kernel in (*kernels, Dense(128), TILES_16BIT[0], TILES_16BIT[-1], None)]
    jobs += [(kernel, layer._replace(coefficient_bits=8)) for kernel in (*kernels, Dense(128), TILES_16BIT[0], None)]
    coded = layer._replace(coefficient_bits=8, trellis=True)
    kernels = {linear_config(m, coded.multiplied, layer.group, layer.N, layer.K, 82, arch, 8, True) for m in tokens}
    jobs += [(kernel, coded) for kernel in (*kernels, Dense(128), TILES_16BIT[0], None)]
    if arch > 86:  # for that the experts' kernels are compiled to be run and counted
        experts = ExpertLayer(Layer(2, 128, 1536, 2048, BF16), Activation("silu"), is_fused=True, is_sorted=True)
        jobs.append((Gemv(2, 4) if arch == 90 else Gemm(8, 2, 4, 2), experts))
    found = compilers.map(flaws, itertools.repeat(arch), *zip(*jobs, strict=True))
    assert not [*itertools.chain.from_iterable(found)]


def layers(arch: int, kernel: Config | Tile | None, coefficient_bits: int, trellis: bool) -> list[Layer]:
    """One for each scheme that this kernel is for. 16-bit dtypes take turns, but for one token, where registers are
    scarcest, each scheme comes with both."""
    found = [
        Layer(*scheme, 4096, 4096, BF16, coefficient_bits, trellis) for scheme in (TRELLISES if trellis else SCHEMES)
    ]
    if kernel in TILES_FP32:
        return [layer._replace(dtype=FP32) for layer in found]
    if isinstance(kernel, Gemv | Gemm):
        found = [x for x in found if fits(kernel, x.multiplied, x.group, coefficient_bits, trellis, arch)]
    if isinstance(kernel, Gemv):
        return [layer._replace(dtype=dtype) for layer in found for dtype in (BF16, FP16)]
    return [layer._replace(dtype=(BF16, FP16)[(i + i // 4) % 2]) for i, layer in enumerate(found)]


@pytest.mark.slow
@pytest.mark.parametrize("trellis", [False, True], ids=["planes", "trellis"])
@pytest.mark.parametrize("coefficient_bits", [16, 8])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "kernel", [*GEMV, *GEMM, *GEMM_ONE_TILE, Dense(128), *TILES_16BIT, *TILES_FP32, None], ids=name
)
def test_nothing_that_the_dispatch_picks_spills_or_is_emulated(
    arch: int, kernel: Config | Tile | None, coefficient_bits: int, trellis: bool, compilers: ProcessPoolExecutor
):
    if isinstance(kernel, Gemv) and arch >= 100:
        pytest.skip("one token gets a Gemm")
    jobs = layers(arch, kernel, coefficient_bits, trellis)
    found = compilers.map(flaws, itertools.repeat(arch), itertools.repeat(kernel), jobs)
    assert not [*itertools.chain.from_iterable(found)]


@pytest.mark.slow
@pytest.mark.parametrize("trellis", [False, True], ids=["planes", "trellis"])
@pytest.mark.parametrize("coefficient_bits", [16, 8])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", EXPERT_GEMV + EXPERT_GEMM, ids=name)
def test_no_kernel_of_experts_spills_or_is_emulated(
    arch: int, kernel: Gemv | Gemm, coefficient_bits: int, trellis: bool, compilers: ProcessPoolExecutor
):
    """Activations take turns: they are computed where most registers are free again."""
    if isinstance(kernel, Gemv) and arch >= 100:
        pytest.skip("one token gets a Gemm")
    names = itertools.cycle(("silu", "swigluoai", "gelu", "gelu_tanh"))
    jobs = []
    for i, scheme in enumerate(TRELLISES if trellis else SCHEMES):
        layer = Layer(*scheme, 1536, 2048, (BF16, FP16)[(i + i // 4) % 2], coefficient_bits, trellis)
        up, down = ExpertLayer(layer, Activation(next(names), limit=7.0), is_fused=True), ExpertLayer(layer, None)
        jobs += [experts._replace(is_sorted=i % 3 > 0) for experts in (up, down) if experts.takes(kernel)]
    found = compilers.map(flaws, itertools.repeat(arch), itertools.repeat(kernel), jobs)
    assert not [*itertools.chain.from_iterable(found)]
