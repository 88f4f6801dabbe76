"""Which kernel, tile and split a layer and a batch get: computed from their sizes, never timed at run time.

A block computes some tiles of 16 outputs; its warps share the inputs among them where that leaves enough blocks. The
largest tile is taken that still gives every multiprocessor about the same number of blocks.
"""

from typing import NamedTuple

from bpdq_kernels.layout import TILE_INPUTS, TILE_ROWS

MIN_BALANCE = 0.85  # of the multiprocessors' time, if a block takes as long on each
MAX_COEFFICIENTS = 12  # registers of a thread for one unit's; as many are on their way for the next


class Gemv(NamedTuple):
    """One token: tiles of 16 outputs per block, warps that share the inputs."""

    tiles: int
    warps: int


class Gemm(NamedTuple):
    """Tokens per block, tiles of 16 outputs per warp, warps, and how many of those share the inputs of a tile."""

    tokens: int
    tiles: int
    warps: int
    split: int


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def balance(blocks: int, multiprocessors: int) -> float:
    """The mean share of the time in which a multiprocessor has work, as that of the busiest one is 1."""
    return blocks / (cdiv(blocks, multiprocessors) * multiprocessors)


def tiles_per_block(out_features: int, candidates: tuple[int, ...], multiprocessors: int, copies: int = 1) -> int:
    """The first candidate that balances the blocks well enough, else the one that does best.

    copies: blocks that compute the same outputs, for other tokens.
    """
    blocks = {tiles: copies * cdiv(out_features, TILE_ROWS * tiles) for tiles in candidates}
    for tiles in candidates:
        if blocks[tiles] >= multiprocessors and balance(blocks[tiles], multiprocessors) >= MIN_BALANCE:
            return tiles
    return max(
        candidates, key=lambda tiles: min(1, blocks[tiles] / multiprocessors) * balance(blocks[tiles], multiprocessors)
    )


def linear_config(
    tokens: int,
    planes: int,
    group_size: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    arch: int,
) -> Gemv | Gemm:
    """The kernel for `tokens` (at least 1) and a layer; arch: compute capability, 86 for 8.6.

    Binary tensor cores end with sm_90: from sm_100 on, ptxas emulates each of their MMAs in some fifty instructions.
    """
    if tokens == 1 and arch < 100:
        return gemv_config(planes, group_size, out_features, in_features, multiprocessors)
    return gemm_config(tokens, out_features, multiprocessors)


def gemv_config(planes: int, group_size: int, out_features: int, in_features: int, multiprocessors: int) -> Gemv:
    """One tile always fits the registers; more only while a unit's coefficients leave room.

    Where these fill it, blocks have four warps: the 128 registers of eight are too few for some versions of ptxas.
    """
    coefficients = (planes + 1) * max(1, TILE_INPUTS // group_size)
    candidates = tuple(tiles for tiles in (4, 2, 1) if tiles == 1 or tiles * coefficients <= MAX_COEFFICIENTS)
    tiles = tiles_per_block(out_features, candidates, multiprocessors)
    full = tiles * coefficients >= MAX_COEFFICIENTS
    return Gemv(tiles, warps=4 if full or in_features < 16 * TILE_INPUTS else 8)


def gemm_config(tokens: int, out_features: int, multiprocessors: int) -> Gemm:
    """Buckets of up to 8, 9..16, 17..32 and more tokens; 64 of those at a time.

    Up to 32 tokens two tiles wherever that gives every multiprocessor a block, balanced or not: each halves how often
    activations are read, which with one tile are several times the weights' bytes.
    """
    for bucket in (8, 16, 32):
        if tokens <= bucket:
            tiles = 2 if cdiv(out_features, 2 * TILE_ROWS) >= multiprocessors else 1
            return Gemm(bucket, tiles, warps=8, split=8)
    tiles = tiles_per_block(out_features, (8, 2, 1), multiprocessors, copies=cdiv(tokens, 64))
    return Gemm(64, tiles=min(tiles, 2), warps=4, split=1 if tiles == 8 else 4)
