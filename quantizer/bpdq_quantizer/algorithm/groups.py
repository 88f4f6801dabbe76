"""Groups solved by the fastest code for their device: C++ on a CPU, Triton on CUDA, else torch (`grid`)."""

import functools
import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from bpdq_quantizer.algorithm import chains, cpu_solver, equations, grid, rounding
from bpdq_quantizer.algorithm.grid import Start, paper_start

SHORT = 8192  # rows; torch splits an operation from 32768 elements on, and a column step has 2^k - 1 per row
_log = logging.getLogger(__name__)


@functools.cache
def triton_solver() -> ModuleType | None:
    """The module of kernels; None, after one line in the log, where Triton can't compile."""
    try:
        driver = importlib.import_module("triton").runtime.driver
        driver.active.get_current_target()  # compiles what loads kernels, by the system's C compiler
        return importlib.import_module("bpdq_quantizer.algorithm.triton_solver")
    except Exception as e:  # whatever its build raises
        _log.warning("quantizing takes a hundred times as many launches on this GPU, as Triton can't compile: %s", e)
    return None


def compiled_for(device: torch.device) -> bool:
    """Whether `cpu_solver` has its library there."""
    return device.type == "cpu" and cpu_solver.library() is not None


def solver_for(
    device: torch.device, bits: int, inputs: int, starts: Sequence[Start] = (), trellis: bool = False
) -> ModuleType:
    """The module whose `quantize_group` and `descend_group` solve groups of that many inputs on a device."""
    if starts and cpu_solver.supports(starts) and compiled_for(device):
        return cpu_solver
    if device.type == "cuda" and (kernels := triton_solver()) is not None:
        return kernels if kernels.supports(bits, inputs, starts, trellis) else grid
    return grid


def takes_batches(device: torch.device, bits: int, inputs: int, starts: Sequence[Start], trellis: bool = False) -> bool:
    """Whether groups of several matrices, with an axis in front, are solved there together."""
    return solver_for(device, bits, inputs, starts, trellis) not in (cpu_solver, grid)


@contextmanager
def threads_for(solver: ModuleType, rows: int) -> Iterator[None]:
    """One CPU thread for torch's loops over short columns. They are thousands of small operations; shared by several
    threads, each waits for the slowest core, which on a busy machine is a hundred times its own work."""
    threads = torch.get_num_threads()
    if solver is grid and rows < SHORT:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quantize_group(
    W: Tensor,
    U: Tensor,
    bits: int,
    iterations: int,
    alpha: float,
    dtype: torch.dtype,
    starts: Sequence[Start] = (paper_start,),
    trellis: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `grid.quantize_group`; of several matrices where the device `takes_batches`. trellis: the first two of `bits`
    planes are those of chains' paths, whose inputs come in order."""
    solver = solver_for(W.device, bits, W.shape[-2], starts, trellis)
    arguments = W, U, bits, iterations, alpha, dtype, starts
    with threads_for(solver, W.shape[-1]):
        if solver is grid:
            return grid.quantize_group(*arguments, chains.assign_chains if trellis else grid.assign_codes)
        return solver.quantize_group(*arguments, trellis)


def descend_group(W_hat: Tensor, V: Tensor, H: Tensor, c: Tensor, paths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `grid.descend_group`; of several matrices where the device `takes_batches`. With a trellis as
    `chains.descend_chains`, from the codes `paths`."""
    solver = solver_for(W_hat.device, c.shape[-2] - 1, W_hat.shape[-2], trellis=paths is not None)
    with threads_for(solver, W_hat.shape[-1]):
        if solver is not grid:
            return solver.descend_group(W_hat, V, H, c, paths)
        if paths is not None:
            return chains.descend_chains(paths, W_hat, V, H, c)
        return grid.descend_group(W_hat, V, H, c)


def solve_jointly(
    codes: Tensor, b: Tensor, H: Tensor, group_size: int, bits: int, alpha: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """As `equations.solve_jointly`."""
    if compiled_for(codes.device):
        return cpu_solver.solve_jointly(codes, b, H, group_size, bits, alpha, dtype)
    nearest = nearest_plane_for(codes.device)
    return equations.solve_jointly(codes, b, H, group_size, bits, alpha, dtype, nearest)


def nearest_plane_for(device: torch.device) -> rounding.NearestPlane:
    """What rounds solutions of equations on a device."""
    if device.type != "cuda" or triton_solver() is None:
        return rounding.nearest_plane
    return importlib.import_module("bpdq_quantizer.algorithm.triton_rounding").nearest_plane
