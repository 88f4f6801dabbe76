"""A picture of what `bpdq inspect` found: layers by modules, bits per weight as colour, relative error as size."""

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpdq_kernels.folder import REMEDY, read_json
from bpdq_quantizer.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 160  # area of the dot of the largest error, in square points


def blank(width: float, height: float) -> "Figure":
    """An empty figure, in inches; raises InputError where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def check_plot(plot: str) -> None:
    """Raise InputError, before the work, unless a figure can be written to the file `plot`."""
    kinds, file = blank(1, 1).canvas.get_supported_filetypes(), Path(plot)
    if file.suffix and file.suffix[1:].lower() not in kinds:
        raise InputError(f"--plot {plot}: expected a name that ends in .png, .svg or .pdf")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK) or file.is_dir():
        raise InputError(
            f"--plot {plot}: can't be written: name a file in a folder that is there and yours to write in"
        )


def draw(found: dict[str, Any]) -> "Figure":
    """A figure of the layers of `checkpoint.inspect`, errors from the folder's quantization_report.json if it has one.

    Raises InputError where matplotlib is not installed, and for a damaged report.
    """
    report = Path(found["checkpoint"]) / "quantization_report.json"
    errors = _errors(report) if report.is_file() else {}
    points = [(*place(layer["name"]), layer, errors.get(layer["name"], 0.0)) for layer in found["layers"]]
    modules = list(dict.fromkeys(module for _, module, _, _ in points))
    largest = max((error for *_, error in points), default=0.0)
    blocks = 1 + max((block for block, *_ in points), default=0)
    figure = blank(max(5.0, 2.5 + 0.22 * blocks), 1.5 + 0.35 * len(modules))
    axes = figure.subplots()
    bits = [layer["bits_per_weight"] for *_, layer, _ in points]
    dots = axes.scatter(
        [block for block, *_ in points],
        [modules.index(module) for _, module, _, _ in points],
        c=bits,
        s=[LARGEST * (0.1 + 0.9 * error / largest) if largest else LARGEST / 2 for *_, error in points],
        cmap="viridis_r",
        vmin=math.floor(min(bits, default=0)),  # or differences of hundredths look large
        vmax=math.ceil(max(bits, default=1)),
    )
    figure.colorbar(dots, label="bits per weight")
    axes.set_yticks(range(len(modules)), modules)
    axes.invert_yaxis()
    axes.set_xlabel("block")
    title = f"{found['architecture']}, {found['bits_per_weight']:.3f} bits per weight"
    axes.set_title(title + (f"; largest dot: relative error {largest:.1%}" if largest else ""), fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _errors(report: Path) -> dict[str, float]:
    """The relative error of every layer."""
    layers = read_json(report).get("layers")
    try:
        errors = {layer["name"]: float(layer["relative_error"]) for layer in layers}
        whole = all(0 <= error < math.inf for error in errors.values())
    except (TypeError, ValueError, LookupError, OverflowError):
        whole = False
    if not whole:
        raise InputError(f"{report}: has no name and error of every layer: {REMEDY}, or move it away")
    return errors


def place(name: str) -> tuple[int, str]:
    """Block number and module of a layer's name, one for all experts; 0 for the embedding and the LM head."""
    found = re.search(r"\.(\d+)\.(.+)", re.sub(r"experts\.\d+\.", "experts.", name))
    return (int(found[1]), found[2]) if found else (0, name)
