"""What parts of the GPU check have in common: their options, a report that is kept step by step, and their end."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

Row = dict[str, Any]


class Parser(argparse.ArgumentParser):
    """Options of every part; a wrong one is one line and exit status 2."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(prog=f"python -m benchmarks.{name}", description=description.splitlines()[0])
        self.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, step by step")
        self.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(%(default)s)")
        self.add_argument("--tiny", action="store_true", help="small shapes, to try the command itself")

    def parse_args(self, *args: Any) -> argparse.Namespace:
        found = super().parse_args(*args)
        if found.json and not found.json.absolute().parent.is_dir():
            self.error(f"--json {found.json}: no such folder")
        if found.device == "cuda" and not torch.cuda.is_available():
            self.exit(3, f"{self.prog}: torch sees no CUDA device here\n")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def new_report(args: argparse.Namespace) -> Row:
    """A report with what was run where, and no `failures` yet."""
    return {
        "settings": {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items() if name != "json"},
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "failures": [],
    }


def save(report: Row, file: Path | None) -> None:
    """Write the report as it is now."""
    if file is not None:
        file.write_text(json.dumps(report, indent=2) + "\n")


def finish(report: Row, file: Path | None) -> int:
    """Write the report and name what failed; returns the exit status."""
    save(report, file)
    for failure in report["failures"]:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if report["failures"] else 0
