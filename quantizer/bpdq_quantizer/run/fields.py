"""An option, declared once as the field of a dataclass: checked, and shown by the command line, Python and the docs.

transformers' HfArgumentParser makes a command line of dataclasses too, but knows no positional argument, shows every
name twice (`--seq_len`, `--seq-len`), takes a value after a switch, and checks nothing else.
"""

import argparse
import inspect
import os
from collections.abc import Collection, Iterable
from dataclasses import MISSING, Field, field
from functools import reduce
from numbers import Integral, Real
from operator import or_
from types import NoneType
from typing import Any, NamedTuple, NewType, get_args

from bpdq_quantizer.errors import InputError

PathName = NewType("PathName", str)  # a path, or a name that stands for one
ACCEPTED = {  # types of a value by that of its field, and in words
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
    PathName: (str | os.PathLike, "a path or a name"),
    list[str]: (list | tuple, "a list of texts"),
}


class About(NamedTuple):
    """What a field says beside its type and default.

    help: a few words; more: what the docs say instead; unset: what None stands for; metavar: of its value on the
    command line; positional: without a flag there; choices: of a text; within: the least and the greatest number;
    expected: that, or what is no empty name, in words.
    """

    help: str
    more: str
    unset: str
    metavar: str | None
    positional: bool
    choices: Collection[str]
    within: tuple[float, float]
    expected: str


def option(
    default: Any,
    help: str,
    more: str = "",
    *,
    unset: str = "off",
    metavar: str | None = None,
    positional: bool = False,
    choices: Collection[str] = (),
    within: tuple[float, float] = (0, 2**31 - 1),
    expected: str = "",
) -> Any:
    """The field of an option (`About`); `default` is MISSING for one that must be given."""
    about = About(help, more or help, unset, metavar, positional, choices, within, expected)
    return field(default=default, metadata={"about": about})


def flag(of: Field) -> str:
    """An option's name on the command line."""
    return of.name.upper() if of.metadata["about"].positional else f"--{of.name.replace('_', '-')}"


def checked(of: Field, value: Any) -> Any:
    """The value of an option, in a type that JSON has; raises InputError for one that it can't have."""
    about, (kind, *others) = of.metadata["about"], get_args(of.type) or (of.type,)
    if value is None and NoneType in others:
        return None
    accepted, words = ACCEPTED[kind]
    met = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    if about.choices:
        met, words = met and value in about.choices, " or ".join(about.choices)
    elif met and kind is PathName:
        value, words = os.fsdecode(value), about.expected or words
        met = value != "" and _is_path(value)
    elif met and kind == list[str]:
        met = all(isinstance(part, str) and part for part in value)
        value = list(value) or None
    elif met and kind in (int, float):
        words, met = about.expected or "{} to {}".format(*about.within), about.within[0] <= value <= about.within[1]
        value = kind(value) if met else value
    if not met:
        raise InputError(f"{flag(of)} {value}: expected {words}")
    return value


def _is_path(name: str) -> bool:
    """Whether the system takes it: it holds no null character, nor half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def annotation(of: Field) -> Any:
    """The types of a value that Python may give."""
    return reduce(or_, [str | os.PathLike if kind is PathName else kind for kind in get_args(of.type) or (of.type,)])


def add_arguments(parser: argparse._ActionsContainer, options: Iterable[Field], *, with_defaults: bool = True) -> None:
    """Let a parser, or a group of one, take options; their values are for `checked` to check. Without defaults what is
    not given is not there."""
    for of in options:
        about, kind = of.metadata["about"], (get_args(of.type) or (of.type,))[0]
        default = {} if of.default is MISSING else {"default": of.default if with_defaults else argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(flag(of), action="store_true", help=about.help, **default)
            continue
        standard = f" ({about.unset if of.default is None else '%(default)s'})"
        if of.default is MISSING or not with_defaults:
            standard = ""
        settings = {"type": kind, "metavar": about.metavar, "help": about.help.replace("%", "%%") + standard, **default}
        if about.choices:
            settings["choices"] = tuple(about.choices)
        if kind == list[str]:
            settings |= {"type": str, "action": "append"}
        if about.positional:
            parser.add_argument(of.name, **settings | {"metavar": flag(of)})
        else:
            parser.add_argument(flag(of), required=of.default is MISSING, **settings)


def default_of(of: Field) -> str:
    """What an option is if it is not given, in Markdown; empty for one that must be."""
    if of.default is MISSING:
        return ""
    if of.default is None or of.default is False:
        return of.metadata["about"].unset
    return f"`{of.default}`" if isinstance(of.default, str) else str(of.default)


def table(options: Iterable[Field]) -> str:
    """A table of options in Markdown."""
    rows = ["| option | default | |", "|---|---|---|"]
    for of in options:
        about = of.metadata["about"]
        name = f"{flag(of)} {about.metavar}" if about.metavar and not about.positional else flag(of)
        rows.append(f"| `{name}` | {default_of(of)} | {about.more} |")
    return "\n".join(rows) + "\n"


def signature(options: Iterable[Field]) -> inspect.Signature:
    """Of a function that takes options by name, and those that must be given by place too."""
    parameters = []
    for of in options:
        needed = of.default is MISSING
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if needed else inspect.Parameter.KEYWORD_ONLY
        default = inspect.Parameter.empty if needed else of.default
        parameters.append(inspect.Parameter(of.name, kind, default=default, annotation=annotation(of)))
    return inspect.Signature(parameters, return_annotation=dict[str, Any])


def described(options: Iterable[Field], *, with_defaults: bool = True) -> str:
    """Options, a line each, for a docstring."""
    lines = [(f"- {of.name}: {of.metadata['about'].help}", default_of(of)) for of in options]
    return "\n".join(f"{line} ({default})" if default and with_defaults else line for line, default in lines)
