"""Which kernel, tile and split a layer and a batch get: computed from their sizes, never timed at run time.

A block computes some tiles of 16 outputs, and its warps share the inputs. The largest tile is taken that still gives
every multiprocessor about the same number of blocks. Planes are counted as they are multiplied: what fits the registers
depends on that, not on how many are stored.
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
DECODE_TOKENS, DECODE_PAIRS = 8, 2  # at most, and for each expert: then each pair of token and expert is a GEMV
# pairs of an average expert up to which blocks have so many: most experts have then no more
EXPERT_TOKENS = {8: 4, 16: 10, 32: 24}
MAX_COEFFICIENTS = 12  # registers of a thread for one unit's; as many are on their way for the next
MAX_COEFFICIENTS_TRELLIS = 16  # of two tiles


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


class Matrix(NamedTuple):
    """One of the two matrices that each expert of a layer has."""

    planes: int
    group_size: int
    out_features: int
    in_features: int
    coefficient_bits: int = 16


class Experts(NamedTuple):
    """The kernels for experts' first and second matrices; is_sorted: their blocks are of pairs with the same expert,
    not of one pair; is_fused: the gate is multiplied where the first matrix is."""

    up: Gemv | Gemm
    down: Gemv | Gemm
    is_sorted: bool
    is_fused: bool


def balance(blocks: int, multiprocessors: int) -> float:
    """The mean share of the time in which a multiprocessor has work, as that of the busiest one is 1."""
    return blocks / (cdiv(blocks, multiprocessors) * multiprocessors)


def tiles_per_block(out_features: int, candidates: tuple[int, ...], multiprocessors: int, copies: int = 1) -> int:
    """The first candidate that balances the blocks, `copies` for each of a layer's, well enough, else the one that
    does best."""
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
    coefficient_bits: int = 16,
    trellis: bool = False,
) -> Config:
    """The kernel for `tokens` (at least 1) and a layer; arch: compute capability, 86 for 8.6.

    With one token, two tiles of four planes with coefficients of 8 bits need more registers, which fewer warps have.
    Binary tensor cores end with sm_90: from sm_100 on, ptxas emulates each of their MMAs in some fifty instructions.
    """
    if tokens == 1 and arch < 100:
        one = gemv_config(planes, group_size, out_features, in_features, multiprocessors, trellis)
        return one._replace(warps=4) if one.tiles == 2 and planes == 4 and coefficient_bits == 8 else one
    if tokens >= DENSE_TOKENS.get(arch, DENSE_TOKENS_ELSEWHERE):
        return dense_config(in_features)
    config = gemm_config(tokens, planes, out_features, multiprocessors)
    if config.tiles == 1 or two_tiles_fit(config, planes, group_size, arch, coefficient_bits, trellis):
        return config
    return config._replace(tiles=1) if config.tokens > 16 else Gemm(config.tokens, 1, 8, 8)


def two_tiles_fit(config: Gemm, planes: int, group_size: int, arch: int, coefficient_bits: int, trellis: bool) -> bool:
    """Whether a thread has registers for two tiles, by any version of ptxas: four planes take the most, and groups of
    32 the most coefficients, which take more where they have 8 bits."""
    tokens, sm_100 = config.tokens, arch // 10 == 10
    if coefficient_bits == 16:
        return (tokens, config.split, planes, group_size) != (64, 8, 3, 64)
    if planes == 4:
        return not (tokens == 64 or (tokens <= 16 and group_size == 32) or (tokens == 8 and sm_100))
    if trellis and arch == 90 and (tokens, config.warps, planes) == (16, 8, 3):
        return False
    return not (sm_100 and (tokens, planes) == (64, 1))


def gemv_config(
    planes: int, group_size: int, out_features: int, in_features: int, multiprocessors: int, trellis: bool = False
) -> Gemv:
    """One tile always fits the registers; more only while a unit's coefficients leave room. With a trellis two tiles
    have more of it, as a word less of each row is on its way.

    Where these fill it, blocks have four warps: the 128 registers of eight are too few for some versions of ptxas.
    """
    coefficients = (planes + 1) * groups_in_unit(group_size)
    room = {4: MAX_COEFFICIENTS, 2: MAX_COEFFICIENTS_TRELLIS if trellis else MAX_COEFFICIENTS}
    candidates = tuple(tiles for tiles in (4, 2, 1) if tiles == 1 or tiles * coefficients <= room[tiles])
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
    trellis: bool = False,
) -> tuple[Config, ...]:
    """All that `linear_config` gives a layer for 1 to MAX_TOKENS tokens: past 64 it counts them in 64s."""
    first = (*range(1, 65), *range(65, MAX_TOKENS, 64))
    layer = (planes, group_size, out_features, in_features, multiprocessors, arch, coefficient_bits, trellis)
    return tuple(dict.fromkeys(linear_config(tokens, *layer) for tokens in first))


def experts_config(
    tokens: int, choices: int, experts: int, up: Matrix, down: Matrix, gated: bool, multiprocessors: int, arch: int
) -> Experts:
    """The kernels for `tokens` (at least 1), each of which chooses `choices` of `experts`, whichever those are.

    Few tokens choose few experts twice: each pair is then a product of its own. Without binary tensor cores (from
    sm_100 on) that is a block with one token. A gate's tiles match those of up where each has whole tiles.
    """
    pairs = tokens * choices
    fused = gated and up.out_features % (2 * TILE_ROWS) == 0
    if tokens <= DECODE_TOKENS and pairs <= DECODE_PAIRS * experts:
        if arch < 100:
            one = expert_gemv(up, pairs, fused, multiprocessors), expert_gemv(down, pairs, False, multiprocessors)
        else:
            one = expert_gemm(8, up, pairs, multiprocessors), expert_gemm(8, down, pairs, multiprocessors)
        return Experts(*one, is_sorted=False, is_fused=fused)
    bucket = next((size for size, mean in EXPERT_TOKENS.items() if pairs <= mean * experts), 64)
    if not all(many_tokens_fit(matrix) for matrix in (up, down)):
        bucket = min(bucket, 32)
    hit = min(pairs, experts)
    several = expert_gemm(bucket, up, hit, multiprocessors), expert_gemm(bucket, down, hit, multiprocessors)
    return Experts(*several, is_sorted=True, is_fused=fused)


def many_tokens_fit(matrix: Matrix) -> bool:
    """Whether 64 tokens leave registers for the weights of two tiles."""
    smallest = {1: 64, 2: 64, 3: 128}.get(matrix.planes)
    return matrix.coefficient_bits == 16 and smallest is not None and matrix.group_size >= smallest


def expert_gemv(matrix: Matrix, pairs: int, fused: bool, multiprocessors: int) -> Gemv:
    """As `gemv_config`; two tiles, of gate and up, where their product is `fused`. Experts have few inputs, that few
    warps share."""
    coefficients = (matrix.planes + 1) * groups_in_unit(matrix.group_size)
    candidates = tuple(tiles for tiles in (4, 2, 1) if tiles == 1 or tiles * coefficients <= MAX_COEFFICIENTS)
    tiles = 2 if fused else tiles_per_block(matrix.out_features, candidates, multiprocessors, pairs)
    units = cdiv(matrix.in_features, UNIT)
    full = tiles * coefficients >= MAX_COEFFICIENTS
    return Gemv(tiles, warps=2 if units < 8 else 4 if full or units < 32 else 8)


def expert_gemm(tokens: int, matrix: Matrix, blocks: int, multiprocessors: int) -> Gemm:
    """Four warps, which share the inputs of two tiles where blocks are few, else in pairs those of two tiles each."""
    few = blocks * cdiv(matrix.out_features, 4 * TILE_ROWS) < 2 * multiprocessors
    return Gemm(tokens, 2, 4, split=4 if few else 2)


@cache
def experts_configs(
    choices: int, experts: int, up: Matrix, down: Matrix, gated: bool, multiprocessors: int, arch: int
) -> tuple[Experts, ...]:
    """All that `experts_config` gives a layer."""
    most = cdiv(experts * (1 + max(EXPERT_TOKENS.values())), choices)
    sizes = (choices, experts, up, down, gated, multiprocessors, arch)
    return tuple(dict.fromkeys(experts_config(tokens, *sizes) for tokens in range(1, most + 1)))
