"""Warp instructions that Triton has no word for, each with a portable twin for TRITON_INTERPRET=1.

The kernels that use them hold one value per thread: every tensor is 1-D with 32 x warps elements, and Triton
gives element i to thread i. Below, r = lane // 4 and q = lane % 4 of a lane in its warp. Layouts of fragments are
those of the PTX ISA, section "Warp-level matrix instructions".
"""

import os

import triton
import triton.language as tl

# the choice is Triton's own, made when it is imported
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def load4(ptr: tl.tensor, live: tl.tensor, OFFSET: tl.constexpr) -> tl.tuple:
    """Four 32-bit words of read-only memory from ptr + OFFSET bytes (16 divides both), zeros where not `live`."""
    if INTERPRETED:
        words = (ptr.to(tl.pointer_type(tl.int8)) + OFFSET).to(tl.pointer_type(tl.int32))
        low = tl.load(words, live, 0), tl.load(words + 1, live, 0)
        return low + (tl.load(words + 2, live, 0), tl.load(words + 3, live, 0))
    return tl.inline_asm_elementwise(
        """{
        .reg .pred live;
        setp.ne.b32 live, $5, 0;
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        mov.b32 $2, 0;
        mov.b32 $3, 0;
        @live ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4 + $6];
        }""",
        "=&r,=&r,=&r,=&r,l,r,n",
        [ptr.to(tl.int64), live.to(tl.int32), tl.full([], OFFSET, tl.int32)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def load2(ptr: tl.tensor, live: tl.tensor, OFFSET: tl.constexpr) -> tl.tuple:
    """Two 32-bit words of read-only memory from ptr + OFFSET bytes (8 divides both), zeros where not `live`."""
    if INTERPRETED:
        words = (ptr.to(tl.pointer_type(tl.int8)) + OFFSET).to(tl.pointer_type(tl.int32))
        return tl.load(words, live, 0), tl.load(words + 1, live, 0)
    return tl.inline_asm_elementwise(
        """{
        .reg .pred live;
        setp.ne.b32 live, $3, 0;
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        @live ld.global.nc.v2.b32 {$0, $1}, [$2 + $4];
        }""",
        "=&r,=&r,l,r,n",
        [ptr.to(tl.int64), live.to(tl.int32), tl.full([], OFFSET, tl.int32)],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def reload4(ptr: tl.tensor, live: tl.tensor, old: tl.tuple, OFFSET: tl.constexpr) -> tl.tuple:
    """As `load4`, but where not `live` what `old` starts with: to keep that takes no instruction.
    (Zeros as `old` are no way to do without `load4`: they made the code before a loop of `triton_gemm` far longer.)"""
    if INTERPRETED:
        return reload2(ptr, live, old, OFFSET) + reload2(ptr, live, old[2:], OFFSET + 8)
    return tl.inline_asm_elementwise(
        "{ .reg .pred live; setp.ne.b32 live, $5, 0; @live ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4 + $6]; }",
        "=&r,=&r,=&r,=&r,l,r,n,0,1,2,3",
        [ptr.to(tl.int64), live.to(tl.int32), tl.full([], OFFSET, tl.int32), old[0], old[1], old[2], old[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def reload2(ptr: tl.tensor, live: tl.tensor, old: tl.tuple, OFFSET: tl.constexpr) -> tl.tuple:
    """As `load2`, but where not `live` what `old` starts with."""
    if INTERPRETED:
        return reload1(ptr, live, old, OFFSET) + reload1(ptr, live, old[1:], OFFSET + 4)
    return tl.inline_asm_elementwise(
        "{ .reg .pred live; setp.ne.b32 live, $3, 0; @live ld.global.nc.v2.b32 {$0, $1}, [$2 + $4]; }",
        "=&r,=&r,l,r,n,0,1",
        [ptr.to(tl.int64), live.to(tl.int32), tl.full([], OFFSET, tl.int32), old[0], old[1]],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def reload1(ptr: tl.tensor, live: tl.tensor, old: tl.tuple, OFFSET: tl.constexpr) -> tl.tuple:
    """A 32-bit word of read-only memory from ptr + OFFSET bytes (4 divides both), `old[0]` where not `live`."""
    if INTERPRETED:
        return (tl.load((ptr.to(tl.pointer_type(tl.int8)) + OFFSET).to(tl.pointer_type(tl.int32)), live, old[0]),)
    word = tl.inline_asm_elementwise(
        "{ .reg .pred live; setp.ne.b32 live, $2, 0; @live ld.global.nc.b32 $0, [$1 + $3]; }",
        "=&r,l,r,n,0",
        [ptr.to(tl.int64), live.to(tl.int32), tl.full([], OFFSET, tl.int32), old[0]],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )
    return (word,)


@triton.jit
def prefetch(ptr: tl.tensor, live: tl.tensor) -> None:
    """Bring memory at ptr into the L2 cache where `live`; whoever loads it later waits less."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred live; setp.ne.b32 live, $2, 0; mov.b32 $0, 0; @live prefetch.global.L2 [$1]; }",
            "=r,l,r",
            [ptr.to(tl.int64), live.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def rotate_left(x: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """x rotated left by `bits` in 0..31 (a constant, or one per lane); x int32."""
    if INTERPRETED:
        u = x.to(tl.uint32, bitcast=True)
        return ((u << bits) | (u >> 1 >> (31 - bits))).to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise(
        "shf.l.wrap.b32 $0, $1, $1, $2;", "=r,r,r", [x, bits], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def shift_right(low: tl.tensor, high: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """The lower word of the 64 bits `high`, `low` shifted right by `bits` in 0..31 (one per lane); all int32."""
    if INTERPRETED:
        shifted = (low.to(tl.uint32, bitcast=True) >> bits) | (high.to(tl.uint32, bitcast=True) << 1 << (31 - bits))
        return shifted.to(tl.int32, bitcast=True)
    return tl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, bits], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def select_bits(mask: tl.tensor, x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """x where mask has a 1, y where it has a 0; all int32. (Left to LLVM, masks are folded into more instructions.)"""
    if INTERPRETED:
        return (x & mask) | (y & ~mask)
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xCA;", "=r,r,r,r", [mask, x, y], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def select_bytes(x: tl.tensor, y: tl.tensor, selector: tl.tensor) -> tl.tensor:
    """Byte n of the result is byte (selector >> 4n) & 7 of the eight of x (0..3) and y (4..7); all int32."""
    if INTERPRETED:
        result = tl.zeros_like(x)
        for n in tl.static_range(4):
            source = (selector >> (4 * n)) & 7
            byte = (tl.where(source < 4, x, y) >> ((source & 3) * 8)) & 0xFF
            result |= byte << (8 * n)
        return result
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [x, y, selector], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def signed_byte(x: tl.tensor, y: tl.tensor, number: tl.tensor) -> tl.tensor:
    """Byte `number` of the eight of x (0..3) and y (4..7) as a signed integer; all int32."""
    if INTERPRETED:
        return (tl.where(number < 4, x, y) << (24 - (number & 3) * 8)) >> 24
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [x, y, tl.zeros_like(x) + (number * 0x1111 + 0x8880)],  # the byte, then its sign thrice
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def exchange(x: tl.tensor, LANE_BIT: tl.constexpr) -> tl.tensor:
    """The value of the lane whose number differs in bit LANE_BIT; x int32."""
    if INTERPRETED:
        pairs = tl.reshape(x, [x.numel // (2 << LANE_BIT), 2, 1 << LANE_BIT])
        first, second = tl.split(tl.permute(pairs, 0, 2, 1))
        return tl.reshape(tl.permute(tl.join(second, first), 0, 2, 1), [x.numel])
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;",
        "=r,r,n",
        [x, tl.full([], 1 << LANE_BIT, tl.int32)],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def warp_max(x: tl.tensor) -> tl.tensor:
    """The largest x of the warp, in each of its lanes; x int32, not negative."""
    if INTERPRETED:
        rows = tl.reshape(x, [x.numel // 32, 32])
        return tl.reshape(tl.broadcast_to(tl.max(rows, 1, keep_dims=True), rows.shape), [x.numel])
    return tl.inline_asm_elementwise(
        "redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def warp_sum(x: tl.tensor) -> tl.tensor:
    """The sum of the warp's x modulo 2^32, in each of its lanes; x int32."""
    if INTERPRETED:
        rows = tl.reshape(x, [x.numel // 32, 32])
        return tl.reshape(tl.broadcast_to(tl.sum(rows, 1, keep_dims=True), rows.shape), [x.numel])
    return tl.inline_asm_elementwise(
        "redux.sync.add.s32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def mma_bits(a: tl.tensor, a8: tl.tensor, b: tl.tensor) -> tl.tuple:
    """popcount(A & B): A 16 rows x 128 bits, B 128 bits x 8 columns.

    Lane (r, q): a and a8 are word q of rows r and r + 8, b is word q of column r. Returns the counts of
    (row r, column 2q), (r, 2q + 1), (r + 8, 2q), (r + 8, 2q + 1).
    """
    if INTERPRETED:
        d0, d1 = _mma_bits_twin(a, b)
        d2, d3 = _mma_bits_twin(a8, b)
        return d0, d1, d2, d3
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $7, $7, $7};",
        "=r,=r,=r,=r,r,r,r,r",
        [a, a8, b, tl.full([], 0, tl.int32)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _mma_bits_twin(a: tl.tensor, b: tl.tensor) -> tl.tuple:
    warps: tl.constexpr = a.numel // 32
    x = tl.reshape(a, [warps, 8, 1, 4]) & tl.reshape(b, [warps, 1, 8, 4])
    x = x.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = (x + (x >> 8) + (x >> 16) + (x >> 24)) & 0x3F
    counts = tl.reshape(tl.sum(x.to(tl.int32), 3), [warps * 32, 2])
    return tl.split(counts)


@triton.jit
def mma(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, BF16: tl.constexpr) -> tl.tuple:  # noqa: ANN001
    """C + A B in fp32: A 16 rows x 16, B 16 x 8 columns, both pairs of fp16 (or bf16) in 32-bit registers.

    Lane (r, q): a0 and a1 are A[r] and A[r + 8] at inputs 2q and 2q + 1, a2 and a3 the same 8 inputs on; b0 and b1
    are column r of B at inputs 2q, 2q + 1 and 2q + 8, 2q + 9; c0..c3 as returned by `mma_bits`.
    """
    if INTERPRETED:
        d0, d1 = _mma_twin(a0, a2, b0, b1, BF16)
        d2, d3 = _mma_twin(a1, a3, b0, b1, BF16)
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3
    name: tl.constexpr = "bf16" if BF16 else "f16"
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32."
        + name
        + "."
        + name
        + ".f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _mma_twin(a: tl.tensor, a_next: tl.tensor, b: tl.tensor, b_next: tl.tensor, BF16: tl.constexpr) -> tl.tuple:
    warps: tl.constexpr = a.numel // 32
    a_low, a_high = unpack_pair(a, BF16)
    b_low, b_high = unpack_pair(b, BF16)
    products = tl.reshape(a_low, [warps, 8, 1, 4]) * tl.reshape(b_low, [warps, 1, 8, 4])
    products += tl.reshape(a_high, [warps, 8, 1, 4]) * tl.reshape(b_high, [warps, 1, 8, 4])
    a_low, a_high = unpack_pair(a_next, BF16)
    b_low, b_high = unpack_pair(b_next, BF16)
    products += tl.reshape(a_low, [warps, 8, 1, 4]) * tl.reshape(b_low, [warps, 1, 8, 4])
    products += tl.reshape(a_high, [warps, 8, 1, 4]) * tl.reshape(b_high, [warps, 1, 8, 4])
    return tl.split(tl.reshape(tl.sum(products, 3), [warps * 32, 2]))


@triton.jit
def unpack_pair(x: tl.tensor, BF16: tl.constexpr) -> tl.tuple:
    """The low and the high half of int32 x as fp32 numbers, read as fp16 or bf16."""
    if BF16:
        return (x << 16).to(tl.float32, bitcast=True), (x & -65536).to(tl.float32, bitcast=True)
    low = x.to(tl.int16).to(tl.float16, bitcast=True)
    high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def pack_pair(low: tl.tensor, high: tl.tensor, BF16: tl.constexpr) -> tl.tensor:
    """Two fp32 numbers rounded to nearest even in one int32, the inverse of `unpack_pair`."""
    if INTERPRETED:
        if BF16:  # the interpreter's own conversion truncates
            low_bits = low.to(tl.int32, bitcast=True)
            high_bits = high.to(tl.int32, bitcast=True)
            low_bits = (low_bits + 0x7FFF + ((low_bits >> 16) & 1)) >> 16
            high_bits = high_bits + 0x7FFF + ((high_bits >> 16) & 1)
            return (low_bits & 0xFFFF) | (high_bits & -65536)
        low_half = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return low_half | (high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    name: tl.constexpr = "bf16x2" if BF16 else "f16x2"
    return tl.inline_asm_elementwise(
        "cvt.rn." + name + ".f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def fma_pair(
    x: tl.tensor, y: tl.tensor, z: tl.tensor, Y_HALF: tl.constexpr, Z_HALF: tl.constexpr, BF16: tl.constexpr
) -> tl.tensor:
    """x * y + z on pairs of fp16 (or bf16) in int32; Y_HALF 0 or 1 uses that half of y for both, 2 uses both (so z)."""
    if INTERPRETED:
        x_low, x_high = unpack_pair(x, BF16)
        y_low, y_high = unpack_pair(y, BF16)
        z_low, z_high = unpack_pair(z, BF16)
        if Y_HALF == 0:
            y_high = y_low
        elif Y_HALF == 1:
            y_low = y_high
        if Z_HALF == 0:
            z_high = z_low
        elif Z_HALF == 1:
            z_low = z_high
        return pack_pair(x_low * y_low + z_low, x_high * y_high + z_high, BF16)
    name: tl.constexpr = "bf16x2" if BF16 else "f16x2"
    y_from: tl.constexpr = "l, l" if Y_HALF == 0 else "h, h" if Y_HALF == 1 else "l, h"
    z_from: tl.constexpr = "l, l" if Z_HALF == 0 else "h, h" if Z_HALF == 1 else "l, h"
    return tl.inline_asm_elementwise(
        "{ .reg .b16 l, h; .reg .b32 y, z; mov.b32 {l, h}, $2; mov.b32 y, {"
        + y_from
        + "}; mov.b32 {l, h}, $3; mov.b32 z, {"
        + z_from
        + "}; fma.rn."
        + name
        + " $0, $1, y, z; }",
        "=r,r,r,r",
        [x, y, z],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def stack(values: tl.tuple) -> tl.tensor:
    """[threads, 2, ..., 2] of a power of two tensors [threads]: the trailing axes are the bits of the tuple's index."""
    for _ in tl.static_range(8):
        if len(values) > 1:
            joined = ()
            for i in tl.static_range(len(values) // 2):
                joined = joined + (tl.join(values[i], values[i + len(values) // 2]),)
            values = joined
    return values[0]


@triton.jit
def sum_last(x: tl.tensor, A: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr) -> tl.tensor:
    """[A, B] sums of x [A, B, COUNT], a power of two of them: halves are added until one is left. (Between warps,
    Triton's own reduction has bank conflicts or many barriers, depending on its version.)"""
    y = x
    for i in tl.static_range(8):
        if COUNT >> i > 1:
            first, second = tl.split(tl.reshape(y, [A, B, COUNT >> i + 1, 2]))
            y = first + second
    return tl.reshape(y, [A, B])
