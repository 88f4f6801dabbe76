"""The layer's Hessian H = (2/n) X X^T of the calibration inputs, and the factor that drives error propagation."""

import torch
from torch import Tensor

MAX_DAMPING = 1.0
CORRECTION_DAMPING = 0.1  # of the mean of diag(H)


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


def accumulate_shift(C: Tensor, original: Tensor, x: Tensor, total_tokens: int) -> None:
    """Add (2 / total_tokens) (original - x)^T x to C [K, K] fp32 in place.

    original, x: [windows, L, K], a Linear's inputs in the 16-bit model and in the one that is quantized so far.
    """
    for before, now in zip(original, x, strict=True):
        C += ((before - now).T @ now).float() * (2.0 / total_tokens)


def correction(H: Tensor, C: Tensor) -> Tensor:
    """S [K, K] such that W + W S applied to the inputs x comes closest to W applied to the original inputs.

    The least squares solution S = C (H + d I)^-1 (QEP, arXiv 2504.09629; GPTAQ, arXiv 2504.02692, puts the same cross
    term into the error propagation), with C from `accumulate_shift` and d = CORRECTION_DAMPING * mean(diag(H)).
    """
    damped = H.clone()
    damped.diagonal().add_(CORRECTION_DAMPING * H.diagonal().mean())
    return torch.linalg.solve(damped, C.T).T


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
