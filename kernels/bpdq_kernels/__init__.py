"""Bit-planes times activations: layout, oracle and kernels for BPDQ weights. Needs torch; Triton on CUDA only."""

from bpdq_kernels.ops import Packed, embedding, linear, prepare, stored_linear
from bpdq_kernels.reference import dequantize

__all__ = ["Packed", "dequantize", "embedding", "linear", "prepare", "stored_linear"]
