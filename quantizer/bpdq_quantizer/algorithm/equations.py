"""The normal equations of all coefficients of a row together, planes fixed (`algorithm.refine.joint_fit`)."""

import torch
from torch import Tensor

from bpdq_quantizer.algorithm.grid import features
from bpdq_quantizer.algorithm.rounding import NearestPlane, nearest_plane, rounded_solution


def normal_matrix(codes: Tensor, H: Tensor, group_size: int, bits: int) -> Tensor:
    """A [..., N, n, n] fp32 = X^T H X of every row's features X [K, n] = [planes, 1] of each group,
    n = (k+1) ceil(K/G).

    codes [..., K, N], H [..., K, K]. It couples every pair of groups; of the blocks above the diagonal nothing is said.
    """
    *batch, K, N = codes.shape
    groups, width = -(-K // group_size), bits + 1
    X = features(codes, bits)  # [..., K, k+1, N]
    X = torch.cat([X, X.new_zeros(*batch, groups * group_size - K, width, N)], -3)  # zeros: a short last group
    A = torch.zeros(*batch, groups, width, groups, width, N, device=H.device)
    for g in range(groups):
        first, last = g * group_size, min((g + 1) * group_size, K)
        HX = X.new_zeros(*batch, X.shape[-3] - first, width, N)
        X_group, filled = X[..., first:last, :, :].flatten(-2), HX[..., : K - first, :, :].flatten(-2)
        torch.matmul(H[..., first:, first:last], X_group, out=filled)
        HX = HX.unflatten(-3, (groups - g, group_size))
        X_later = X[..., first:, :, :].unflatten(-3, (groups - g, group_size))
        for p in range(width):
            A[..., g:, p, g, :, :] = (X_later[..., p : p + 1, :] * HX).sum(-3)
    return A.flatten(-3, -2).flatten(-4, -3).movedim(-1, -3).contiguous()


def right_sides(codes: Tensor, HW: Tensor, group_size: int, bits: int) -> Tensor:
    """b [..., n, N] = X^T H W, with codes [..., K, N] and HW [..., K, N] = H W."""
    parts = zip(codes.split(group_size, -2), HW.split(group_size, -2), strict=True)
    return torch.cat([(features(code, bits) * hw.unsqueeze(-2)).sum(-3) for code, hw in parts], -2)


def solve_jointly(
    codes: Tensor,
    b: Tensor,
    H: Tensor,
    group_size: int,
    bits: int,
    alpha: float,
    dtype: torch.dtype,
    nearest: NearestPlane = nearest_plane,
) -> tuple[Tensor, Tensor | None]:
    """Solutions c [..., n, N] fp32 of (X^T H X + alpha m I) c = b [..., n, N], m the mean of the diagonal; codes
    [..., K, N].

    They are rounded to `dtype` (`algorithm.rounding`), for int8 to multiples of the steps [..., k+1, N] that come with
    them. NaN for rows whose equations are singular in fp32.
    """
    rows = b.mT.shape[:-1]
    A = normal_matrix(codes, H, group_size, bits).flatten(0, -3)
    diagonal = A.diagonal(dim1=1, dim2=2)
    diagonal.add_(alpha * diagonal.mean(1, keepdim=True))
    R, failed = torch.linalg.cholesky_ex(A.mT, upper=True)  # in columns, as LAPACK has it: L = R^T then is in rows
    L = R.mT
    y = torch.linalg.solve_triangular(L, b.mT.flatten(0, -2).unsqueeze(2), upper=False).squeeze(2)
    c, steps = rounded_solution(L, y, bits + 1, dtype, nearest)
    c = c.masked_fill((failed != 0).unsqueeze(1), torch.nan).unflatten(0, rows).mT
    return c, None if steps is None else steps.T.unflatten(0, rows).mT
