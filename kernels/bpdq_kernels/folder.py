"""The safetensors files of a checkpoint folder: which ones hold its tensors, what their headers say, and whether the
values are numbers.

Transformers and vLLM pick files by rules of their own; a folder that one of them would read differently is refused.
"""

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from bpdq_kernels.errors import InputError
from bpdq_kernels.format import KV_SCALES, is_finite

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
REMEDY = "download or quantize it again"
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # what is left in 16 bits may be these
DTYPES = {**FLOATS, "I32": torch.int32, "I8": torch.int8}  # what checkpoints are made of
# of an fp8 KV cache: with the largest, all that float16 can hold fits; the smallest is float16's own
SCALE_RANGE = (2.0**-24, torch.finfo(torch.float16).max / torch.finfo(torch.float8_e4m3fn).max)
_CHUNK = 1 << 24  # elements


class Entry(NamedTuple):
    """A stored tensor: its file, its dtype as the header writes it (`BF16`), and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of a dtype in DTYPES."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def meta(self) -> Tensor:
        """The tensor on the meta device; of an integer type if its own is not in DTYPES."""
        return torch.empty(self.shape, dtype=DTYPES.get(self.dtype, torch.uint8), device="meta")


Headers = dict[str, Entry]


def check_plain(name: str, entry: Entry, *shapes: tuple[int, ...]) -> None:
    """Raise InputError unless a tensor that is no part of bit-planes has one of the `shapes` and a dtype for it."""
    if entry.dtype not in FLOATS or entry.shape not in shapes:
        raise InputError(
            f"{entry.file}: {name} is {entry.dtype} {entry.shape}, expected {' or '.join(FLOATS)} "
            f"{' or '.join(map(str, shapes))}: {REMEDY}"
        )


def read_headers(files: Iterable[str | Path]) -> Headers:
    """What safetensors files hold, by the names of the tensors, from their headers alone.

    Raises InputError for files that are not whole, and for a tensor in two of them.
    """
    stored: Headers = {}
    for file in map(Path, files):
        if not file.is_file():  # a pipe would never end
            raise InputError(f"{file}: no such file, or not a regular one: {REMEDY}")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, not a dict
                    if name in stored:
                        raise InputError(f"{file}: {name} is in {stored[name].file.name} too: {REMEDY}")
                    header = tensors.get_slice(name)
                    stored[name] = Entry(file, header.get_dtype(), tuple(header.get_shape()))
        except InputError:
            raise
        except Exception as e:  # SafetensorError has no public home
            raise InputError(f"{file}: not a complete safetensors file ({e}): {REMEDY}") from None
    return stored


def read_folder(folder: str | Path) -> Headers:
    """What the checkpoint `folder` holds. Raises InputError unless every loader reads the same from it."""
    folder = Path(folder)
    weight_map = _weight_map(folder)
    files = weight_files(folder, weight_map)
    stored = read_headers(files)
    if weight_map is not None:
        for name in weight_map.keys() | stored.keys():
            found = stored[name].file.name if name in stored else None
            if weight_map.get(name) != found:
                raise InputError(
                    f"{folder / INDEX} says that {name} is in {weight_map.get(name, 'no file')}, but it is in "
                    f"{found or 'none'}: {REMEDY}"
                )
    return stored


def weight_files(folder: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    """The files of `folder` that `weight_map` of its index names, or without an index the only one.

    Raises InputError for others that a loader would prefer.
    """
    present = {path.name for path in folder.glob("*.safetensors")}
    if weight_map is None:
        used, rivals = {SINGLE} & present, present
    else:
        used = set(weight_map.values())
        rivals = {name for name in present if name == SINGLE or name.startswith("consolidated")}
    if not used:
        raise InputError(f"{folder}: no {SINGLE} and no {INDEX}: {REMEDY}")
    for name in sorted(rivals - used):
        raise InputError(
            f"{folder / name}: loaders differ in whether they read it or the files of "
            f"{SINGLE if weight_map is None else INDEX}: remove what does not belong to the checkpoint"
        )
    return [folder / name for name in sorted(used)]


def _weight_map(folder: Path) -> dict[str, str] | None:
    """File by name of the tensor, as the index says; None without an index. Raises InputError for a damaged one."""
    index = folder / INDEX
    if not index.exists():
        return None
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(content.get("metadata"), dict):
        raise InputError(f"{index}: weight_map and metadata must be objects, the former not empty: {REMEDY}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"{index}: {name} is in {file!r}, which is not a safetensors file of this folder: {REMEDY}"
            )
    return weight_map


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; raises InputError."""
    if not file.is_file():
        raise InputError(f"{file}: no such file, or not a regular one: {REMEDY}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{file}: can't be read as JSON ({e}): {REMEDY}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: not a JSON object: {REMEDY}")
    return content


def check_values(stored: Headers) -> None:
    """Raise InputError if a floating-point tensor of the files holds NaN or infinity, or is a scale of the KV cache and
    out of range. Reads 16 Mi elements at a time."""
    for file in {entry.file for entry in stored.values()}:
        with safe_open(file, framework="pt") as tensors:
            for name, entry in stored.items():
                if entry.file != file or entry.dtype not in FLOATS:
                    continue
                if not _is_finite(tensors.get_slice(name), entry.shape):
                    raise InputError(f"{file}: {name} holds NaN or infinity: {REMEDY}")
                if name.rpartition(".")[2] in KV_SCALES:
                    check_scale(name, tensors.get_tensor(name))


def check_scale(name: str, scale: Tensor) -> None:
    """Raise InputError unless `scale` of a KV cache is one number that keys or values can have been divided by."""
    low, high = SCALE_RANGE
    if scale.numel() != 1 or not low <= scale.item() <= high:
        raise InputError(
            f"{name} is {scale.flatten().tolist()[:4]}, expected one number from {low:.2g} to {high:.4g}: "
            "quantize the model again"
        )


def _is_finite(stored: Any, shape: tuple[int, ...]) -> bool:
    if not shape:
        return is_finite(stored[...])
    rows = max(1, _CHUNK // max(1, prod(shape[1:])))
    return all(is_finite(stored[i : i + rows]) for i in range(0, shape[0], rows))
