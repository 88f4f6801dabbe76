"""Number of planes and group size for each stage of weights: the least cost to the model within a budget of bytes.

The costs of `passes.sensitivity` add up, so this is a multiple-choice knapsack. Its continuous solution has
equal slopes everywhere: the last byte spent on any stage lowers the cost equally, which for costs that fall as 4^-R is
the equal-loss principle of BAQ, R_j = R + log2(l_j / geometric mean) / 2 (arXiv 2506.05664). Schemes are integers, so
each stage climbs the lower convex hull of its (bytes, cost) points, the steepest step of all stages first (the optimum
of the relaxed problem), and what is left is spent on single changes.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite

from bpdq_kernels.format import Scheme
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.stream import Streamed, solved
from bpdq_quantizer.passes.sensitivity import Stage, schemes_for

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_size(size: str) -> int:
    """Bytes of `20GiB`, `1.5 GB` or `93000000`; raises InputError for anything else."""
    found = re.fullmatch(rf"(\d{{1,30}}(?:\.\d{{1,30}})?)\s*({'|'.join(UNITS)})", size.strip())
    if found is None:
        raise InputError(f"--target-size {size}: expected a number and a unit of {', '.join(filter(None, UNITS))}")
    return int(float(found[1]) * UNITS[found[2]])


def other_bytes(source: Streamed, embeddings: Mapping[str, Scheme]) -> int:
    """Bytes of a checkpoint's tensors beside the blocks' solved weights; embeddings: `embedding_schemes`."""
    model = source.model
    weights = {f"{name}.weight" for name in solved(source)}
    tensors = {n: t for n, t in model.state_dict().items() if n not in weights | set(model.all_tied_weights_keys)}
    packed = {f"{name}.weight": scheme for name, scheme in embeddings.items()}
    return sum(packed[n].stored_bytes(*t.shape) if n in packed else t.nbytes for n, t in tensors.items())


def uniform(source: Streamed, scheme: Scheme) -> dict[str, Scheme]:
    """The same scheme for every weight of the blocks that is to be solved, by name, as `Scheme.for_inputs`."""
    return {name: scheme.for_inputs(weight.shape[1]) for name, weight in solved(source).items()}


def least_bytes(source: Streamed, schemes: Sequence[Scheme]) -> int:
    """Bytes of the blocks' solved weights, each in the smallest of `schemes`."""
    shapes = [weight.shape for weight in solved(source).values()]
    return sum(min(s.stored_bytes(*shape) for s in schemes_for(shape[1], schemes)) for shape in shapes)


def stage_bytes(stage: Stage) -> dict[Scheme, int]:
    """Bytes of a stage's planes and coefficients by scheme."""
    return {scheme: sum(scheme.stored_bytes(*shape) for shape in stage.shapes) for scheme in stage.costs}


def check_costs(stages: Sequence[Stage]) -> None:
    """Raise InputError for costs that say nothing: NaN or infinity, or zeros alone."""
    for stage in stages:
        if not all(map(isfinite, stage.costs.values())):
            raise InputError(
                f"{stage.names[0]}: what its errors cost is NaN or infinite: check the model and its dtype, or leave "
                "out --target-bpw / --target-size"
            )
    if not any(any(stage.costs.values()) for stage in stages):
        raise InputError(
            f"{stages[0].names[0]}: what its errors cost is 0, as of all others: bring other text (--calibration), or "
            "leave out --target-bpw / --target-size"
        )


def allocate(stages: Sequence[Stage], budget: int) -> list[Scheme]:
    """The scheme of every stage, of at most `budget` bytes together; raises InputError if that is too little."""
    sizes = [stage_bytes(stage) for stage in stages]
    ladders = [hull(stage.costs, size) for stage, size in zip(stages, sizes, strict=True)]
    chosen = [ladder[0] for ladder in ladders]
    left = budget - sum(size[scheme] for size, scheme in zip(sizes, chosen, strict=True))
    if left < 0:
        raise InputError(f"the smallest schemes take {budget - left} bytes, the target leaves {budget}: raise it")

    def gain(i: int, scheme: Scheme, before: Scheme) -> float:
        return (stages[i].costs[before] - stages[i].costs[scheme]) / (sizes[i][scheme] - sizes[i][before])

    steps = [(gain(i, up, down), i, up) for i, ladder in enumerate(ladders) for down, up in pairwise(ladder)]
    stuck: set[int] = set()
    for _, i, scheme in sorted(steps, key=lambda step: step[0], reverse=True):
        extra = sizes[i][scheme] - sizes[i][chosen[i]]
        if i in stuck or extra > left:
            stuck.add(i)
        else:
            chosen[i], left = scheme, left - extra
    while changes := [
        (stages[i].costs[chosen[i]] - cost, i, scheme)
        for i, stage in enumerate(stages)
        for scheme, cost in stage.costs.items()
        if cost < stage.costs[chosen[i]] and sizes[i][scheme] - sizes[i][chosen[i]] <= left
    ]:
        _, i, scheme = max(changes, key=lambda change: change[0])
        left -= sizes[i][scheme] - sizes[i][chosen[i]]
        chosen[i] = scheme
    return chosen


def hull(costs: Mapping[Scheme, float], sizes: Mapping[Scheme, int]) -> list[Scheme]:
    """The schemes on the lower convex hull of (bytes, cost), from the smallest to that of the least cost."""

    def slope(a: Scheme, b: Scheme) -> float:
        return (costs[a] - costs[b]) / (sizes[b] - sizes[a])

    corners: list[Scheme] = []
    for scheme in sorted(costs, key=lambda s: (sizes[s], costs[s])):
        if corners and costs[scheme] >= costs[corners[-1]]:
            continue
        while len(corners) > 1 and slope(*corners[-2:]) <= slope(corners[-1], scheme):
            corners.pop()
        corners.append(scheme)
    return corners


def by_layer(stages: Sequence[Stage], schemes: Sequence[Scheme]) -> dict[str, Scheme]:
    """The scheme of every weight, by name."""
    return {name: scheme for stage, scheme in zip(stages, schemes, strict=True) for name in stage.names}


def most_common(schemes: Mapping[str, Scheme]) -> Scheme:
    """The scheme of most layers."""
    return Counter(schemes.values()).most_common(1)[0][0]
