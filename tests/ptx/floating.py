"""Floating-point instructions as functions of raw bits.

+, -, *, /, sqrt and fma are correctly rounded; min and max order zeros by sign. The approximate functions are
computed in double precision and rounded, so they are more exact than a GPU's. NaN payloads are the host's.
"""

from collections.abc import Callable

import numpy as np

from tests.ptx.integer import SIGNED, U16, U32, U64, UNSIGNED, Array, Pure
from tests.ptx.parse import SIZES

F16, F32, F64 = np.float16, np.float32, np.float64
TYPES = ("f16", "bf16", "f32", "f64", "f16x2", "bf16x2")
_SIGN = {"f16": U16(0x8000), "f32": U32(1 << 31), "f64": U64(1 << 63)}
_SIGN |= {"bf16": U16(0x8000), "f16x2": U32(0x80008000), "bf16x2": U32(0x80008000)}
DIRECTED = {"rz", "rm", "rp"}
_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}


def scalar(kind: str) -> str:
    return kind.removesuffix("x2")


def to_bits(values: Array, kind: str) -> Array:
    """Packed halves -> the registers that hold them."""
    return values.view(UNSIGNED[SIZES[kind]])


def decode(bits: Array, kind: str) -> Array:
    """Raw bits -> numbers; two per element for the packed types. bf16 becomes float32."""
    kind = scalar(kind)
    if kind == "bf16":
        return (bits.view(U16).astype(U32) << U32(16)).view(F32)
    return bits.view({"f16": F16, "f32": F32, "f64": F64}[kind])


def to_odd(values: Array) -> Array:
    """float64 -> float32 rounded to odd, so that rounding the result again to fewer bits rounds once."""
    rounded = values.astype(F32)
    back = rounded.astype(F64)
    even = (rounded.view(U32) & U32(1)) == 0
    step = np.where(np.abs(values) > np.abs(back), 1, -1).astype(np.int32)
    inexact = np.isfinite(values) & (values != back) & even
    return (rounded.view(np.int32) + np.where(inexact, step, 0).astype(np.int32)).view(F32)


def bf16_bits(values: Array) -> Array:
    """float32 -> bfloat16 bits, nearest even."""
    bits = values.view(U32)
    rounded = ((bits + (U32(0x7FFF) + ((bits >> U32(16)) & U32(1)))) >> U32(16)).astype(U16)
    return np.where(np.isnan(values), U16(0x7FFF), rounded)


def encode(values: Array, kind: str) -> Array:
    """Numbers -> raw bits, to the nearest even; float64 of any precision is rounded once."""
    half = scalar(kind)
    if half == "bf16":
        return to_bits(bf16_bits(to_odd(values) if values.dtype == F64 else values), kind)
    return to_bits(values.astype({"f16": F16, "f32": F32, "f64": F64}[half], copy=False), kind)


def fused(a: Array, b: Array, c: Array) -> Array:
    """a * b + c in float64 rounded to odd, of numbers with at most 24 bits, whose product is exact.

    The error of the sum is known exactly (Knuth's two-sum); if there is one, the last bit is made odd. Rounding that
    to float32 or less is the correctly rounded fma.
    """
    product = a.astype(F64) * b.astype(F64)
    c = c.astype(F64)
    total = product + c
    rest = total - product
    error = (product - (total - rest)) + (c - rest)
    inexact = (error > 0) | (error < 0)  # false for NaN
    away = (error > 0) == (total > 0)
    bits = total.view(np.int64)
    return np.where(inexact & ((bits & 1) == 0), bits + np.where(away, 1, -1), bits).view(F64)


def fused_nearest(kind: str) -> Callable[[Array, Array, Array], Array]:
    """As `fused`, but rounded to odd only where a lane's nearest float64 may lie halfway between two numbers of `kind`:
    else rounding to the nearest twice is as good."""
    dropped = {"f32": 29, "f16": 42, "bf16": 45}[kind]
    mask, half = U64((1 << dropped) - 1), U64(1 << (dropped - 1))
    smallest = 2.0**-13 if kind == "f16" else 2.0**-125  # below it, subnormal numbers drop more bits

    def run(a: Array, b: Array, c: Array) -> Array:
        total = a.astype(F64) * b.astype(F64) + c.astype(F64)
        doubtful = (total.view(U64) & mask) == half
        doubtful |= (np.abs(total) < smallest) & (total != 0)
        return fused(a, b, c) if doubtful.any() else total

    return run


def directed(values: Array, kind: str, mode: str) -> Array:
    """Raw bits of `values` (float64) rounded toward zero, down or up."""
    unit = UNSIGNED[SIZES[scalar(kind)]]
    bits = encode(values, scalar(kind)).view(SIGNED[SIZES[scalar(kind)]])
    nearest = decode(bits.view(unit), scalar(kind)).astype(F64)
    toward_zero = {"rz": np.ones_like(values, bool), "rm": values > 0, "rp": values < 0}[mode]
    magnitude, target = np.abs(nearest), np.abs(values)
    too_large = toward_zero & (magnitude > target)
    too_small = ~toward_zero & (magnitude < target)
    return to_bits((bits - too_large.astype(bits.dtype) + too_small.astype(bits.dtype)).view(unit), kind)


def flush(bits: Array, kind: str) -> Array:
    """Subnormal numbers become zeros of their sign."""
    kind = scalar(kind)
    bits, shape = bits.view(UNSIGNED[SIZES[kind]]), bits.dtype
    exponent = {"f16": U16(0x7C00), "bf16": U16(0x7F80), "f32": U32(0x7F800000)}[kind]
    return np.where((bits & exponent) == 0, bits & _SIGN[kind], bits).view(shape)


def _extreme(kind: str, largest: bool, nan: bool) -> Callable[[Array, Array], Array]:
    half = scalar(kind)
    unit = UNSIGNED[SIZES[half]]
    function = np.fmax if largest else np.fmin

    def run(a: Array, b: Array) -> Array:
        x, y = decode(a, kind), decode(b, kind)
        a, b = a.view(unit), b.view(unit)
        equal = a & b if largest else a | b  # of equal numbers only the signs of zeros differ
        result = np.where(x == y, equal, encode(function(x, y), half))
        if nan:
            result = np.where(np.isnan(x) | np.isnan(y), unit(_NAN[half]), result)
        return to_bits(result, kind)

    return run


def _saturate(values: Array) -> Array:
    return np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)


def _relu(values: Array) -> Array:
    return np.where(values > 0, values, np.where(np.isnan(values), values, 0)).astype(values.dtype)


def _double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda a: function(a.astype(F64))


_ARITHMETIC: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "fma": fused,
    "mad": fused,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": lambda a: 1 / a,
    "rsqrt": _double(lambda a: 1 / np.sqrt(a)),
    "ex2": _double(np.exp2),
    "lg2": _double(np.log2),
    "sin": _double(np.sin),
    "cos": _double(np.cos),
    "tanh": _double(np.tanh),
}
_ODD: dict[str, Callable[..., Array]] = {
    "add": lambda a, b: fused(a, np.ones_like(a), b),
    "sub": lambda a, b: fused(a, np.ones_like(a), -b),
    "mul": lambda a, b: fused(a, b, np.zeros_like(a)),
    "fma": fused,
}
_COUNT = {"add": 2, "sub": 2, "mul": 2, "div": 2, "fma": 3, "mad": 3}
_MODIFIERS = {"rn", "approx", "full", "ftz", "noftz", "sat", "relu"} | DIRECTED


def _arithmetic(name: str, modifiers: set[str], kind: str) -> Pure | None:
    if not modifiers <= _MODIFIERS or (kind == "f64" and name in ("fma", "mad")):
        return None
    count = _COUNT.get(name, 1)
    mode = next(iter(modifiers & DIRECTED), None)
    if mode and (name not in _ODD or kind == "f64"):
        return None
    function = _ODD[name] if mode else fused_nearest(scalar(kind)) if count == 3 else _ARITHMETIC[name]
    if modifiers & {"sat", "relu"}:
        plain, limit = function, _saturate if "sat" in modifiers else _relu
        function = lambda *sources: limit(plain(*sources))  # noqa: E731

    def run(*sources: Array) -> Array:
        values = function(*(decode(source, kind) for source in sources))
        return directed(values, kind, mode) if mode else encode(values, kind)

    return Pure(_flushing(run, kind) if "ftz" in modifiers else run, kind, (kind,) * count)


def _flushing(run: Callable[..., Array], kind: str) -> Callable[..., Array]:
    return lambda *sources: flush(run(*(flush(source, kind) for source in sources)), kind)


_CLASSES: dict[str, Callable[[Array], Array]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
    "number": lambda a: ~np.isnan(a),
    "normal": lambda a: np.isfinite(a) & (np.abs(a) >= np.finfo(a.dtype).tiny),
    "subnormal": lambda a: (a != 0) & (np.abs(a) < np.finfo(a.dtype).tiny),
}


def lookup(op: tuple[str, ...]) -> Pure | None:
    """The function of a floating-point instruction; None if there is none."""
    name, modifiers, kind = op[0], set(op[1:-1]), op[-1]
    if kind not in TYPES:
        return None
    sign = _SIGN[kind]
    if name in _ARITHMETIC:
        return _arithmetic(name, modifiers, kind)
    if name in ("min", "max") and modifiers <= {"NaN", "ftz"}:
        run = _extreme(kind, name == "max", "NaN" in modifiers)
        return Pure(_flushing(run, kind) if "ftz" in modifiers else run, kind, (kind, kind))
    if name in ("neg", "abs") and modifiers <= {"ftz"}:
        run = (lambda a: a ^ sign) if name == "neg" else (lambda a: a & ~sign)
        return Pure(_flushing(run, kind) if "ftz" in modifiers else run, kind, (kind,))
    if name == "copysign" and not modifiers:
        return Pure(lambda a, b: (a & sign) | (b & ~sign), kind, (kind, kind))
    if name == "testp" and len(modifiers) == 1:
        test = _CLASSES[next(iter(modifiers))]
        return Pure(lambda a: test(decode(a, kind)), "pred", (kind,))
    if name == "selp" and not modifiers:
        return Pure(lambda a, b, p: np.where(p, a, b), kind, (kind, kind, "pred"))
    return None


_ORDERED = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_UNORDERED = {"equ": np.not_equal, "neu": np.equal, "ltu": np.greater_equal, "leu": np.greater}
_UNORDERED |= {"gtu": np.less_equal, "geu": np.less}


def comparison(name: str, kind: str, ftz: bool) -> Callable[[Array, Array], Array]:
    """(a, b) -> bool of setp on floating-point numbers."""

    def compare(x: Array, y: Array) -> Array:
        unordered = np.isnan(x) | np.isnan(y)
        if name in _ORDERED:
            return _ORDERED[name](x, y)
        if name == "ne":
            return (x != y) & ~unordered
        if name in ("num", "nan"):
            return unordered if name == "nan" else ~unordered
        return {"equ": x == y, "neu": x != y, "ltu": x < y, "leu": x <= y, "gtu": x > y, "geu": x >= y}[
            name
        ] | unordered

    if ftz:
        return lambda a, b: compare(decode(flush(a, kind), kind), decode(flush(b, kind), kind))
    return lambda a, b: compare(decode(a, kind), decode(b, kind))
