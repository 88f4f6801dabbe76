"""Groups solved by the fastest code for their device: C++ on a CPU, Triton on CUDA, else torch (`grid`)."""

import functools
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from bpdq_quantizer import cpu_solver, grid
from bpdq_quantizer.grid import Start, paper_start

_log = logging.getLogger(__name__)


@functools.cache
def triton_solver() -> ModuleType | None:
    """The module of kernels; None, after one line in the log, where Triton can't compile."""
    try:
        driver = importlib.import_module("triton").runtime.driver
        driver.active.get_current_target()  # compiles what loads kernels, by the system's C compiler
        return importlib.import_module("bpdq_quantizer.triton_solver")
    except Exception as e:  # whatever its build raises
        _log.warning("quantizing takes a hundred times as many launches on this GPU, as Triton can't compile: %s", e)
    return None


def solver_for(device: torch.device, bits: int, inputs: int, starts: Sequence[Start] = ()) -> ModuleType:
    """The module whose `quantize_group` and `descend_group` solve groups of that many inputs on a device."""
    if device.type == "cpu" and cpu_solver.supports(starts) and cpu_solver.library() is not None:
        return cpu_solver
    if device.type == "cuda" and (kernels := triton_solver()) is not None and kernels.supports(bits, inputs, starts):
        return kernels
    return grid


def quantize_group(
    W: Tensor,
    U: Tensor,
    bits: int,
    iterations: int,
    alpha: float,
    dtype: torch.dtype,
    starts: Sequence[Start] = (paper_start,),
) -> tuple[Tensor, Tensor, Tensor]:
    """As `grid.quantize_group`."""
    solver = solver_for(W.device, bits, len(W), starts)
    return solver.quantize_group(W, U, bits, iterations, alpha, dtype, starts)


def descend_group(W_hat: Tensor, V: Tensor, H: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """As `grid.descend_group`."""
    return solver_for(W_hat.device, len(c) - 1, len(W_hat)).descend_group(W_hat, V, H, c)
