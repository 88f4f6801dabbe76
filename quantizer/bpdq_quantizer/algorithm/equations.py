"""The normal equations of all coefficients of a row together, planes fixed (`algorithm.refine.joint_fit`)."""

import torch
from torch import Tensor

from bpdq_quantizer.algorithm.grid import features
from bpdq_quantizer.algorithm.rounding import NearestPlane, nearest_plane, rounded_solution


def normal_matrix(codes: Tensor, H: Tensor, group_size: int, bits: int) -> Tensor:
    """A [N, n, n] fp32 = X^T H X of every row's features X [K, n] = [planes, 1] of each group, n = (k+1) ceil(K/G).

    codes [K, N]. It couples every pair of groups; of the blocks above the diagonal nothing is said.
    """
    K, N = codes.shape
    groups, width = -(-K // group_size), bits + 1
    X = features(codes, bits)  # [K, k+1, N]
    X = torch.cat([X, X.new_zeros(groups * group_size - K, width, N)])  # zeros: a short last group
    A = torch.zeros(groups, width, groups, width, N, device=H.device)
    for g in range(groups):
        first, last = g * group_size, min((g + 1) * group_size, K)
        HX = X.new_zeros(len(X) - first, width, N)
        torch.mm(H[first:, first:last], X[first:last].flatten(1), out=HX[: K - first].flatten(1))
        HX = HX.unflatten(0, (groups - g, group_size))
        X_later = X[first:].unflatten(0, (groups - g, group_size))
        for p in range(width):
            A[g:, p, g] = (X_later[:, :, p : p + 1] * HX).sum(1)
    return A.view(groups * width, groups * width, N).permute(2, 0, 1).contiguous()


def right_sides(codes: Tensor, HW: Tensor, group_size: int, bits: int) -> Tensor:
    """b [n, N] = X^T H W, with HW [K, N] = H W."""
    parts = zip(codes.split(group_size), HW.split(group_size), strict=True)
    return torch.cat([(features(code, bits) * hw.unsqueeze(1)).sum(0) for code, hw in parts])


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
    """Solutions c [n, N] fp32 of (X^T H X + alpha m I) c = b [n, N], m the mean of the diagonal; codes [K, N].

    They are rounded to `dtype` (`algorithm.rounding`), for int8 to multiples of the steps [k+1, N] that come with them.
    NaN for rows whose equations are singular in fp32.
    """
    A = normal_matrix(codes, H, group_size, bits)
    diagonal = A.diagonal(dim1=1, dim2=2)
    diagonal.add_(alpha * diagonal.mean(1, keepdim=True))
    R, failed = torch.linalg.cholesky_ex(A.mT, upper=True)  # in columns, as LAPACK has it: L = R^T then is in rows
    L = R.mT
    y = torch.linalg.solve_triangular(L, b.T.unsqueeze(2), upper=False).squeeze(2)
    c, steps = rounded_solution(L, y, bits + 1, dtype, nearest)
    return c.T.masked_fill(failed != 0, torch.nan), steps
