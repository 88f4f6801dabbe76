"""cvt between integers and floating-point numbers, with its rounding and saturation."""

from collections.abc import Callable

import numpy as np

from tests.ptx import floating
from tests.ptx.floating import DIRECTED, F32, F64, decode, directed, encode, flush
from tests.ptx.integer import U8, U16, U32, U64, UNSIGNED, Array, Pure, numbers, unsigned, widen
from tests.ptx.parse import SIZES

_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _bits(kind: str) -> int:
    return 8 * SIZES[kind]


def _limits(kind: str) -> tuple[int, int]:
    bits = _bits(kind)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def _integer_to_integer(target: str, source: str, saturate: bool) -> Callable[[Array], Array]:
    """Truncates or extends; the result has the width of `target`."""
    low, high = _limits(target)
    dtype = UNSIGNED[SIZES[target]]
    if not saturate:
        return lambda a: widen(a, source).astype(dtype)

    def run(a: Array) -> Array:
        wide = numbers(source)(widen(a, source))
        bounds = np.iinfo(wide.dtype)
        return unsigned(np.clip(wide, max(low, bounds.min), min(high, bounds.max))).astype(dtype)

    return run


def to_integer(values: Array, target: str, nan: int) -> Array:
    """Integral floating-point numbers -> raw bits, clamped to the range of `target`."""
    low, high = _limits(target)
    values = values.astype(F64)
    dtype = UNSIGNED[SIZES[target]]
    inside = (values >= low) & (values < float(high + 1))
    safe = np.where(inside, values, 0)
    exact = safe.astype(np.int64).view(U64) if target[0] == "s" else safe.astype(U64)
    mask = (1 << _bits(target)) - 1
    result = np.where(inside, exact.astype(dtype), np.where(values < 0, dtype(low & mask), dtype(high & mask)))
    return np.where(np.isnan(values), dtype(nan), result)


def _float_to_integer(target: str, source: str, modifiers: set[str]) -> Callable[[Array], Array] | None:
    names = modifiers & _ROUND.keys()
    if len(names) != 1:
        return None
    rounding = _ROUND[names.pop()]
    nan = 1 << (_bits(target) - 1) if _bits(target) == 64 or source == "f64" else 0
    return lambda a: to_integer(rounding(decode(a, source)), target, nan)


def _to_float(target: str, modifiers: set[str]) -> Callable[[Array], Array]:
    """Numbers -> raw bits of `target`."""
    mode = next(iter(modifiers & DIRECTED), None)

    def run(values: Array) -> Array:
        if values.dtype == np.float16:
            values = values.astype(F32)
        if "sat" in modifiers:
            values = np.where(np.isnan(values), 0, np.clip(values, 0, 1)).astype(values.dtype)
        if "relu" in modifiers:
            values = np.where(values < 0, 0, values).astype(values.dtype)
        if mode:
            return directed(values.astype(F64), target, mode)
        return encode(values, target)

    return run


def _tf32(a: Array) -> Array:
    """Nearest tf32, ties away from zero."""
    finite = np.isfinite(a.view(F32))
    return np.where(finite, (a + U32(0x1000)) & ~U32(0x1FFF), a)


def _scalar(target: str, source: str, modifiers: set[str]) -> Callable[[Array], Array] | None:
    floats = target in floating.TYPES, source in floating.TYPES
    if floats == (False, False):
        return _integer_to_integer(target, source, "sat" in modifiers)
    if floats == (False, True):
        return _float_to_integer(target, source, modifiers)
    encode_target = _to_float(target, modifiers)
    if floats == (True, False):
        view = numbers(source)
        return lambda a: encode_target(_exact(view(a)))
    rounding = modifiers & _ROUND.keys()
    if rounding:
        integral = _ROUND[rounding.pop()]
        return lambda a: encode_target(integral(decode(a, source)))
    return lambda a: encode_target(decode(a, source))


def _exact(values: Array) -> Array:
    """Integers as float64 where that is exact; of 64 bits, rounded to odd."""
    if values.itemsize < 8:
        return values.astype(F64)
    negative = values < 0
    magnitude = np.where(negative, ~values.view(U64) + U64(1), values.view(U64))
    shift = np.where(magnitude >> U64(53), U64(11), U64(0))
    kept = magnitude >> shift
    kept = kept | ((kept << shift) != magnitude).astype(U64)
    result = kept.astype(F64) * (U64(1) << shift).astype(F64)
    return np.where(negative, -result, result)


def lookup(op: tuple[str, ...]) -> Pure | None:
    """cvt{.modifiers}.target.source; the result has the width of the target type."""
    if op[:2] == ("cvt", "pack"):
        return _pack(op)
    target, source, modifiers = op[-2], op[-1], set(op[1:-2])
    allowed = _ROUND.keys() | DIRECTED | {"rn", "rna", "sat", "ftz", "relu", "satfinite"}
    if target not in SIZES or source not in SIZES or not modifiers <= allowed:
        return None
    if target == "tf32":
        return Pure(_tf32, "b32", ("f32",)) if modifiers == {"rna"} and source == "f32" else None
    if "rna" in modifiers or "satfinite" in modifiers:
        return None
    if target in ("f16x2", "bf16x2"):
        half = _scalar(floating.scalar(target), source, modifiers)
        return Pure(lambda a, b: half(np.stack([b, a], axis=1).reshape(-1)).view(U32), target, (source, source))
    run = _scalar(target, source, modifiers)
    if run and "ftz" in modifiers and "f32" in (target, source):
        plain = run
        before = (lambda a: flush(a, source)) if source == "f32" else (lambda a: a)
        after = (lambda a: flush(a, target)) if target == "f32" else (lambda a: a)
        run = lambda a: after(plain(before(a)))  # noqa: E731
    return Pure(run, target, (source,)) if run else None


def _pack(op: tuple[str, ...]) -> Pure | None:
    """cvt.pack.sat.{u16,s16}.s32 d, a, b and cvt.pack.sat.{u8,s8}.s32.b32 d, a, b, c: saturated a above b above c."""
    if op[2] != "sat" or op[4] != "s32":
        return None
    low, high = _limits(op[3])

    def clip(a: Array) -> Array:
        return np.clip(a.view(np.int32), low, high).view(U32)

    if op[3] in ("u16", "s16") and len(op) == 5:
        return Pure(lambda a, b: clip(a) << U32(16) | clip(b).astype(U16), "b32", ("s32", "s32"))
    if op[3] in ("u8", "s8") and op[5:] == ("b32",):
        return Pure(
            lambda a, b, c: c << U32(16) | clip(a).astype(U8).astype(U32) << U32(8) | clip(b).astype(U8),
            "b32",
            ("s32", "s32", "b32"),
        )
    return None
