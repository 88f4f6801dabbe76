"""The options of a run from those that are given: what the others then are, what is refused before any work starts, and
the command line that gives the same ones."""

import difflib
import shlex
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.support import FLOATS
from bpdq_quantizer.model.windows import gradient_tokens
from bpdq_quantizer.run.fields import checked, flag
from bpdq_quantizer.run.options import (
    ASYMMETRIC,
    COEFFICIENT_BITS,
    FIELDS,
    GROUP_SIZE,
    HELD_OUT,
    HELD_OUT_FROM,
    PARTS,
    TUNE_STEPS,
    Options,
)

# in `command`: they change no tensor, or are shown first
SILENT = ("calibration", "evaluate", "offload_dir", "device", "devices")


def _held_out(known: dict[str, Any]) -> int:
    return HELD_OUT if known["samples"] >= HELD_OUT_FROM and known["offload_dir"] is None else 0


DEFAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {  # of options that follow others, those above among them
    "tune_steps": lambda known: TUNE_STEPS[known["tune"]],
    "tune_samples": lambda known: known["samples"] if known["tune"] == "model" else None,
    "asymmetric": lambda known: ASYMMETRIC[known["solver"]],
    "evaluate": _held_out,
    "coefficient_bits": lambda known: COEFFICIENT_BITS[known["solver"]],
    "group_size": lambda known: GROUP_SIZE.get(known["coefficient_bits"], GROUP_SIZE[16]),
}


def resolved(**given: Any) -> Options:
    """The options of a run, by name, paths as strings, with the defaults that depend on others. Raises InputError for
    what can't be used, and TypeError for a name that is no option's."""
    for name in given:
        if name not in FIELDS:
            nearest = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0)
            raise TypeError(f"quantize has no option {name!r}, the nearest is {nearest[0]!r}")
    found = {name: checked(of, given.get(name, of.default)) for name, of in FIELDS.items()}
    for name, default in DEFAULTS.items():
        if found[name] is None:
            found[name] = default(found)
    parts = {name: part(**{of.name: found[of.name] for of in fields(part)}) for name, part in PARTS.items()}
    o = Options(**parts)
    _check_together(o)
    return o


def default_output_tokens(solver: str, calibration: int) -> int:
    """`--output-tokens` where it is not given, of so many calibration tokens."""
    return 0 if solver == "paper" else gradient_tokens(calibration)


def command(o: Options, model: str) -> str:
    """The command line that makes the same checkpoint of what is called `model`: other paths by their last parts, and
    without options that are so in any case, or SILENT."""
    known, public = o.by_name(), o.public()
    default = {name: DEFAULTS[name](known) if name in DEFAULTS else of.default for name, of in FIELDS.items()}
    shown = {name: value for name, value in public.items() if value != default[name] and name not in SILENT}
    shown = {"calibration": public["calibration"], **shown, "output": Path(o.files.output).name}
    words = [word for name, value in shown.items() for word in _words(FIELDS[name], value)]
    return shlex.join(["bpdq", "quantize", model, *words])


def _words(of: Field, value: Any) -> list[str]:
    """An option on a command line."""
    if isinstance(value, bool):
        return [flag(of)]
    texts = map(str, value if isinstance(value, list) else [value])
    pairs = ([f"{flag(of)}={text}"] if text.startswith("-") else [flag(of), text] for text in texts)
    return [word for pair in pairs for word in pair]


def _check_together(o: Options) -> None:
    s, tuning = o.schemes, o.tuning
    try:
        scheme = s.scheme()
        for bits in (s.embed_bits, s.head_bits):
            if bits not in (None, FLOATS):
                scheme.with_bits(bits)
    except ValueError as e:
        options = "--bits / --embed-bits / --head-bits / --group-size / --coefficient-bits / --code"
        raise InputError(f"{options}: {e}") from None
    if min(o.text.samples, o.method.iterations) < 1 or tuning.tune_steps == 0:
        raise InputError("--samples, --iterations and --tune-steps must be at least 1")
    if s.target_bpw is not None and s.target_size is not None:
        raise InputError("--target-bpw and --target-size: give one of them")
    if o.publishing.push_to_hub is None and (o.publishing.private or o.publishing.force):
        raise InputError("--private and --force are of --push-to-hub: name its repository, or leave them out")
    _check_tuning(o)


def _check_tuning(o: Options) -> None:
    tuning = o.tuning
    if tuning.tune == "none":
        for name, unset in (("tune_steps", None), ("tune_samples", None), ("tune_loss", FIELDS["tune_loss"].default)):
            if (value := getattr(tuning, name)) != unset:
                raise InputError(f"{flag(FIELDS[name])} {value} needs --tune model")
    elif min(o.text.samples, tuning.tune_samples) < 2:
        raise InputError("--tune model needs two calibration windows or more: raise --samples and --tune-samples")
