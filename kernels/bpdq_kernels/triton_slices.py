"""One token's inputs for `triton_gemv`: loaded, rounded to fixed point, and cut into bit-planes.

A warp has a unit of 128 inputs, lane 4r + q four of word q. Their integers of 16 bits are packed by bytes, and three
exchanges between lanes make of each byte's bits a word:

    lane 4r + q, low     byte 0: bits 0..7 of input r        lane 4r + q, low     bit r of the inputs of word q,
                         byte 1: of input 8 + r         ->                        in the order of its bits
                         byte 2: 16 + r, byte 3: 24 + r
                 high    bits 8..15                                       high    bit 8 + r

Input b stands here for that of bit b of the word (`triton_layout.input_of_bit`).
"""

import triton
import triton.language as tl

from bpdq_kernels.triton_layout import input_of_bit, input_of_word, run_step
from bpdq_kernels.warp import exchange, rotate_left, select_bits, select_bytes, unpack_pair, warp_max, warp_sum


@triton.jit
def first_input(lane: tl.tensor, BESIDE: tl.constexpr) -> tl.tensor:
    """The first of the four inputs of a unit that a lane loads, those of bits r, 8 + r, 16 + r and 24 + r of its word:
    two neighbours of one run, of bits 8 + r and 24 + r (where r < 3 of bits 16 + r and r), and two of the next but one.
    """
    r = lane // 4
    return input_of_word(input_of_bit(tl.where(r < 3, 16, 8) + r, BESIDE), lane % 4, BESIDE)


@triton.jit
def load_inputs(
    ptr: tl.tensor,
    live: tl.tensor,
    inputs_left: tl.tensor,
    BESIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    BF16: tl.constexpr,
) -> tl.tuple:
    """A lane's inputs in fp32: two neighbours, and those two runs on; zeros where the unit is not `live` and past K."""
    x = ()
    for pair in tl.static_range(2):
        offset = 2 * pair * run_step(BESIDE)
        if WHOLE:  # x starts at a multiple of 4 bytes
            neighbours = (ptr + offset).to(tl.pointer_type(tl.int32))
            x = x + unpack_pair(tl.load(neighbours, live, 0), BF16)
        else:
            x = x + (tl.load(ptr + offset, inputs_left > offset, 0).to(tl.float32),)
            x = x + (tl.load(ptr + offset + 1, inputs_left > offset + 1, 0).to(tl.float32),)
    return x


@triton.jit
def slice_bits(x: tl.tuple, lane: tl.tensor, PARTS: tl.constexpr) -> tl.tuple:
    """Bit-planes of a unit's inputs in fixed point: the operands of `mma_bits` for bits 0..7 and 8..15, the sum of the
    integers of the group that the lane's word is in, and the unit's power of two."""
    ALL: tl.constexpr = tl.PropagateNan.ALL
    top01 = tl.maximum(tl.abs(x[0]), tl.abs(x[1]), propagate_nan=ALL)
    top23 = tl.maximum(tl.abs(x[2]), tl.abs(x[3]), propagate_nan=ALL)
    top = tl.maximum(top01, top23, propagate_nan=ALL)
    peak = warp_max(top.to(tl.int32, bitcast=True))
    power = tl.maximum(peak & 0x7F800000, 16 << 23)  # of two, as fp32
    scale = (power - (14 << 23)).to(tl.float32, bitcast=True)
    inverse = ((268 << 23) - (1 << 32) - power).to(tl.float32, bitcast=True)
    scale += peak.to(tl.float32, bitcast=True) * 0.0  # NaN for NaN and infinity
    # adding 1.5 * 2^23 rounds to an integer and leaves its two's complement in the low bits
    i0 = (x[0] * inverse + 12582912.0).to(tl.int32, bitcast=True)
    i1 = (x[1] * inverse + 12582912.0).to(tl.int32, bitcast=True)
    i2 = (x[2] * inverse + 12582912.0).to(tl.int32, bitcast=True)
    i3 = (x[3] * inverse + 12582912.0).to(tl.int32, bitcast=True)
    # modulo 2^32 without what 1.5 * 2^23 left above the integers
    total = sum_of_group(i0 + i1 + i2 + i3 - (4 * 0x4B400000 & 0xFFFFFFFF), lane % 4, PARTS)
    i02 = select_bytes(i0, i2, tl.full([], 0x5140, tl.int32))
    i13 = select_bytes(i1, i3, tl.full([], 0x5140, tl.int32))
    order = tl.where(lane < 12, 0x1054, 0x4105)  # of the bytes, as `first_input` has the bits
    low = select_bytes(i02, i13, order)
    high = select_bytes(i02, i13, order + 0x2222)
    return transpose_bits(low, lane), transpose_bits(high, lane), total, scale


@triton.jit
def sum_of_group(i: tl.tensor, q: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    """The sum of i over the lanes whose words are in the same group, in each of them."""
    if PARTS == 1:
        return warp_sum(i)
    if PARTS == 2:
        first = warp_sum(tl.where(q // 2 == 0, i, 0))
        return tl.where(q // 2 == 0, first, warp_sum(i) - first)
    for lane_bit in tl.static_range(2, 5):
        i += exchange(i, lane_bit)
    return i


@triton.jit
def transpose_bits(v: tl.tensor, lane: tl.tensor) -> tl.tensor:
    """Bits of bytes to words: lane 4r + q gets bit r of all bytes of lanes q, 4 + q, .., 28 + q; bit 8b + r of a word
    comes from byte b of lane 4r + q. Three swaps of a bit of the bit's number with one of the lane's."""
    v = swap_bits(v, lane, 2, 4, 0x0F0F0F0F)
    v = swap_bits(v, lane, 1, 3, 0x33333333)
    return swap_bits(v, lane, 0, 2, 0x55555555)


@triton.jit
def swap_bits(
    v: tl.tensor, lane: tl.tensor, BIT: tl.constexpr, LANE_BIT: tl.constexpr, CLEAR: tl.constexpr
) -> tl.tensor:
    """Swap bit BIT of the bits' numbers with bit LANE_BIT of the lanes'; CLEAR marks the bits where it is 0."""
    upper = (lane >> LANE_BIT) & 1
    other = rotate_left(exchange(v, LANE_BIT), tl.where(upper == 1, 32 - (1 << BIT), 1 << BIT))
    return select_bits(CLEAR ^ -upper, v, other)
