"""What a Sentence-Transformers folder has behind its model: pooling, projections, each in a folder that `modules.json`
names. vLLM reads them there, and without them pools as the architecture does by default."""

import glob
import json
import re
from pathlib import Path

from bpdq_kernels.folder import FLOATS, SINGLE, check_values, read_headers
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.sources import check_content

MODULES = "modules.json"
SETTINGS = (MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
WITH_SETTINGS, WITH_WEIGHTS = ("Pooling", "Dense"), ("Dense",)  # classes of modules that vLLM reads files of


def module_patterns(source: Path) -> list[str]:
    """Of the files in the folders of `source`'s modules; raises InputError for a modules.json that can't be used."""
    return [f"{glob.escape(path)}/*.{kind}" for path in _folders(source) for kind in ("json", "safetensors")]


def check_modules(source: Path) -> None:
    """Raise InputError for a module of the folder `source` that can't be copied whole: files that are missing, cut or
    git-lfs pointers, and weights that are pickled, no 16-bit or 32-bit floats, or no numbers."""
    for path, kind in _folders(source).items():
        config, weights = source / path / "config.json", source / path / SINGLE
        if kind in WITH_SETTINGS and not config.is_file():
            raise InputError(f"{config} is missing, though {MODULES} names its folder: download it again")
        if kind in WITH_WEIGHTS and not weights.is_file():
            raise InputError(
                f"{weights} is missing, where {MODULES} has a projection: download it, or convert what is there "
                "instead to safetensors, as nothing is unpickled here"
            )
        for file in sorted([*(source / path).glob("*.json"), *(source / path).glob("*.safetensors")]):
            check_content(file)
        stored = read_headers(sorted((source / path).glob("*.safetensors")))
        for name, entry in stored.items():
            if entry.dtype not in FLOATS:
                raise InputError(
                    f"{entry.file}: {name} is {entry.dtype}, and is copied only from {', '.join(FLOATS)}: start from "
                    "the 16-bit model"
                )
        check_values(stored)


def _folders(source: Path) -> dict[str, str]:
    """The folders that `source`'s modules.json names, with the class of the module in each; none without the file."""
    file = source / MODULES
    check_content(file)
    if not file.is_file():
        return {}
    try:
        found = {module["path"]: module["type"].rpartition(".")[2] for module in json.loads(file.read_text("utf-8"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{file}: not a list of modules with path and type ({e}): download it again") from None
    found.pop("", None)
    for path, kind in found.items():
        if not isinstance(path, str) or not re.fullmatch(r"\w[\w .-]*(/\w[\w .-]*)*", path):
            raise InputError(f"{file}: {path!r} is no folder beside it: correct it")
        if kind == "Transformer":
            raise InputError(
                f"{file}: the model is in {path}: put that folder's files beside {MODULES}, and make its path empty"
            )
    return found
