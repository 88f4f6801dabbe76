"""The checkpoint's `quantization_config`: parsed, validated, and resolved per layer.

Two dialects are read. Ours:

    {"quant_method": "bpdq", "checkpoint_format": "bpdq", "format_version": 1, "bits": k, "group_size": G,
     "ignore": ["lm_head"], "layers": {"re:.*mlp.*": {"bits": 3, "group_size": 64}},
     "meta": {"bpdq": {"msbits": k, "n_iters": 10, "alpha": 1e-4}}}

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
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from bpdq_kernels import patterns
from bpdq_kernels.errors import InputError
from bpdq_kernels.layout import GROUP_SIZES, MAX_PLANES, TILE_ROWS, UNIT, cdiv, coefficient_shape, plane_shape

FORMAT_VERSION = 1
KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
KV_SCALES = ("k_scale", "v_scale")


@dataclass(frozen=True)
class Scheme:
    """Number of bit-planes and group size of one layer."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in range(1, MAX_PLANES + 1):  # True and 2.0 are "in" it
            raise InputError(f"bits = {self.bits!r} bit-planes are not supported: use 1 to {MAX_PLANES}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise InputError(f"group_size = {self.group_size!r} is not supported: use one of {GROUP_SIZES}")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, 16-bit coefficients included: k + 16 (k + 1) / G."""
        return self.bits + 16 * (self.bits + 1) / self.group_size

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a layer's B and c, ragged ends included."""
        planes = plane_shape(in_features, out_features, self.bits)
        coefficients = coefficient_shape(in_features, out_features, self.bits, self.group_size)
        return 4 * prod(planes) + 2 * prod(coefficients)

    def tiled_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a layer's `bpdq_kernels.layout.Tiles`, padding and scales included."""
        units, outputs = cdiv(in_features, UNIT), cdiv(out_features, 4 * TILE_ROWS) * 4 * TILE_ROWS
        groups = cdiv(units * UNIT, self.group_size)
        return outputs * (units * UNIT // 8 * self.bits + groups * 2 * (self.bits + 1)) + 4 * out_features


@dataclass(frozen=True)
class Format:
    """What a checkpoint says of its layers."""

    default: Scheme
    ignore: tuple[str, ...] = ()
    layers: Mapping[str, Scheme] = field(default_factory=dict)
    kv_cache_scales: bool = False

    def scheme_for(self, name: str) -> Scheme | None:
        """Scheme of the Linear called `name` in the checkpoint, or None if it is left in 16 bits."""
        if _matches(name, self.ignore):
            return None
        for pattern, scheme in self.layers.items():
            if _matches(name, (pattern,)):
                return scheme
        return self.default

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
    version = config.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(
            f"quantization_config: format_version {version!r} is not supported (this release reads "
            f"{FORMAT_VERSION}): upgrade vllm-bpdq or quantize the model again"
        )
    default = _scheme(config, "quantization_config")
    ignore = config.get("ignore") or []
    if not isinstance(ignore, list | tuple) or not all(isinstance(name, str) for name in ignore):
        raise InputError(f"quantization_config: ignore = {ignore!r} must be a list of layer names or 're:' patterns")
    layers = {}
    for pattern, override in _mapping(config, "layers", "quantization_config").items():
        where = f"quantization_config: layers[{pattern!r}]"
        if not isinstance(override, Mapping) or not override.keys() <= {"bits", "group_size"}:
            raise InputError(f"{where} = {override!r} must be an object of bits, group_size or both")
        layers[pattern] = _scheme({"bits": default.bits, "group_size": default.group_size, **override}, where)
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
        return Scheme(config["bits"], config["group_size"])
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
_COEFFICIENTS = (torch.float16, torch.bfloat16)


def check_planes(name: str, B: Tensor, in_features: int, out_features: int, scheme: Scheme) -> None:
    """Raise InputError naming the layer unless `B` has the dtype and shape that `scheme` asks for.

    At G = 256, words that pad the inputs to a multiple of 256 are accepted (the authors write them).
    """
    want = plane_shape(in_features, out_features, scheme.bits)
    padded = plane_shape(-(-in_features // 256) * 256, out_features, scheme.bits)
    if B.dtype != torch.int32 or B.shape not in ((want, padded) if scheme.group_size == 256 else (want,)):
        raise InputError(f"{name}.B is {B.dtype} {tuple(B.shape)}, expected int32 {want}: {_REMEDY}")


def check_coefficients(name: str, c: Tensor, in_features: int, out_features: int, scheme: Scheme) -> None:
    """Raise InputError naming the layer unless `c` is float16 or bfloat16 in the shape that `scheme` asks for."""
    want = coefficient_shape(in_features, out_features, scheme.bits, scheme.group_size)
    if c.dtype not in _COEFFICIENTS or c.shape != want:
        raise InputError(f"{name}.c is {c.dtype} {tuple(c.shape)}, expected 16-bit floats {want}: {_REMEDY}")


def is_finite(tensor: Tensor) -> bool:
    """Whether floats are all numbers; on a CPU 20 times as fast as `isfinite` in 16 bits."""
    if tensor.numel() == 0:
        return True
    least, largest = torch.aminmax(tensor)  # NaN if there is one
    return bool(torch.isfinite(least) & torch.isfinite(largest))


def check_finite(name: str, c: Tensor) -> None:
    """Raise InputError naming the layer unless its coefficients `c` are finite."""
    if not is_finite(c):
        raise InputError(f"{name}.c holds NaN or infinity, or was not in the checkpoint: {_REMEDY}")


def check(name: str, B: Tensor, c: Tensor, in_features: int, out_features: int, scheme: Scheme) -> None:
    """`check_planes`, `check_coefficients`, and `check_finite` unless they are on the meta device."""
    check_planes(name, B, in_features, out_features, scheme)
    check_coefficients(name, c, in_features, out_features, scheme)
    if not c.is_meta:
        check_finite(name, c)
