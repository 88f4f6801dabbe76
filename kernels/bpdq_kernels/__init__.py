"""Bit-planes times activations: layout, oracle and kernels for BPDQ weights. Needs torch; Triton on CUDA only."""

from bpdq_kernels.activation import Activation
from bpdq_kernels.moe import PreparedExperts, moe, prepare_experts
from bpdq_kernels.ops import Prepared, embedding, linear, prepare, stored_linear
from bpdq_kernels.reference import dequantize
from bpdq_kernels.warm import warm_up, warm_up_embedding, warm_up_experts

__all__ = [
    "Activation",
    "Prepared",
    "PreparedExperts",
    "dequantize",
    "embedding",
    "linear",
    "moe",
    "prepare",
    "prepare_experts",
    "stored_linear",
    "warm_up",
    "warm_up_embedding",
    "warm_up_experts",
]
