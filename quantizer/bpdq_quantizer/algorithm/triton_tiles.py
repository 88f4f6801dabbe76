"""What kernels of `triton_solver` and `triton_descent` have in common: tiles, packed codes, launches' sizes."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

STAGES = tl.constexpr(3)  # columns of the factors on their way into shared memory


@triton.jit
def code_at(t: tl.tensor, words: tl.tensor) -> tl.tensor:
    """Codes [R] of input t."""
    which = tl.arange(0, words.shape[0])[:, None]
    return (tl.sum(tl.where(which == t // 8, words, 0), 0) >> (t % 8 * 4)) & 15


@triton.jit
def with_code(words: tl.tensor, word: tl.tensor, t: tl.tensor, code: tl.tensor) -> tl.tensor:
    """Words, numbered by `word`, with codes [R] of input t, which are zero there so far."""
    return tl.where((word == t // 8)[:, None], words | (code << (t % 8 * 4))[None, :], words)


@triton.jit
def zeros(G: tl.constexpr, R: tl.constexpr, COUNT: tl.constexpr) -> tl.tuple:
    """That many tiles."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros([G, R], tl.float32),)
    return tiles


@triton.jit
def add_planes(VX: tl.tuple, v: tl.tensor, code: tl.tensor, BITS: tl.constexpr) -> tl.tuple:
    """V X with what an input of these codes [R] adds; v [G]: its column of V."""
    more = ()
    for p in tl.static_range(BITS):
        more = more + (VX[p] + v[:, None] * ((code >> p) & 1).to(tl.float32)[None, :],)
    return more


def tile(bits: int, inputs: int) -> dict[str, int]:
    """A program's G and R for groups of that many inputs."""
    G = max(32, triton.next_power_of_2(inputs))
    return {"G": G, "R": (512 if bits < 4 else 256) // G}


def options(all_registers: bool = False) -> dict[str, Any]:
    """Compiler options: with one warp, sums over inputs are shuffles. all_registers: ptxas takes what it needs, where
    it would else spill so that more programs run at once."""
    return {"num_warps": 1, "enable_fp_fusion": True} | ({"maxnreg": 255} if all_registers else {})


def has_whole_rows(x: Tensor) -> bool:
    """Whether the rows of each matrix of x [..., rows, columns] follow each other."""
    return x.stride()[-2:] == (x.shape[-1], 1)


def matrix_stride(x: Tensor) -> int:
    """From one matrix of x [E, rows, columns] to the next; of a single one 0."""
    return x.stride(0) if x.ndim == 3 else 0
