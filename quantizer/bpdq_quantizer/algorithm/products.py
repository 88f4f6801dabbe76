"""Products of fp32 matrices, and what consists of them.

On a CPU PyTorch has MKL multiply fp32, which does without AVX-512 on AMD's. oneDNN, which PyTorch has as well, takes
half the time there (2.2 times the FLOP/s on a Zen 5), and its results depend neither on the number of threads nor on
how many rows there are.
"""

import torch
from torch import Tensor

from bpdq_kernels.compiled import instruction_set

BLOCK = 256  # columns of a Cholesky factor that are found at a time
SMALLEST = 1 << 21  # multiplications, for which a call of either takes as long
ROWS = 4096  # of a matrix that are multiplied at a time: what is copied of it


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b of fp32 matrices [M, K] and [K, N], or of batches of them."""
    if a.ndim != 2 or b.ndim != 2 or a.numel() * b.shape[1] < SMALLEST or not quick(a):
        return a @ b
    dense = b.is_contiguous() or b.mT.is_contiguous()
    return linear(a.contiguous(), b.mT if dense else b.mT.contiguous())  # with gaps it would take a thousand times


def quick(x: Tensor) -> bool:
    """Whether oneDNN is the one to multiply x."""
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return fp32_on_cpu and torch.backends.mkldnn.is_available() and instruction_set().startswith("avx512")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] weight [N, K]^T + bias [N] by oneDNN, of which no gradient can be had."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def factorize_in_blocks(A: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor, lower, of the symmetric A [K, K], in A's memory, and whether there is none, bool []. The other
    triangle is zero."""
    for block in blocks(len(A)):
        start, end = block.start, block.stop
        done = A[block, :start].contiguous()
        for rows in (slice(row, row + ROWS) for row in range(start, len(A), ROWS)):
            A[rows, block] -= matmul(A[rows, :start], done.mT)
        corner, info = torch.linalg.cholesky_ex(A[block, block])
        if info:
            return A, info != 0
        A[block, block] = corner
        A[end:, block] = torch.linalg.solve_triangular(corner.mT, A[end:, block], upper=True, left=False)
    return A.tril_(), torch.zeros((), dtype=torch.bool)


def solve(L: Tensor, X: Tensor) -> Tensor:
    """X (L L^T)^-1, whose memory X [N, K] may become, for a lower triangular L [K, K]."""
    if not in_blocks(L):
        half = torch.linalg.solve_triangular(L, X.T, upper=False)
        return torch.linalg.solve_triangular(L.mT, half, upper=True).T
    for block in blocks(len(L)):
        left = X[:, block] - matmul(X[:, : block.start], L[block, : block.start].mT)
        X[:, block] = torch.linalg.solve_triangular(L[block, block].mT, left, upper=True, left=False)
    for block in reversed(blocks(len(L))):
        left = X[:, block] - matmul(X[:, block.stop :], L[block.stop :, block])
        X[:, block] = torch.linalg.solve_triangular(L[block, block], left, upper=False, left=False)
    return X


def in_blocks(A: Tensor) -> bool:
    """Whether A [K, K] is wide enough for blocks to be worth it: from K = 1024 on they take half the time."""
    return quick(A) and len(A) >= 4 * BLOCK


def blocks(K: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, K)) for start in range(0, K, BLOCK)]
