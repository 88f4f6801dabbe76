"""`digests.json` of a checkpoint: SHA-256 of every tensor (`storage.files`) and of every other file but README.md, the
model card, which is for the publisher to change."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.storage.files import DamagedError, file_digest, save, stored_digests

NAME = "digests.json"
READ = (".safetensors", ".json", ".jinja", ".model", ".bin")  # suffixes of what loaders may read: none may be added
NAMED = 3  # faults in a message

Digests = Mapping[str, Mapping[str, str]]


def write_manifest(folder: Path, tensors: Digests, files: Mapping[str, Path]) -> None:
    """Write the digests of `tensors`, by file and name, and take those of other files, by the names they will have."""
    found = {"tensors": tensors, "files": {name: file_digest(path) for name, path in files.items()}}
    save(folder / NAME, lambda partial: partial.write_text(json.dumps(found, indent=2) + "\n"))


def verify(checkpoint: str | Path) -> dict[str, int]:
    """Compare a checkpoint folder with its digests; returns how many tensors and other files there are.

    Raises InputError, which names what has changed, is missing or was added. Files of no suffix in READ may be added.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    tensors, files = _read(folder)
    faults = [*_tensor_faults(folder, tensors), *_file_faults(folder, files), *_added(folder, {*tensors, *files})]
    if faults:
        more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise InputError(
            f"{folder} is not what `bpdq quantize` wrote: {', '.join(faults[:NAMED])}{more}: download or quantize it "
            "again"
        )
    return {"tensors": sum(len(names) for names in tensors.values()), "files": len(files)}


def _read(folder: Path) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    file = folder / NAME
    try:
        found = json.loads(file.read_bytes())
        tensors = {name: dict(digests) for name, digests in found["tensors"].items()}
        return tensors, dict(found["files"])
    except FileNotFoundError:
        raise InputError(f"{file} is missing: there is nothing to verify {folder} by") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{file} can't be read as digests ({e}): download or quantize the checkpoint again") from None


def _tensor_faults(folder: Path, expected: Digests) -> Iterator[str]:
    for name, digests in expected.items():
        if not (folder / name).is_file():
            yield f"{name} is missing"
            continue
        try:
            found = stored_digests(folder / name)
        except DamagedError as e:
            yield str(e)
            continue
        for tensor in sorted(digests.keys() | found.keys()):
            if tensor not in found:
                yield f"{tensor} is missing from {name}"
            elif tensor not in digests:
                yield f"{tensor} was added to {name}"
            elif digests[tensor] != found[tensor]:
                yield f"{tensor} in {name} has changed"


def _file_faults(folder: Path, expected: Mapping[str, str]) -> Iterator[str]:
    for name, digest in expected.items():
        try:
            if file_digest(folder / name) != digest:
                yield f"{name} has changed"
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as e:
            yield f"{name} can't be read ({e.strerror})"


def _added(folder: Path, known: set[str]) -> Iterator[str]:
    for inside in sorted({folder, *((folder / name).parent for name in known)}):
        for path in sorted(inside.iterdir()) if inside.is_dir() else ():
            name = path.relative_to(folder).as_posix()
            if path.suffix in READ and name not in known | {NAME}:
                yield f"{name} was added"
