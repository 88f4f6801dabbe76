"""The checkpoint's `quantization_config`: parsed, validated, and resolved per layer.

Two dialects are read. Ours:

    {"quant_method": "bpdq", "checkpoint_format": "bpdq", "format_version": 2, "bits": k, "group_size": G,
     "coefficient_bits": 8, "ignore": ["lm_head"], "layers": {"re:.*mlp.*": {"bits": 3, "group_size": 64}},
     "meta": {"bpdq": {"msbits": k, "n_iters": 10, "alpha": 1e-4}}}

(version 1 has coefficients in 16 bits only, and no word of it; from version 3 on the model or a layer may have
"code": "trellis4", the planes of `bpdq_kernels.trellis`, instead of "plain")

and that of the authors' release (GPTQModel 5.7.0 with the BPDQ patch), whose `bits` is the width of the initial
integer grid and whose number of planes is `meta.bpdq.msbits`:

    {"quant_method": "gptq", "checkpoint_format": "bpdq", "bits": 8, "group_size": 64,
     "meta": {"bpdq": {"msbits": 2, "n_iters": 10, "alpha": 0.0001}}, "dynamic": null, "lm_head": false}

Layer names and `ignore` entries are exact module names or `re:` patterns, matched as compressed-tensors does. An
embedding or LM head is in bit-planes where `layers` gives its exact name; tied ones are stored as the embedding, and
`layers` names both. `kv_cache_scheme` = KV_CACHE_SCHEME, in compressed-tensors' words, says that every attention layer
has scales for an fp8 KV cache, `k_scale` and `v_scale`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor

from bpdq_kernels import patterns
from bpdq_kernels.errors import InputError
from bpdq_kernels.layout import (
    GROUP_SIZES,
    MAX_PLANES,
    TILE_ROWS,
    UNIT,
    WORD,
    Stored,
    cdiv,
    coefficient_shape,
    plane_shape,
)

WIDTHS = {1: (16,), 2: (8, 16), 3: (8, 16)}  # of coefficients, by format version
PLAIN, TRELLIS = "plain", "trellis4"
CODES = {1: (PLAIN,), 2: (PLAIN,), 3: (PLAIN, TRELLIS)}  # of planes, likewise
CODE_OPTIONS = {"plain": PLAIN, "trellis": TRELLIS}  # what --code says
KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KV_SCALES = ("k_scale", "v_scale")


@dataclass(frozen=True)
class Scheme:
    """Number of bit-planes that are stored, group size, width of the coefficients and code of one layer."""

    bits: int
    group_size: int
    coefficient_bits: int = 16
    code: str = PLAIN

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in range(1, MAX_PLANES + 1):  # True and 2.0 are "in" it
            raise InputError(f"bits = {self.bits!r} bit-planes are not supported: use 1 to {MAX_PLANES}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise InputError(f"group_size = {self.group_size!r} is not supported: use one of {GROUP_SIZES}")
        if type(self.coefficient_bits) is not int or self.coefficient_bits not in WIDTHS[2]:
            raise InputError(f"coefficient_bits = {self.coefficient_bits!r} is not supported: use one of {WIDTHS[2]}")
        if self.code not in CODES[3]:
            raise InputError(f"code = {self.code!r} is not supported: use one of {CODES[3]}")
        if self.planes > MAX_PLANES:
            raise InputError(f"bits = {self.bits} with a trellis is not supported: use 1 to {MAX_PLANES - 1}")

    @property
    def trellis(self) -> bool:
        """Whether the planes are trellis-coded (`bpdq_kernels.trellis`)."""
        return self.code == TRELLIS

    @property
    def planes(self) -> int:
        """How many planes are multiplied."""
        return self.bits + self.trellis

    def with_bits(self, bits: int) -> "Scheme":
        """This with so many planes, plain where there is no such trellis."""
        return replace(self, bits=bits, code=PLAIN if bits == MAX_PLANES else self.code)

    def for_inputs(self, in_features: int) -> "Scheme":
        """This, but with plain planes for a layer whose inputs are no multiple of a chain's."""
        return replace(self, code=PLAIN) if in_features % WORD else self

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of a layer's tensors in a checkpoint, after its own and a dot."""
        return ("B", "c") if self.coefficient_bits == 16 else ("B", "c", "s")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of long rows: k + 16 (p + 1) / G, or k + 8 (p + 1) / G, with p = `planes`; for
        coefficients in 8 bits 16 (p + 1) / K are to be added."""
        return self.bits + self.coefficient_bits * (self.planes + 1) / self.group_size

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a layer's tensors, ragged ends included."""
        planes = plane_shape(in_features, out_features, self.bits)
        coefficients = coefficient_shape(in_features, out_features, self.bits, self.group_size, self.trellis)
        scales = 0 if self.coefficient_bits == 16 else prod(coefficients[1:])
        return 4 * prod(planes) + self.coefficient_bits // 8 * prod(coefficients) + 2 * scales

    def tiled_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a layer's `bpdq_kernels.layout.Tiles`, padding and scales included."""
        units, outputs = cdiv(in_features, UNIT), cdiv(out_features, 4 * TILE_ROWS) * 4 * TILE_ROWS
        groups = cdiv(units * UNIT, self.group_size)
        ratios = 0 if self.coefficient_bits == 16 else 1
        coefficients = (self.planes + 1) * (groups * self.coefficient_bits // 8 + 2 * ratios)
        return outputs * (units * UNIT // 8 * self.bits + coefficients) + 4 * out_features


class _Targets:
    """Names and `re:` patterns of a checkpoint: names, of which experts have thousands, are looked up."""

    def __init__(self, targets: Iterable[str]) -> None:
        self.names = frozenset(targets)
        self.patterns = [target for target in targets if target.startswith(patterns.PREFIX)]

    def found(self, name: str, aliases: list[str]) -> list[str]:
        """Only `name` if it is among them, else all patterns that match one of `aliases`."""
        if name in self.names:
            return [name]
        return [p for p in self.patterns if any(patterns.matches(alias, p) for alias in aliases)]


@dataclass(frozen=True)
class Format:
    """What a checkpoint says of its layers."""

    default: Scheme
    ignore: tuple[str, ...] = ()
    layers: Mapping[str, Scheme] = field(default_factory=dict)
    kv_cache_scales: bool = False

    def scheme_for(self, name: str, aliases: Iterable[str] = ()) -> Scheme | None:
        """Scheme of the Linear called `name` in the checkpoint, or None if it is left in 16 bits.

        aliases: what patterns are matched with instead, where `name` is that of another program's model. Raises
        InputError where patterns of `layers` contradict each other: of which comes first a saved copy tells nothing.
        """
        names = [*aliases] or [name]
        if self._ignored.found(name, names):
            return None
        schemes = {target: self.layers[target] for target in self._named.found(name, names)}
        for target, scheme in schemes.items():
            first, other = next(iter(schemes.items()))
            if scheme != other:
                raise InputError(
                    f"{name}: quantization_config: layers makes it {other} by {patterns.shown(first)} and {scheme} by "
                    f"{patterns.shown(target)}: name the layer itself, or let one pattern match it"
                )
        return next(iter(schemes.values()), self.default)

    def mentions(self, name: str) -> bool:
        """Whether `ignore` or `layers` gives exactly this name."""
        return name in self._ignored.names or name in self._named.names

    @cached_property
    def _ignored(self) -> "_Targets":
        return _Targets(self.ignore)

    @cached_property
    def _named(self) -> "_Targets":
        return _Targets(self.layers)

    def embedding_scheme(self, name: str) -> Scheme | None:
        """Scheme of the embedding or LM head called `name` in the checkpoint, or None if it is left in 16 bits."""
        return None if _matches(name, self.ignore) else self.layers.get(name)


def claims(config: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` describes a BPDQ checkpoint, in our dialect or the authors'."""
    method = config.get("quant_method")
    return method == "bpdq" or (method == "gptq" and config.get("checkpoint_format") == "bpdq")


def parse(config: Mapping[str, Any]) -> Format:
    """Read a `quantization_config`; raises InputError that names the key and the remedy."""
    if not isinstance(config, Mapping):
        raise InputError(f"quantization_config = {config!r} must be an object: download or quantize the model again")
    if not claims(config):
        raise InputError(
            f"quantization_config is not BPDQ: quant_method {config.get('quant_method')!r}, "
            f"checkpoint_format {config.get('checkpoint_format')!r}"
        )
    if config["quant_method"] == "gptq":
        return _parse_authors(config)
    version = config.get("format_version", 1)
    if type(version) is not int or version not in WIDTHS:
        raise InputError(
            f"quantization_config: format_version {version!r} is not supported (this release reads "
            f"{', '.join(map(str, WIDTHS))}): upgrade vllm-bpdq or quantize the model again"
        )
    default = _scheme(config, "quantization_config")
    meta = config.get("meta")
    authors = meta.get("bpdq") if isinstance(meta, Mapping) else None  # what their loader goes by
    planes = authors.get("msbits", default.bits) if isinstance(authors, Mapping) else default.bits
    if planes != default.bits:
        raise InputError(
            f"quantization_config: bits = {default.bits}, but meta.bpdq.msbits = {planes!r}: download or quantize the "
            "model again"
        )
    ignore = config.get("ignore") or []
    if not isinstance(ignore, list | tuple) or not all(isinstance(name, str) for name in ignore):
        raise InputError(f"quantization_config: ignore = {ignore!r} must be a list of layer names or 're:' patterns")
    layers = {}
    for pattern, override in _mapping(config, "layers", "quantization_config").items():
        where = f"quantization_config: layers[{pattern!r}]"
        if not isinstance(override, Mapping) or not override.keys() <= vars(default).keys():
            raise InputError(f"{where} = {override!r} must be an object of {', '.join(vars(default))} or some of them")
        layers[pattern] = _scheme({**vars(default), **override}, where)
    for scheme in (default, *layers.values()):
        if scheme.coefficient_bits not in WIDTHS[version]:
            raise InputError(
                f"quantization_config: format_version {version} has no coefficient_bits = {scheme.coefficient_bits}: "
                "download or quantize the model again"
            )
        if scheme.code not in CODES[version]:
            raise InputError(
                f"quantization_config: format_version {version} has no code = {scheme.code!r}: "
                "download or quantize the model again"
            )
    _checked("ignore", ignore)
    _checked("layers", layers)
    return Format(default, tuple(ignore), layers, _has_kv_cache_scales(config))


def _has_kv_cache_scales(config: Mapping[str, Any]) -> bool:
    scheme = _mapping(config, "kv_cache_scheme", "quantization_config")
    if any(scheme.get(key) != value for key, value in KV_CACHE_SCHEME.items()) and scheme:
        raise InputError(
            f"quantization_config: kv_cache_scheme = {scheme!r} is not supported, only {KV_CACHE_SCHEME} is: remove it "
            "to serve with a 16-bit KV cache"
        )
    return bool(scheme)


def _parse_authors(config: Mapping[str, Any]) -> Format:
    bpdq = _mapping(_mapping(config, "meta", "quantization_config"), "bpdq", "quantization_config: meta")
    if "msbits" not in bpdq:
        raise InputError(
            "quantization_config: meta.bpdq.msbits (the number of bit-planes) is missing: add it or quantize again"
        )
    if config.get("lm_head"):
        raise InputError(
            "quantization_config: lm_head = true (a quantized LM head) is not supported: quantize again without it"
        )
    default = _scheme({"bits": bpdq["msbits"], "group_size": config.get("group_size")}, "quantization_config")
    ignore, layers = ["lm_head"], {}
    for pattern, override in _mapping(config, "dynamic", "quantization_config").items():
        if pattern.startswith("-:"):
            ignore.append("re:" + pattern[2:])
            continue
        where = f"quantization_config: dynamic[{pattern!r}]"
        if not isinstance(override, Mapping):
            raise InputError(f"{where} = {override!r} must be an object")
        group_size = override.get("group_size", default.group_size)
        layers["re:" + pattern.removeprefix("+:")] = _scheme({"bits": default.bits, "group_size": group_size}, where)
    _checked("dynamic", [*ignore, *layers])
    return Format(default, tuple(ignore), layers)


def _mapping(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {key} = {value!r} must be an object")
    return value


def _scheme(config: Mapping[str, Any], where: str) -> Scheme:
    missing = [key for key in ("bits", "group_size") if config.get(key) is None]
    if missing:
        raise InputError(f"{where}: {' and '.join(missing)} missing: add the value or quantize the model again")
    try:
        return Scheme(
            config["bits"], config["group_size"], config.get("coefficient_bits", 16), config.get("code", PLAIN)
        )
    except InputError as e:
        raise InputError(f"{where}: {e}") from None


def _checked(patterns_of: str, names: Iterable[str]) -> None:
    for name in names:
        try:
            patterns.check(name)
        except InputError as e:
            raise InputError(f"quantization_config: {patterns_of}: {e}") from None


def _matches(name: str, targets: Iterable[str]) -> bool:
    return any(patterns.matches(name, target) for target in targets)


_REMEDY = "the checkpoint does not fit its config.json: download or quantize it again"
_HALVES = (torch.float16, torch.bfloat16)


def check_planes(name: str, B: Tensor, in_features: int, out_features: int, scheme: Scheme) -> None:
    """Raise InputError naming the layer unless `B` has the dtype and shape that `scheme` asks for.

    At G = 256, words that pad the inputs to a multiple of 256 are accepted (the authors write them).
    """
    if scheme.trellis and in_features % WORD:
        raise InputError(f"{name} has {in_features} inputs, and trellis-coded planes a multiple of {WORD}: {_REMEDY}")
    want = plane_shape(in_features, out_features, scheme.bits)
    padded = plane_shape(-(-in_features // 256) * 256, out_features, scheme.bits)
    if B.dtype != torch.int32 or B.shape not in ((want, padded) if scheme.group_size == 256 else (want,)):
        raise InputError(f"{name}.B is {B.dtype} {tuple(B.shape)}, expected int32 {want}: {_REMEDY}")


def check_coefficients(name: str, c: Tensor, in_features: int, out_features: int, scheme: Scheme) -> None:
    """Raise InputError naming the layer unless `c` has a dtype and the shape that `scheme` asks for."""
    want = coefficient_shape(in_features, out_features, scheme.bits, scheme.group_size, scheme.trellis)
    dtypes, expected = (_HALVES, "16-bit floats") if scheme.coefficient_bits == 16 else ((torch.int8,), "int8")
    if c.dtype not in dtypes or c.shape != want:
        raise InputError(f"{name}.c is {c.dtype} {tuple(c.shape)}, expected {expected} {want}: {_REMEDY}")


def check_scales(name: str, s: Tensor, out_features: int, scheme: Scheme) -> None:
    """Raise InputError naming the layer unless `s` is float16 or bfloat16 [k+1, N]."""
    want = (scheme.planes + 1, out_features)
    if s.dtype not in _HALVES or s.shape != want:
        raise InputError(f"{name}.s is {s.dtype} {tuple(s.shape)}, expected 16-bit floats {want}: {_REMEDY}")


def is_finite(tensor: Tensor) -> bool:
    """Whether floats are all numbers; on a CPU 20 times as fast as `isfinite` in 16 bits."""
    if tensor.numel() == 0:
        return True
    least, largest = torch.aminmax(tensor)  # NaN if there is one
    return bool(torch.isfinite(least) & torch.isfinite(largest))


def check_finite(name: str, c: Tensor, s: Tensor | None = None) -> None:
    """Raise InputError naming the layer unless its coefficients are finite: `c`, or the scales `s` of int8."""
    tensor, key = (c, "c") if s is None else (s, "s")
    if not is_finite(tensor):
        raise InputError(f"{name}.{key} holds NaN or infinity, or was not in the checkpoint: {_REMEDY}")


def check(name: str, stored: Stored, in_features: int, out_features: int, scheme: Scheme) -> None:
    """Raise InputError naming the layer unless its tensors have the dtypes and shapes that `scheme` asks for, and, but
    on the meta device, finite coefficients."""
    B, c, s = stored
    check_planes(name, B, in_features, out_features, scheme)
    check_coefficients(name, c, in_features, out_features, scheme)
    if "s" in scheme.tensors:
        check_scales(name, s, out_features, scheme)
    if not c.is_meta:
        check_finite(name, c, s)
