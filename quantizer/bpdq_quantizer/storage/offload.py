"""Hidden states of the calibration windows, in memory or in files."""

import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.storage.files import DamagedError, read_sealed, write_tensors


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
