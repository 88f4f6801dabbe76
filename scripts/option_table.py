"""Bring README.md's table of the options of `bpdq quantize` up to date: python -m scripts.option_table."""

import re
from pathlib import Path

from bpdq_quantizer.run.fields import table
from bpdq_quantizer.run.options import FIELDS

README = Path(__file__).parent.parent / "README.md"

if __name__ == "__main__":
    own = table("bpdq quantize", FIELDS.values())
    heading = re.escape(own.partition("\n")[0])
    README.write_text(re.sub(rf"^{heading}\n(\|.*\n)+", lambda _: own, README.read_text(), flags=re.MULTILINE))
