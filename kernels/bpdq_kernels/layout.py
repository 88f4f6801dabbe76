"""How bit-planes and coefficients are laid out in memory: as stored, below; in `Tiles`, for CUDA; in `to_cpu_tiles`.

All three are drawn here only. `triton_layout` has the same for code that Triton compiles, and `cpu` passes the sizes to
that in C++.

A Linear with N outputs and K inputs, k planes, groups of G inputs (32 divides G):

    B  int32        [ceil(K/32), k, N]       bit j of word t  =  plane bit of input 32t + j

         word t, plane p, output n:   31 ............ 2 1 0
                                       |              | | '-- input 32t
                                       |              | '---- input 32t + 1
                                       '--------------------- input 32t + 31

    c  fp16 / bf16  [ceil(K/G), k+1, N]      rows 0..k-1: plane coefficients, row k: bias c0

    W[n, i] = c[i // G, k, n]  +  sum_p  c[i // G, p, n] * bit_p[n, i]

This is the layout of the BPDQ authors' release (arXiv 2602.04163), so checkpoints go both ways. With coefficients in 8
bits there is a scale for each output and plane, and s * c stands where c is above:

    c  int8         [ceil(K/G), k+1, N]
    s  fp16 / bf16  [k+1, N]

Of trellis-coded planes (`bpdq_kernels.trellis`) c and s have k+2 rows, as k+1 planes are multiplied; 32 divides K.

The last group may be short, and bits past K in the last word are zero. The authors pad B to a multiple of 256 inputs
when G = 256; `trim` drops that padding.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

WORD = 32
GROUP_SIZES = (32, 64, 128, 256)
MAX_PLANES = 4
TILE_ROWS, UNIT, RUN = 16, 128, 8  # of `Tiles`: outputs, inputs, inputs
CPU_TILE = 32  # outputs
_BYTES = (4, 2, 4, 4)  # of the outputs of a tile
_TILED_AT_ONCE = 1 << 24  # words: 64 MiB


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def plane_shape(in_features: int, out_features: int, planes: int) -> tuple[int, int, int]:
    """Shape of `B`: [ceil(K/32), k, N]."""
    return (cdiv(in_features, WORD), planes, out_features)


def coefficient_shape(
    in_features: int, out_features: int, planes: int, group_size: int, trellis: bool = False
) -> tuple[int, int, int]:
    """Shape of `c`: [ceil(K/G), k+1, N], of a trellis [ceil(K/G), k+2, N]."""
    return (cdiv(in_features, group_size), planes + trellis + 1, out_features)


def has_trellis(B: Tensor, c: Tensor) -> bool:
    """Whether B [..., k, N] is to be multiplied with c [..., N] as trellis-coded planes: by the rows of c."""
    return c.shape[-2] == B.shape[-2] + 2


class Stored(NamedTuple):
    """A layer's tensors as a checkpoint holds them, which the module's docstring draws; s only where c is int8."""

    B: Tensor
    c: Tensor
    s: Tensor | None = None

    def to(self, device: torch.device | str) -> "Stored":
        """They on a device."""
        return Stored(*(None if tensor is None else tensor.to(device) for tensor in self))

    def outputs(self, which: Tensor | slice) -> "Stored":
        """Those of some outputs."""
        return Stored(*(None if tensor is None else tensor[..., which] for tensor in self))


class PreparedExperts(NamedTuple):
    """One matrix of every expert as the kernels of one device want it: the fields of `ops.Prepared` with E in front of
    each tensor's shape; build it with `moe.prepare_experts`."""

    planes: Tensor
    coefficients: Tensor
    scales: Tensor | None
    ratios: Tensor | None
    in_features: int
    out_features: int
    group_size: int

    @property
    def stored(self) -> Stored:
        """The tensors by their names in a checkpoint, in the order that a CPU wants or, elsewhere, as stored."""
        return Stored(self.planes, self.coefficients, self.scales)


def coefficients(c: Tensor, s: Tensor | None) -> Tensor:
    """The numbers [ceil(K/G), k+1, N] that planes are multiplied with, in fp32; from int8 exact."""
    return c.float() if s is None else c.float() * s.float()


def check_layer(B: Tensor, c: Tensor, group_size: int, in_features: int, s: Tensor | None = None) -> None:
    """Raise ValueError unless B, c and s hold a layer of `in_features` inputs and 1 to 4 planes; words of B past
    the inputs are accepted."""
    words, planes, n = plane_shape(in_features, B.shape[2], B.shape[1])
    trellis = has_trellis(B, c)
    if not 1 <= planes <= MAX_PLANES - trellis:
        most = f"{MAX_PLANES - 1} with a trellis" if trellis else MAX_PLANES
        raise ValueError(f"B {tuple(B.shape)} has {planes} bit-planes: 1 to {most} are supported")
    if trellis and in_features % WORD:
        raise ValueError(f"trellis-coded planes need a multiple of {WORD} inputs, not {in_features}")
    shape = coefficient_shape(in_features, n, planes, group_size, trellis)
    if B.dtype != torch.int32 or B.shape[0] < words or c.shape != shape:
        raise ValueError(
            f"B {B.dtype} {tuple(B.shape)} and c {tuple(c.shape)} don't describe {in_features} inputs "
            f"at group size {group_size}: expected int32 {(words, planes, n)} and {shape}"
        )
    if (c.dtype == torch.int8) != (s is not None) or (s is not None and s.shape != shape[1:]):
        found = None if s is None else tuple(s.shape)
        raise ValueError(f"c {c.dtype} with s {found}: int8 needs s {shape[1:]}, and nothing else does")


def pack(bits: Tensor) -> Tensor:
    """Pack plane bits [k, N, K] (any integer or bool dtype, values 0 and 1) into B [ceil(K/32), k, N] int32."""
    k, n, in_features = bits.shape
    words = cdiv(in_features, WORD)
    padded = torch.nn.functional.pad(bits.to(torch.int32), (0, words * WORD - in_features))
    shifts = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    # int32 sums wrap, so bit 31 lands in the sign as intended
    packed = (padded.view(k, n, words, WORD) << shifts).sum(-1, dtype=torch.int32)
    return packed.permute(2, 0, 1).contiguous()


def pack_codes(codes: Tensor, planes: int) -> Tensor:
    """Pack codes [N, K] (any integer dtype), of which bit p is the bit of plane p, into B [ceil(K/32), k, N] int32."""
    return pack(torch.stack([(codes >> p) & 1 for p in range(planes)]))


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
    return B[: cdiv(in_features, WORD)]


def split_groups(c: Tensor, group_size: int, finer: int) -> Tensor:
    """Coefficients for groups of `finer` inputs instead of `group_size`, by repetition: the same weights.

    `finer` must divide `group_size`; of a group that ends early, some are past the inputs. Used where a
    tensor-parallel shard starts inside a group.
    """
    if group_size % finer:
        raise ValueError(f"group size {group_size} can't be split into {finer}s: it does not divide")
    return c.repeat_interleave(group_size // finer, dim=0)


class Tiles(NamedTuple):
    """A layer as the CUDA kernels read it, built by `to_tiles`. T tiles of 16 outputs (a multiple of 4 of them), U
    units of 128 inputs: together the tensor-core operand that a warp holds, lane 4r + q: r = 0..7, q = 0..3. Of E
    experts, each shape has E in front.

    planes  int32 [T, U, k/v, 32, v, 2]   v = 2 for even k, else 1: lane 4r + q finds its words next to each other

             tile t, unit u, lane 4r + q, plane p, half h:  outputs 16t + 8h + r, four runs of 8 inputs of the unit

             G >= 128   run j starts at input 32j + 8q                    q:  0   1   2   3   0   1   2   3   0  ..
             G = 64     run j starts at input 64(q // 2) + 16j + 8(q % 2)     0   1   0   1   0   1   0   1   2  ..
             G = 32     run j starts at input 32q + 8j                        0   0   0   0   1   1   1   1   2  ..

             so that the lanes of a row read activations next to each other, and a word lies in one group.

             bit    31 | 30 29 28 27 | 26 .. 23 | 22 .. 19 | 18 .. 15 | 14 13 12 11 | 10 .. 7 | 6 .. 3 | 2  1  0
             run     1 |           0 |        3 |        2 |        1 |           0 |       3 |      2 |       1
             input   1 |  7  5  3  1 |  6 ..  0 |  6 ..  0 |  6 ..  0 |  6  4  2  0 | 7 .. 1  | 7 .. 1 | 7  5  3

             Rotated right by 4j, bits 11..14 and 27..30 are the pairs of inputs 2i, 2i + 1 of run j, i = 0..3: each is
             the exponent of an fp16 (or bf16) number in one half of the register.

             Of trellis-coded planes those stored, and below k+2 in place of k+1. For every G runs are as for G = 32, so
             that a word has the inputs of a stored one: a chain, upwards from bit 11 and past bit 31 from bit 0.

    coefficients  [T, Gn, 8, k+1, 2]       c of outputs 16t + 8h + r over 2^s, in the activations' dtype, fp16 or bf16;
                                           Gn groups, whole units of them
    scales        fp32 [N]                 2^s, a power of two per output that keeps its coefficients within 1
    ratios        None

    With coefficients in 8 bits W[n, i] = scales[n] * (ratio_k c_k + sum_p ratio_p c_p bit_p):

    coefficients  int8 [T, Gn, 8, k+1, 2]  c as stored
    scales        fp32 [N]                 the largest |s| of the output, 1 where that is 0
    ratios        [T, 8, k+1, 2]           s of outputs 16t + 8h + r over their scale, in the activations' dtype
    """

    planes: Tensor
    coefficients: Tensor
    scales: Tensor
    ratios: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.coefficients.dtype if self.ratios is None else self.ratios.dtype

    @property
    def stored(self) -> int:
        """Bit-planes in `planes`: k."""
        return self.planes.shape[-4] * self.planes.shape[-2]

    @property
    def multiplied(self) -> int:
        """Bit-planes that coefficients are for: k, of trellis-coded ones k + 1."""
        return self.coefficients.shape[-2] - 1

    @property
    def has_trellis(self) -> bool:
        return self.stored < self.multiplied

    @property
    def coefficient_bits(self) -> int:
        return 16 if self.ratios is None else 8

    @property
    def pairs(self) -> Tensor:
        """The coefficients with those of rows r and r + 8 in one integer."""
        return self.coefficients.view(torch.int32 if self.ratios is None else torch.int16)

    @property
    def ratio_pairs(self) -> Tensor | None:
        """The ratios likewise, in int32."""
        return None if self.ratios is None else self.ratios.view(torch.int32)


def to_tiles(B: Tensor, c: Tensor, group_size: int, dtype: torch.dtype, s: Tensor | None = None) -> Tiles:
    """Rearrange B [ceil(K/32), k, N], c [ceil(K/G), k+1, N] and s [k+1, N] (finite; s where c is int8; of trellis-coded
    planes c and s with k+2 rows) for activations of `dtype`, fp16 or bf16.

    Exact for int8 c where an output's s are powers of two apart; other ratios of s are rounded to `dtype`. Else exact
    for c in `dtype`, but for coefficients below 2^-14 of their output's largest, which fp16 holds with an error
    of 2^-25 of it. fp16 coefficients are rounded for bf16 activations, as their products would be.
    Needs a few times `_TILED_AT_ONCE` words beside the result.
    """
    words, k, n = B.shape
    units, tiles = cdiv(words * WORD, UNIT), cdiv(n, 4 * TILE_ROWS) * 4
    v = planes_beside(k)
    planes = torch.empty(tiles, units, k // v, 32, v, 2, dtype=torch.int32, device=B.device)
    step = max(1, _TILED_AT_ONCE // (words * k * TILE_ROWS))
    for start in range(0, tiles, step):
        part = planes[start : start + step]
        rows = B[:, :, start * TILE_ROWS : (start + len(part)) * TILE_ROWS]
        missing = len(part) * TILE_ROWS - rows.shape[2]
        rows = torch.nn.functional.pad(rows, (0, missing, 0, 0, 0, units * 4 - words))
        rows = _interleave_pairs(_interleave_words(rows, words_beside(group_size, has_trellis(B, c))))
        rows = rows.view(units, 4, k // v, v, len(part), 2, 8).permute(4, 0, 2, 6, 1, 3, 5)  # [T, U, k/v, r, q, v, h]
        part.copy_(rows.reshape(part.shape))

    groups = cdiv(units * UNIT, group_size)
    if s is not None:
        scales = s.float().abs().amax(0)
        scales[scales == 0] = 1
        ratios = _pairs_of_rows((s.float() / scales).to(dtype).unsqueeze(0), tiles, 1).squeeze(1)
        return Tiles(planes, _pairs_of_rows(c, tiles, groups), scales, ratios)
    _, exponents = torch.frexp(c.float().abs().amax((0, 1)))
    scales = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    return Tiles(planes, _pairs_of_rows((c / scales).to(dtype), tiles, groups), scales)


def _pairs_of_rows(c: Tensor, tiles: int, groups: int) -> Tensor:
    """c [.., k+1, N] in the order of `Tiles`, [T, Gn, 8, k+1, 2], padded with zeros."""
    c = torch.nn.functional.pad(c, (0, tiles * TILE_ROWS - c.shape[2], 0, 0, 0, groups - c.shape[0]))
    return c.view(groups, -1, tiles, 2, 8).permute(2, 0, 4, 1, 3).contiguous()


def words_beside(group_size: int, trellis: bool = False) -> int:
    """How many words of a unit take runs of 8 inputs in turn: as many as their group has, 4 at most; with a trellis
    each keeps its own."""
    return 1 if trellis else min(4, group_size // WORD)


def planes_beside(stored: int) -> int:
    """Of how many of its planes `Tiles` has a lane's words next to each other: v."""
    return 2 - stored % 2


def groups_in_unit(group_size: int) -> int:
    """How many groups a unit has a part of."""
    return max(1, UNIT // group_size)


def _interleave_words(B: Tensor, beside: int) -> Tensor:
    """B [4U, k, N] with byte j of word q replaced by byte q % beside, in turn, of the `beside` words around it."""
    words, k, n = B.shape
    runs = torch.stack([(B >> shift) & 0xFF for shift in (0, 8, 16, 24)], 1)  # [4U, 4, k, N]
    runs = runs.view(words // beside, 4, beside, k, n).transpose(1, 2).reshape(words, 4, k, n)
    return runs[:, 0] | runs[:, 1] << 8 | runs[:, 2] << 16 | runs[:, 3] << 24


def _interleave_pairs(B: Tensor) -> Tensor:
    """Words with their bits in the order of `Tiles`: those of `to_chains` rotated left by 11."""
    B = to_chains(B)
    return (B << 11) | ((B >> 21) & 0x7FF)


_UNSHUFFLED = ((1, 0x22222222), (2, 0x0C0C0C0C), (4, 0x00F000F0), (8, 0x0000FF00))  # how far bits go, and which


def to_chains(B: Tensor) -> Tensor:
    """Words int32 with the bits of even inputs in the low half, those of odd ones in the high half."""
    return _exchanged(B, _UNSHUFFLED)


def from_chains(B: Tensor) -> Tensor:
    """The inverse of `to_chains`."""
    return _exchanged(B, reversed(_UNSHUFFLED))


def _exchanged(B: Tensor, steps: Iterable[tuple[int, int]]) -> Tensor:
    for shift, mask in steps:
        moved = (B ^ (B >> shift)) & mask
        B = B ^ moved ^ (moved << shift)
    return B


def to_cpu_tiles(
    B: Tensor, c: Tensor, group_size: int, planes: Tensor, s: Tensor | None = None, bytes_together: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Fill `planes`, int32 of B's size, from B [ceil(K/32), k, N], and return c [ceil(K/G), k+1, N] and, in fp32,
    s [k+1, N] (k+2 of a trellis) in the same order, the one that cpu_linear.cpp walks; CPU_TILE divides N:

    planes        [group][tile of 32 outputs][word of the group][plane][32]  words as stored
    coefficients  [group][tile of 32 outputs][plane .. , c0][32]             as stored
    scales        [tile of 32 outputs][plane .. , c0][32]                    of coefficients in 8 bits

                 16 outputs = one AVX-512 register, two to a tile
               .------.------.---   ---.------.
     word t,   |  n   | n+1  |   ...   | n+15 |   bit j of a lane = plane bit of input 32t + j of that output
     plane p   '------'------'---   ---'------'

    With `bytes_together`, for AVX2, the words of a plane in a tile lie as four registers, byte b of all outputs (of
    inputs 8b to 8b + 7) in the one b, and there outputs 8i + 4h + j at 16h + 4i + j: unpacking twice, which halves of
    a register do apart, puts words or sums of 8 outputs into a register in order.

    Of trellis-coded planes the bits of a word lie in the order of its chain, those of even inputs first.
    """
    start, trellis = 0, has_trellis(B, c)
    for group in B.unflatten(2, (-1, CPU_TILE)).split(group_size // WORD):  # [words of the group, k, tiles, 32]
        group = to_chains(group) if trellis else group
        group = group.permute(2, 0, 1, 3)
        if bytes_together:
            parts = group.contiguous().view(torch.uint8).unflatten(3, _BYTES)  # outputs 8i + 4h + j, then bytes
            group = parts.permute(0, 1, 2, 6, 4, 3, 5).flatten(3).view(torch.int32)
        planes.view(-1)[start : start + group.numel()].view(group.shape).copy_(group)
        start += group.numel()
    coefficients = c.unflatten(2, (-1, CPU_TILE)).transpose(1, 2).contiguous().view_as(c)
    return coefficients, None if s is None else s.float().unflatten(1, (-1, CPU_TILE)).transpose(0, 1).contiguous()


def rows_of_cpu_tiles(
    planes: Tensor,
    coefficients: Tensor,
    scales: Tensor | None,
    group_size: int,
    rows: Tensor,
    bytes_together: bool = False,
) -> Stored:
    """The tensors of the outputs `rows` [R]: the inverse of `to_cpu_tiles`, whose planes are in a tensor
    [ceil(K/32), k, N]; s stays fp32."""
    words, k, n = planes.shape
    word, tile, lane = torch.arange(words).view(-1, 1, 1), rows // CPU_TILE, rows % CPU_TILE
    start = word // (group_size // WORD) * (group_size // WORD)  # of the word's group
    length = (words - start).clamp_max(group_size // WORD)
    plane = torch.arange(k).view(-1, 1)
    at = start * k * n + ((tile * length + word - start) * k + plane) * CPU_TILE
    if bytes_together:
        place = torch.arange(CPU_TILE).view(4, 2, 4).transpose(0, 1).flatten().argsort()[lane]
        byte = (4 * at + place).unsqueeze(-1) + CPU_TILE * torch.arange(4)
        B = planes.view(-1).view(torch.uint8)[byte].view(torch.int32).squeeze(-1)
    else:
        B = planes.view(-1)[at + lane]
    c = coefficients.view(-1, n // CPU_TILE, coefficients.shape[1], CPU_TILE)[:, tile, :, lane].permute(1, 2, 0)
    B = from_chains(B) if has_trellis(planes, coefficients) else B
    return Stored(B, c, None if scales is None else scales[tile, :, lane].T)
