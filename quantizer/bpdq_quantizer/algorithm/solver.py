"""A whole Linear: group after group, with the error of each group propagated to the ones after it (BPDQ, alg. 1)."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bpdq_kernels.layout import WORD
from bpdq_kernels.trellis import chain_order
from bpdq_quantizer.algorithm.grid import Start, range_start, residual_start
from bpdq_quantizer.algorithm.groups import quantize_group, takes_batches
from bpdq_quantizer.algorithm.hessian import live_mean, upper_factor
from bpdq_quantizer.algorithm.in_turn import solve_in_turn
from bpdq_quantizer.algorithm.order import Order, group_aware_order, in_order
from bpdq_quantizer.algorithm.products import matmul
from bpdq_quantizer.algorithm.refine import add_product, dequantize_columns, refine
from bpdq_quantizer.algorithm.rounding import stored_coefficients
from bpdq_quantizer.algorithm.solution import Solution, joined, joined_rows

STARTS = (range_start, residual_start)


# W [N, K] or [E, N, K], H [K, K] or [E, K, K], bits, group_size, coefficient_bits, and `covariances` where outputs' are
# known: `quantize_linear` with its other options decided, here or elsewhere (`run.workers`)
Solve = Callable[..., Solution]


def each_or_all(solve: Callable[..., Solution]) -> Callable[..., Solution]:
    """`solve` for several matrices, W [E, N, K] with H [E, K, K]: at once where that saves launches, else one after the
    other, so that on a CPU a matrix gets the same tensors alone and among others. At once, groups must be alike."""

    @functools.wraps(solve)
    def solve_any(W: Tensor, H: Tensor, bits: int, group_size: int, *args: Any, **options: Any) -> Solution:
        starts, trellis = options.get("starts", STARTS), options.get("trellis", False)
        at_once = takes_batches(W.device, bits + trellis, group_size, starts, trellis)
        if W.ndim == 2 or (at_once and W.shape[-1] % group_size == 0):
            return solve(W, H, bits, group_size, *args, **options)
        each = [solve(w, h, bits, group_size, *args, **options) for w, h in zip(W, H, strict=True)]
        return joined(each, torch.stack)

    return solve_any


@each_or_all
def quantize_linear(
    W: Tensor,
    H: Tensor,
    bits: int,
    group_size: int,
    coefficient_bits: int = 16,
    *,
    covariances: Sequence[Tensor] = (),
    rows: int | None = None,
    **options: Any,
) -> Solution:
    """Quantize W [N, K] against the Hessian H [K, K] of its inputs (fp32, symmetric, not modified), or several such
    matrices, W [E, N, K] with H [E, K, K]; options: of `row_solver`.

    Rows are independent given H, so the rows of several Linears that read the same input may be stacked, unless
    `covariances` of chunks of the outputs say what they do together (`solve_in_turn`). rows: that are solved at a time,
    by default all; of `covariances` a chunk's.
    """
    solve = row_solver(H, bits, group_size, coefficient_bits, **options)
    if covariances:
        return solve_in_turn(solve, covariances, W, group_size, apart=rows is not None)
    return joined_rows([solve(part) for part in W.split(rows or W.shape[-2], -2)])


def row_solver(
    H: Tensor,
    bits: int,
    group_size: int,
    coefficient_bits: int = 16,
    *,
    iterations: int = 10,
    refinements: int = 2,
    alpha: float = 1e-6,
    damping: float = 0.01,
    starts: Sequence[Start] = STARTS,
    dtype: torch.dtype = torch.bfloat16,
    trellis: bool = False,
) -> Callable[[Tensor], Solution]:
    """What quantizes rows W [N, K] against H [K, K], or W [E, N, K] against H [E, K, K], which is factorized once.

    `starts`: initial grids of a group, of which every row keeps the one with the best outcome. The paper's algorithm is
    `refinements` = 0, `damping` = 0.05, `starts` = (paper_start,); more rounds go on with `algorithm.refine`. dtype: of
    coefficients in 16 bits. Those in 8 are first rounded in the joint fit: rounded in the pass, they cost 0.3 (k = 2)
    to 1.3 % (k = 4) of the refined loss. trellis: codes have `bits` + 1 bits, of the planes that are multiplied
    (`bpdq_kernels.trellis`); K is a multiple of 32.
    """
    metric = metric_of(H, group_size, damping, trellis)
    planes = bits + trellis
    eight = coefficient_bits == 8
    first, last = (torch.float32, torch.int8) if eight else (dtype, dtype)

    def solve(W: Tensor) -> Solution:
        target = metric.target(W)
        found = one_pass(target, metric.R, metric.order, planes, iterations, alpha, first, starts, trellis)
        HW = matmul(metric.H, target)
        energy = metric.undamped((HW * target).sum(-2), target)
        codes, c, loss, s = refine(*found, target, HW, metric.H, group_size, refinements, alpha, last, trellis)
        loss = metric.undamped(loss, target - dequantize_columns(codes, c, group_size)).clamp(min=0)
        codes = in_order(codes, metric.inputs.argsort(), -2).mT.contiguous()
        c = stored_coefficients(c, s.unsqueeze(-3) if eight else None, last)
        return Solution(codes, c, loss, energy, metric.damping, s.bfloat16() if eight else None)

    return solve


class Metric(NamedTuple):
    """What the rows of a matrix, or of several, are solved in, with the inputs in the order of `inputs` [K].

    H: [..., K, K], damped by d [...] on its diagonal, where `used` [..., K] says which inputs any calibration token
    ever used; R [..., K, K]: its factor in `order`; damping: as `upper_factor` chose it.
    """

    inputs: Tensor
    H: Tensor
    d: Tensor
    used: Tensor
    order: Order
    R: Tensor
    damping: Tensor

    def target(self, W: Tensor) -> Tensor:
        """W [..., N, K] of any float dtype as fp32 [..., K, N], zero for inputs that are not used."""
        target = in_order(W, self.inputs, -1).to(torch.float32, copy=True).mT.contiguous()
        return target.masked_fill_(~self.used.unsqueeze(-1), 0)

    def undamped(self, loss: Tensor, error: Tensor) -> Tensor:
        """What `loss` [..., N] of an error [..., K, N], or the energy of a target, is without d."""
        return loss - self.d.unsqueeze(-1) * error.square().sum(-2)


def metric_of(H: Tensor, group_size: int, damping: float, trellis: bool = False) -> Metric:
    """That of the Hessian H [..., K, K], which is not modified, in groups of K; trellis: in the order of chains."""
    K = H.shape[-1]
    inputs = chain_order(K, H.device) if trellis else torch.arange(K, device=H.device)
    H = in_order(in_order(H, inputs, -2), inputs, -1) if trellis else H.clone()
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    used, mean = diagonal != 0, live_mean(diagonal)
    order = group_aware_order(diagonal, group_size, WORD if trellis else 1)
    R, damping = upper_factor(H, order.columns, damping)
    d = damping.to(diagonal) * mean
    diagonal.add_(d.unsqueeze(-1))
    return Metric(inputs, H, d, used, order, R, damping)


def one_pass(
    target: Tensor,
    R: Tensor,
    order: Order,
    bits: int,
    iterations: int,
    alpha: float,
    dtype: torch.dtype,
    starts: Sequence[Start],
    trellis: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., K, N], c [..., ceil(K/G), k+1, N] and loss [..., N] of target [..., K, N] under R R^T: group after
    group in `order`, which is that of R [..., K, K].

    The loss is |R^T D|^2 for errors D = W - W_hat. In a group that is |R_gg^T (W + R_gg^-T S - W_hat)|^2, where S is
    what the errors of the groups before add to the group's coordinates.
    """
    errors = in_order(target, order.columns, -2)  # the weights of groups to come
    codes, coefficients, norms = [], [], []
    blocks = diagonal_blocks(R, order.sizes)
    start = 0
    for size, U in zip(order.sizes, blocks, strict=True):
        block = slice(start, start + size)
        S = matmul(R[..., :start, block].mT, errors[..., :start, :])
        weight = add_product(errors[..., block, :], U.mT, S)
        code, c, E = quantize_group(weight, U, bits, iterations, alpha, dtype, starts, trellis)
        codes.append(code)
        coefficients.append(c)
        norms.append(torch.linalg.vector_norm(E, dim=-2))
        torch.matmul(U.mT, E - S, out=errors[..., block, :])
        start = block.stop
    del errors
    loss = torch.stack(norms).square().sum(0)
    codes = in_order(torch.cat(codes, -2), order.columns.argsort(-1), -2)
    return codes, in_order(torch.stack(coefficients, -3), order.groups.argsort(-1), -3), loss


def diagonal_blocks(R: Tensor, sizes: list[int]) -> list[Tensor]:
    """The inverses [..., g, g] of R's diagonal blocks of these sizes; those of one size in one operation."""
    starts = [0, *itertools.accumulate(sizes)]
    blocks = [R[..., start:stop, start:stop] for start, stop in itertools.pairwise(starts)]
    inverses = {}
    for size in set(sizes):
        alike = torch.stack([block for block in blocks if block.shape[-1] == size])
        inverse = torch.linalg.solve_triangular(alike, torch.eye(size, device=R.device), upper=True)
        inverses[size] = iter(inverse.unbind())
    return [next(inverses[size]) for size in sizes]
