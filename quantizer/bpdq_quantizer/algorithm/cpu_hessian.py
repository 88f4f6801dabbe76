"""Sums of products of inputs in bf16 on CPUs that multiply them: cpu_hessian.cpp, compiled for this machine at first
use. They are as exact as products in fp32, and take 0.4 of the time (`hessian`)."""

import ctypes
import functools
from pathlib import Path

from torch import Tensor

from bpdq_kernels.compiled import instruction_set, library_or_none, load_library

ISAS = ("avx512_bf16", "avx512_vbmi", "avx512_amx")
_SOURCE = Path(__file__).with_name("cpu_hessian.cpp")


def open_library(isa: str) -> ctypes.CDLL:
    """The library for one of ISAS. Raises as `bpdq_kernels.compiled.compile_library`."""
    library = load_library(_SOURCE, isa)
    library.bpdq_add_products.restype = None
    library.bpdq_add_products.argtypes = [
        *[ctypes.c_int64] * 3,
        *[ctypes.c_void_p] * 2,
        ctypes.c_float,
        ctypes.c_void_p,
    ]
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library for this machine; None where there can be none, after one line in the log if that is for want of a
    compiler."""
    if instruction_set() not in ISAS:
        return None
    return library_or_none(open_library, "Hessians take twice as long on this CPU, as their products in bf16")


def add_products(S: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """Add alpha a^T b to S [M, N] in place, where there is a `library`. S: fp32, contiguous; a [T, M], b [T, N]: bf16.

    If a is b, what is above the diagonal may be left as it is.
    """
    square, b = a is b, b.contiguous()
    a = b if square else a.contiguous()
    pointers = a.data_ptr(), b.data_ptr()
    library().bpdq_add_products(len(b), *S.shape, *pointers, alpha, S.data_ptr())
