"""One solved matrix: what is asked of it beforehand, what is stored of it, and what is reported."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bpdq_kernels import layout, trellis
from bpdq_kernels.format import Scheme, is_finite
from bpdq_kernels.layout import Stored
from bpdq_quantizer.algorithm.solver import Solution, Solve
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.stream import Streamed, solved
from bpdq_quantizer.model.weights import check_numbers


@dataclass
class LayerReport:
    """A quantized Linear, embedding or LM head. loss: tr((W - W_hat) H (W - W_hat)^T) with H = (2/n) X X^T, which is
    twice the mean squared output error per token, summed over outputs; relative_error: loss / tr(W H W^T); seconds: a
    Linear's are its share of its stage's; tokens: that H is of, an expert's those that were routed to it."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    coefficient_bits: int
    code: str
    bits_per_weight: float
    loss: float
    relative_error: float
    damping: float
    seconds: float
    tokens: int


def check_finite(weights: dict[str, Tensor], *statistics: Tensor) -> None:
    """Raise InputError for NaN or infinity in the weights, by name, or in statistics of their inputs: H, and C."""
    if not all(is_finite(statistic) for statistic in statistics):
        first = next(iter(weights)).removesuffix(".weight")
        raise InputError(f"{first}: its calibration inputs hold NaN or infinity: check the model and its dtype")
    check_numbers(weights)


def check_output(source: Streamed, index: int, model: str, output: Tensor) -> None:
    """Raise InputError for NaN or infinity in what block `index`, which is loaded, gives in `model`, as it is called;
    with the weight that holds it."""
    if is_finite(output):
        return
    weights = {f"{name}.weight": weight.matrix for name, weight in solved(source, index).items()}
    check_finite(weights)
    remedy = "convert the model to bfloat16 first" if output.dtype == torch.float16 else "check the model and its dtype"
    block = f"{source.prefix}.{index}"
    raise InputError(f"{next(iter(weights), block)}: {model} computes NaN or infinity in its block: {remedy}")


def solve_checked(names: Sequence[str], W: Tensor, H: Tensor, scheme: Scheme, solve: Solve) -> list[Solution]:
    """Quantize W [N, K], rows that share the inputs with Hessian H [K, K], or several such matrices, W [E, N, K] with
    H [E, K, K]; names: of the first layer of each.

    Raises InputError for coefficients that overflow their dtype.
    """
    found = solve(W, H, scheme.bits, scheme.group_size, scheme.coefficient_bits, trellis=scheme.trellis)
    solutions = [found] if W.ndim == 2 else [found.of(i) for i in range(len(W))]
    for name, solution in zip(names, solutions, strict=True):
        coefficients = solution.c if solution.s is None else solution.s
        if not is_finite(coefficients):
            raise InputError(
                f"{name}: its coefficients overflow {coefficients.dtype}: convert the model to bfloat16 first"
            )
    return solutions


def stored(solution: Solution, scheme: Scheme, rows: slice = slice(None)) -> Stored:
    """The tensors of some rows of a solution, on its device."""
    B, s = layout.pack_codes(solution.codes[rows], scheme.planes), solution.s
    if scheme.trellis:
        B = trellis.stored(B)
    return Stored(B, solution.c[..., rows].contiguous(), None if s is None else s[:, rows].contiguous())


def layer_report(
    name: str,
    shape: tuple[int, int],
    scheme: Scheme,
    loss: float,
    energy: float,
    damping: float,
    seconds: float,
    tokens: int,
) -> LayerReport:
    """The report of a matrix of `shape` (outputs, inputs); energy: tr(W H W^T)."""
    out_features, in_features = shape
    return LayerReport(
        name=name,
        in_features=in_features,
        out_features=out_features,
        bits=scheme.bits,
        group_size=scheme.group_size,
        coefficient_bits=scheme.coefficient_bits,
        code=scheme.code,
        bits_per_weight=8 * scheme.stored_bytes(*shape) / (out_features * in_features),
        loss=loss,
        relative_error=loss / energy if energy else 0.0,
        damping=damping,
        seconds=seconds,
        tokens=tokens,
    )
