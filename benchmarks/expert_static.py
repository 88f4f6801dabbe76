"""The experts of mixtures in `kernel_bench --static`: their kernels, and the time of both matrices of a layer.

Tokens are taken to choose their experts at random, all alike: for so many tokens, so many experts are read, and the
tokens of each fill so many blocks, on average.
"""

from collections.abc import Sequence
from math import exp, lgamma, log, log1p
from typing import Any

from benchmarks.kernel_static import Variant, fill, stored_planes
from benchmarks.sass import Machine
from benchmarks.shapes import EXPERTS, Experts, Layer
from bpdq_kernels import dispatch
from bpdq_kernels.dispatch import Matrix
from bpdq_kernels.layout import GROUP_SIZES, cdiv

SWEEP_TOKENS = (1, 256)


def matrices(experts: Experts) -> tuple[Layer, Layer]:
    """Those of an expert."""
    return (
        Layer("gate_up", 2 * experts.inner, experts.hidden),
        Layer("down", experts.hidden, experts.inner),
    )


def config_for(
    experts: Experts, tokens: int, planes: int, group: int, machine: Machine, coefficient_bits: int
) -> dispatch.Experts:
    """What `bpdq_kernels.tiled_moe` dispatches to; planes: those multiplied."""
    up, down = (
        Matrix(planes, group, layer.out_features, layer.in_features, coefficient_bits) for layer in matrices(experts)
    )
    sizes = (experts.chosen, experts.count, up, down, True, machine.multiprocessors, machine.capability)
    return dispatch.experts_config(tokens, *sizes)


def variants(
    models: Sequence[str],
    tokens: Sequence[int],
    planes: int,
    group: int,
    machine: Machine,
    dtype: str = "bf16",
    coefficient_bits: int = 16,
    trellis: bool = False,
) -> list[Variant]:
    """The experts' kernels at `planes` and `group`; then all k and G = 32..256 with the first model's."""
    wanted = [(EXPERTS[name], m, planes, group) for name in models for m in tokens]
    wanted += [
        (EXPERTS[name], m, k, g)
        for name in models[:1]
        for k in stored_planes(trellis)
        for g in GROUP_SIZES
        for m in SWEEP_TOKENS
    ]
    found = []
    for experts, m, k, g in wanted:
        config = config_for(experts, m, k + trellis, g, machine, coefficient_bits)
        found.append(Variant(k, g, config.up, dtype, coefficient_bits, "gate_up", trellis))
        found.append(Variant(k, g, config.down, dtype, coefficient_bits, "down", trellis))
    return list(dict.fromkeys(found))


def blocks(experts: Experts, tokens: int, config: dispatch.Experts) -> float:
    """How many blocks the tokens of the chosen experts fill, on average."""
    if not config.is_sorted:
        return tokens * experts.chosen
    share = experts.chosen / experts.count
    total = 0.0
    for n in range(1, tokens + 1):
        ways = lgamma(tokens + 1) - lgamma(n + 1) - lgamma(tokens - n + 1)
        total += cdiv(n, config.up.tokens) * exp(ways + n * log(share) + (tokens - n) * log1p(-share))
    return experts.count * total


def rows(
    model: str,
    tokens: int,
    planes: int,
    group: int,
    machine: Machine,
    dtype: str,
    coefficient_bits: int,
    trellis: bool = False,
) -> list[dict[str, Any]]:
    """As `kernel_static.layer_row`, of both matrices of all experts that `tokens` choose."""
    experts = EXPERTS[model]
    chosen = experts.count * (1 - (1 - experts.chosen / experts.count) ** tokens)
    config = config_for(experts, tokens, planes + trellis, group, machine, coefficient_bits)
    full = blocks(experts, tokens, config)
    found = []
    for layer, part in zip(matrices(experts), (config.up, config.down), strict=True):
        variant = Variant(planes, group, part, dtype, coefficient_bits, layer.name, trellis)
        size = chosen * variant.tiled_bytes(layer)
        found.append(fill(variant, layer, tokens, full, size, machine) | {"model": model})
    return found
