"""The folder that a checkpoint grows in, `OUTPUT.partial`, from which a stopped run goes on.

    OUTPUT.partial/model-00002-of-00031.safetensors   block 0, then one file for every block; 1 is the rest of the model
                   resume/lock                        held while a run is under way; names its process
                          run.json                    options, model and calibration tokens of the run
                          written.safetensors         the text of --calibration self
                          schemes.json                bits and group size of each layer, if --target-... asked
                          outputs-00000.safetensors   of block 0 and so on, the first one last, with --output-tokens
                          states.safetensors          what the next block reads, written after each block
                          teacher.safetensors, tuning.safetensors, tuned.json     of --tune model
                          carried/                    what the checkpoint takes over from the source
    DIR/OUTPUT-1a2b3c4d/000000000007.safetensors      with `--offload-dir DIR`: a batch of what the next block reads

Every file appears under its name when it is whole, and what resume/ knows of it is checked before a run goes on.
`config.json` comes last, as neither transformers nor vLLM loads a folder without it; then resume/ becomes
OUTPUT.resume, the folder gets the name OUTPUT, and OUTPUT.resume goes. What a run leaves that is killed in between is
put right by the next one. Only files of these names are ever removed.
"""

import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpdq_quantizer.checkpoint.writer import check_only
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.storage.files import DamagedError, read_json, sync, write_json
from bpdq_quantizer.storage.offload import state_files

PROGRAM = "bpdq quantize"
KEPT = (  # what makes a folder worth keeping
    "states.safetensors",
    "schemes.json",
    "teacher.safetensors",
    "outputs-00000.safetensors",
)
WRITTEN = "written.safetensors"  # kept too, as it takes as long as quantizing
ATTEMPTS = 100  # to lock a folder that other runs create and remove meanwhile
REMEDIES = {
    "threads": "set OMP_NUM_THREADS={}",
    "release": "install vllm-bpdq {}",
    "torch": "install torch {}",
    "model files": "put the model back as it was",
}


@dataclass
class RunFolder:
    """Where a run writes: its folder, and that for the hidden states, if any; begun: it is known to be this run's."""

    path: Path
    offload: Path | None
    begun: bool = False

    @property
    def resume(self) -> Path:
        """What a run goes on from, and takes with it when it ends."""
        return self.path / "resume"


@contextmanager
def run_folder(output: str | Path, offload_dir: str | None, resume: bool) -> Iterator[RunFolder]:
    """`output`.partial, which becomes `output` if the body succeeds, and stays for `resume` if that saves work.

    Locked against other runs until then. Raises InputError for an `output` that exists or can't be written, for a
    folder that holds another run, or something else, and for an `offload_dir` in either.
    """
    _put_right(output, offload_dir)
    output = _free(output)
    if offload_dir is not None:
        check_beside("--offload-dir", offload_dir, output)
    folder = output.with_name(f"{output.name}.partial")
    with _locked(folder, output):
        run = RunFolder(folder, None)
        kept = holds_work(folder)
        if (kept or _holds_text(folder)) and not resume:
            raise InputError(f"{folder} is from a run that was stopped: add --resume, or remove the folder")
        if resume and not kept and not _holds_text(folder):
            print(
                f"{folder} holds nothing that --resume could go on from: starting from the first block", file=sys.stderr
            )
        try:
            _free(output)
            if not kept:
                _clear(folder)
            run.offload = _offload_folder(offload_dir, output, kept)
            yield run
            _publish(folder, output)
        except BaseException as e:
            _put_back(output)
            if not folder.exists():  # it has its name
                _remove_aside(output, run.offload)
            elif not holds_work(folder):
                _clear(folder)
                _remove_offload(run.offload)
                if not _holds_text(folder):
                    (folder / "resume" / "lock").unlink()
                    with suppress(OSError):  # of something that is not ours
                        (folder / "resume").rmdir()
                        folder.rmdir()
            if run.begun and folder.exists():
                e.add_note(f"{folder} keeps what is finished: repeat the command with --resume to go on from there")
            raise
        shutil.rmtree(output / "resume", ignore_errors=True)  # of another run that came meanwhile
        _remove_aside(output, run.offload)


def begin(folder: RunFolder, run: Mapping[str, Any], files: Collection[str]) -> None:
    """Note what a new run is, or check that it is the one to go on with. run: what its tensors depend on, as JSON;
    files: names of all that the checkpoint will hold. Raises InputError with what differs."""
    run = json.loads(json.dumps(run))
    if holds_work(folder.path):
        check_same(folder.path, _noted(folder.path), run)
    else:
        write_json(folder.resume / "run.json", run)
    check_only(folder.path, files)
    folder.begun = True


def check_beside(option: str, directory: str, output: str | Path) -> None:
    """Raise InputError, which names `option`, for a `directory` that is, or is in, the folder `output` or the one that
    it grows in."""
    folder, checkpoint = Path(directory).resolve(), Path(output).resolve()
    if {checkpoint, checkpoint.with_name(f"{checkpoint.name}.partial")} & {folder, *folder.parents}:
        raise InputError(f"{option} {directory} is in the checkpoint's folder: name one beside it")


def _free(output: str | Path) -> Path:
    """The absolute path of a folder that can be created; raises InputError."""
    if not str(output):
        raise InputError("--output is empty: name a folder that is to be created")
    if os.path.lexists(output):
        raise InputError(f"--output {output} exists already: remove it or name another folder")
    path = Path(os.path.abspath(output))
    if os.path.lexists(path):
        raise InputError(f"--output {output} exists already: remove it or name another folder")
    return path


def _aside(output: Path) -> Path:
    """Where resume/ is while a finished folder gets its name."""
    return output.parent / f"{output.name}.resume"


def _put_right(output: str | Path, offload_dir: str | None) -> None:
    """What a run left that was killed while it gave `output` its name: put resume/ back into a folder that lacks it, or
    remove it. Raises InputError where `output` is finished, and for something else of that name."""
    import fcntl

    path = Path(os.path.abspath(output))
    aside = _aside(path)
    if not str(output) or not os.path.lexists(aside):
        return
    if not _is_ours(aside):
        raise InputError(f"{aside} is in the way, and not from `{PROGRAM}`: move it away, or name another --output")
    with suppress(FileNotFoundError), open(aside / "lock", "a+") as lock:  # of a run that has just ended
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path} is being finished by another run") from None
        _put_back(path)
        if not aside.exists():
            return
        with suppress(DamagedError):
            offload_dir = offload_dir or read_json(aside / "run.json").get("offload_dir")
        states = None if offload_dir is None else Path(offload_dir) / offload_name(path)
        _remove_aside(path, states)
    if path.exists():
        raise InputError(f"--output {output} exists already: a run that was stopped at its very end had finished it")


def _put_back(output: Path) -> None:
    """Let a folder that has not got its name yet have its resume/ again."""
    folder = output.with_name(f"{output.name}.partial")
    if folder.is_dir() and not (folder / "resume").exists():
        with suppress(FileNotFoundError):
            os.rename(_aside(output), folder / "resume")


def _remove_aside(output: Path, offload: Path | None) -> None:
    """Remove what a finished run went on from, its lock last."""
    aside = _aside(output)
    if offload is not None and offload.is_dir():
        _remove_offload(offload)
    with suppress(OSError):  # the next run says so
        _empty(aside)
        (aside / "lock").unlink(missing_ok=True)
        aside.rmdir()


@contextmanager
def _locked(folder: Path, output: Path) -> Iterator[None]:
    """Create `folder`, unless it is there and ours, and hold its lock, which ends with this process at the latest."""
    try:
        descriptor = _lock(folder, output)
    except InputError:
        raise
    except (OSError, ValueError) as e:
        raise InputError(f"--output {output} can't be written: {e}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, output: Path) -> int:
    """The open lock file of `folder`, which is to be `output`; raises InputError if another run holds it, or the folder
    is not ours."""
    import fcntl  # not on Windows, where checkpoints can still be loaded

    file = folder / "resume" / "lock"
    for attempt in range(ATTEMPTS):
        _check_ours(folder)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # of a run that ends now and takes the folder with it, or for good
            if attempt == ATTEMPTS - 1:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _aside(output).exists():  # of a run that ends now: this resume/ has just been made
                with suppress(OSError):
                    file.unlink()
                    file.parent.rmdir()
                raise BlockingIOError
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                holder = json.dumps(_this_process()).encode()
                os.pwrite(descriptor, holder, 0)
                os.truncate(descriptor, len(holder))
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            raise InputError(f"{folder} is being written by another run{_named(holder)}") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise OSError("other runs keep creating and removing it")


def _this_process() -> dict[str, Any]:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"program": PROGRAM, "pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _named(holder: bytes) -> str:
    try:
        found = json.loads(holder)
        return f": process {found['pid']} on {found['host']}, started {found['started']}"
    except (ValueError, KeyError, TypeError):  # it is just starting
        return ""


def _check_ours(folder: Path) -> None:
    """Raise InputError if `folder` is there, and not of this program."""
    if not os.path.lexists(folder):
        return
    if folder.is_dir() and not folder.is_symlink():
        inside = os.listdir(folder)
        if not inside or _is_ours(folder / "resume", just_starts=inside == ["resume"]):
            return
    raise InputError(f"{folder} is in the way, and not from `{PROGRAM}`: move it away, or name another --output")


def _is_ours(resume: Path, just_starts: bool = True) -> bool:
    """Whether a folder is what this program goes on from; just_starts: it may hold nothing yet."""
    if resume.is_symlink() or not resume.is_dir():
        return False
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((resume / "lock").read_bytes())["program"] == PROGRAM:
            return True
    with suppress(DamagedError):
        read_json(resume / "run.json")
        return True
    return just_starts and set(os.listdir(resume)) <= {"lock"}


def holds_work(folder: Path) -> bool:
    """Whether a run has left there what belongs to its options."""
    return any((folder / "resume" / name).is_file() for name in KEPT)


def _holds_text(folder: Path) -> bool:
    return (folder / "resume" / WRITTEN).is_file()


def _clear(folder: Path) -> None:
    """Remove what a run has written into a folder, but for the lock and the model's own text."""
    for file in folder.glob("model-*-of-*.safetensors*"):
        file.unlink()
    _empty(folder / "resume", but=("lock", WRITTEN))


def _empty(resume: Path, but: Collection[str] = ("lock",)) -> None:
    for path in resume.iterdir():
        if path.name not in but:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def offload_name(output: Path) -> str:
    """Name of the folder for the Offloaded states of an absolute path `output`."""
    return f"{output.name}-{hashlib.sha256(os.fsencode(output)).hexdigest()[:8]}"


def _offload_folder(directory: str | None, output: Path, kept: bool) -> Path | None:
    """The folder for Offloaded states of `output`, in `directory`; empty of them unless they were kept."""
    if directory is None:
        return None
    folder = Path(directory) / offload_name(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in [] if kept else state_files(folder):
            file.unlink()
    except OSError as e:
        raise InputError(f"--offload-dir {directory} can't be written: {e}") from None
    return folder


def _remove_offload(folder: Path | None) -> None:
    if folder is not None:
        for file in state_files(folder):
            file.unlink()
        with suppress(OSError):  # of something that is not ours
            folder.rmdir()


def _noted(folder: Path) -> dict[str, Any]:
    """What `begin` has written of the run in a folder."""
    try:
        return read_json(folder / "resume" / "run.json")
    except DamagedError as e:
        raise InputError(f"{e}: remove {folder}") from None


def check_same(folder: Path, before: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise InputError with what differs, and remedies, unless a folder's run is the one that is asked for, as JSON."""
    changed = {key: value for key, value in before.items() if value != run.get(key)}
    if changed:
        listed = ", ".join(f"{key} = {value!r} (now {run.get(key)!r})" for key, value in changed.items())
        remedies = dict.fromkeys(REMEDIES.get(key, "repeat them").format(value) for key, value in changed.items())
        raise InputError(
            f"{folder} is from a run with other options, {listed}: {', '.join(remedies)}, or remove the folder"
        )


def _publish(folder: Path, output: Path) -> None:
    """Give a finished folder its name."""
    if os.path.lexists(output):
        raise InputError(f"--output {output} has appeared since the run began: move it away")
    try:
        os.rename(folder / "resume", _aside(output))
        os.rename(folder, output)
        sync(output.parent)
    except OSError as e:
        raise InputError(f"{folder} can't be renamed to {output} ({e}): mend that") from e
