"""`python -m bpdq_quantizer`: the `bpdq` command."""

import sys

from bpdq_quantizer.cli import main

if __name__ == "__main__":
    sys.exit(main())
