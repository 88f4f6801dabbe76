"""Bring docs/models.md up to date with tests/families.py and what `bpdq plan` takes: python -m scripts.model_table."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, PreTrainedConfig

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.kv_layers import kept_layers

if TYPE_CHECKING:
    from families import Family

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- python -m scripts.model_table -->\n", "<!-- end -->\n"
HEADING = ("family", "published models", "kind", "vLLM", "plan", "refused options")


def table() -> str:
    """One row for each family."""
    from architectures import ARCHITECTURES
    from families import FAMILIES, ROTATED

    rows = [HEADING, ("---",) * len(HEADING)]
    for name in ARCHITECTURES:
        family = FAMILIES[name]
        refused = ", ".join(f"`{option}`" for option in family.refuses)
        cells = (f"`{name}`", family.models, family.kind, served(family), planned(name), refused)
        rows.append(cells)
    rotated = ", ".join(f"`{name}`" for name in ROTATED)
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return f"{lines}\n`--rotate hadamard` folds into {rotated}, and is refused for all others.\n"


def served(family: "Family") -> str:
    if isinstance(family.engine, str):
        return f"no: {family.engine}"
    how = [" in bf16"] if "dtype" in family.engine else []
    how += [f" with `--ignore '{family.ignore}'`"] if family.ignore else []
    return f"yes{','.join(how)}{'' if family.same else ' ¹'}"


def planned(name: str) -> str:
    """Whether `bpdq plan` counts what the tiny model's layers cache, or why not."""
    try:
        kept_layers(name, published_config(name))
    except InputError as e:
        reason = str(e).partition(": ")[2]
        reason = re.sub("^`bpdq plan` |, which .*", "", reason)
        return "no: " + re.sub(r"\b\w+_\w+\b", r"`\g<0>`", reason)
    return "yes"


def published_config(name: str) -> PreTrainedConfig:
    """The tiny model's, without keys that no published model of the family has."""
    from architectures import config_of

    config = config_of(name)
    for key in vars(config).keys() - vars(AutoConfig.for_model(config.model_type)).keys():
        delattr(config, key)
    return config


def updated(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    PAGE.write_text(updated(PAGE.read_text()))
