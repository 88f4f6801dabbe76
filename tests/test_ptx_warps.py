"""The PTX emulator: what lanes of a warp do together, against the PTX ISA element by element."""

from collections.abc import Callable

import numpy as np
import pytest

from tests.ptx import launch
from tests.ptx_snippets import RNG, U32, assembled, evaluate, kernel_text, number, random_bits, signed

ptxas = pytest.fixture(scope="module", autouse=True)(assembled)


# --- warps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("width", [32, 16, 4])
def test_shuffles(mode: str, width: int):
    a, b = random_bits(32, 64), RNG.integers(0, 32, 64).astype("u4")
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    body = f"{{ .reg .pred p; shfl.sync.{mode}.b32 %y0|p, %x0, %x1, {c}, -1; selp.b32 %y1, 1, 0, p; }}"
    got, inside = evaluate(body, [a, b], ["u4", "u4"])
    segment = c >> 8
    for thread in range(64):
        lane, step = thread % 32, int(b[thread])
        last = (lane & segment) | (c & 31 & ~segment)
        j = {"up": lane - step, "down": lane + step, "bfly": lane ^ step}.get(
            mode, (lane & segment) | (step & ~segment)
        )
        valid = j >= last if mode == "up" else j <= last
        assert inside[thread] == valid
        assert got[thread] == a[thread - lane + (j if valid else lane)]


def test_votes():
    a = np.array([1] * 32 + [0, 1] * 16, "u4")
    body = """
    { .reg .pred p, q;
    setp.ne.u32 p, %x0, 0;
    vote.sync.ballot.b32 %y0, p, -1;
    vote.sync.any.pred q, p, -1; selp.b32 %y1, 1, 0, q;
    vote.sync.all.pred q, !p, -1; selp.b32 %y2, 1, 0, q; }"""
    ballot, some, none = evaluate(body, [a], ["u4"] * 3)
    assert ballot[[0, 31, 32, 63]].tolist() == [U32, U32, 0xAAAAAAAA, 0xAAAAAAAA]
    assert (some == 1).all()
    assert (none == 0).all()


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("add.u32", lambda a: int(a.sum(dtype="u8")) & U32),
        ("add.s32", lambda a: int(a.sum(dtype="u8")) & U32),
        ("min.u32", lambda a: int(a.min())),
        ("max.s32", lambda a: int(a.view("i4").max()) & U32),
        ("min.s32", lambda a: int(a.view("i4").min()) & U32),
        ("and.b32", lambda a: int(np.bitwise_and.reduce(a))),
        ("or.b32", lambda a: int(np.bitwise_or.reduce(a))),
        ("xor.b32", lambda a: int(np.bitwise_xor.reduce(a))),
    ],
)
def test_redux(op: str, function: Callable[[np.ndarray], int]):
    a = random_bits(32, 64)
    a[32:] &= 0x0FFFFFFF if op[:3] == "or." else U32
    (got,) = evaluate(f"redux.sync.{op} %y0, %x0, -1;", [a], ["u4"])
    for warp in (slice(0, 32), slice(32, 64)):
        assert (got[warp] == function(a[warp])).all()


# --- tensor cores: the fragments of the PTX ISA, element by element -----------------------------------------------


def place_a(i: int, lane: int, per_word: int) -> tuple[int, int]:
    """(row, column) of element i of a lane's fragment of A, `per_word` elements to a register."""
    register, element = divmod(i, per_word)
    row = lane // 4 + (8 if register % 2 else 0)
    return row, lane % 4 * per_word + element + (4 * per_word if register >= 2 else 0)


def place_b(i: int, lane: int, per_word: int) -> tuple[int, int]:
    register, element = divmod(i, per_word)
    return lane % 4 * per_word + element + 4 * per_word * register, lane // 4


def place_c(i: int, lane: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


def matrices(words_a: list[np.ndarray], words_b: list[np.ndarray], bits: int, decode: Callable[[int], float]) -> tuple:
    """A and B of each of two warps."""
    per_word = 32 // bits
    k = 4 * per_word * len(words_b)
    a, b = np.zeros((2, 16, k)), np.zeros((2, k, 8))
    for words, matrix, place in ((words_a, a, place_a), (words_b, b, place_b)):
        for thread in range(64):
            for i in range(len(words) * per_word):
                raw = int(words[i // per_word][thread]) >> bits * (i % per_word) & ((1 << bits) - 1)
                matrix[(thread // 32, *place(i, thread % 32, per_word))] = decode(raw)
    return a, b


def fragments_of_c(matrix: np.ndarray) -> list[np.ndarray]:
    return [np.array([matrix[(thread // 32, *place_c(i, thread % 32))] for thread in range(64)]) for i in range(4)]


def multiply(instruction: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """The registers of D."""
    inputs = [*a, *b, *c]
    names = [f"%x{i}" for i in range(len(inputs))]
    groups = [names[: len(a)], names[len(a) : len(a) + len(b)], names[len(a) + len(b) :]]
    operands = [[f"%y{i}" for i in range(len(c))], *groups]
    return evaluate(
        f"{instruction} " + ", ".join("{" + ", ".join(group) + "}" for group in operands) + ";", inputs, ["u4"] * len(c)
    )


SHAPES = [
    ("m16n8k16", "f16", 16, 2),
    ("m16n8k8", "f16", 16, 1),
    ("m16n8k16", "bf16", 16, 2),
    ("m16n8k8", "bf16", 16, 1),
]
SHAPES += [("m16n8k8", "tf32", 32, 2), ("m16n8k4", "tf32", 32, 1)]


@pytest.mark.parametrize(("shape", "kind", "bits", "halves"), SHAPES)
def test_floating_point_mma(shape: str, kind: str, bits: int, halves: int):
    exponent, fraction = {"f16": (0x3C00, 0x83FF), "bf16": (0x3F80, 0x807F), "tf32": (0x3F800000, 0x807FFFFF)}[kind]
    pair = exponent << 16 | exponent if bits == 16 else exponent
    mask = fraction << 16 | fraction if bits == 16 else fraction

    def decode(raw: int) -> float:
        return float(number(raw & 0xFFFFE000, "f32") if kind == "tf32" else number(raw, kind))

    a, b = ([random_bits(32, 64) & np.uint32(mask) | np.uint32(pair) for _ in range(n * halves)] for n in (2, 1))
    c = [RNG.normal(0, 1, 64).astype("f4") for _ in range(4)]
    got = multiply(f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32", a, b, [x.view("u4") for x in c])
    x, y = matrices(a, b, bits, decode)
    for d, start, product in zip(got, c, fragments_of_c(x @ y), strict=True):
        np.testing.assert_array_equal(d.view("f4"), (product + start).astype("f4"))


def test_mma_with_half_precision_accumulators():
    halves = [RNG.normal(0, 1, 128).astype("f2").view("u4") for _ in range(8)]
    a, b, c = halves[:4], halves[4:6], halves[6:]
    got = multiply("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16", a, b, c)
    x, y = matrices(a, b, 16, lambda raw: float(number(raw, "f16")))
    products = fragments_of_c(x @ y)
    for register in range(2):
        for half in range(2):
            start = c[register].view("f2")[half::2].astype("f8")
            expected = (start + products[2 * register + half]).astype("f2")
            np.testing.assert_array_equal(got[register].view("f2")[half::2], expected)


@pytest.mark.parametrize(("shape", "registers"), [("m16n8k128", 1), ("m16n8k256", 2)])
@pytest.mark.parametrize("combine", ["and", "xor"])
def test_single_bit_mma(shape: str, registers: int, combine: str):
    a, b = [random_bits(32, 64) for _ in range(2 * registers)], [random_bits(32, 64) for _ in range(registers)]
    c = [random_bits(32, 64) for _ in range(4)]
    got = multiply(f"mma.sync.aligned.{shape}.row.col.s32.b1.b1.s32.{combine}.popc", a, b, c)
    x, y = (matrix.astype(bool) for matrix in matrices(a, b, 1, bool))
    combined = (x[..., None] & y[:, None]) if combine == "and" else (x[..., None] ^ y[:, None])
    for d, start, product in zip(got, c, fragments_of_c(combined.sum(2)), strict=True):
        np.testing.assert_array_equal(d, start + product.astype("u4"))


@pytest.mark.parametrize(("shape", "registers"), [("m16n8k16", 1), ("m16n8k32", 2)])
def test_8_bit_mma(shape: str, registers: int):
    a, b = [random_bits(32, 64) for _ in range(2 * registers)], [random_bits(32, 64) for _ in range(registers)]
    c = [RNG.integers(0, 1000, 64).astype("u4") for _ in range(4)]
    got = multiply(f"mma.sync.aligned.{shape}.row.col.satfinite.s32.s8.u8.s32", a, b, c)
    x, _ = matrices(a, b, 8, lambda raw: signed(raw, 8))
    _, y = matrices(a, b, 8, float)
    for d, start, product in zip(got, c, fragments_of_c(x @ y), strict=True):
        np.testing.assert_array_equal(d.view("i4"), product.astype("i8") + start)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix(count: int, trans: str):
    rows = RNG.permutation(64).astype("u4")  # 16-byte row to read, of each thread
    halves = np.arange(512, dtype="u2")
    registers = ", ".join(f"%y{i}" for i in range(count))
    body = f"""
    .reg .b32 %s, %from; .reg .b64 %p; .reg .b32 %v<4>;
    mov.b32 %s, smem;
    mad.wide.u32 %p, %t, 16, %a1; mad.lo.u32 %from, %t, 16, %s;
    ld.global.v4.b32 {{%v0, %v1, %v2, %v3}}, [%p]; st.shared.v4.b32 [%from], {{%v0, %v1, %v2, %v3}};
    bar.sync 0;
    mad.wide.u32 %p, %t, 4, %a0; ld.global.b32 %v0, [%p]; mad.lo.u32 %from, %v0, 16, %s;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%from];
    """
    body += "".join(f"mad.wide.u32 %p, %t, 4, %a{2 + i}; st.global.b32 [%p], %y{i};\n" for i in range(count))
    got = [np.zeros(64, "u4") for _ in range(count)]
    text = kernel_text(body, 2 + count, f".reg .b32 %y<{count}>;")
    launch(text, (1,), 64, [rows, halves, *got], 1024)
    for thread in range(64):
        for j in range(count):
            matrix = np.stack([halves.reshape(64, 8)[rows[thread // 32 * 32 + 8 * j + i]] for i in range(8)])
            matrix = matrix.T if trans else matrix
            lane = thread % 32
            assert got[j].view("u2").reshape(64, 2)[thread].tolist() == matrix[lane // 4, lane % 4 * 2 :][:2].tolist()
