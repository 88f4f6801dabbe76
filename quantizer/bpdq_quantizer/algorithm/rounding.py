"""Coefficients rounded to what is stored, each knowing the errors of those before it.

Of least squares with normal equations A c = b, A = L L^T, the loss that rounding adds is |L^T (c - rounded)|^2. From
the last coefficient to the first, what the ones already rounded have left is part of the next one's target: Babai's
nearest plane, as GPTQ does it to weights (arXiv 2507.18553).

In 8 bits coefficients are multiples q s of a step s, one for each output and plane, q = -127 .. 127. An output's steps
are one number in bf16 over powers of two: as activations times q and q over a power of two are exact, kernels lose
nothing by multiplying with s at the end.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MOST = 127  # |q|
FINER = 7  # a plane's step is at least the output's largest over 2^7
# Where the largest step is this much larger than needed for its own plane, those of others may fit theirs better.
MARGINS = (1.0, 1.12, 1.25, 1.4, 1.6, 1.8)

# L [N, n, n], y [N, n], steps [F, N, n] or None, and a dtype: see `nearest_plane`
NearestPlane = Callable[[Tensor, Tensor, Tensor | None, torch.dtype], tuple[Tensor, Tensor]]


def steps_for(c: Tensor, margin: float = 1.0) -> Tensor:
    """Steps [..., k+1, N] fp32 that hold coefficients c [..., ceil(K/G), k+1, N]; margin: of the largest, 1 to 2."""
    largest = c.abs().amax(-3)
    most = (largest.amax(-2, keepdim=True) * margin).clamp_min(2.0**-90)
    finer = torch.floor(torch.log2(most / largest.clamp_min(2.0**-120))).clamp(0, FINER)
    return (most / MOST).bfloat16().float() * torch.exp2(-finer)


def stored_coefficients(c: Tensor, steps: Tensor | None, dtype: torch.dtype) -> Tensor:
    """c [..., N] in `dtype`: for int8 as multiples of its steps, which others don't have."""
    return (c if steps is None else torch.round(c / steps).clamp(-MOST, MOST)).to(dtype)


def round_to(c: Tensor, steps: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What `stored_coefficients` stand for, in fp32."""
    rounded = stored_coefficients(c, steps, dtype).float()
    return rounded if steps is None else rounded * steps


def nearest_plane(L: Tensor, y: Tensor, steps: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rounded solutions of L^T c = y: c [F, N, n], and what rounding adds to the loss, [F, N].

    L [N, n, n]: lower triangular; y [N, n]; steps [F, N, n]: F tries; None: to `dtype`, F = 1.
    """
    tries = 1 if steps is None else len(steps)
    left = y.repeat(tries, 1, 1)
    c, loss = torch.empty_like(left), left.new_zeros(left.shape[:2])
    for m in reversed(range(y.shape[1])):
        pivot = L[:, m, m]
        exact = left[..., m] / pivot
        c[..., m] = round_to(exact, None if steps is None else steps[..., m], dtype)
        loss += (pivot * (exact - c[..., m])).square()
        left[..., :m] -= L[:, m, :m] * c[..., m : m + 1]
    return c, loss


def rounded_solution(
    L: Tensor, y: Tensor, width: int, dtype: torch.dtype, nearest: NearestPlane = nearest_plane
) -> tuple[Tensor, Tensor | None]:
    """c [N, n] fp32 with L^T c near y, rounded to `dtype`; for int8 with the steps [width, N] that add the least loss.

    n: some groups of `width` = k + 1 coefficients.
    """
    if dtype != torch.int8:
        return nearest(L, y, None, dtype)[0][0], None
    exact = torch.linalg.solve_triangular(L.mT, y.unsqueeze(2), upper=True).squeeze(2)
    grouped = exact.T.unflatten(0, (-1, width))
    tried = torch.stack([steps_for(grouped, margin) for margin in MARGINS])  # [F, width, N]
    c, loss = nearest(L, y, tried.mT.repeat(1, 1, len(grouped)), dtype)
    best = loss.argmin(0)
    rows = torch.arange(len(y), device=y.device)
    return c[best, rows], tried[best, :, rows].T
