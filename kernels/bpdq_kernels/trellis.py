"""Trellis-coded planes: k planes are stored and k + 1 are multiplied, so that weights have twice as many levels.

The first stored plane, x, is a path through the four states of Ungerboeck's code; two planes take its place:

    stored        x    u_1 .. u_(k-1)            B [ceil(K/32), k, N]
    multiplied    z0   z1   u_1 .. u_(k-1)       c [ceil(K/G), k+2, N], the last row c0

    z0_i = x_(i-1),  z1_i = x_i ^ x_(i-2)        i: the place in a chain; before a chain there are zeros

A chain is the word of 32 inputs that holds its bits, even inputs before odd ones:

    input     0   2   4  ..  30   1   3   5  ..  31
    place     0   1   2  ..  15  16  17  18  ..  31

so that of a word all bits are derived at once, rows are independent of each other, and a shard may start at any word.
Of the levels W_hat = c0 + sum c_p bit_p, those of equal z0 and z1 are the subsets of a set partition as long as
c of z0 < c of z1 < c of u; from each state two of the four subsets can be reached.
"""

import torch
from torch import Tensor

from bpdq_kernels.layout import WORD, has_trellis

CODED = 2  # planes that are multiplied in the place of x
STATES = 4
_EVEN = 0x55555555  # bits of even inputs


def chain_order(in_features: int, device: torch.device | str = "cpu") -> Tensor:
    """Inputs int64 [K] in the order of their chains; K is a multiple of 32."""
    return torch.arange(in_features, device=device).view(-1, WORD // 2, 2).mT.flatten()


def shifted(x: Tensor, places: int) -> Tensor:
    """Words int32 with each bit `places` = 1 .. 16 places later in its chain; the last ones drop out."""
    from_even = x & _EVEN
    if places == 16:
        return from_even << 1
    return (x << 2 * places) | (from_even >> 31 - 2 * places)


def multiplied(B: Tensor) -> Tensor:
    """The planes that are multiplied, [..., k+1, N], of those stored, B int32 [..., k, N]."""
    x, free = B[..., :1, :], B[..., 1:, :]
    return torch.cat([shifted(x, 1), x ^ shifted(x, 2), free], -2)


def stored(planes: Tensor) -> Tensor:
    """The inverse of `multiplied`: of z0, z1, .. [..., k+1, N], those stored, [..., k, N]. z0 is not looked at."""
    x = planes[..., 1:2, :]
    for places in (2, 4, 8, 16):
        x = x ^ shifted(x, places)
    return torch.cat([x, planes[..., 2:, :]], -2)


def planes_of(B: Tensor, c: Tensor) -> Tensor:
    """The planes [..., N] that the rows of c are multiplied with: B, or of a trellis `multiplied`."""
    return multiplied(B) if has_trellis(B, c) else B
