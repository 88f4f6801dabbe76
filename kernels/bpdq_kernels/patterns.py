"""Names of modules against `re:` patterns of a checkpoint, as compressed-tensors matches them, in bounded time."""

import re
from functools import lru_cache
from math import prod

import regex

from bpdq_kernels.errors import InputError

PREFIX = "re:"
_SECONDS = 0.1  # for one name, of which a pattern that is no trap takes microseconds
# What `regex` unrolls when it compiles: groups in groups, and repeats that are counted in braces.
_LENGTH, _DEPTH, _COUNTS = 1000, 8, 1000


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> "regex.Pattern[str]":
    counts = [int(n) for braces in re.findall(r"\{[\d,]+\}", pattern) for n in re.findall(r"\d+", braces)]
    depth = deepest = 0
    for sign in pattern:
        depth += (sign == "(") - (sign == ")")
        deepest = max(deepest, depth)
    if len(pattern) > _LENGTH or deepest > _DEPTH or prod(n or 1 for n in counts) > _COUNTS:
        raise InputError(f"the pattern {shown(pattern)} is too complex: use a simpler one, or the layers' names")
    try:
        return regex.compile(pattern)
    except (regex.error, OverflowError) as e:
        raise InputError(f"the pattern {shown(pattern)} is not a regular expression ({e}): correct it") from None


def check(target: str) -> None:
    """Raise InputError if `target` is a pattern that can't be used."""
    if target.startswith(PREFIX):
        _compiled(target.removeprefix(PREFIX))


def matches(name: str, target: str) -> bool:
    """Whether `target` is `name`, or `re:` and a pattern that matches at its start; raises InputError."""
    if not target.startswith(PREFIX):
        return target == name
    pattern = target.removeprefix(PREFIX)
    try:
        return _compiled(pattern).match(name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise InputError(
            f"the pattern {shown(pattern)} does not come to an end on {name}: use a simpler one, or the layers' names"
        ) from None


def shown(text: str) -> str:
    """For messages: as Python writes it, and not much of what is long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
