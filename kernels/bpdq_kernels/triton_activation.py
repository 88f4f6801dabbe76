"""An expert's activation, for code that Triton compiles: `bpdq_kernels.activation`, in fp32.

It is a part of the kernels that multiply with the first matrix, but where gate and up are not in whole tiles."""

import triton
import triton.language as tl
from torch import Tensor

from bpdq_kernels.activation import Activation
from bpdq_kernels.layout import cdiv

COLUMNS = 256  # outputs of a program


@triton.jit
def activate(gate: tl.tensor, up: tl.tensor, NAME: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr) -> tl.tensor:
    """The activation of a gate's outputs and those of up; LIMIT: None for none."""
    ALL: tl.constexpr = tl.PropagateNan.ALL
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT, propagate_nan=ALL)
        up = tl.maximum(tl.minimum(up, LIMIT, propagate_nan=ALL), -LIMIT, propagate_nan=ALL)
    if NAME == "swigluoai":
        return gate * sigmoid(ALPHA * gate) * (up + 1)
    else:
        return activate_one(gate, NAME) * up


@triton.jit
def activate_one(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """f(x), by the name of an activation with or without a gate; "none" is the identity."""
    if NAME == "silu" or NAME == "silu_no_mul":
        return x * sigmoid(x)
    elif NAME == "gelu" or NAME == "gelu_no_mul":
        return x * 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu2_no_mul":
        above = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return above * above
    else:
        tl.static_assert(NAME == "none")
        return x


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    return 1 / (1 + tl.exp(-x))


@triton.jit(do_not_specialize_on_alignment=["y_ptr"])
def activation_kernel(
    h_ptr: tl.tensor,
    y_ptr: tl.tensor,
    N: tl.tensor,
    stride_y: tl.tensor,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.load(h_ptr + row * (2 * N) + n, n < N, 0)
    up = tl.load(h_ptr + row * (2 * N) + N + n, n < N, 0)
    y = activate(gate, up, ACTIVATION, ALPHA, LIMIT)
    tl.store(y_ptr + row * stride_y + n, y.to(y_ptr.dtype.element_ty), n < N)


def constants(activation: Activation | None, fused: bool) -> dict[str, bool | str | float | None]:
    """Of the kernels that end with it; fused: its gate is multiplied there. None: they end without one."""
    name, alpha, limit = activation or Activation("none")
    limited = fused and limit != float("inf")
    return {"GATED": fused, "ACTIVATION": name, "ALPHA": alpha, "LIMIT": limit if limited else None}


def launch(h: Tensor, activation: Activation, y: Tensor, compile_only: bool = False) -> None:
    """Write the activation of h [P, 2N] fp32, gate first, into y [P, N], whose rows may be apart."""
    rows, n = y.shape
    named = constants(activation, True)
    activation_kernel.run(
        h,
        y,
        n,
        y.stride(0),
        ACTIVATION=named["ACTIVATION"],
        ALPHA=named["ALPHA"],
        LIMIT=named["LIMIT"],
        COLUMNS=COLUMNS,
        grid=(rows, cdiv(n, COLUMNS)),
        warmup=compile_only,
        num_warps=4,
    )
