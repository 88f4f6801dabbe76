"""Where a word, a coefficient or an input is in `bpdq_kernels.layout.Tiles`, which draws it, for code that Triton
compiles.

Planes are counted in words from a tile's unit, coefficients in pairs (of rows r and r + 8) from a tile's group. Of
trellis-coded planes fewer are `stored` than there are to be multiplied, `planes`: `multiplied_plane` makes those.
"""

import triton
import triton.language as tl

from bpdq_kernels import layout
from bpdq_kernels.warp import (
    load2,
    load4,
    reload1,
    reload2,
    reload4,
    rotate_left,
    select_bytes,
    shift_right,
    signed_byte,
)

TILE_ROWS, UNIT, RUN = tl.constexpr(layout.TILE_ROWS), tl.constexpr(layout.UNIT), tl.constexpr(layout.RUN)
words_beside = triton.constexpr_function(layout.words_beside)
planes_beside = triton.constexpr_function(layout.planes_beside)
groups_in_unit = triton.constexpr_function(layout.groups_in_unit)


@triton.constexpr_function
def unit_words(stored: int) -> int:
    """Words of a tile in a unit."""
    return layout.TILE_ROWS * layout.UNIT // layout.WORD * stored


@triton.constexpr_function
def lane_words(stored: int) -> int:
    """Words that a lane finds next to each other, and how far it is to those of the next lane."""
    return 2 * planes_beside(stored)


@triton.constexpr_function
def plane_start(plane: int, stored: int) -> int:
    """Where the first lane's words of a stored plane start."""
    beside = planes_beside(stored)
    return plane // beside * (64 * beside) + plane % beside * 2


@triton.constexpr_function
def plane_in_store(plane: int, planes: int, stored: int) -> int:
    """The stored plane from which plane `plane` of those multiplied comes."""
    return max(0, plane - (planes - stored))


@triton.constexpr_function
def row_pairs(planes: int) -> int:
    """Pairs of coefficients of a row: how far it is to those of the next."""
    return planes + 1


@triton.constexpr_function
def group_pairs(planes: int) -> int:
    """Pairs of coefficients of a tile in a group."""
    return layout.TILE_ROWS // 2 * (planes + 1)


@triton.constexpr_function
def row_words(planes: int) -> int:
    """Words that hold a row's pairs of 8-bit coefficients."""
    return planes // 2 + 1


@triton.jit
def first_pair(r: tl.tensor, PLANES: tl.constexpr, BYTES: tl.constexpr) -> tl.tensor:
    """Where `load_coefficients` starts to read row r of a group: at its first pair, or before it at a whole word."""
    first = r * row_pairs(PLANES)
    return first - r % 2 if BYTES and PLANES % 2 == 0 else first


@triton.constexpr_function
def run_step(beside: int) -> int:
    """Inputs from one run of a word to its next; beside: `words_beside`."""
    return layout.RUN * beside


@triton.jit
def input_of_word(i: tl.tensor, q: tl.tensor, BESIDE: tl.constexpr) -> tl.tensor:
    """The input of word q that is in the place of input i of the unit's first word."""
    return i + q // BESIDE * (32 * BESIDE) + q % BESIDE * RUN


@triton.jit
def input_of_bit(bit: tl.tensor, BESIDE: tl.constexpr) -> tl.tensor:
    """Which input of its unit a bit of the first word stands for."""
    rank = (bit - 11) & 31  # runs of 8 inputs, even ones first
    run = (rank & 15) >> 2
    return run * run_step(BESIDE) + (((rank & 3) << 1) | (rank >> 4))


@triton.jit
def bit_of_input(run: tl.tensor, number: tl.tensor) -> tl.tensor:
    """Which bit of its word stands for input `number` of run `run`: the inverse of `input_of_bit`."""
    return (11 + (number & 1) * 16 + run * 4 + (number >> 1)) & 31


@triton.constexpr_function
def turn(run: int) -> int:
    """By how much a word is rotated left so that `pair_mask` finds the inputs of a run."""
    return -4 * run % 32


@triton.constexpr_function
def pair_mask(pair: int) -> int:
    """Inputs 2 `pair` and 2 `pair` + 1 of the run that a word was turned to: an exponent bit of each half."""
    return 0x00010001 << (11 + pair)


@triton.jit
def load_planes(
    ptr: tl.tensor, stride: tl.tensor, live: tl.tensor, STORED: tl.constexpr, TILES: tl.constexpr
) -> tl.tuple:
    """A lane's words of one unit for each tile: rows r and r + 8 of plane 0, then of plane 1, ...; zeros where not
    `live`. Tiles are `stride` words apart."""
    words = ()
    for _ in tl.static_range(TILES):
        if STORED % 2 == 0:
            for p in tl.static_range(0, STORED, 2):
                words = words + load4(ptr, live, 4 * plane_start(p, STORED))
        else:
            for p in tl.static_range(STORED):
                words = words + load2(ptr, live, 4 * plane_start(p, STORED))
        ptr += stride
    return words


@triton.jit
def reload_planes(
    ptr: tl.tensor, stride: tl.tensor, live: tl.tensor, old: tl.tuple, STORED: tl.constexpr, TILES: tl.constexpr
) -> tl.tuple:
    """As `load_planes`, but `old` where not `live`."""
    words = ()
    for _ in tl.static_range(TILES):
        if STORED % 2 == 0:
            for p in tl.static_range(0, STORED, 2):
                words = words + reload4(ptr, live, old[len(words) :], 4 * plane_start(p, STORED))
        else:
            for p in tl.static_range(STORED):
                words = words + reload2(ptr, live, old[len(words) :], 4 * plane_start(p, STORED))
        ptr += stride
    return words


@triton.jit
def multiplied_planes(words: tl.tuple, PLANES: tl.constexpr, STORED: tl.constexpr, TILES: tl.constexpr) -> tl.tuple:
    """A lane's words, in the order of `load_planes`, of the planes that are multiplied; words: of those stored."""
    if PLANES == STORED:
        return words
    found = ()
    for t in tl.static_range(TILES):
        for p in tl.static_range(PLANES):
            for half in tl.static_range(2):
                word = words[2 * (STORED * t + plane_in_store(p, PLANES, STORED)) + half]
                found = found + (multiplied_plane(word, p, PLANES, STORED),)
    return found


@triton.jit
def multiplied_plane(word: tl.tensor, P: tl.constexpr, PLANES: tl.constexpr, STORED: tl.constexpr) -> tl.tensor:
    """The word of plane P of those multiplied; word: of `plane_in_store(P)`. The first two of a trellis are the bits of
    one before and two before in their chain (`bpdq_kernels.trellis`), which starts at bit 11."""
    if PLANES == STORED or P > 1:
        return word
    elif P == 0:
        return rotate_left(word, 1) & ~(1 << 11)
    return word ^ (rotate_left(word, 2) & ~(3 << 11))


@triton.jit
def load_coefficients(
    ptr: tl.tensor,
    stride: tl.tensor,
    live: tl.tensor,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    TILES: tl.constexpr,
    BYTES: tl.constexpr = False,
) -> tl.tuple:
    """A row's pairs of coefficients for each tile, of GROUPS groups one after the other; zeros where not `live`. Tiles
    are `stride` pairs apart, ptr points at `first_pair`. BYTES: `row_words`
    of each group, whose pairs start with the second where r is odd and k even."""
    c = ()
    for _ in tl.static_range(TILES):
        for group in tl.static_range(GROUPS):
            if BYTES and PLANES == 3:
                c = c + load2(ptr, live, 2 * group * group_pairs(PLANES))
            elif BYTES:
                for word in tl.static_range(row_words(PLANES)):
                    words_ptr = (ptr + group * group_pairs(PLANES)).to(tl.pointer_type(tl.int32))
                    c = c + (tl.load(words_ptr + word, live, 0),)
            else:
                for p in tl.static_range(PLANES + 1):
                    c = c + (tl.load(ptr + (group * group_pairs(PLANES) + p), live, 0),)
        ptr += stride
    return c


@triton.jit
def reload_coefficients(
    ptr: tl.tensor,
    stride: tl.tensor,
    live: tl.tensor,
    old: tl.tuple,
    GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    TILES: tl.constexpr,
    BYTES: tl.constexpr,
) -> tl.tuple:
    """As `load_coefficients`, but `old` where not `live`."""
    GROUP_BYTES: tl.constexpr = group_pairs(PLANES) * (2 if BYTES else 4)
    c = ()
    for _ in tl.static_range(TILES):
        for group in tl.static_range(GROUPS):
            if BYTES and PLANES == 3:
                c = c + reload2(ptr, live, old[len(c) :], group * GROUP_BYTES)
            else:
                for word in tl.static_range(row_words(PLANES) if BYTES else PLANES + 1):
                    c = c + reload1(ptr, live, old[len(c) :], group * GROUP_BYTES + 4 * word)
        ptr += stride
    return c


@triton.jit
def coefficient_of(words: tl.tuple, P: tl.constexpr, half: tl.tensor, r: tl.tensor, PLANES: tl.constexpr) -> tl.tensor:
    """Coefficient P of row r + 8 half as an integer; words: of row r's coefficients of 8 bits."""
    byte = P % 2 * 2 + half
    if PLANES == 2:
        value = signed_byte(words[P // 2], words[(P + 1) // 2], byte + r % 2 * 2)
    elif PLANES == 4:  # registers are short, and these shifts need one for all
        word = shift_right(words[P // 2], words[P // 2 + 1] if P < 4 else words[2], r % 2 * 16)
        value = signed_byte(word, word, byte)
    else:
        value = signed_byte(words[P // 2], words[P // 2], byte)
    return value


@triton.jit
def coefficient_pair(words: tl.tuple, P: tl.constexpr, r: tl.tensor, PLANES: tl.constexpr) -> tl.tensor:
    """Bytes of coefficient P of rows r and r + 8, one in each half; words: of row r's coefficients of 8 bits."""
    word = words[P // 2]
    selector = tl.full([], 0x4342 if P % 2 else 0x4140, tl.int32)
    if PLANES % 2 == 0:
        if P % 2 == 0:
            selector = tl.where(r % 2 == 0, 0x4140, 0x4342)
        else:
            word = shift_right(word, words[P // 2 + 1], r % 2 * 16)
    return select_bytes(word, tl.zeros_like(word), selector)
