"""Bring docs/quantize.md's table of the options of `bpdq quantize` up to date: python -m scripts.option_table."""

import re
from pathlib import Path

from bpdq_quantizer.run.fields import table
from bpdq_quantizer.run.options import FIELDS

PAGE = Path(__file__).parent.parent / "docs" / "quantize.md"

if __name__ == "__main__":
    own = table("bpdq quantize", FIELDS.values())
    heading = re.escape(own.partition("\n")[0])
    PAGE.write_text(re.sub(rf"^{heading}\n(\|.*\n)+", lambda _: own, PAGE.read_text(), flags=re.MULTILINE))
