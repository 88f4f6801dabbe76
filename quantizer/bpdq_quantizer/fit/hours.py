"""How long `bpdq quantize` takes: flops, bytes and launches of its parts, and what a machine needs for each."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from bpdq_kernels.compiled import instruction_set
from bpdq_quantizer.algorithm.grid import BATCH
from bpdq_quantizer.algorithm.groups import quantize_group, solve_jointly
from bpdq_quantizer.algorithm.hessian import accumulate, factorize
from bpdq_quantizer.algorithm.in_turn import CHUNK, steps
from bpdq_quantizer.algorithm.products import matmul
from bpdq_quantizer.algorithm.refine import CHUNK_ELEMENTS, SWEEPS, descend, rows_at_once
from bpdq_quantizer.algorithm.solver import STARTS

ITERATIONS, REFINEMENTS = 10, 2  # defaults of `bpdq quantize`
SMALLEST = 32  # groups of the widest systems
PROBE_SECONDS = 1  # of a part, but at least 3 calls
PASSES = 3  # of a block's weights over the calibration tokens: two quantized, one of the 16-bit block


class Work(NamedTuple):
    """What quantizing needs: flops of hessian, product, factor and forward; of the others, the units of `Rates`."""

    hessian: float = 0.0
    product: float = 0.0
    factor: float = 0.0
    forward: float = 0.0
    groups: float = 0.0
    tables: float = 0.0
    systems: float = 0.0
    columns: float = 0.0

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))


class Rates(NamedTuple):
    """A core's seconds for one unit of each part of `Work`. Flops of Hessians, of fp32 products, of a Cholesky
    factorization and of 16-bit forward passes; groups: weights x (k+1) x G of the pass over groups; tables: rows x K^2
    x k of the joint equations; systems: rows x n^3 of their solution, n = (k+1) K/G; columns: weights x (k+1) x G of a
    sweep of descent."""

    hessian: float
    product: float
    factor: float
    forward: float
    groups: float
    tables: float
    systems: float
    columns: float


# one core of an AMD EPYC of 2021 (Zen 3, AVX2, 90 Gflop/s in fp32 products), as `probe` finds them
EPYC = Rates(
    hessian=1.2e-11,
    product=1.13e-11,
    factor=2.3e-11,
    forward=1.13e-11,
    groups=3.8e-10,
    tables=1.38e-11,
    systems=1.5e-11,
    columns=1.26e-10,
)


class Card(NamedTuple):
    """A GPU by its data sheet: bytes/s, dense flop/s with 16 and 32 bits; seconds of a launch; share: of the fp32 flops
    that the solver's own loops reach, an assumption, as a small matrix' factorization reaches a tenth of that."""

    name: str
    bytes: float
    half: float
    full: float
    launch: float = 7e-6
    share: float = 0.5


RTX_3090 = Card("RTX 3090", 936e9, 71e12, 35e12)


class Block(NamedTuple):
    """A decoder block. stages: (outputs, inputs) of Linears that are solved together; hessians: inputs of each Hessian
    that is taken; in_turn: whether rows make good each other's errors; writers: (outputs, inputs) of Linears that write
    to the residual stream."""

    stages: Sequence[tuple[int, int]]
    hessians: Sequence[int]
    in_turn: bool = True
    writers: Sequence[tuple[int, int]] = ()


def solver_work(n: int, k: int, planes: int, group_size: int, in_turn: bool = False) -> Work:
    """Of `quantize_linear` with its defaults on [n, k]; planes: that are multiplied, of a trellis one more than stored,
    whose paths cost as much as plain planes; in_turn: whether rows make good each other's errors."""
    size = min(group_size, k)
    unknowns = (planes + 1) * -(-k // group_size)
    products = (3 + 2 * REFINEMENTS) * n * k * k  # H W, the pass' errors (half of H), the gradients
    return Work(
        product=products + in_turn * min(n, CHUNK) * n * k,
        factor=k**3 / 3,
        groups=n * k * (planes + 1) * size,
        tables=REFINEMENTS * n * k * k * planes,
        systems=REFINEMENTS * n * unknowns**3,
        columns=REFINEMENTS * SWEEPS * n * k * (planes + 1) * size,
    )


def block_work(block: Block, planes: int, group_size: int, tokens: int, asymmetric: bool = True) -> Work:
    """Of a decoder block: its stages, Hessians and forward passes, and the correction for shifted inputs."""
    work = Work(forward=PASSES * 2 * tokens * sum(n * k for n, k in block.stages))
    for n, k in block.stages:
        work = work.plus(solver_work(n, k, planes, group_size, block.in_turn))
        if asymmetric:
            work = work.plus(Work(product=(2 + 2) * n * k * k))  # W C, two triangular systems
    for k in block.hessians:
        work = work.plus(Work(hessian=5 / 4 * tokens * k * k))
        if asymmetric:
            work = work.plus(Work(hessian=2 * tokens * k * k, factor=k**3 / 3))
    for n, k in block.writers if asymmetric else ():
        work = work.plus(Work(hessian=2 * tokens * n * k))
    return work


def seconds(work: Work, rates: Rates) -> float:
    """One core's."""
    return sum(amount * rate for amount, rate in zip(work, rates, strict=True))


def card_seconds(block: Block, planes: int, group_size: int, tokens: int, card: Card, at_once: int = 1) -> float:
    """A decoder block's on a GPU, by count; or an expert's, of which `at_once` share launches."""
    work, width = block_work(block, planes, group_size, tokens), planes + 1
    tables = work.tables / planes * width  # H X of planes and ones, half of H, two flops
    loops = 2 * ((len(STARTS) * ITERATIONS) * work.groups / 2 + work.columns / width / 2)
    flops = (work.forward + work.hessian) / card.half + (work.product + work.factor + tables) / card.full
    flops += (loops + work.systems / 3 / 5) / (card.share * card.full)
    launches, moved = 0, 0.0
    for n, k in block.stages:
        groups, times = -(-k // group_size), steps(n) if block.in_turn else 1
        together = at_once if k % group_size == 0 else 1
        fitted = min(BATCH, max(1, CHUNK_ELEMENTS // max((groups * width) ** 2, k * width)))
        rows = -(-n * together // times)
        chunks, fits = times * -(-rows // rows_at_once(k, width)), times * -(-rows // fitted)
        shared = 8 * times + REFINEMENTS * ((8 * SWEEPS + 3) * chunks + (6 + 6 * width) * fits)
        launches += groups * shared / together
        # a matrix [k, n] in fp32 is read and written by each group's propagation, each sweep's, and X^T (H X)
        moved += 4.0 * n * k * groups * (1 + REFINEMENTS * (SWEEPS + width))
    return flops + launches * card.launch + moved / card.bytes


def probe(planes: int, group_size: int) -> Rates:
    """This machine's rates for k and G, of one core, from small versions of the parts: some 20 seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _probe(planes, group_size, torch.Generator().manual_seed(0))
    finally:
        torch.set_num_threads(threads)


def _probe(planes: int, group_size: int, random: torch.Generator) -> Rates:
    k, n, width = 1024, 256, planes + 1
    x = torch.randn(2 * k, k, generator=random) * torch.randn(k, generator=random).mul(0.5).exp()
    H = x.T @ x / len(x)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.linalg.inv(H[:group_size, :group_size]), upper=True)
    W = torch.randn(k, n, generator=random)
    solved = [quantize_group(group, U, planes, 2, 1e-6, torch.bfloat16) for group in W.split(group_size)]
    codes, c = torch.cat([found[0] for found in solved]), torch.stack([found[1] for found in solved])
    b = torch.randn(2 * k // SMALLEST * width, n, generator=random)
    seconds = {
        "hessian": cpu_time(lambda: accumulate(torch.zeros_like(H), x[None].bfloat16(), len(x))),
        "product": cpu_time(lambda: matmul(x, H)),
        "factor": cpu_time(lambda: factorize(torch.block_diag(H, H))),
        "forward": cpu_time(lambda: half_product(x)),
        "groups": cpu_time(lambda: quantize_group(W[:group_size], U, planes, ITERATIONS, 1e-6, torch.bfloat16, STARTS)),
        "tables": cpu_time(lambda: solve_jointly(codes, b[: len(c) * width], H, group_size, planes, 1e-6, torch.int8)),
        "columns": cpu_time(lambda: descend(codes, c, W, H, group_size, SWEEPS)),
    }
    product, tables = seconds["product"] / (2 * len(x) * k * k), seconds["tables"] / (n * k * k * planes)
    wide = solve_jointly, codes.repeat(2, 1), b, torch.block_diag(H, H), SMALLEST, planes, 1e-6, torch.int8
    systems = cpu_time(lambda: wide[0](*wide[1:])) - tables * n * (2 * k) ** 2 * planes
    return Rates(
        hessian=seconds["hessian"] / (5 / 4 * len(x) * k * k),
        product=product,
        factor=seconds["factor"] / ((2 * k) ** 3 / 3),
        forward=seconds["forward"] / (2 * len(x) * k * k),
        groups=seconds["groups"] / (group_size * n * width * group_size),
        tables=tables,
        systems=max(0.0, systems) / (n * len(b) ** 3),
        columns=(seconds["columns"] - product * 2 * n * k * k) / (SWEEPS * W.numel() * width * group_size),
    )


def half_product(x: Tensor) -> Tensor:
    """A product of [K, K] as forward passes on this CPU multiply bf16."""
    weight = x[: x.shape[1]]
    if instruction_set() in ("avx2", "portable"):  # as `model.products`
        return x @ weight.bfloat16().float()
    return x.bfloat16() @ weight.bfloat16()


def cpu_time(call: Callable[[], object]) -> float:
    """Median CPU seconds of a call."""
    call()
    found = []
    while len(found) < 3 or (sum(found) < PROBE_SECONDS and len(found) < 15):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return median(found)
