"""The layer's Hessian H = (2/n) X X^T of the calibration inputs, and the factor that drives error propagation."""

import torch
from torch import Tensor

MAX_DAMPING = 1.0


def accumulate(H: Tensor, x: Tensor, total_tokens: int) -> None:
    """Add (2 / total_tokens) x^T x to the lower block triangle of H in place; `symmetrize` fills in the rest.

    H: [K, K] fp32; x: [windows, L, K], any float dtype. Blocks above the diagonal are skipped: 5/8 of the work.
    """
    step = -(-len(H) // 4)
    for window in x:
        tokens = window.to(torch.float32)
        for start in range(0, len(H), step):
            rows = slice(start, start + step)
            H[rows, : rows.stop].addmm_(tokens[:, rows].T, tokens[:, : rows.stop], alpha=2.0 / total_tokens)


def symmetrize(H: Tensor) -> Tensor:
    """H with its upper triangle made the mirror image of the lower one."""
    return H.tril() + H.tril(-1).T


def inverse_factor(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular U with (H + d I)^-1 = U^T U, and the damping that was needed (GPTQ, section 3.3).

    d = damping * mean(diag(H)); `damping` is doubled until both Cholesky factorizations succeed. Raises
    ValueError when even d = mean(diag(H)) is not enough, which means that H holds NaN or infinity.
    """
    mean = H.diagonal().mean()
    while damping <= MAX_DAMPING:
        damped = H.clone()
        damped.diagonal().add_(damping * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not failed and torch.isfinite(U).all():
                return U, damping
        damping *= 2
    raise ValueError(
        f"the Hessian can't be factorized even with damping {MAX_DAMPING}: "
        "the calibration activations hold NaN or infinity, or overflow fp32"
    )
