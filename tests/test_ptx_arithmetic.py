"""The PTX emulator's arithmetic, against oracles written from the PTX ISA, lane by lane in Python numbers.

By default only what one-token kernels live on: integers, bits, and fused pairs of halves. -m slow has all of it."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx_snippets import (
    FORMATS,
    RNG,
    U32,
    assembled,
    check,
    evaluate,
    finite,
    number,
    random_bits,
    rounded,
    signed,
)

ptxas = pytest.fixture(scope="module", autouse=True)(assembled)


# --- integers and bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "width", "oracle"),
    [
        ("add.s32", 32, lambda a, b: (a + b) & U32),
        ("sub.u32", 32, lambda a, b: (a - b) & U32),
        ("mul.lo.s32", 32, lambda a, b: a * b & U32),
        ("mul.hi.u32", 32, lambda a, b: a * b >> 32),
        ("mul.hi.s32", 32, lambda a, b: signed(a, 32) * signed(b, 32) >> 32 & U32),
        ("mul.hi.u64", 64, lambda a, b: a * b >> 64),
        ("mul.hi.s64", 64, lambda a, b: signed(a, 64) * signed(b, 64) >> 64 & (1 << 64) - 1),
        ("min.s32", 32, lambda a, b: min(a, b, key=lambda x: signed(x, 32))),
        ("max.u32", 32, max),
        ("max.s16", 16, lambda a, b: max(a, b, key=lambda x: signed(x, 16))),
        ("and.b64", 64, lambda a, b: a & b),
        ("xor.b32", 32, lambda a, b: a ^ b),
        ("div.u32", 32, lambda a, b: a // b if b else U32),
        ("rem.u64", 64, lambda a, b: a % b if b else None),
        ("div.s32", 32, lambda a, b: int(Fraction(signed(a, 32), signed(b, 32))) & U32 if b else U32),
        ("rem.s32", 32, lambda a, b: signed(a, 32) - signed(b, 32) * int(Fraction(signed(a, 32), signed(b, 32))) & U32),
    ],
)
def test_integer_arithmetic(op: str, width: int, oracle: Callable[[int, int], int]):
    a, b = random_bits(width), random_bits(width)
    b[::3] %= 1000
    b[b == 0] = 7 if op.startswith("rem") else 0
    check(f"{op} %y0, %x0, %x1;", [a, b], f"u{width // 8}", oracle)


def test_wide_products_and_multiply_add():
    a, b, c = random_bits(32), random_bits(32), random_bits(64)
    wide = (1 << 64) - 1
    check("mul.wide.s32 %y0, %x0, %x1;", [a, b], "u8", lambda a, b: signed(a, 32) * signed(b, 32) & wide)
    check("mad.wide.u32 %y0, %x0, %x1, %x2;", [a, b, c], "u8", lambda a, b, c: a * b + c & wide)
    check("mad.lo.s32 %y0, %x0, %x1, %x0;", [a, b], "u4", lambda a, b: a * b + a & U32)
    check("mul.wide.u16 %y0, %x0, %x1;", [random_bits(16), random_bits(16)], "u4", lambda a, b: a * b)
    check("dp4a.u32.u32 %y0, %x0, %x1, %x1;", [a, b], "u4", lambda a, b: b + sum(
        (a >> 8 * i & 255) * (b >> 8 * i & 255) for i in range(4)) & U32)  # fmt: skip


def test_shifts_beyond_the_width():
    a, n = random_bits(32), RNG.integers(0, 70, 128).astype("u4")
    check("shl.b32 %y0, %x0, %x1;", [a, n], "u4", lambda a, n: a << n & U32)
    check("shr.u32 %y0, %x0, %x1;", [a, n], "u4", lambda a, n: a >> n)
    check("shr.s32 %y0, %x0, %x1;", [a, n], "u4", lambda a, n: signed(a, 32) >> n & U32)
    check("shr.s64 %y0, %x0, %x1;", [random_bits(64), n], "u8", lambda a, n: signed(a, 64) >> n & (1 << 64) - 1)
    check("shl.b16 %y0, %x0, %x1;", [random_bits(16), n], "u2", lambda a, n: a << n & 0xFFFF)
    inputs = [a, random_bits(32), n]
    shift = "%y0, %x0, %x1, %x2;"
    check(f"shf.l.wrap.b32 {shift}", inputs, "u4", lambda a, b, n: (b << 32 | a) << (n & 31) >> 32 & U32)
    check(f"shf.r.wrap.b32 {shift}", inputs, "u4", lambda a, b, n: (b << 32 | a) >> (n & 31) & U32)
    check(f"shf.l.clamp.b32 {shift}", inputs, "u4", lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32 & U32)
    check(f"shf.r.clamp.b32 {shift}", inputs, "u4", lambda a, b, n: (b << 32 | a) >> min(n, 32) & U32)


def test_bit_fields():
    position, length = RNG.integers(0, 40, 128).astype("u4"), RNG.integers(0, 40, 128).astype("u4")
    position[0], length[0] = 255, 255

    def extract(a: int, position: int, length: int, width: int, sign: bool) -> int:
        bits = [a >> i & 1 for i in range(width)]
        fill = bits[min(position + length - 1, width - 1)] if sign and length else 0
        field = [bits[position + i] if i < length and position + i < width else fill for i in range(width)]
        return sum(bit << i for i, bit in enumerate(field))

    def insert(a: int, b: int, position: int, length: int) -> int:
        for i in range(min(length, 32)):
            if position + i < 32:
                b = b & ~(1 << position + i) | (a >> i & 1) << position + i
        return b

    for width in (32, 64):
        for sign in "us":
            check(
                f"bfe.{sign}{width} %y0, %x0, %x1, %x2;",
                [random_bits(width), position, length],
                f"u{width // 8}",
                lambda a, p, n, width=width, sign=sign: extract(a, p, n, width, sign == "s"),
            )
    inputs = [random_bits(32), random_bits(32), position, length]
    check("bfi.b32 %y0, %x0, %x1, %x2, %x3;", inputs, "u4", insert)


def test_bit_counts():
    for width in (32, 64):
        a = random_bits(width) >> RNG.integers(0, width, 128).astype(f"u{width // 8}")
        check(f"popc.b{width} %y0, %x0;", [a], "u4", int.bit_count)
        check(f"clz.b{width} %y0, %x0;", [a], "u4", lambda a, width=width: width - a.bit_length())
        check(f"bfind.u{width} %y0, %x0;", [a], "u4", lambda a: a.bit_length() - 1 & U32)
        check(f"brev.b{width} %y0, %x0;", [a], f"u{width // 8}", lambda a, width=width: int(f"{a:0{width}b}"[::-1], 2))
    a = random_bits(32)
    check("bfind.s32 %y0, %x0;", [a], "u4", lambda a: (a ^ U32 * (a >> 31)).bit_length() - 1 & U32)
    check("bfind.shiftamt.u32 %y0, %x0;", [a], "u4", lambda a: 32 - a.bit_length() if a else U32)


@pytest.mark.slow
def test_every_table_of_lop3():
    inputs = [random_bits(32, 32) for _ in range(3)]
    outputs = 16
    for start in range(0, 256, outputs):
        body = "\n".join(f"lop3.b32 %y{i}, %x0, %x1, %x2, {start + i};" for i in range(outputs))
        for i, got in enumerate(evaluate(body, inputs, ["u4"] * outputs)):
            for lane, (a, b, c) in enumerate(zip(*(x.tolist() for x in inputs), strict=True)):
                bits = (start + i >> (4 * (a >> j & 1) + 2 * (b >> j & 1) + (c >> j & 1)) & 1 for j in range(32))
                assert got[lane] == sum(bit << j for j, bit in enumerate(bits)), f"table {start + i:#x}"


def permuted(a: int, b: int, c: int, mode: str) -> int:
    octets = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    if mode == "":
        chosen = [octets[c >> 4 * i & 7] for i in range(4)]
        chosen = [255 * (octet >> 7) if c >> 4 * i & 8 else octet for i, octet in enumerate(chosen)]
    else:
        table = {
            "f4e": [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)],
            "b4e": [(0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)],
            "rc8": [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)],
            "ecl": [(0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)],
            "ecr": [(0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)],
            "rc16": [(0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)],
        }
        chosen = [octets[i] for i in table[mode][c & 3]]
    return sum(octet << 8 * i for i, octet in enumerate(chosen))


@pytest.mark.parametrize("mode", ["", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"])
def test_prmt(mode: str):
    op = f"prmt.b32.{mode}".rstrip(".")
    a, b, c = (random_bits(32) for _ in range(3))
    check(f"{op} %y0, %x0, %x1, %x2;", [a, b, c], "u4", lambda a, b, c: permuted(a, b, c, mode))
    for same in (0x5410, 0x7632, 0xFEDC, 0x0123):
        check(f"{op} %y0, %x0, %x1, {same};", [a, b], "u4", lambda a, b, c=same: permuted(a, b, c, mode))


def test_comparisons_and_predicates():
    a, b = random_bits(32), random_bits(32)
    b[::4] = a[::4]
    body = """
    {{ .reg .pred p, q, r;
    setp.ne.u32 r, %x1, 0;
    setp.{} p|q, %x0, %x1{};
    selp.b32 %y0, 2, 0, p;
    @q add.u32 %y0, %y0, 1; }}"""
    check(body.format("lt.s32", ""), [a, b], "u4", lambda a, b: 2 if signed(a, 32) < signed(b, 32) else 1)
    check(body.format("hs.u32", ""), [a, b], "u4", lambda a, b: 2 if a >= b else 1)
    check(body.format("gt.and.s32", ", !r"), [a, b % 2], "u4", lambda a, b: 0 if b else 2 if signed(a, 32) > 0 else 1)
    for name, compare in (("eq", lambda a, b: a == b), ("ltu", lambda a, b: not a >= b), ("num", lambda a, b: True)):

        def oracle(a: int, b: int, name: str = name, compare: Callable = compare) -> int:
            a, b = number(a, "f32"), number(b, "f32")
            nan = a != a or b != b
            return 2 if (name == "ltu" if nan else compare(a, b)) else 1

        check(body.format(f"{name}.f32", ""), [a, b], "u4", oracle)
    check(body.format("ne.f32", ""), [a, b], "u4", lambda a, b: 2 if number(a, "f32") != number(b, "f32") and not any(
        number(x, "f32") != number(x, "f32") for x in (a, b)) else 1)  # fmt: skip


def test_packing_and_sinks():
    a, b = random_bits(16), random_bits(16)
    check("mov.b32 %y0, {%x0, %x1};", [a, b], "u4", lambda a, b: b << 16 | a)
    check("{ .reg .b32 h; mov.b64 {_, h}, %x0; mov.u32 %y0, h; }", [random_bits(64)], "u4", lambda a: a >> 32)
    assert evaluate("mov.b32 {%y0, %y1}, %x0;", [np.full(32, 0x12345678, "u4")], ["u2", "u2"])[1][0] == 0x1234


def test_blocks_scope_registers_and_labels():
    body = """
    .reg .b32 v;
    mov.u32 v, 1;
    { .reg .b32 v; .reg .pred p;
      mov.u32 v, 0;
      again: add.u32 v, v, 1; setp.lt.u32 p, v, %x0; @p bra again;
      mov.u32 %y0, v; }
    again: { .reg .b32 v; .reg .pred p;
      mov.u32 v, 100;
      again: sub.u32 v, v, 1; setp.gt.u32 p, v, %x0; @p bra again;
      add.u32 %y0, %y0, v; }
    add.u32 %y0, %y0, v;"""
    check(body, [RNG.integers(1, 50, 64).astype("u4")], "u4", lambda n: 2 * n + 1)


# --- floating point ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_fma_is_rounded_once(kind: str):
    width = 1 + sum(FORMATS[kind])
    exponent_bits, fraction_bits = FORMATS[kind]
    for _ in range(4):
        a, b, c = (finite(random_bits(width, 512), kind) for _ in range(3))
        # products near halves of an ulp of c, where rounding twice goes wrong
        shift = RNG.integers(0, 4 * fraction_bits, 512)
        one = (1 << (exponent_bits - 1)) - 1 << fraction_bits
        a[64:], b[64:] = a[64:] & ((1 << fraction_bits) - 1) | one, b[64:] & 3 | one
        exponent = np.clip((one >> fraction_bits) - shift, 1, None)
        c[64:] = (c[64:] & ((1 << (width - 1)) | 1)) | (exponent[64:] << fraction_bits).astype(c.dtype)
        op = {"f16": "fma.rn.f16", "bf16": "fma.rn.bf16", "f32": "fma.rn.f32"}[kind]

        def oracle(a: int, b: int, c: int) -> int:
            exact = number(a, kind) * number(b, kind) + number(c, kind)
            negative_zero = (a ^ b) >> (width - 1) & c >> (width - 1) and not (number(c, kind) or exact)
            return rounded(exact, kind) | negative_zero << (width - 1)

        check(f"{op} %y0, %x0, %x1, %x2;", [a, b, c], f"u{width // 8}", oracle)


@pytest.mark.slow
def test_fma_decides_ties_by_what_a_double_drops():
    """A product halfway between two numbers plus a c below the last bit of a double; a halfway sum of subnormals."""

    def bits(value: float) -> int:
        return int(np.array([value], "f4").view("u4")[0])

    for kind, half, width in (("f32", 12, 32), ("bf16", 4, 16)):
        a = bits(1 + 2.0**-half) >> 32 - width
        tiny = [bits(sign * 2.0**-100) >> 32 - width for sign in (-1, 0, 1)]
        cases = [(a, a, c) for c in tiny] + [(a | 1 << width - 1, a, c) for c in tiny]
        check_fma(cases, kind, width)
    scaled = bits((1 + 2.0**-23) * 2.0**-75), bits((1 - 2.0**-23) * 2.0**-75)
    check_fma([(*scaled, 0x00400001), (*scaled, 0x00400002), (*scaled, 0x80400001)], "f32", 32)


def check_fma(cases: list[tuple[int, int, int]], kind: str, width: int) -> None:
    inputs = [np.array((cases * 32)[:64], f"u{width // 8}")[:, i].copy() for i in range(3)]
    check(
        f"fma.rn.{kind} %y0, %x0, %x1, %x2;",
        inputs,
        f"u{width // 8}",
        lambda a, b, c: rounded(number(a, kind) * number(b, kind) + number(c, kind), kind),
    )


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_packed_fma_handles_both_halves_and_subnormals(kind: str):
    def pair(bits: np.ndarray) -> np.ndarray:
        return finite(bits, kind).view("u4")

    inputs = [pair(random_bits(16, 256)) for _ in range(3)]
    tiny = pair(random_bits(16, 256) & (0x83FF if kind == "f16" else 0x807F))
    one = np.full(128, 0x3C003C00 if kind == "f16" else 0x3F803F80, "u4")

    def oracle(a: int, b: int, c: int) -> int:
        result = 0
        for shift in (0, 16):
            x, y, z = (number(value >> shift & 0xFFFF, kind) for value in (a, b, c))
            result |= rounded(x * y + z, kind) << shift
        return result

    got = evaluate(f"fma.rn.{kind}x2 %y0, %x0, %x1, %x2;", [*inputs], ["u4"])[0]
    for lane, y in enumerate(got.tolist()):
        wanted = oracle(*(int(x[lane]) for x in inputs))
        for shift in (0, 16):  # the oracle does not know the sign of zeros
            half, its = y >> shift & 0xFFFF, wanted >> shift & 0xFFFF
            assert half == its or {half, its} <= {0, 0x8000}
    assert (evaluate(f"fma.rn.{kind}x2 %y0, %x0, %x1, %x2;", [tiny, one, one * 0], ["u4"])[0] == tiny).sum() > 100
    (twice,) = evaluate(f"fma.rn.{kind}x2 %y0, %x0, %x1, %x0;", [tiny, one], ["u4"])
    assert (twice == tiny + (tiny & 0x7FFF7FFF)).all()  # twice a subnormal number, even where it becomes normal


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "f32"])
@pytest.mark.parametrize("name", ["add", "mul"])
def test_sums_and_products_keep_subnormals(kind: str, name: str):
    width = 1 + sum(FORMATS[kind])
    a, b = (finite(random_bits(width, 256), kind) for _ in range(2))

    def oracle(a: int, b: int) -> int:
        x, y = number(a, kind), number(b, kind)
        exact = x * y if name == "mul" else x + y
        signs = a >> (width - 1), b >> (width - 1)
        zero = (signs[0] ^ signs[1] if name == "mul" else signs[0] & signs[1]) if exact == 0 else 0
        return rounded(exact, kind) | zero << (width - 1)

    check(f"{name}.{kind} %y0, %x0, %x1;", [a, b], f"u{width // 8}", oracle)


@pytest.mark.slow
def test_sums_and_products_toward_zero():
    a, b, c = (finite(random_bits(32, 256) & np.uint32(0xBFFFFFFF), "f32") for _ in range(3))
    c[::2] = a[::2] ^ np.uint32(0x80000007)

    for body, exact in (
        ("add.rz.f32 %y0, %x0, %x2;", lambda a, b, c: a + c),
        ("mul.rz.f32 %y0, %x0, %x1;", lambda a, b, c: a * b),
        ("fma.rz.f32 %y0, %x0, %x1, %x2;", lambda a, b, c: a * b + c),
    ):
        (got,) = evaluate(body, [a, b, c], ["u4"])
        for x, y, z, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
            value = exact(*(number(bits, "f32") for bits in (x, y, z)))
            wanted = rounded(value, "f32", "rz")
            assert result in ((wanted, wanted | 1 << 31) if wanted in (0, 1 << 31) else (wanted,)), body


def test_flush_to_zero_only_where_asked():
    a = np.array([1, 0x807FFFFF, 0x00800000, 0x3F800000] * 8, "u4")
    one = np.full(32, 0x3F800000, "u4")
    check("mul.f32 %y0, %x0, %x1;", [a, one], "u4", lambda a, b: a)
    check("mul.ftz.f32 %y0, %x0, %x1;", [a, one], "u4", lambda a, b: a if a & 0x7F800000 else a & 0x80000000)


def test_minimum_and_maximum_of_zeros_and_nans():
    zero, minus, nan, one = 0, 0x80000000, 0x7FC00000, 0x3F800000
    a = np.array([zero, minus, nan, one, nan, minus, one, zero] * 4, "u4")
    b = np.array([minus, zero, one, nan, nan, one, minus, zero] * 4, "u4")
    largest, smallest, propagated = evaluate(
        "max.f32 %y0, %x0, %x1; min.f32 %y1, %x0, %x1; max.NaN.f32 %y2, %x0, %x1;", [a, b], ["u4"] * 3
    )
    assert largest[[0, 1, 2, 3, 5, 6, 7]].tolist() == [zero, zero, one, one, one, one, zero]
    assert smallest[[0, 1, 2, 3, 5, 6, 7]].tolist() == [minus, minus, one, one, minus, minus, zero]
    assert np.isnan(propagated[[2, 3, 4]].view("f4")).all()
    assert propagated[5] == one


@pytest.mark.slow
@pytest.mark.parametrize(("target", "mode"), [("f16", "rn"), ("f16", "rz"), ("bf16", "rn"), ("bf16", "rz")])
def test_narrowing_conversions(target: str, mode: str):
    a = finite(random_bits(32, 256), "f32")
    exponents = RNG.integers(90 if target == "f16" else 0, 145 if target == "f16" else 254, 192).astype("u4")
    a[64:] = a[64:] & 0x807FFFFF | exponents << 23
    a[100:140] = a[100:140] & 0xFFFF8000 | 0x1000 * (target == "f16")  # midpoints

    def oracle(a: int) -> int:
        return rounded(number(a, "f32"), target, mode) | a >> 31 << 15

    if target == "bf16" and mode == "rz":
        check("cvt.rz.bf16.f32 %y0, %x0;", [a], "u2", oracle)
    else:
        check(f"cvt.{mode}.{target}.f32 %y0, %x0;", [a], "u2", oracle)
    check(
        f"cvt.{mode}.{target}x2.f32 %y0, %x0, %x1;", [a, a[::-1].copy()], "u4", lambda a, b: oracle(a) << 16 | oracle(b)
    )


@pytest.mark.slow
def test_widening_conversions_are_exact():
    for kind in ("f16", "bf16"):
        a = finite(random_bits(16, 256), kind)
        op = "cvt.f32.f16" if kind == "f16" else "cvt.f32.bf16"
        check(f"{op} %y0, %x0;", [a], "u4", lambda a, kind=kind: rounded(number(a, kind), "f32") | a >> 15 << 31)


@pytest.mark.slow
def test_conversions_to_and_from_integers():
    a = RNG.normal(0, 1, 128).astype("f4") * np.float32(2) ** RNG.integers(-3, 40, 128).astype("f4")
    a[:8] = [0.5, 1.5, 2.5, -0.5, np.nan, np.inf, -np.inf, 3e9]
    bits = a.view("u4")
    functions = {"rni": round, "rzi": int, "rmi": lambda x: x.__floor__(), "rpi": lambda x: x.__ceil__()}

    def clamped(bits: int, mode: str, low: int, high: int) -> int:
        value = number(bits, "f32")
        if value != value:
            return 0
        if isinstance(value, float):
            return (high if value > 0 else low) & U32
        return min(max(functions[mode](value), low), high) & U32

    for mode in functions:
        check(f"cvt.{mode}.s32.f32 %y0, %x0;", [bits], "u4", lambda x, m=mode: clamped(x, m, -(1 << 31), (1 << 31) - 1))
        check(f"cvt.{mode}.u32.f32 %y0, %x0;", [bits], "u4", lambda x, m=mode: clamped(x, m, 0, U32))
    check("cvt.rzi.s8.f32 %y0, %x0;", [bits], "u4", lambda x: clamped(x, "rzi", -128, 127))
    n = random_bits(32)
    check("cvt.rn.f32.s32 %y0, %x0;", [n], "u4", lambda n: rounded(Fraction(signed(n, 32)), "f32"))
    check("cvt.rn.f16.u32 %y0, %x0;", [n % 70000], "u2", lambda n: rounded(Fraction(n), "f16"))
    long = random_bits(64)
    long[-3:] = (1 << 63 | 1 << 39) + np.arange(3, dtype="u8")  # ties, but for what a double drops
    check("cvt.rn.f32.u64 %y0, %x0;", [long], "u4", lambda n: rounded(Fraction(n), "f32"))
    check("cvt.s64.s32 %y0, %x0;", [n], "u8", lambda n: signed(n, 32) & (1 << 64) - 1)
    check("cvt.s32.s8 %y0, %x0;", [n], "u4", lambda n: signed(n & 255, 8) & U32)
    check("cvt.u32.u16 %y0, %x0;", [random_bits(16)], "u4", lambda n: n)
    check("cvt.sat.s16.s32 %y0, %x0;", [n], "u2", lambda n: min(max(signed(n, 32), -32768), 32767) & 0xFFFF)
    m = random_bits(32) % 600

    def packed(a: int, b: int, c: int) -> int:
        low, high = (min(max(signed(x, 32), 0), 255) for x in (b, a))
        return (c << 16 | high << 8 | low) & U32

    check("cvt.pack.sat.u8.s32.b32 %y0, %x0, %x1, %x2;", [n, m, n], "u4", packed)
    tf32 = evaluate("cvt.rna.tf32.f32 %y0, %x0;", [np.array([0x3F801000, 0x3F800FFF] * 16, "u4")], ["u4"])[0]
    assert tf32[:2].tolist() == [0x3F802000, 0x3F800000]


@pytest.mark.slow
def test_approximate_functions():
    a = np.abs(RNG.normal(0, 3, 128)).astype("f4") + np.float32(0.01)
    functions = {"ex2": np.exp2, "lg2": np.log2, "rcp": lambda a: 1 / a, "sqrt": np.sqrt, "tanh": np.tanh}
    functions |= {"rsqrt": lambda a: 1 / np.sqrt(a), "sin": np.sin, "cos": np.cos}
    for name, function in functions.items():
        (got,) = evaluate(f"{name}.approx.f32 %y0, %x0;", [a], ["f4"])
        np.testing.assert_allclose(got, function(a.astype("f8")), rtol=2e-7)
    (got,) = evaluate("div.full.f32 %y0, %x0, %x1;", [a, a[::-1].copy()], ["f4"])
    np.testing.assert_array_equal(got, a / a[::-1])
    subnormal = evaluate("ex2.approx.f32 %y0, %x0;", [np.full(32, -140, "f4")], ["f4"])[0]
    assert (subnormal == 2.0**-140).all()
