"""One weight group: bit-planes B and coefficients c on a variable grid (BPDQ, arXiv 2602.04163, section 3).

Everything here is transposed, inputs before rows, so that a column of the weight is contiguous in memory:

    W     [g, N]       the group's g inputs (in processing order) of all N rows
    U     [g, g]       the group's diagonal block of the factor U, (H + dI)^-1 = U^T U
    codes [g, N]       uint8, bit p of a code is plane p
    c     [k+1, N]     plane coefficients, then the bias c0

A group's error coordinates are E = U^-T (W - W_hat), and its share of the loss is |E|^2 (section 3.1).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

INITIAL_BITS = 8
CLUSTER_ROUNDS = 5
BATCH = 1 << 15  # systems of equations in a call: of more than 65535, failures and wrong results on GPUs are on record

Start = Callable[[Tensor, Tensor, int], Tensor]  # W [g, N], U [g, g] and bits -> codes [g, N] to begin with
Assign = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # W [g, N], c [k+1, N], U [g, g] and bits -> codes [g, N]


def level_table(bits: int, device: torch.device) -> Tensor:
    """[2^k, k+1] fp32: row j holds the bits of code j and a one, so that levels = table @ c."""
    codes = torch.arange(2**bits, device=device)
    columns = [(codes >> p) & 1 for p in range(bits)] + [torch.ones_like(codes)]
    return torch.stack(columns, dim=1).float()


def features(codes: Tensor, bits: int) -> Tensor:
    """X [..., g, k+1, N] fp32: the bits of codes [..., g, N] and a one, so that W_hat = sum over X * c."""
    X = torch.ones(*codes.shape[:-1], bits + 1, codes.shape[-1], device=codes.device)
    for p in range(bits):
        X[..., p, :] = (codes >> p) & 1
    return X


def most_significant_planes(W: Tensor, bits: int, spread: float = 1.0) -> Tensor:
    """Codes [g, N] of the k most significant bits of an 8-bit min-max grid per row that contains zero.

    `spread` < 1 narrows the grid to that share of the range; what lies beyond gets the outermost codes.
    """
    low, high = W.amin(0).clamp(max=0) * spread, W.amax(0).clamp(min=0) * spread
    scale = ((high - low) / (2**INITIAL_BITS - 1)).clamp(min=torch.finfo(W.dtype).tiny)
    zero = torch.round(-low / scale)
    q = (torch.round(W / scale) + zero).clamp(0, 2**INITIAL_BITS - 1).to(torch.uint8)
    return q >> (INITIAL_BITS - bits)


def residual_planes(W: Tensor, bits: int) -> Tensor:
    """Codes [g, N] of signs: that of W - mean, then of what each sign times its mean leaves (R2Q, arXiv 2511.21736)."""
    codes = torch.zeros(W.shape, dtype=torch.uint8, device=W.device)
    left = W - W.mean(0)
    for p in reversed(range(bits)):
        positive = left > 0
        codes |= positive.to(torch.uint8) << p
        scale = left.abs().mean(0)
        left = left - torch.where(positive, scale, -scale)
    return codes


def fit_coefficients(codes: Tensor, W: Tensor, whiten: Tensor, bits: int, alpha: float, dtype: torch.dtype) -> Tensor:
    """Coefficients c [k+1, N], rounded to `dtype`: ridge least squares of W on the planes in H's metric.

    Minimizes |V (W - X c)|^2 + alpha |c|^2 per row (section 3.2), with V = `whiten` = U^-T [g, g] and
    X = [bits of codes, 1].
    """
    X = features(codes, bits)
    VX = (whiten @ X.flatten(1)).view(X.shape)
    VW = whiten @ W
    gram = torch.stack([(VX * VX[:, i : i + 1]).sum(0) for i in range(bits + 1)])  # [k+1, k+1, N]
    target = (VX * VW.unsqueeze(1)).sum(0)  # [k+1, N]
    A = gram.permute(2, 0, 1).contiguous()
    diagonal = A.diagonal(dim1=1, dim2=2)  # [N, k+1], a view
    diagonal.add_(alpha * diagonal.mean(1, keepdim=True))
    parts = zip(A.split(BATCH), target.T.split(BATCH), strict=True)
    return torch.cat([torch.linalg.solve(*part) for part in parts]).T.to(dtype).float().contiguous()


def assign_codes(W: Tensor, c: Tensor, U: Tensor, bits: int) -> Tensor:
    """Codes [g, N]: nearest of the 2^k levels column by column, the error propagated to later columns (GPTQ)."""
    levels, order = (level_table(bits, W.device) @ c).sort(dim=0)  # [2^k, N]
    midpoints = (levels[1:] + levels[:-1]) / 2
    W = W.clone()
    spread = U / U.diagonal().unsqueeze(1)
    nearest = torch.empty(W.shape, dtype=torch.int64, device=W.device)
    for t in range(W.shape[0]):
        w, index = W[t], nearest[t : t + 1]
        torch.sum(w > midpoints, 0, keepdim=True, out=index)
        W[t + 1 :].addr_(spread[t, t + 1 :], w - levels.gather(0, index)[0], alpha=-1)
    return order.to(torch.uint8).gather(0, nearest)


def nearest_codes(W: Tensor, c: Tensor, bits: int) -> Tensor:
    """Codes [g, N]: nearest of the 2^k levels for each weight on its own."""
    levels, order = (level_table(bits, W.device) @ c).sort(dim=0)
    nearest = torch.zeros(W.shape, dtype=torch.int64, device=W.device)
    for midpoint in (levels[1:] + levels[:-1]) / 2:
        nearest += midpoint < W
    return order.to(torch.uint8).gather(0, nearest)


def clustered(codes: Tensor, W: Tensor, U: Tensor, bits: int) -> Tensor:
    """Codes [g, N] after k-means from `codes` on bit-plane grids; errors weigh 1 / U[i, i]^2, none propagates."""
    weights = torch.diag(1 / U.diagonal())
    for _ in range(CLUSTER_ROUNDS):
        codes = nearest_codes(W, fit_coefficients(codes, W, weights, bits, 1e-6, torch.float32), bits)
    return codes


def paper_start(W: Tensor, U: Tensor, bits: int) -> Tensor:
    """The most significant planes, as they are."""
    return most_significant_planes(W, bits)


def range_start(W: Tensor, U: Tensor, bits: int) -> Tensor:
    """k-means from the most significant planes; of four levels, the outer ones are left the tails of the range."""
    return clustered(most_significant_planes(W, bits, 0.8 if bits == 2 else 1.0), W, U, bits)


def residual_start(W: Tensor, U: Tensor, bits: int) -> Tensor:
    """k-means from `residual_planes`, a balanced grid around the mean."""
    return clustered(residual_planes(W, bits), W, U, bits)


def quantize_group(
    W: Tensor,
    U: Tensor,
    bits: int,
    iterations: int,
    alpha: float,
    dtype: torch.dtype,
    starts: Sequence[Start] = (paper_start,),
    assign: Assign = assign_codes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Planes and coefficients of one group; returns (codes [g, N], c [k+1, N], E [g, N]).

    Alternates assignment, by `assign`, and refit from each of `starts`, by default the most significant planes of the
    paper, and keeps each row's best iterate. E is computed from the refitted weights, so what is propagated to later
    groups belongs to the weights that are stored: this is the paper's delta correction (eq. 9), E_old + (W_old - W_new)
    U^-1, in closed form, since E_old U = W - W_old. A row whose planes repeat is at a fixed point and leaves the loop.
    """
    whiten = torch.linalg.solve_triangular(U.T, torch.eye(len(U), device=U.device), upper=False)
    table = level_table(bits, W.device)
    codes = torch.cat([start(W, U, bits) for start in starts], dim=1)
    N, W = W.shape[1], W.repeat(1, len(starts))
    c = fit_coefficients(codes, W, whiten, bits, alpha, dtype)
    best_codes, best_c, best_E = codes.clone(), c.clone(), torch.empty_like(W)
    best_loss = torch.full_like(W[0], torch.inf)
    active = torch.arange(W.shape[1], device=W.device)
    for _ in range(iterations):
        w = W[:, active]
        new_codes = assign(w, c, U, bits)
        moved = (new_codes != codes).any(0)
        codes, c = new_codes, fit_coefficients(new_codes, w, whiten, bits, alpha, dtype)
        W_hat = (table @ c).gather(0, codes.long())
        E = whiten @ (w - W_hat)
        loss = E.square().sum(0)
        better = loss < best_loss[active]
        rows = active[better]
        best_codes[:, rows], best_c[:, rows] = codes[:, better], c[:, better]
        best_E[:, rows], best_loss[rows] = E[:, better], loss[better]
        active, codes, c = active[moved], codes[:, moved], c[:, moved]
        if not len(active):
            break
    best = best_loss.view(len(starts), N).argmin(0) * N + torch.arange(N, device=W.device)
    return best_codes[:, best], best_c[:, best], best_E[:, best]


def descend_group(W_hat: Tensor, V: Tensor, H: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """A sweep of coordinate descent over a group, with levels c [k+1, N]; returns codes and the change of W_hat [g, N].

    V [g, N]: the gradient H (W - W_hat) of whole rows, in this group's inputs; H [g, g]: the group's diagonal block.
    Column i's best value given the others is W_hat[i] + V[i] / H[i, i]; the nearest level is taken.
    """
    best = W_hat + V / H.diagonal().unsqueeze(1)
    spread = H / H.diagonal()  # column j: what a change of one input does to best[j]
    levels, order = (level_table(len(c) - 1, c.device) @ c).sort(dim=0)
    midpoints = (levels[1:] + levels[:-1]) / 2
    nearest = torch.empty(W_hat.shape, dtype=torch.int64, device=W_hat.device)
    change = torch.empty_like(W_hat)
    for t in range(len(W_hat)):
        index = nearest[t : t + 1]
        torch.sum(best[t] > midpoints, 0, keepdim=True, out=index)
        torch.sub(levels.gather(0, index)[0], W_hat[t], out=change[t])
        best[t + 1 :].addr_(spread[t, t + 1 :], change[t], alpha=-1)
    return order.to(torch.uint8).gather(0, nearest), change
