"""The layer's Hessian H = (2/n) X X^T of the calibration inputs, and the factor that drives error propagation."""

import torch
from torch import Tensor

from bpdq_quantizer.algorithm import cpu_hessian
from bpdq_quantizer.algorithm.order import in_order
from bpdq_quantizer.algorithm.products import ROWS, factorize_in_blocks, in_blocks, matmul, solve

MAX_DAMPING = 1.0
CORRECTION_DAMPING = 0.1  # of `live_mean`
UNFACTORIZED = (
    f"the Hessian can't be factorized even with damping {MAX_DAMPING}: "
    "the calibration activations hold NaN or infinity, or overflow fp32"
)


def accumulate(H: Tensor, x: Tensor, total_tokens: int) -> None:
    """Add (2 / total_tokens) x^T x to the lower block triangle of H in place; `symmetrize` fills in the rest.

    H: [K, K] fp32; x: [windows, ..., K], or [rows, K] of all windows, any float dtype.
    """
    for window in by_window(x):
        add_square(H, window, 2.0 / total_tokens)


def add_square(S: Tensor, x: Tensor, alpha: float) -> None:
    """Add alpha x^T x to the lower block triangle of S [K, K] fp32 in place; x [T, K] of any float dtype.

    Blocks above the diagonal are skipped: 5/8 of the work, and less where a CPU multiplies bf16.
    """
    if in_16_bits(x) and not x.is_cuda:
        cpu_hessian.add_products(S, x, x, alpha)
        return
    step, x = -(-len(S) // 4), _factor(x)
    for start in range(0, len(S), step):
        rows = slice(start, start + step)
        _add_product(S[rows, : rows.stop], x[:, rows], x[:, : rows.stop], alpha)


def in_16_bits(x: Tensor) -> bool:
    """Whether products of x are best left in its 16 bits: of bf16 on a GPU or a CPU that adds exact products in
    fp32."""
    return x.dtype == torch.bfloat16 and (x.is_cuda or (x.device.type == "cpu" and cpu_hessian.library() is not None))


def _factor(x: Tensor) -> Tensor:
    """x for `_add_product`."""
    return x if in_16_bits(x) else x.to(torch.float32)


def _add_product(S: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    """Add alpha a^T b to S [M, N] fp32 in place. a [T, M], b [T, N]: of `_factor`."""
    if a.dtype == torch.float32:
        S.addmm_(a.T, b, alpha=alpha)
    elif a.is_cuda:
        torch.addmm(S, a.T, b, out_dtype=torch.float32, alpha=alpha, out=S)
    else:
        cpu_hessian.add_products(S, a, b, alpha)


def by_window(x: Tensor) -> Tensor:
    """x [windows, ..., K] as [windows, rows, K]; [rows, K], what OPT feeds its Linears, is one window."""
    return x.reshape(1 if x.ndim == 2 else len(x), -1, x.shape[-1])


def symmetrize(H: Tensor) -> Tensor:
    """H, in place, with its upper triangle made the mirror image of the lower one."""
    H.tril_()
    H += H.tril(-1).T
    return H


def shift(original: Tensor, now: Tensor) -> Tensor:
    """original - now, in fp32, as fp16 overflows; where products are of bf16 (`in_16_bits`) in bf16, which rounds less
    than when both became it."""
    return original - now if in_16_bits(now) else original.float() - now.float()


def accumulate_shift(C: Tensor, shifts: Tensor, x: Tensor, total_tokens: int) -> None:
    """Add (2 / total_tokens) shifts^T x to C [M, K] fp32 in place.

    x: as for `accumulate`, a Linear's inputs in the model that is quantized so far; shifts [.., M]: `shift` of
    something of the same tokens in the 16-bit model and in that one. Sums are fp32: over a window's tokens they
    overflow fp16 where no activation does.
    """
    for window, inputs in zip(by_window(shifts), by_window(x), strict=True):
        tokens = _factor(inputs)
        _add_product(C, window.to(tokens.dtype), tokens, 2.0 / total_tokens)


def live_mean(diagonal: Tensor) -> Tensor:
    """Mean [...] of diag(H) [..., K] over the inputs that were used, those where it is not zero; 1 if none was.

    Damping is a share of it, so that neither the scale of H nor the number of dead inputs changes what it does.
    """
    live = diagonal.count_nonzero(-1)
    return torch.where(live > 0, diagonal.mean(-1) * (diagonal.shape[-1] / live), 1)


def factorize(A: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors, lower, of the symmetric A [..., K, K], in A's memory, and where there is none, bool [...]. The
    other triangle is zero.

    At K = 29568 a matrix has 3.5 GB: no more of them than need be.
    """
    if A.ndim == 2 and in_blocks(A):
        return factorize_in_blocks(A)
    A = A if A.stride(-2) == 1 else A.mT  # in the order of LAPACK and cuSOLVER, which else get a copy
    info = torch.empty(A.shape[:-2], dtype=torch.int32, device=A.device)
    torch.linalg.cholesky_ex(A, out=(A, info))
    return A, info != 0


def corrected(W: Tensor, H: Tensor, C: Tensor, share: float, P: Tensor | None = None) -> Tensor:
    """W [N, K] moved by `share` of the way to what, applied to the inputs x, comes closest to W on the original inputs,
    and where P is given, to that and what the residual stream lacks that its outputs are added to.

    That is W + share (W C + P) (H + d I)^-1, fp32, the least squares solution (QEP, arXiv 2504.09629; GPTAQ, arXiv
    2504.02692, puts the cross term of C into the error propagation), with C and P of `activations.Statistics`, whose
    memory is used up, and d = CORRECTION_DAMPING * `live_mean`, doubled until the Cholesky factorization succeeds;
    ValueError when d = MAX_DAMPING * `live_mean` is not enough. Where H is zero, no input was ever used and W stays as
    it is.
    """
    W, diagonal = W.float(), H.diagonal()
    if not diagonal.any():
        return W
    lacking, damping = torch.zeros_like(W) if P is None else P, CORRECTION_DAMPING
    for start in range(0, len(W), ROWS):
        lacking[start : start + ROWS] += matmul(W[start : start + ROWS], C)
    while damping <= MAX_DAMPING:
        C.copy_(H).diagonal().add_(damping * live_mean(diagonal))
        L, failed = factorize(C)
        if not failed:
            return W + share * solve(L, lacking)
        damping *= 2
    raise ValueError(UNFACTORIZED)


def upper_factor(H: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper triangular R [..., K, K] with H' + d I = R R^T, and the damping that was needed, [...] fp64 on the CPU.

    H' is H with its rows and columns in `order` [..., K]; inputs that were never used have d alone on the diagonal.
    d = damping * `live_mean`; of a matrix `damping` is doubled until the Cholesky factorization succeeds. Raises
    ValueError when even damping 1 is not enough, which means that H holds NaN or infinity.
    """
    backwards = order.flip(-1)
    diagonal = in_order(H.diagonal(dim1=-2, dim2=-1), backwards, -1)
    used = torch.full(H.shape[:-2], damping, dtype=torch.float64)
    while (used <= MAX_DAMPING).all():
        damped = in_order(in_order(H, backwards, -2), backwards, -1)
        d = used.to(diagonal) * live_mean(diagonal)
        damped.diagonal(dim1=-2, dim2=-1).copy_(diagonal + d.unsqueeze(-1))
        L, failed = factorize(damped)
        del damped
        failed |= ~torch.isfinite(L.diagonal(dim1=-2, dim2=-1)).all(-1)
        if not failed.any():
            return L.flip(-2, -1), used
        used = torch.where(failed.cpu(), 2 * used, used)
    raise ValueError(UNFACTORIZED)


def inverse_factor(H: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Upper triangular U with (H' + d I)^-1 = U^T U (GPTQ, section 3.3), and d / `live_mean`, as of `upper_factor`."""
    R, used = upper_factor(H, order, damping)
    return torch.linalg.solve_triangular(R, torch.eye(R.shape[-1], device=R.device), upper=True), used
