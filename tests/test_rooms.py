"""The rooms of the code: imports go downwards only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"vllm_bpdq": ROOT, "bpdq_kernels": ROOT / "kernels", "bpdq_quantizer": ROOT / "quantizer"}
BELOW = {  # what a package, or a room of the quantizer, may import
    "vllm_bpdq": {"bpdq_kernels"},
    "bpdq_kernels": set(),
    "bpdq_quantizer": {"bpdq_kernels"},
}
ROOMS = ["storage", "algorithm", "model", {"passes", "checkpoint", "fit"}, "evaluation", "run"]
BASE = {"errors", "cost"}  # modules beside the rooms that all may import


def imported(file):
    """The modules of our packages that a file imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".") for name in names if name.split(".")[0] in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_the_kernels(package):
    files = list((PACKAGES[package] / package).rglob("*.py"))
    assert files
    for file in files:
        assert {name[0] for name in imported(file)} <= {package, *BELOW[package]}, file


def test_rooms_of_the_quantizer_import_only_those_below():
    below = set(BASE)
    for floor in ROOMS:
        rooms = floor if isinstance(floor, set) else {floor}
        for room in rooms:
            files = list((PACKAGES["bpdq_quantizer"] / "bpdq_quantizer" / room).glob("*.py"))
            assert len(files) > 1, room
            for file in files:
                found = {name[1] for name in imported(file) if name[0] == "bpdq_quantizer"}
                assert found <= below | {room}, file
        below |= rooms
