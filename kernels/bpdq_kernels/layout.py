"""How bit-planes and coefficients are laid out in memory. The only module that knows the bit order.

A Linear with N outputs and K inputs, k planes, groups of G inputs (32 divides G):

    B  int32        [ceil(K/32), k, N]       bit j of word t  =  plane bit of input 32t + j

         word t, plane p, output n:   31 ............ 2 1 0
                                       |              | | '-- input 32t
                                       |              | '---- input 32t + 1
                                       '--------------------- input 32t + 31

    c  fp16 / bf16  [ceil(K/G), k+1, N]      rows 0..k-1: plane coefficients, row k: bias c0

    W[n, i] = c[i // G, k, n]  +  sum_p  c[i // G, p, n] * bit_p[n, i]

This is the layout of the BPDQ authors' release (arXiv 2602.04163), so checkpoints go both ways. The last
group may be short, and bits past K in the last word are zero. The authors pad B to a multiple of 256 inputs
when G = 256; `trim` drops that padding.
"""

import torch
from torch import Tensor

WORD = 32
GROUP_SIZES = (32, 64, 128, 256)
MAX_PLANES = 4


def plane_shape(in_features: int, out_features: int, planes: int) -> tuple[int, int, int]:
    """Shape of `B`: [ceil(K/32), k, N]."""
    return (-(-in_features // WORD), planes, out_features)


def coefficient_shape(in_features: int, out_features: int, planes: int, group_size: int) -> tuple[int, int, int]:
    """Shape of `c`: [ceil(K/G), k+1, N]."""
    return (-(-in_features // group_size), planes + 1, out_features)


def check_layer(B: Tensor, c: Tensor, group_size: int, in_features: int) -> None:
    """Raise ValueError unless B and c hold a layer of `in_features` inputs; padding past them is accepted."""
    words, planes, n = plane_shape(in_features, B.shape[2], B.shape[1])
    groups = coefficient_shape(in_features, n, planes, group_size)[0]
    if B.dtype != torch.int32 or B.shape[0] < words or c.shape[0] < groups or c.shape[1:] != (planes + 1, n):
        raise ValueError(
            f"B {B.dtype} {tuple(B.shape)} and c {tuple(c.shape)} don't describe {in_features} inputs "
            f"at group size {group_size}: expected int32 {(words, planes, n)} and {(groups, planes + 1, n)}"
        )


def pack(bits: Tensor) -> Tensor:
    """Pack plane bits [k, N, K] (any integer or bool dtype, values 0 and 1) into B [ceil(K/32), k, N] int32."""
    k, n, in_features = bits.shape
    words = -(-in_features // WORD)
    padded = torch.nn.functional.pad(bits.to(torch.int32), (0, words * WORD - in_features))
    shifts = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    # int32 sums wrap, so bit 31 lands in the sign as intended
    packed = (padded.view(k, n, words, WORD) << shifts).sum(-1, dtype=torch.int32)
    return packed.permute(2, 0, 1).contiguous()


def unpack(B: Tensor, in_features: int) -> Tensor:
    """Unpack B [>= ceil(K/32), k, N] into plane bits [k, N, K] uint8; the inverse of `pack`."""
    return expand_words(B).permute(0, 3, 1, 2).flatten(2)[..., :in_features].contiguous()


def expand_words(B: Tensor) -> Tensor:
    """Bits of B [words, k, N] as uint8 [k, words, 32, N], inputs before outputs."""
    words, k, n = B.shape
    # bytes first: their eight bits are then tested in 8-bit lanes, four times as many to a vector as words
    octets = (B.unsqueeze(2) >> (8 * torch.arange(4, dtype=torch.int32, device=B.device)).view(4, 1)).to(torch.uint8)
    tests = (1 << torch.arange(8, device=B.device)).to(torch.uint8).view(8, 1)
    bits = (octets.permute(1, 0, 2, 3).unsqueeze(3) & tests).clamp_max_(1)  # [k, words, 4, 8, N]
    return bits.reshape(k, words, WORD, n)


def trim(B: Tensor, in_features: int) -> Tensor:
    """B without padding words past `in_features` inputs."""
    return B[: -(-in_features // WORD)]


def refine(c: Tensor, group_size: int, finer: int) -> Tensor:
    """Coefficients for groups of `finer` inputs instead of `group_size`, by repetition: the same weights.

    `finer` must divide `group_size`. Used where a tensor-parallel shard starts inside a group.
    """
    if group_size % finer:
        raise ValueError(f"group size {group_size} can't be refined to {finer}: it does not divide")
    return c.repeat_interleave(group_size // finer, dim=0)
