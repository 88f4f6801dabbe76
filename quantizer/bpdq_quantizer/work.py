"""What a run keeps to go on from (`bpdq_quantizer.folder`): hidden states, reports, and what they cost."""

import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.storage import DamagedError, read_sealed, write_tensors

STATUS = Path("/proc/self/status")


class Offloaded(Sequence[Tensor]):
    """As much of a list of tensors as the calibration needs, in the files `names` of `folder` instead of memory.

    A tensor is read when it is asked for. No file is ever changed: a new value gets a new file, so that a stopped run
    finds what it goes on from; `save_progress` removes the files that are no longer needed.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ()) -> None:
        self.folder, self.names = folder, list(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        try:
            return read_sealed(self.folder / self.names[index])[0]["states"]
        except DamagedError as e:
            raise InputError(f"--offload-dir: {e}: --resume starts again from the first block") from e

    def __setitem__(self, index: int, states: Tensor) -> None:
        self.names[index] = self._write(states)

    def append(self, states: Tensor) -> None:
        self.names.append(self._write(states))

    def copy(self) -> "Offloaded":
        """Another list of the same files."""
        return Offloaded(self.folder, self.names)

    def _write(self, states: Tensor) -> str:
        last = max((int(file.name[:12]) for file in state_files(self.folder)), default=-1)
        name = f"{last + 1:012}.safetensors"
        write_tensors(self.folder / name, {"states": states}, {})
        return name


def state_files(folder: Path) -> list[Path]:
    """The files of Offloaded states in a folder, unfinished ones too."""
    return [file for file in folder.iterdir() if re.fullmatch(r"\d{12}\.safetensors(\.partial)?", file.name)]


Batches = list[Tensor] | Offloaded


class States(NamedTuple):
    """Hidden states in front of block `block`, in batches [n, L, D] on the CPU; `original`: the 16-bit model's."""

    block: int
    quantized: Batches
    original: Batches


class Progress(NamedTuple):
    """What a run has come to: the states to go on from, the reports of the layers, seconds spent, and the combined
    digest of each finished block's tensors, by file."""

    states: States | None
    layers: list[dict[str, Any]]
    cost: dict[str, float]
    blocks: dict[str, str]


class Clock:
    """Seconds and CPU seconds, those of earlier runs included."""

    def __init__(self, before: Mapping[str, float]) -> None:
        self.before, self.start = dict(before), self._now()

    def _now(self) -> dict[str, float]:
        return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}

    def read(self) -> dict[str, float]:
        return {key: self.before.get(key, 0.0) + now - self.start[key] for key, now in self._now().items()}


def peak_memory() -> int | None:
    """The most bytes of host memory that this process has held, None where the system does not say. Not ru_maxrss,
    which starts from the parent's."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def digest(tokens: Tensor) -> str:
    """Short hash of calibration tokens."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def shard(folder: Path, number: int, of: int) -> Path:
    """The file of part `number`, from 1, of `of`."""
    return folder / f"model-{number:05d}-of-{of:05d}.safetensors"


def save_progress(
    folder: Path,
    states: States,
    layers: list[dict[str, Any]],
    cost: Mapping[str, float],
    blocks: Mapping[str, str],
) -> None:
    """Remember where to go on (`Progress`); removes the files of Offloaded states that this does not need."""
    streams = {kind: getattr(states, kind) for kind in ("quantized", "original")}
    files = {kind: stream.names for kind, stream in streams.items() if isinstance(stream, Offloaded)}
    named = {f"{kind}.{i}": x for kind in streams.keys() - files.keys() for i, x in enumerate(streams[kind])}
    notes = {"block": states.block, "layers": layers, "cost": cost, "files": files, "blocks": blocks}
    write_tensors(folder / "resume" / "states.safetensors", named, notes)
    for stream in streams.values():
        if isinstance(stream, Offloaded):
            for name in {file.name for file in state_files(stream.folder)}.difference(*files.values()):
                (stream.folder / name).unlink()


def load_progress(folder: Path, offload: Path | None = None) -> Progress:
    """What `save_progress` wrote last, or nothing yet; `offload`: where Offloaded states are. Raises DamagedError."""
    file = folder / "resume" / "states.safetensors"
    if not file.is_file():
        return Progress(None, [], {}, {})
    named, notes = read_sealed(file)
    if offload is None:
        keys = [[f"{kind}.{i}" for i in range(len(named))] for kind in ("quantized", "original")]
        quantized, original = ([named[key] for key in stream if key in named] for stream in keys)
    else:
        quantized, original = (Offloaded(offload, notes["files"].get(kind, ())) for kind in ("quantized", "original"))
    return Progress(States(notes["block"], quantized, original), notes["layers"], notes["cost"], notes["blocks"])
