"""Integer, bit and predicate instructions as functions of the raw bits of their operands, one lane per element."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.ptx.parse import SIZES

Array = np.ndarray
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
UNSIGNED = {1: U8, 2: U16, 4: U32, 8: U64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


class Pure(NamedTuple):
    """An instruction without side effects: result = run(*sources), all as unsigned integers or booleans."""

    run: Callable[..., Array]
    result: str
    sources: tuple[str, ...]


def signed(a: Array) -> Array:
    return a.view(SIGNED[a.itemsize])


def unsigned(a: Array) -> Array:
    return a.view(UNSIGNED[a.itemsize])


def numbers(kind: str) -> Callable[[Array], Array]:
    """Raw bits -> integers with the sign of `kind`."""
    return signed if kind[0] == "s" else unsigned


def widen(a: Array, kind: str) -> Array:
    """Raw bits of an integer of `kind` as 64 bits, sign- or zero-extended."""
    return signed(a).astype(np.int64).view(U64) if kind[0] == "s" else a.astype(U64)


def lookup(op: tuple[str, ...]) -> Pure | None:
    """The function of an instruction on integers, bits or predicates; None if there is none."""
    build = _TABLE.get(op[0])
    return build(op[1:-1], op[-1]) if build else None


def _binary(function: Callable[..., Array]) -> Callable[[tuple[str, ...], str], Pure | None]:
    return lambda modifiers, kind: None if modifiers else Pure(function, kind, (kind, kind))


def _comparing(function: Callable[..., Array]) -> Callable[[tuple[str, ...], str], Pure | None]:
    def build(modifiers: tuple[str, ...], kind: str) -> Pure | None:
        view = numbers(kind)
        return None if modifiers else Pure(lambda a, b: unsigned(function(view(a), view(b))), kind, (kind, kind))

    return build


def _unary(function: Callable[[Array], Array]) -> Callable[[tuple[str, ...], str], Pure | None]:
    return lambda modifiers, kind: None if modifiers else Pure(function, kind, (kind,))


def high_product(a: Array, b: Array, kind: str) -> Array:
    """The upper half of the product."""
    if a.itemsize < 8:
        product = widen(a, kind) * widen(b, kind)
        return (product >> U64(8 * a.itemsize)).astype(a.dtype)
    low = U64(0xFFFFFFFF)
    a0, a1, b0, b1 = a & low, a >> U64(32), b & low, b >> U64(32)
    middle = a1 * b0 + (a0 * b0 >> U64(32))
    upper = a1 * b1 + (middle >> U64(32)) + ((a0 * b1 + (middle & low)) >> U64(32))
    if kind[0] == "s":
        upper = upper - np.where(signed(a) < 0, b, U64(0)) - np.where(signed(b) < 0, a, U64(0))
    return upper


def _multiply(modifiers: tuple[str, ...], kind: str) -> Pure | None:
    if modifiers == ("lo",):
        return Pure(np.multiply, kind, (kind, kind))
    if modifiers == ("hi",):
        return Pure(lambda a, b: high_product(a, b, kind), kind, (kind, kind))
    if modifiers == ("wide",):
        wide = UNSIGNED[2 * SIZES[kind]]
        return Pure(lambda a, b: (widen(a, kind) * widen(b, kind)).astype(wide), WIDE[kind], (kind, kind))
    return None


def _multiply_add(modifiers: tuple[str, ...], kind: str) -> Pure | None:
    product = _multiply(modifiers, kind)
    if product is None:
        return None
    return Pure(lambda a, b, c: product.run(a, b) + c, product.result, (kind, kind, product.result))


def _magnitude(a: Array) -> Array:
    return np.where(signed(a) < 0, ~a + a.dtype.type(1), a)


def _divide(a: Array, b: Array, kind: str) -> tuple[Array, Array]:
    """Quotient truncated toward zero, all ones where b is 0, and the remainder with the sign of a."""
    if kind[0] == "s":
        magnitude = _magnitude(a) // np.maximum(_magnitude(b), 1)
        quotient = np.where((signed(a) < 0) ^ (signed(b) < 0), ~magnitude + a.dtype.type(1), magnitude)
    else:
        quotient = a // np.maximum(b, 1)
    quotient = np.where(b == 0, ~np.zeros_like(a), quotient)
    return quotient, a - quotient * b


def _division(part: int) -> Callable[[tuple[str, ...], str], Pure | None]:
    def build(modifiers: tuple[str, ...], kind: str) -> Pure | None:
        return None if modifiers else Pure(lambda a, b: _divide(a, b, kind)[part], kind, (kind, kind))

    return build


def _shift_left(modifiers: tuple[str, ...], kind: str) -> Pure:
    def run(a: Array, n: Array) -> Array:
        return np.left_shift(a, np.minimum(n, U32(8 * a.itemsize)).astype(a.dtype))

    return Pure(run, kind, (kind, "u32"))


def _shift_right(modifiers: tuple[str, ...], kind: str) -> Pure:
    view = numbers(kind)

    def run(a: Array, n: Array) -> Array:
        a = view(a)
        return unsigned(np.right_shift(a, np.minimum(n, U32(8 * a.itemsize)).astype(a.dtype)))

    return Pure(run, kind, (kind, "u32"))


def _funnel_shift(modifiers: tuple[str, ...], kind: str) -> Pure | None:
    left, wrap = modifiers[0] == "l", modifiers[1] == "wrap"

    def run(low: Array, high: Array, n: Array) -> Array:
        n = (n & U32(31) if wrap else np.minimum(n, U32(32))).astype(U64)
        both = (high.astype(U64) << U64(32)) | low
        return ((both << n) >> U64(32) if left else both >> n).astype(U32)

    return Pure(run, kind, (kind, kind, "u32"))


def _extract(modifiers: tuple[str, ...], kind: str) -> Pure:
    view = numbers(kind)

    def run(a: Array, position: Array, length: Array) -> Array:
        field = view(widen(a, kind)) >> view((position & U32(255)).astype(U64))
        unused = view(U64(64) - np.minimum(length & U32(255), U32(64)).astype(U64))
        return unsigned((field << unused) >> unused).astype(a.dtype)

    return Pure(run, kind, (kind, "u32", "u32"))


def _insert(modifiers: tuple[str, ...], kind: str) -> Pure:
    def run(a: Array, b: Array, position: Array, length: Array) -> Array:
        one = a.dtype.type(1)
        bits = a.dtype.type(8 * a.itemsize)
        position = (position & U32(255)).astype(a.dtype)
        length = np.minimum((length & U32(255)).astype(a.dtype), bits)
        mask = ((one << length) - one) << np.minimum(position, bits)
        return (b & ~mask) | ((a << np.minimum(position, bits)) & mask)

    return Pure(run, kind, (kind, kind, "u32", "u32"))


def bit_length(a: Array) -> Array:
    """Position of the highest set bit, counted from 1; 0 for 0."""
    if a.itemsize == 8:
        high = (a >> U64(32)).astype(U32)
        return np.where(high != 0, bit_length(high) + U32(32), bit_length(a.astype(U32)))
    return np.frexp(a.astype(np.float64))[1].astype(U32)


def _find(modifiers: tuple[str, ...], kind: str) -> Pure:
    def run(a: Array) -> Array:
        length = bit_length(np.where(signed(a) < 0, ~a, a) if kind[0] == "s" else a)
        if modifiers == ("shiftamt",):
            return np.where(length == 0, U32(0xFFFFFFFF), U32(8 * a.itemsize) - length)
        return length - U32(1)

    return Pure(run, "u32", (kind,))


_REVERSED = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], U8)


def _reverse(a: Array) -> Array:
    octets = _REVERSED[a.view(U8)].reshape(-1, a.itemsize)[:, ::-1]
    return np.ascontiguousarray(octets).view(a.dtype)[:, 0]


def _permute_selectors(mode: tuple[str, ...], c: Array) -> Array:
    """Byte selectors [lanes, 4] of prmt; bit 3 replicates a sign."""
    if not mode:
        return (c[:, None] >> np.array([0, 4, 8, 12], U32)) & U32(15)
    at = (c & U32(3)).astype(np.int64)[:, None]
    byte = np.arange(4)[None]
    return {
        "f4e": lambda: at + byte,
        "b4e": lambda: (at - byte) & 7,
        "rc8": lambda: at + 0 * byte,
        "ecl": lambda: np.maximum(at, byte),
        "ecr": lambda: np.minimum(at, byte),
        "rc16": lambda: 2 * (at & 1) + (byte & 1),
    }[mode[0]]()


def _permute(op_modifiers: tuple[str, ...], kind: str) -> Pure:
    # the mode, if any, follows the type: prmt.b32.f4e
    mode = () if kind == "b32" else (kind,)

    def run(a: Array, b: Array, c: Array) -> Array:
        octets = np.concatenate([a.view(U8).reshape(-1, 4), b.view(U8).reshape(-1, 4)], axis=1)
        if (c == c[0]).all() and not (mode == () and c[0] & U32(0x8888)):
            return np.take(octets, _permute_selectors(mode, c[:1])[0].astype(np.int64), axis=1).view(U32)[:, 0]
        selectors = _permute_selectors(mode, c).astype(np.int64)
        chosen = np.take_along_axis(octets, selectors & 7, axis=1)
        signs = (chosen.view(np.int8) >> 7).view(U8)
        return np.where(selectors & 8, signs, chosen).view(U32)[:, 0]

    return Pure(run, "b32", ("b32", "b32", "b32"))


def _logic(modifiers: tuple[str, ...], kind: str) -> Pure | None:
    if modifiers:
        return None

    def run(a: Array, b: Array, c: Array, table: Array) -> Array:
        wanted = int(table[0]) & 255
        flip = wanted.bit_count() > 4
        wanted ^= 255 * flip
        result = np.zeros_like(a)
        for minterm in range(8):
            if wanted >> minterm & 1:
                terms = [x if minterm & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1))]
                result = result | (terms[0] & terms[1] & terms[2])
        return ~result if flip else result

    return Pure(run, kind, (kind, kind, kind, "u32"))


def _dot4(modifiers: tuple[str, ...], kind: str) -> Pure:
    """dp4a.atype.btype: four products of bytes, added to c."""

    def octets(a: Array, its: str) -> Array:
        return a.view(np.int8 if its == "s32" else U8).reshape(-1, 4).astype(np.int32)

    def run(a: Array, b: Array, c: Array) -> Array:
        return c + (octets(a, modifiers[0]) * octets(b, kind)).sum(1, dtype=np.int32).view(U32)

    return Pure(run, "u32", (modifiers[0], kind, "u32"))


def _absolute_difference(modifiers: tuple[str, ...], kind: str) -> Pure:
    """sad: |a - b| + c"""
    view = numbers(kind)
    return Pure(lambda a, b, c: np.where(view(a) < view(b), b - a, a - b) + c, kind, (kind, kind, kind))


COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal}
COMPARISONS |= {"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}


def comparison(name: str, kind: str) -> Callable[[Array, Array], Array]:
    """(a, b) -> bool of setp on integers."""
    view, compare = numbers(kind), COMPARISONS[name]
    return lambda a, b: compare(view(a), view(b))


_TABLE: dict[str, Callable[[tuple[str, ...], str], Pure | None]] = {
    "add": _binary(np.add),
    "sub": _binary(np.subtract),
    "and": _binary(np.bitwise_and),
    "or": _binary(np.bitwise_or),
    "xor": _binary(np.bitwise_xor),
    "not": _unary(np.invert),
    "neg": _unary(lambda a: ~a + a.dtype.type(1)),
    "abs": _unary(_magnitude),
    "min": _comparing(np.minimum),
    "max": _comparing(np.maximum),
    "mul": _multiply,
    "mad": _multiply_add,
    "div": _division(0),
    "rem": _division(1),
    "shl": _shift_left,
    "shr": _shift_right,
    "shf": _funnel_shift,
    "bfe": _extract,
    "bfi": _insert,
    "bfind": _find,
    "brev": _unary(_reverse),
    "clz": lambda modifiers, kind: Pure(lambda a: U32(8 * a.itemsize) - bit_length(a), "u32", (kind,)),
    "popc": lambda modifiers, kind: Pure(lambda a: np.bitwise_count(a).astype(U32), "u32", (kind,)),
    "prmt": _permute,
    "lop3": _logic,
    "dp4a": _dot4,
    "sad": _absolute_difference,
    "selp": lambda modifiers, kind: Pure(lambda a, b, p: np.where(p, a, b), kind, (kind, kind, "pred")),
}
