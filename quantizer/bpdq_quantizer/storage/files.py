"""Files that get their names when they are whole and on the disk, and digests that tell later whether they still are.

The digest of a tensor is the SHA-256 of its dtype, its shape and its bytes; `combined` makes one of many.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bpdq_quantizer.errors import InputError

CHUNK_BYTES = 1 << 24


class DamagedError(InputError):
    """A file is missing, or not what was written."""


def save(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file, which gets the name `file` when all of it is on the disk, with the permissions of the
    user's umask; raises InputError if it can't be written."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        write(partial)
        partial.chmod(mode)  # safetensors' files are the owner's alone
        sync(partial)
        os.replace(partial, file)
        sync(file.parent)
    except (OSError, SafetensorError) as e:
        partial.unlink(missing_ok=True)
        raise InputError(f"{file}: can't be written ({e}): make room, or mend its permissions") from e


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor on the CPU, as hexadecimal digits."""
    found = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    found = hashlib.sha256()
    with file.open("rb") as data:
        while chunk := data.read(CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def combined(digests: Mapping[str, str], notes: str = "") -> str:
    """One digest of many, by name, and of a text."""
    return hashlib.sha256(json.dumps([notes, sorted(digests.items())]).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The combined digest of tensors on the CPU."""
    return combined({name: tensor_digest(tensor) for name, tensor in tensors.items()})


def stored_digests(file: Path) -> dict[str, str]:
    """Digests of the tensors of a safetensors file, by name; raises DamagedError if it can't be read."""
    try:
        with safe_open(file, framework="pt") as stored:
            return {name: tensor_digest(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise DamagedError(f"{file} is missing") from None
    except (OSError, SafetensorError) as e:
        raise DamagedError(f"{file} can't be read ({e})") from e


def check_intact(file: Path, written: Collection[str]) -> dict[str, str]:
    """Digests of a file's tensors, by name; raises DamagedError unless their combination is among those `written`."""
    found = stored_digests(file)
    if combined(found) not in written:
        raise DamagedError(f"{file} is not what was written: check the disk, and what else writes there")
    return found


def write_tensors(file: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> str:
    """A safetensors file, whole or not at all; returns the combined digest of its tensors.

    notes: JSON for its header, sealed together with the tensors for `read_sealed`. Raises InputError.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    metadata = {"format": "pt"}  # alone in a checkpoint: the order of several would differ from run to run
    if notes is not None:
        text = json.dumps(notes)
        metadata |= {"notes": text, "sha256": combined(digests, text)}
    save(file, lambda partial: save_file(tensors, partial, metadata=metadata))
    return combined(digests)


def read_sealed(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and notes that `write_tensors` wrote; raises DamagedError unless both are what they were."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise DamagedError(f"{file} is missing") from None
    except (OSError, SafetensorError) as e:
        raise DamagedError(f"{file} can't be read ({e})") from e
    digests, notes = {name: tensor_digest(tensor) for name, tensor in tensors.items()}, metadata.get("notes", "")
    if combined(digests, notes) != metadata.get("sha256"):
        raise DamagedError(f"{file} is damaged")
    return tensors, json.loads(notes)


def write_json(file: Path, value: Any) -> None:
    """A JSON file with a digest of its value, whole or not at all; raises InputError."""
    sealed = {"sha256": combined({}, json.dumps(value)), "value": value}
    save(file, lambda partial: partial.write_text(json.dumps(sealed)))


def read_json(file: Path) -> Any:
    """What `write_json` wrote; raises DamagedError unless it is what it was."""
    try:
        sealed = json.loads(file.read_bytes())
        intact = combined({}, json.dumps(sealed["value"])) == sealed["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DamagedError(f"{file} can't be read ({e})") from e
    if not intact:
        raise DamagedError(f"{file} is damaged")
    return sealed["value"]
