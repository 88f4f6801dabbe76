"""The experts' CUDA kernels, in three ways: interpreted from their source, as the PTX that Triton emits for sm_86
executed on the CPU, and for real (-m gpu)."""

from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import triton

from benchmarks.sass import read_cubin
from bpdq_kernels import (
    Activation,
    PreparedExperts,
    moe,
    prepare_experts,
    tiled_moe,
    triton_activation,
    triton_expert_gemm,
    triton_expert_gemv,
    triton_routing,
)
from bpdq_kernels.activation import NAMES
from bpdq_kernels.layout import cdiv, to_tiles
from test_moe import Case, Experts, expected, random_case
from tests.offline import BF16, FP16, OfflineDriver
from tests.ptx import launch

INT8 = torch.int8
# the interpreter truncates where a GPU rounds
TOLERANCE = {FP16: 4e-3, BF16: 3e-2}  # of a token's length


def tiled(experts: Experts, dtype: torch.dtype) -> PreparedExperts:
    """As `prepare_experts` would pack them on a GPU, in CPU memory."""
    each = [
        to_tiles(*(t[e] for t in experts.stored[:2]), experts.group_size, dtype, None if s is None else s[e])
        for e, s in enumerate([experts.stored.s] * len(experts.dense))
    ]
    tensors = [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]
    return PreparedExperts(*tensors, *experts.dense.shape[:0:-1], experts.group_size)


def compare(case: Case, y: torch.Tensor) -> None:
    """Exactly 0 for tokens without an expert of ours."""
    exact = expected(case)
    error = (y.double().cpu() - exact).norm(dim=1)
    assert (y.dtype, y.shape) == (case.x.dtype, case.x.shape)
    assert (error <= TOLERANCE[y.dtype] * exact.norm(dim=1)).all(), (error / exact.norm(dim=1)).max()


def multiply(case: Case) -> torch.Tensor:
    up, down = tiled(case.up, case.x.dtype), tiled(case.down, case.x.dtype)
    return tiled_moe.tiled_moe(*case._replace(up=up, down=down))


# --- interpreted ----------------------------------------------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "pairs": {"tokens": 1, "choices": 3, "hidden": 40, "inner": 16, "count": 4, "groups": (128, 32), "biases": True},
    "no-whole-tiles": {"tokens": 1, "choices": 2, "hidden": 24, "inner": 21, "count": 4, "k": 3, "c_dtype": FP16},
    "sorted": {"tokens": 4, "choices": 2, "hidden": 40, "inner": 16, "count": 3, "activation": Activation("gelu_tanh")},
    "weights-on-input": {"tokens": 2, "choices": 1, "hidden": 16, "inner": 16, "count": 3, "weights_on_input": True}
    | {"activation": Activation("relu2_no_mul"), "dtype": BF16, "k": 1, "ids_dtype": torch.int64},
    "trellis-pairs": {"tokens": 1, "choices": 2, "hidden": 160, "inner": 32, "count": 4, "trellises": (True, True)}
    | {"groups": (128, 32)},
    "trellis-sorted": {"tokens": 4, "choices": 2, "hidden": 96, "inner": 32, "count": 3, "trellises": (True, True)}
    | {"k": 1, "c_dtype": FP16, "groups": (64, 256)},
}
SIZES = [(1, 4, 264, 80, 5), (30, 2, 72, 64, 4), (2, 1, 100, 37, 6), (9, 3, 136, 48, 5), (100, 3, 40, 20, 4)]
SIZES += [(70, 1, 65, 33, 3), (8, 2, 136, 144, 9)]
SCHEMES = [(4, 32, 256), (3, 64, 64), (2, 128, 32), (1, 256, 128), (4, 64, 32), (2, 128, 128), (3, 32, 64)]
MANY = [
    dict(zip(("tokens", "choices", "hidden", "inner", "count"), sizes, strict=True))
    | {"k": k, "groups": groups, "dtype": dtype, "c_dtype": (INT8, dtype)[sizes[0] // 2 % 2]}
    | {"activation": Activation(name, limit=0.7), "biases": dtype == FP16, "weights_on_input": sizes[0] == 2}
    for sizes, (k, *groups), name, dtype in zip(SIZES, SCHEMES, NAMES, [FP16, BF16] * 4, strict=False)
]
MANY += [
    {
        "tokens": tokens,
        "choices": 2,
        "hidden": 160,
        "inner": 64,
        "count": 4,
        "k": k,
        "groups": groups,
        "trellises": (True, True),
    }
    | {"dtype": dtype, "c_dtype": c_dtype, "biases": k > 1}
    for tokens, k, groups, dtype, c_dtype in (
        (2, 3, (256, 64), BF16, INT8),
        (1, 1, (32, 128), BF16, BF16),
        (30, 2, (64, 32), FP16, INT8),
        (90, 3, (128, 256), BF16, BF16),
    )
]


def some_case(kwargs: dict[str, Any]) -> Case:
    """Any experts are chosen, some several times, and some ids are of none."""
    case = random_case(**{"dtype": FP16, **kwargs})
    count, generator = len(case.up.dense), torch.Generator().manual_seed(1)
    case.ids.copy_(torch.randint(-1, count + 1, case.ids.shape, generator=generator))
    case.ids[-1, -1] = 1
    return case


def interpret(kwargs: dict[str, Any], arch: int = 86) -> None:
    case = some_case(kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_moe, "machine", lambda _: (1, arch))
        compare(case, multiply(case))


def interpret_routing() -> None:
    generator = torch.Generator().manual_seed(0)
    for pairs, experts, tokens in ((1, 1, 8), (50, 4, 8), (3, 9, 16), (1500, 3, 64)):
        ids = torch.randint(-1, experts + 2, (pairs,), generator=generator, dtype=torch.int32)
        routing = triton_routing.new_routing(ids, experts, tokens)
        routing.blocks.fill_(-7)
        triton_routing.route(ids, routing, tokens)
        assert_routed(ids, routing, experts, tokens)


def assert_routed(ids: torch.Tensor, routing: triton_routing.Routing, experts: int, tokens: int) -> None:
    """The pairs of `ids` are in blocks as they should be."""
    found = []
    for expert, first, end in routing.blocks.tolist():
        here = routing.order[first : min(end, first + tokens)]
        assert (ids[here] == expert).all()
        found += here.tolist()
    assert sorted(found) == ((ids >= 0) & (ids < experts)).nonzero().flatten().tolist()
    assert all(a < b for a, b in pairwise(found) if ids[a] == ids[b])
    assert not routing.blocks[sum(cdiv(int((ids == e).sum()), tokens) for e in range(experts)) :].any()


def test_few_tokens_on_an_architecture_without_binary_tensor_cores(interpreter: ProcessPoolExecutor):
    interpreter.submit(interpret, CASES["weights-on-input"], 120).result()


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [*CASES.values(), *MANY], ids=str)
def test_interpreted_kernels_of_any_experts_give_what_dense_ones_give(
    kwargs: dict[str, Any], interpreter: ProcessPoolExecutor
):
    interpreter.submit(interpret, kwargs).result()
    interpreter.submit(interpret, kwargs, 120).result()


def test_pairs_are_sorted_into_blocks_of_one_expert(interpreter: ProcessPoolExecutor):
    interpreter.submit(interpret_routing).result()


# --- compiled for sm_86, executed on the CPU ------------------------------------------------------------------------


class Emulated:
    """A kernel whose launches are compiled as on an RTX 3090, from the same arguments, and executed on the CPU."""

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel = kernel

    def run(self, *args: object, grid: tuple[int, ...], warmup: bool, num_warps: int, **rest: Any) -> None:
        assert not warmup
        compiled = self.kernel.run(*args, grid=grid, warmup=True, num_warps=num_warps, **rest)
        assert not read_cubin(compiled.asm["cubin"]).spills
        types = compiled.src.signature
        given = [arg for name, arg in zip(self.kernel.arg_names, args, strict=False) if types[name] != "constexpr"]
        # a view of the first columns starts where the whole does
        given = [arg._base if isinstance(arg, torch.Tensor) and not arg.is_contiguous() else arg for arg in given]
        report = launch(compiled.asm["ptx"], grid, 32 * num_warps, given, compiled.metadata.shared)
        assert not report.uninitialised
        assert not report.races
        assert not report.partial_warps


KERNELS: list[tuple[ModuleType, str]] = [
    (triton_activation, "activation_kernel"),
    (triton_expert_gemm, "expert_gemm_kernel"),
    (triton_expert_gemv, "expert_gemv_kernel"),
    (triton_routing, "combine_kernel"),
    (triton_routing, "count_kernel"),
    (triton_routing, "place_kernel"),
]


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", OfflineDriver())
    monkeypatch.setattr(tiled_moe, "machine", lambda _: (1, 86))
    for module, name in KERNELS:
        kernel = getattr(module, name)
        monkeypatch.setattr(kernel, "device_caches", kernel.device_caches.copy())
        monkeypatch.setattr(module, name, Emulated(kernel))


@pytest.mark.parametrize("name", ["pairs", "sorted", "trellis-pairs", "trellis-sorted"])
def test_ptx_for_rtx_3090_gives_what_dense_experts_give(name: str, emulator: None):
    case = some_case(CASES[name])
    compare(case, multiply(case))


def test_what_is_not_finite_stays_in_its_token(emulator: None, monkeypatch: pytest.MonkeyPatch):
    """Also where tokens come in several turns, as their outputs don't fit the scratch memory."""
    case = some_case({**CASES["pairs"], "tokens": 3})
    case.x[0, 3], case.ids[:2], case.ids[2] = float("nan"), 1, -1
    monkeypatch.setattr(tiled_moe, "SCRATCH_BYTES", 4 * case.x.shape[1] * case.ids.shape[1])
    y = multiply(case)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()
    assert not y[2].any()


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [CASES["no-whole-tiles"], CASES["weights-on-input"], *MANY], ids=str)
def test_ptx_for_any_experts_gives_what_dense_ones_give(kwargs: dict[str, Any], emulator: None):
    case = some_case(kwargs)
    compare(case, multiply(case))


# --- for real -------------------------------------------------------------------------------------------------------


def on_gpu(case: Case) -> Case:
    """With prepared experts."""
    up, down = (
        prepare_experts(e.stored, e.group_size, e.dense.shape[2], case.x.dtype, "cuda") for e in (case.up, case.down)
    )
    moved = {name: value.cuda() for name, value in case._asdict().items() if isinstance(value, torch.Tensor)}
    return case._replace(up=up, down=down, **moved)


@pytest.mark.gpu
@pytest.mark.parametrize("kwargs", [*CASES.values(), *MANY], ids=str)
def test_experts_on_a_gpu_give_what_dense_ones_give(kwargs: dict[str, Any]):
    case = some_case(kwargs)
    compare(case, moe(*on_gpu(case)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 40, 400, 3000])
def test_experts_of_common_sizes_on_a_gpu_give_what_dense_ones_give(tokens: int):
    case = some_case({"tokens": tokens, "choices": 4, "hidden": 512, "inner": 192, "count": 32, "groups": (128, 64)})
    case.ids[0] = 31
    compare(case, moe(*on_gpu(case)))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 40])
def test_experts_replay_from_a_cuda_graph_with_another_routing(tokens: int):
    case = on_gpu(some_case({"tokens": tokens, "choices": 2, "hidden": 256, "inner": 64, "count": 8}))
    moe(*case)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe(*case)
    case.x.normal_()
    case.ids.random_(-1, 8)
    graph.replay()
    assert torch.equal(y, moe(*case))
