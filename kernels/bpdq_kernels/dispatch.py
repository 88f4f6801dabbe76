"""Which kernel, tile and split a layer and a batch get: computed from their sizes, never timed at run time.

A block computes some tiles of 16 outputs, and its warps share the inputs. The largest tile is taken that still gives
every multiprocessor about the same number of blocks.
"""

from functools import cache
from typing import NamedTuple

from bpdq_kernels.layout import TILE_ROWS, UNIT, cdiv, groups_in_unit

MIN_BALANCE = 0.85  # of the multiprocessors' time, if a block takes as long on each
MAX_TOKENS = 1 << 15  # of a batch whose kernel is compiled ahead
DENSE_BYTES = 64 << 20  # of dequantized weights at a time
DENSE_TILE = 128  # outputs
# Tokens from which on multiplying with dequantized weights is faster: measured on an H100. GeForce's tensor cores are
# slower with fp32 sums, so that they, not the rest of the fused kernel, are the bound up to more tokens.
DENSE_TOKENS = {80: 512, 90: 512, 100: 512, 103: 512}
DENSE_TOKENS_ELSEWHERE = 1024
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


class Dense(NamedTuple):
    """Many tokens: the weights of so many outputs are dequantized at a time, for `torch.matmul`."""

    outputs: int


Config = Gemv | Gemm | Dense


def balance(blocks: int, multiprocessors: int) -> float:
    """The mean share of the time in which a multiprocessor has work, as that of the busiest one is 1."""
    return blocks / (cdiv(blocks, multiprocessors) * multiprocessors)


def tiles_per_block(out_features: int, candidates: tuple[int, ...], multiprocessors: int) -> int:
    """The first candidate that balances the blocks well enough, else the one that does best."""
    blocks = {tiles: cdiv(out_features, TILE_ROWS * tiles) for tiles in candidates}
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
    coefficient_bits: int = 16,
) -> Config:
    """The kernel for `tokens` (at least 1) and a layer; arch: compute capability, 86 for 8.6.

    Two tiles of four planes with coefficients of 8 bits need more registers: with one token fewer warps have them, with
    64 tokens no thread.
    Binary tensor cores end with sm_90: from sm_100 on, ptxas emulates each of their MMAs in some fifty instructions.
    """
    if tokens == 1 and arch < 100:
        one = gemv_config(planes, group_size, out_features, in_features, multiprocessors)
        return one._replace(warps=4) if one.tiles == 2 and planes == 4 and coefficient_bits == 8 else one
    if tokens >= DENSE_TOKENS.get(arch, DENSE_TOKENS_ELSEWHERE):
        return dense_config(in_features)
    config = gemm_config(tokens, planes, out_features, multiprocessors)
    too_large = config.tokens == 64 and planes == 4 and coefficient_bits == 8
    return config._replace(tiles=1) if too_large else config


def gemv_config(planes: int, group_size: int, out_features: int, in_features: int, multiprocessors: int) -> Gemv:
    """One tile always fits the registers; more only while a unit's coefficients leave room.

    Where these fill it, blocks have four warps: the 128 registers of eight are too few for some versions of ptxas.
    """
    coefficients = (planes + 1) * groups_in_unit(group_size)
    candidates = tuple(tiles for tiles in (4, 2, 1) if tiles == 1 or tiles * coefficients <= MAX_COEFFICIENTS)
    tiles = tiles_per_block(out_features, candidates, multiprocessors)
    full = tiles * coefficients >= MAX_COEFFICIENTS
    return Gemv(tiles, warps=4 if full or in_features < 16 * UNIT else 8)


def gemm_config(tokens: int, planes: int, out_features: int, multiprocessors: int) -> Gemm:
    """Buckets of up to 8, 9..16, 17..32 and more tokens; 64 of those at a time. Measured on an H100.

    Two tiles halve how often activations are read, which with one are several times the weights' bytes. Where that
    leaves multiprocessors without a block, blocks have more warps instead, among which the inputs are split.
    """
    narrow = cdiv(out_features, 2 * TILE_ROWS) < multiprocessors
    if tokens > 64:
        blocks = cdiv(tokens, 64) * cdiv(out_features, 4 * TILE_ROWS)
        return Gemm(64, 2, 4, split=2 if 2 * blocks >= 3 * multiprocessors else 4)
    bucket = next(size for size in (8, 16, 32, 64) if tokens <= size)
    if bucket > 16:
        return Gemm(bucket, 2, 8, split=8) if narrow else Gemm(bucket, 2, 4, split=4)
    if narrow:  # 128 registers for each thread of 16 warps, which two tiles of 3 planes exceed
        return Gemm(bucket, 2 if planes <= 2 and cdiv(out_features, TILE_ROWS) > multiprocessors else 1, 16, split=16)
    tiles = tiles_per_block(out_features, (2, 1), multiprocessors)
    wide = tiles == 2 and cdiv(out_features, 2 * TILE_ROWS) >= 8 * multiprocessors
    return Gemm(bucket, tiles, *((4, 4) if wide else (8, 8)))


def dense_config(in_features: int) -> Dense:
    """As many outputs as fit DENSE_BYTES, in tiles that suit a matrix multiplication."""
    return Dense(max(1, DENSE_BYTES // (2 * in_features * DENSE_TILE)) * DENSE_TILE)


@cache
def linear_configs(
    planes: int,
    group_size: int,
    out_features: int,
    in_features: int,
    multiprocessors: int,
    arch: int,
    coefficient_bits: int = 16,
) -> tuple[Config, ...]:
    """All that `linear_config` gives a layer for 1 to MAX_TOKENS tokens: past 64 it counts them in 64s."""
    first = (*range(1, 65), *range(65, MAX_TOKENS, 64))
    layer = (planes, group_size, out_features, in_features, multiprocessors, arch, coefficient_bits)
    return tuple(dict.fromkeys(linear_config(tokens, *layer) for tokens in first))
