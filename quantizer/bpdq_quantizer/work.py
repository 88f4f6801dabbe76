"""The folder that a checkpoint grows in, `OUTPUT.partial`, from which a stopped run goes on.

    OUTPUT.partial/model-00002-of-00031.safetensors   block 0, then one file for every block; 1 is the rest of the model
                   resume/run.json                    options, model and calibration tokens of the run
                          schemes.json                bits and group size of each layer, if --target-... asked
                          states.safetensors          what the next block reads, written after each block
                          teacher.safetensors, tuning.pt     of --tune model
    DIR/OUTPUT-1a2b3c4d/000000000007.safetensors      with `--offload-dir DIR`: a batch of what the next block reads

Every file appears under its name when it is whole. `config.json` comes last, as neither transformers nor vLLM loads a
folder without it; then the folder gets the name OUTPUT.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bpdq_quantizer.errors import InputError

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
        file = self.folder / self.names[index]
        try:
            return load_file(file)["states"]
        except (OSError, SafetensorError) as e:
            raise InputError(f"--offload-dir: {file} can't be read ({e}): remove the .partial folder") from e

    def __setitem__(self, index: int, states: Tensor) -> None:
        self.names[index] = self._write(states)

    def append(self, states: Tensor) -> None:
        self.names.append(self._write(states))

    def copy(self) -> "Offloaded":
        """Another list of the same files."""
        return Offloaded(self.folder, self.names)

    def _write(self, states: Tensor) -> str:
        last = max((int(file.stem) for file in self.folder.glob("*.safetensors")), default=-1)
        name = f"{last + 1:012}.safetensors"
        write_tensors(self.folder / name, {"states": states})
        return name


Batches = list[Tensor] | Offloaded


class States(NamedTuple):
    """Hidden states in front of block `block`, in batches [n, L, D] on the CPU; `original`: the 16-bit model's."""

    block: int
    quantized: Batches
    original: Batches


class Progress(NamedTuple):
    """What a run has come to: the states to go on from, the reports of the layers, and seconds spent."""

    states: States | None
    layers: list[dict[str, Any]]
    cost: dict[str, float]


class Clock:
    """Seconds and CPU seconds, those of earlier runs included."""

    def __init__(self, before: Mapping[str, float]) -> None:
        self.before, self.start = dict(before), self._now()

    def _now(self) -> dict[str, float]:
        return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}

    def read(self) -> dict[str, float]:
        return {key: self.before.get(key, 0.0) + now - self.start[key] for key, now in self._now().items()}


@contextmanager
def work_folder(output: Path, run: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    """`output`.partial, which becomes `output` if the body succeeds, and stays for `resume` if that saves work.

    run: what must be the same to go on; raises InputError with the differences if it is not.
    """
    folder, run = output.with_name(f"{output.name}.partial"), json.loads(json.dumps(run))
    if output.exists():
        raise InputError(f"--output {output} exists already: remove it or name another folder")
    if _worth_keeping(folder):
        _check_same(folder, run, resume)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        try:
            (folder / "resume").mkdir(parents=True)
            (folder / "resume" / "run.json").write_text(json.dumps(run))
        except OSError as e:
            raise InputError(f"--output {output} can't be written: {e}") from None
    try:
        yield folder
        os.rename(folder, output)
    except BaseException as e:
        if _worth_keeping(folder):
            e.add_note(f"{folder} keeps what is finished: repeat the command with --resume to go on from there")
        else:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(output / "resume")


@contextmanager
def offload_folder(directory: str | None, output: Path) -> Iterator[Path | None]:
    """The folder for Offloaded states of `output`, in `directory`; None without one. It goes where `output`.partial
    goes: it is empty for a new run, stays for `resume`, and is removed in the end. Raises InputError."""
    if directory is None:
        yield None
        return
    name = f"{output.name}-{hashlib.sha256(str(output.absolute()).encode()).hexdigest()[:8]}"
    folder, partial = Path(directory) / name, output.with_name(f"{output.name}.partial")
    if not partial.exists():
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--offload-dir {directory} can't be written: {e}") from None
    try:
        yield folder
    finally:
        if not partial.exists():
            shutil.rmtree(folder)


def _worth_keeping(folder: Path) -> bool:
    finished = {file.name for file in (folder / "resume").glob("*") if file.suffix in (".json", ".safetensors")}
    return bool(finished - {"run.json"})


def _check_same(folder: Path, run: Mapping[str, Any], resume: bool) -> None:
    if not resume:
        raise InputError(f"{folder} is from a run that was stopped: add --resume, or remove the folder")
    before = json.loads((folder / "resume" / "run.json").read_text())
    changed = [f"{k} = {v!r} (now {run.get(k)!r})" for k, v in before.items() if v != run.get(k)]
    if changed:
        raise InputError(f"{folder} is from a run with other options, {', '.join(changed)}: repeat them or remove it")


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


def write_tensors(file: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
    """A safetensors file with JSON `notes` in its header, whole or not at all; raises InputError if it can't be."""
    partial = file.with_name(f"{file.name}.partial")
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in (notes or {}).items()}
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, metadata=metadata)
        os.replace(partial, file)
    except (OSError, SafetensorError) as e:
        partial.unlink(missing_ok=True)
        raise InputError(f"{file}: can't be written ({e}): make room, then go on with --resume") from e


def write_json(file: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(value))
    os.replace(partial, file)


def save_progress(folder: Path, states: States, layers: list[dict[str, Any]], cost: Mapping[str, float]) -> None:
    """Remember where to go on; removes the files of Offloaded states that this does not need."""
    streams = {kind: getattr(states, kind) for kind in ("quantized", "original")}
    files = {kind: stream.names for kind, stream in streams.items() if isinstance(stream, Offloaded)}
    named = {f"{kind}.{i}": x for kind in streams.keys() - files.keys() for i, x in enumerate(streams[kind])}
    notes = {"block": states.block, "layers": layers, "cost": cost, "files": files}
    write_tensors(folder / "resume" / "states.safetensors", named, notes)
    for stream in streams.values():
        if isinstance(stream, Offloaded):
            for name in {file.name for file in stream.folder.iterdir()}.difference(*files.values()):
                (stream.folder / name).unlink()


def load_progress(folder: Path, offload: Path | None = None) -> Progress:
    """What `save_progress` wrote last, or nothing yet; `offload`: where Offloaded states are."""
    file = folder / "resume" / "states.safetensors"
    if not file.is_file():
        return Progress(None, [], {})
    with safe_open(file, framework="pt") as stored:
        notes = {key: json.loads(value) for key, value in stored.metadata().items() if key != "format"}
        count = len(stored.keys())
        keys = [[f"{kind}.{i}" for i in range(count)] for kind in ("quantized", "original")]
        named = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118, not a dict
    if offload is None:
        quantized, original = ([named[key] for key in stream if key in named] for stream in keys)
    else:
        quantized, original = (Offloaded(offload, notes["files"].get(kind, ())) for kind in ("quantized", "original"))
    return Progress(States(notes["block"], quantized, original), notes["layers"], notes["cost"])
