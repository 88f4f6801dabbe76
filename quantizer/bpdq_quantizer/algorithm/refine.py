"""Refinement of a whole row after the paper's pass: what no group could know, all groups now correct.

The paper's pass fits a group's coefficients against that group's error alone and never revisits a decision. Here
both are undone in turn, under the full damped Hessian H and for each row on its own:

- `joint_fit`: planes fixed, W_hat is linear in all (k+1) ceil(K/G) coefficients of the row; solve for them together;
- `descend`: coefficients fixed, set column after column to the level that is best given all other columns.

Neither step can raise the row's loss (W - W_hat) H (W - W_hat)^T except by rounding c; each row keeps its best.
Tensors are transposed as in `grid`: W [K, N], codes [K, N], c [ceil(K/G), k+1, N]. All may have the axis of a batch of
matrices in front, [E, ...], each with an H of its own.
"""

from math import prod

import torch
from torch import Tensor

from bpdq_quantizer.algorithm import cpu_solver
from bpdq_quantizer.algorithm.equations import right_sides
from bpdq_quantizer.algorithm.grid import BATCH, level_table
from bpdq_quantizer.algorithm.groups import compiled_for, descend_group, solve_jointly
from bpdq_quantizer.algorithm.products import matmul
from bpdq_quantizer.algorithm.rounding import round_to, steps_for

SWEEPS = 2  # of descent to a fit: 4 rounds of 2 end lower than 10 rounds of 1, in less time
CHUNK_ELEMENTS = 1 << 26  # of the largest temporary: 256 MiB in fp32
CPU_ELEMENTS = 1 << 25  # likewise for the joint fit on a CPU


def refine(
    codes: Tensor,
    c: Tensor,
    loss: Tensor,
    W: Tensor,
    HW: Tensor,
    H: Tensor,
    group_size: int,
    rounds: int,
    alpha: float,
    dtype: torch.dtype,
    trellis: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Alternate `joint_fit` and `descend` for `rounds` rounds; returns codes, c (rounded to `dtype`), loss [N], steps.

    HW [K, N] is H W; loss: of `codes` and `c` as they come. For int8 they come in fp32, so that there is a joint fit in
    any case; steps [k+1, N]: of which int8 c are multiples, else ones.
    """
    *batch, K, N = W.shape
    groups, width, _ = c.shape[-3:]
    rows = rows_at_once(K, width, prod(batch))
    fit_elements = CPU_ELEMENTS if W.device.type == "cpu" else CHUNK_ELEMENTS
    fit_rows = max(1, min(BATCH, fit_elements // max((groups * width) ** 2, K * width)) // prod(batch))
    codes, c, loss, steps = codes.clone(), c.clone(), loss.clone(), torch.ones_like(c[..., 0, :, :])
    sweeps = SWEEPS if rounds else 0
    if dtype == torch.int8:
        rounds, steps = max(rounds, 1), steps_for(c)
        c = round_to(c, steps.unsqueeze(-3), dtype)
        loss.fill_(torch.inf)  # any fit's is better
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        w, hw = W[..., part].contiguous(), HW[..., part].contiguous()
        best_codes, best_c = codes[..., part].contiguous(), c[..., part].contiguous()
        best_loss, best_steps = loss[..., part], steps[..., part]
        row_codes = best_codes
        for _ in range(rounds):
            parts = zip(row_codes.split(fit_rows, -1), hw.split(fit_rows, -1), strict=True)
            fits = [joint_fit(*fitted, H, group_size, width - 1, alpha, dtype) for fitted in parts]
            row_c, row_steps = (torch.cat(tensors, dim=-1) for tensors in zip(*fits, strict=True))
            if dtype == torch.int8:  # singular equations: what there was
                singular = row_c[..., 0, 0, :].isnan()
                row_c = torch.where(singular[..., None, None, :], best_c, row_c)
                row_steps = torch.where(singular[..., None, :], best_steps, row_steps)
            row_codes, row_loss = descend(row_codes, row_c, w, H, group_size, sweeps, trellis)
            better = row_loss < best_loss
            best_codes = torch.where(better[..., None, :], row_codes, best_codes)
            best_c = torch.where(better[..., None, None, :], row_c, best_c)
            best_steps = torch.where(better[..., None, :], row_steps, best_steps)
            best_loss = torch.where(better, row_loss, best_loss)
        codes[..., part], c[..., part], loss[..., part], steps[..., part] = best_codes, best_c, best_loss, best_steps
    return codes, c, loss, steps


def rows_at_once(inputs: int, width: int, matrices: int = 1) -> int:
    """Rows of each of some matrices that are refined together: all share a step's launches, `width` = k + 1 values a
    weight fit a temporary."""
    return max(1, CHUNK_ELEMENTS // (inputs * width * matrices))


def matrices_at_once(rows: int, inputs: int) -> int:
    """How many matrices [rows, inputs] are to be solved together: with two planes all are refined together, and what
    else is held of them is not larger than that takes. At least one."""
    return max(1, CHUNK_ELEMENTS // (inputs * max(3 * rows, inputs + rows)))


def joint_fit(
    codes: Tensor, HW: Tensor, H: Tensor, group_size: int, bits: int, alpha: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """All coefficients of each row, c [ceil(K/G), k+1, N]: ridge least squares of W on its planes in the metric H,
    rounded to `dtype`, for int8 to multiples of the steps [k+1, N] (else ones) that come with them.

    HW [K, N] is H W. A row whose equations are singular in fp32 gets NaN, which no later comparison of losses takes for
    better.
    """
    c, steps = solve_jointly(codes, right_sides(codes, HW, group_size, bits), H, group_size, bits, alpha, dtype)
    steps = torch.ones_like(c[..., : bits + 1, :]) if steps is None else steps
    return c.unflatten(-2, (-1, bits + 1)).contiguous(), steps


def descend(
    codes: Tensor, c: Tensor, W: Tensor, H: Tensor, group_size: int, sweeps: int, trellis: bool = False
) -> tuple[Tensor, Tensor]:
    """Coordinate descent, `sweeps` times over the columns; returns the new codes [K, N] and each row's loss [N].

    With the gradient V = H (W - W_hat), column i's best value given the others is W_hat[i] + V[i] / H[i, i]; the
    nearest level is taken, with a `trellis` the path that lowers the loss most.
    """
    if not compiled_for(W.device):
        return descend_in_torch(codes, c, W, H, group_size, sweeps, trellis)
    error = (W - dequantize_columns(codes, c, group_size)).T.contiguous()
    V = matmul(error, H)
    codes, gain = cpu_solver.descend(codes, V, c, H, group_size, sweeps, trellis)
    return codes, torch.linalg.vecdot(error, V) - gain


def descend_in_torch(
    codes: Tensor, c: Tensor, W: Tensor, H: Tensor, group_size: int, sweeps: int, trellis: bool = False
) -> tuple[Tensor, Tensor]:
    """As `descend`. V is kept up to date within a group column by column, beyond it once per group, and in the last
    sweep only for the groups to come.
    """
    W_hat = dequantize_columns(codes, c, group_size)
    error = W - W_hat
    V = H @ error
    loss = (error * V).sum(-2)
    codes = codes.clone()
    for sweep in range(sweeps):
        for g in range(c.shape[-3]):
            block = slice(g * group_size, min((g + 1) * group_size, W.shape[-2]))
            later = slice(block.start if sweep == sweeps - 1 else 0, None)
            here, V_here = (..., block, slice(None)), V[..., block, :]
            group = W_hat[here], V_here, H[..., block, block], c[..., g, :, :]
            codes[here], change = descend_group(*group, codes[here] if trellis else None)
            W_hat[here] += change
            before = V_here.clone()
            V_later = V[..., later, :]
            add_product(V_later, H[..., later, block], change, alpha=-1, out=V_later)
            loss -= (change * (before + V_here)).sum(-2)
    return codes, loss


def add_product(x: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """x + alpha a b of matrices or of batches of them, as one operation."""
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    return add(x, a, b, alpha=alpha, out=out)


def dequantize_columns(codes: Tensor, c: Tensor, group_size: int) -> Tensor:
    """W_hat [..., K, N] fp32 from codes [..., K, N] and c [..., ceil(K/G), k+1, N]."""
    levels = level_table(c.shape[-2] - 1, c.device) @ c
    parts = codes.split(group_size, -2)
    return torch.cat([levels[..., g, :, :].gather(-2, part.long()) for g, part in enumerate(parts)], -2)
