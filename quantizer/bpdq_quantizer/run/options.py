"""The options of `bpdq quantize`: their defaults, and what is refused before any work starts."""

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from bpdq_kernels.format import Scheme
from bpdq_quantizer.algorithm.grid import paper_start
from bpdq_quantizer.errors import InputError

SOLVERS = {  # options of `quantize_linear`
    "refined": {"refinements": 2, "alpha": 1e-6, "damping": 0.01},
    "paper": {"refinements": 0, "alpha": 1e-4, "damping": 0.05, "starts": (paper_start,)},
}
ASYMMETRIC = {"refined": 0.5, "paper": 0.0}  # share of the shift of its inputs that a weight is corrected for
TUNE_STEPS = {"none": 0, "model": 200}
ROTATIONS = ("none", "hadamard")
TUNE_LOSSES = ("kl", "mix")
DEVICES = ("auto", "cpu", "cuda")
SPECIAL_TOKENS = ("auto", "none")

_CHOICES = {"solver": SOLVERS, "rotate": ROTATIONS, "tune": TUNE_STEPS, "tune_loss": TUNE_LOSSES, "device": DEVICES}
_CHOICES["special_tokens"] = SPECIAL_TOKENS
_LARGEST = {"seed": 2**63 - 1}  # of integers, else 2^31 - 1
_INTEGERS = ("bits", "group_size", "embed_bits", "head_bits", "samples", "seq_len", "iterations")
_INTEGERS += ("tune_steps", "tune_samples", "seed")
_NUMBERS = ("asymmetric", "target_bpw")
_TEXTS = ("target_size", "devices")
_PATHS = ("model", "calibration", "offload_dir")
_SWITCHES = ("kv_cache_scales", "resume")
_OPTIONAL = {*_TEXTS, *_NUMBERS, "embed_bits", "head_bits", "tune_steps", "tune_samples", "offload_dir"}


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "MODEL" if name == "model" else f"--{name.replace('_', '-')}"


def resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `quantize`, paths as strings, with the defaults that depend on others; None stays where an option
    is off. Raises InputError for what can't be used."""
    found = {name: _checked(name, value) for name, value in options.items()}
    if found["tune_steps"] is None:
        found["tune_steps"] = TUNE_STEPS[found["tune"]]
    if found["asymmetric"] is None:
        found["asymmetric"] = ASYMMETRIC[found["solver"]]
    if found["tune_samples"] is None:
        found["tune_samples"] = found["samples"]
    _check_together(found)
    return found


def scheme(bits: int, group_size: int) -> Scheme:
    """Raises InputError for one that is not supported."""
    try:
        return Scheme(bits, group_size)
    except ValueError as e:
        raise InputError(f"--bits / --embed-bits / --head-bits / --group-size: {e}") from None


def _checked(name: str, value: Any) -> Any:
    """The value of one option, in a type that JSON has."""
    if name in _CHOICES:
        if not isinstance(value, str) or value not in _CHOICES[name]:
            raise InputError(f"{flag(name)} {value}: expected {' or '.join(_CHOICES[name])}")
    elif name in _SWITCHES:
        _expect(name, value, isinstance(value, bool), "True or False")
    elif value is None and name in _OPTIONAL:
        return None
    elif name in _INTEGERS:
        _expect(name, value, isinstance(value, Integral) and not isinstance(value, bool), "a whole number")
        limit = _LARGEST.get(name, 2**31 - 1)
        _expect(name, value, 0 <= value <= limit, f"0 to {limit}")
        return int(value)
    elif name in _NUMBERS:
        _expect(name, value, isinstance(value, Real) and not isinstance(value, bool), "a number")
        return float(value)
    elif name in _PATHS:
        _expect(name, value, isinstance(value, str | os.PathLike) and os.fspath(value) != "", "a path or a name")
        return os.fspath(value)
    elif name in _TEXTS:
        _expect(name, value, isinstance(value, str), "text")
    return value


def _expect(name: str, value: Any, met: bool, expected: str) -> None:
    if not met:
        raise InputError(f"{flag(name)} {value}: expected {expected}")


def _check_together(found: Mapping[str, Any]) -> None:
    for bits in (found["bits"], found["embed_bits"], found["head_bits"]):
        if bits is not None:
            scheme(bits, found["group_size"])
    tune = found["tune"]
    counts = [found[name] for name in ("samples", "seq_len", "iterations")]
    if min(counts) < 1 or found["tune_steps"] < (tune != "none"):
        raise InputError("--samples, --seq-len, --iterations and --tune-steps must be at least 1")
    if found["tune_loss"] != "kl" and tune != "model":
        raise InputError(f"--tune-loss {found['tune_loss']} needs --tune model")
    if not 0 <= found["asymmetric"] <= 1:
        raise InputError(f"--asymmetric {found['asymmetric']}: expected 0 (off) to 1")
    if found["target_bpw"] is not None and found["target_size"] is not None:
        raise InputError("--target-bpw and --target-size: give one of them")
    if found["target_bpw"] is not None and not 0 < found["target_bpw"] <= 16:
        raise InputError(f"--target-bpw {found['target_bpw']}: expected bits per weight, such as 2.5")
    if tune != "none" and min(found["samples"], found["tune_samples"]) < 2:
        raise InputError(f"--tune {tune} needs two calibration windows or more: raise --samples and --tune-samples")
