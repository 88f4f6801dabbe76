"""What a stopped run left is checked before it goes on: what is missing or damaged is forgotten, and done again."""

import sys
from pathlib import Path

from tqdm import tqdm

from bpdq_quantizer.run.progress import load_progress
from bpdq_quantizer.run.run_folder import RunFolder
from bpdq_quantizer.storage.files import DamagedError, combined, read_json, read_sealed, stored_digests
from bpdq_quantizer.storage.offload import Offloaded

BLOCKS = ("states.safetensors", "schemes.json", "tuning.safetensors", "tuned.json")  # what is known of them


def recover(folder: RunFolder) -> None:
    """Compare the files that a run goes on from with their digests.

    Where a block's file or the states after the last one are damaged, all blocks are forgotten, as the states in front
    of earlier ones are no longer there; one line on stderr says so.
    """
    resume = folder.resume
    try:
        _check_blocks(folder)
    except DamagedError as e:
        _say(f"{e}: starting again from the first block")
        for name in BLOCKS:
            (resume / name).unlink(missing_ok=True)
    outputs = sorted(resume.glob("outputs-*.safetensors"))
    try:
        for file in outputs:
            read_sealed(file)
    except DamagedError as e:
        _say(f"{e}: following the 16-bit model's loss backwards again")
        for file in outputs:
            file.unlink()
    try:
        if (resume / "teacher.safetensors").is_file():
            read_sealed(resume / "teacher.safetensors")
    except DamagedError as e:
        _say(f"{e}: running the 16-bit model again")
        (resume / "teacher.safetensors").unlink()


def tuned_blocks(folder: Path) -> dict[str, str]:
    """Combined digests of the blocks' files after tuning, by name; none before. Raises DamagedError."""
    file = folder / "resume" / "tuned.json"
    return read_json(file) if file.is_file() else {}


def _check_blocks(folder: RunFolder) -> None:
    resume = folder.resume
    if (resume / "schemes.json").is_file():
        read_json(resume / "schemes.json")
    progress, tuned = load_progress(folder.path, folder.offload), tuned_blocks(folder.path)
    if progress.states is None and any((resume / name).is_file() for name in BLOCKS[2:]):
        raise DamagedError(f"{resume / BLOCKS[0]} is missing")
    found = {name: combined(stored_digests(folder.path / name)) for name in progress.blocks}
    for name, digest in progress.blocks.items():
        if found[name] not in (digest, tuned.get(name)):
            raise DamagedError(f"{folder.path / name} is damaged")
    if found != progress.blocks:  # some are tuned, which can't be done again from those
        read_sealed(resume / "tuning.safetensors")
    for stream in progress.states[1:] if progress.states else ():
        if isinstance(stream, Offloaded):
            for name in stream.names:
                read_sealed(stream.folder / name)


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
