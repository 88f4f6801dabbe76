"""Bring the tables of options in docs/quantize.md up to date: python -m scripts.option_table."""

from dataclasses import fields
from pathlib import Path

from bpdq_quantizer.run.fields import table
from bpdq_quantizer.run.options import PARTS

PAGE = Path(__file__).parent.parent / "docs" / "quantize.md"
BEGIN, END = "<!-- python -m scripts.option_table -->\n", "<!-- end -->\n"


def tables() -> str:
    """A heading and a table for each group of options."""
    return "\n".join(f"### {part.__doc__.capitalize()}\n\n{table(fields(part))}" for part in PARTS.values())


def updated(page: str) -> str:
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
