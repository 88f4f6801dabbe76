"""The solver's pieces timed on a device, and what a stage of any size should take by them.

A stage [N, K] factorizes its Hessian once. Its rows take up to sixteen turns (`in_turn.steps`), each a pass over ceil(K
/ G) groups, and are refined in chunks of `refine.rows_at_once`. A group takes a few launches (`triton_solver`), a chunk
some for each of its groups.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu_part import Row
from benchmarks.random_models import STD, generator
from benchmarks.shapes import Model
from bpdq_kernels.format import Scheme
from bpdq_quantizer.algorithm.groups import descend_group, quantize_group
from bpdq_quantizer.algorithm.hessian import (
    accumulate,
    accumulate_shift,
    inverse_factor,
    shift,
    symmetrize,
    upper_factor,
)
from bpdq_quantizer.algorithm.in_turn import CHUNK, steps
from bpdq_quantizer.algorithm.refine import refine, rows_at_once
from bpdq_quantizer.algorithm.solver import STARTS, quantize_linear
from bpdq_quantizer.fit.memory import stage_bytes
from bpdq_quantizer.run.options import SOLVERS

SCHEME = Scheme(2, 128, 8)
WIDTH = SCHEME.bits + 1
ITERATIONS = 10  # default of `bpdq quantize`
SOLVER = SOLVERS["refined"]
WINDOW = 2048  # tokens
WINDOWS = 8
REFINED_INPUTS = 8192  # up to which a refinement is timed
DIRECTIONS = 64  # that many channels of hidden states move together


class Pieces(NamedTuple):
    """Seconds of the solver's pieces. factor, refine, token: by inputs K; group: by rows N; token: of calibration."""

    factor: dict[int, float]
    refine: dict[int, float]
    token: dict[int, float]
    group: dict[int, float]


def stage_seconds(n: int, k: int, pieces: Pieces) -> float:
    """What the pieces say of a stage with weights [n, k]."""
    groups, chunks = -(-k // SCHEME.group_size), -(-n // rows_at_once(k, WIDTH))
    return pieces.factor[k] + groups * steps(n) * pieces.group[n] + chunks * pieces.refine[k]


def random_inputs(tokens: int, k: int, random: torch.Generator) -> Tensor:
    """bf16 [1, tokens, k]: channels of unequal size, and a few directions that most of the energy is in."""
    scales = generator(random.device, k)
    device = random.device
    channels = torch.randn(k, device=device, generator=scales).mul_(0.5).exp_()
    directions = torch.randn(DIRECTIONS, k, device=device, generator=scales)
    strength = 4 / torch.arange(1, DIRECTIONS + 1, device=device)
    x = torch.randn(tokens, k, device=device, generator=random) * channels
    x += (torch.randn(tokens, DIRECTIONS, device=device, generator=random) * strength) @ directions
    return x.bfloat16()[None]


def random_hessian(k: int, device: str, windows: int, window: int) -> tuple[Tensor, float]:
    """H [k, k] fp32 of random inputs, and the seconds per token of it and of a cross term as large."""
    random, tokens = generator(device, 0), windows * window
    H, C = (torch.zeros(k, k, device=device) for _ in range(2))
    seconds = []
    for _ in range(windows):
        x = random_inputs(window, k, random)
        added = timed(partial(accumulate, H, x, tokens))
        seconds.append(added + timed(partial(accumulate_shift, C, shift(1.01 * x, x), x, tokens)))
    return symmetrize(H), min(seconds) / window


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call, until the device is done."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def random_weights(n: int, k: int, device: str) -> Tensor:
    return torch.empty(n, k, device=device, dtype=torch.bfloat16).normal_(std=STD, generator=generator(device, 1))


def measure_pieces(models: dict[str, Model], device: str) -> tuple[Pieces, Row]:
    """Time the pieces for all layers of the models; also as rows of a report."""
    layers = [layer for model in models.values() for layer in model.layers]
    inputs = sorted({layer.in_features for layer in layers})
    pieces = Pieces({}, {}, {}, {})
    windows, window = (WINDOWS, WINDOW) if inputs[-1] > WINDOW else (2, 256)
    small, block = one_group(device)
    launch_group(block, 64, device)  # the first calls load libraries
    launch_refinement(small, 64, device)
    for k in inputs:
        H, pieces.token[k] = random_hessian(k, device, windows, window)
        pieces.factor[k] = timed(partial(upper_factor, H, torch.arange(k, device=device), SOLVER["damping"]))
        rows = min(rows_at_once(k, WIDTH), max(layer.out_features for layer in layers if layer.in_features == k))
        if k <= REFINED_INPUTS:
            pieces.refine[k] = timed(partial(launch_refinement, H, rows, device))
        else:  # products of H with fewer rows the more inputs: proportional to the inputs
            widest = max(measured for measured in pieces.refine if measured <= REFINED_INPUTS)
            pieces.refine[k] = pieces.refine[widest] * k / widest
        del H
    for n in sorted({layer.out_features for layer in layers}):
        pieces.group[n] = timed(partial(launch_group, block, -(-n // steps(n)), device))
    report = {
        "factor_s_by_inputs": pieces.factor,
        "refine_s_by_inputs": pieces.refine,
        "refined_rows_at_once_by_inputs": {k: rows_at_once(k, WIDTH) for k in inputs},
        "calibration_s_per_token_by_inputs": pieces.token,
        "group_s_of_a_turn_by_rows": pieces.group,
    }
    return pieces, report


def one_group(device: str) -> tuple[Tensor, Tensor]:
    """H of a group's inputs, and its factor U."""
    H, _ = random_hessian(SCHEME.group_size, device, 2, 256)
    U, _ = inverse_factor(H, torch.arange(SCHEME.group_size, device=device), SOLVER["damping"])
    return H, U


def launch_group(U: Tensor, n: int, device: str) -> None:
    """The paper's pass over one group of n rows."""
    W = random_weights(n, len(U), device).float().T.contiguous()
    quantize_group(W, U, SCHEME.bits, ITERATIONS, SOLVER["alpha"], torch.float32, STARTS)


def launch_refinement(H: Tensor, n: int, device: str) -> None:
    """The refinement of n rows from random planes."""
    k = len(H)
    W = random_weights(n, k, device).float().T.contiguous()
    codes = torch.randint(2**SCHEME.bits, (k, n), dtype=torch.uint8, device=device, generator=generator(device, 2))
    c = torch.zeros(-(-k // SCHEME.group_size), WIDTH, n, device=device)
    loss = torch.full((n,), torch.inf, device=device)
    refine(codes, c, loss, W, H @ W, H, SCHEME.group_size, SOLVER["refinements"], SOLVER["alpha"], torch.int8)


def measure_stage(n: int, k: int, device: str) -> Row:
    """A whole stage with weights [n, k]: seconds, and peak bytes beside what plan counts for it."""
    H, _ = random_hessian(k, device, WINDOWS, min(WINDOW, k))
    W = random_weights(n, k, device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    solve = {"iterations": ITERATIONS, **SOLVER, "covariances": random_covariances(n, device)}
    row: Row = {"shape": (n, k)}
    row["seconds"] = timed(
        lambda: quantize_linear(W, H, SCHEME.bits, SCHEME.group_size, SCHEME.coefficient_bits, **solve)
    )
    row["planned_bytes"] = stage_bytes(n, k)
    if device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def random_covariances(n: int, device: str) -> list[Tensor]:
    """G of n outputs, in chunks, with some directions in common."""
    found = []
    for part in torch.arange(n).tensor_split(-(-n // CHUNK)):
        g = torch.randn(DIRECTIONS, len(part), device=device, generator=generator(device, 4))
        found.append((g.T @ g / DIRECTIONS).add_(torch.eye(len(part), device=device)))
    return found


def launches(device: str) -> dict[str, int]:
    """CUDA kernels that solve a group in the paper's pass, and in one sweep of descent; zeros where the profiler may
    not count."""
    g, n = SCHEME.group_size, 1024
    H, U = one_group(device)
    W = random_weights(n, g, device).float().T.contiguous()
    c = torch.randn(WIDTH, n, device=device, generator=generator(device, 3))
    solve = partial(quantize_group, W, U, SCHEME.bits, ITERATIONS, SOLVER["alpha"], torch.float32, STARTS)
    return {"pass_per_group": kernels(solve), "sweep_per_group": kernels(partial(descend_group, W, W, H, c))}


def kernels(call: Callable[[], object]) -> int:
    """Kernels and copies that a call starts on the device."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.count for event in profile.key_averages() if event.device_type == on_device)
