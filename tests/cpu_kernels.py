"""The CPU kernels, one at a time."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from unittest import mock

from bpdq_kernels import cpu
from bpdq_kernels.compiled import FLAGS, instruction_set

EMULATED = "emulated AMX"
ISAS = list(FLAGS)[list(FLAGS).index(instruction_set()) :]
ISAS += [EMULATED] * ("avx512_vbmi" in ISAS)
KERNELS = ["lookup", "multiply"]
ROUNDING = ("avx512_amx", "avx512_vbmi", EMULATED, "avx2")  # activations of 16 bits
_FEW = {"lookup": 1 << 30, "multiply": 0}


@functools.cache
def opened(isa: str) -> CDLL:
    return cpu.open_library("avx512_vbmi", ("-DBPDQ_EMULATED_TILES",)) if isa == EMULATED else cpu.open_library(isa)


@contextmanager
def using(isa: str, kernel: str | None = None) -> Iterator[None]:
    """Multiply on the instruction set `isa`, with `kernel` or what suits each number of tokens."""
    few = cpu.FEW if kernel is None else _FEW[kernel]
    native = cpu.library()
    cpu.use(opened(isa), few)
    try:
        with mock.patch.multiple(cpu, library=lambda: opened(isa), FEW=few):
            yield
    finally:
        cpu.use(native)
