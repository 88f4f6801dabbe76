"""What other sizes of the same model need of a run, in a folder of its own: `--keep-statistics DIR`.

    DIR/run.safetensors              options of the run, what its statistics depend on, and its calibration windows
        sensitivities.json           what every scheme costs each stage, once a target has asked for it
        outputs-00000.safetensors    of block 0 and so on, with --output-tokens
        measuring                    locked while a run measures

Every file appears under its name when it is whole. Hessians are not among them: those of a block depend on how the
blocks in front of it were quantized.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bpdq_kernels.format import Scheme
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.windows import Window, as_tensors, from_tensors
from bpdq_quantizer.passes.sensitivity import Stage
from bpdq_quantizer.run.identity import release
from bpdq_quantizer.run.options import Options
from bpdq_quantizer.run.resolved import resolved
from bpdq_quantizer.run.run_folder import check_beside, check_same
from bpdq_quantizer.storage.files import DamagedError, read_json, read_sealed, write_json, write_tensors

RUN, SENSITIVITIES, LOCK = "run.safetensors", "sensitivities.json", "measuring"
OF_A_SIZE = (  # options on which no statistics depend
    *("bits", "group_size", "embed_bits", "head_bits", "target_bpw", "target_size", "kv_cache_scales"),
    *("tune", "tune_steps", "tune_loss"),
)
OFFERED = (  # by `requantize`
    *OF_A_SIZE,
    *("resume", "offload_dir", "device", "devices", "push_to_hub", "private", "force"),
)
FREE = (*OF_A_SIZE, "tune_samples", "offload_dir", "devices")
REPLACED = {  # options of the first run that another one takes the place of
    "bits": ("target_bpw", "target_size"),
    "target_bpw": ("bits", "target_size"),
    "target_size": ("bits", "target_bpw"),
    "device": ("devices",),
    "devices": ("device",),
    "tune": ("tune_steps", "tune_loss", "tune_samples"),
}


def other_size(directory: str | Path, **given: Any) -> tuple[Options, list[Window]]:
    """The options of the run that kept `directory`, with others in their place, and its calibration windows.

    given: `output`, and any of OFFERED. Raises InputError for a folder that can't be used, and TypeError for other
    options.
    """
    for name in given:
        if name not in ("output", *OFFERED):
            raise TypeError(f"requantize has no option {name!r}: it takes {', '.join(OFFERED)}")
    if not (Path(directory) / RUN).is_file():
        raise InputError(f"{directory} holds no statistics: name a folder of `bpdq quantize --keep-statistics`")
    windows, notes = _read(directory)
    replaced = {name for by in given for name in REPLACED.get(by, ())}
    first = {name: value for name, value in notes["options"].items() if name not in replaced}
    return resolved(**first | given, keep_statistics=directory), windows


def check_place(directory: str, output: str) -> None:
    """Raise InputError unless `directory` is one for statistics: beside the checkpoint, and empty, not there yet, or
    whole."""
    check_beside("--keep-statistics", directory, output)
    folder = Path(directory).resolve()
    try:
        inside = {path.name for path in folder.iterdir()} if folder.exists() else set()
    except OSError as e:
        raise InputError(f"--keep-statistics {directory}: can't be read ({e}): name another folder") from None
    if RUN in inside:
        _read(directory)
    elif inside - {LOCK, f"{RUN}.partial"}:
        raise InputError(f"--keep-statistics {directory} holds something else: name a folder of its own")
    try:
        if SENSITIVITIES in inside:
            read_json(folder / SENSITIVITIES)
        for file in folder.glob("outputs-*.safetensors"):
            read_sealed(file)
    except DamagedError as e:
        raise InputError(f"{e}: remove it, and it is measured again") from None


def keep(o: Options, windows: Sequence[Window], run: Mapping[str, Any]) -> None:
    """Begin the folder of `--keep-statistics`, or check that it is of this model, text and method. o: as they were
    given; windows: all that were read; run: `identity`, of the windows to solve on. Raises InputError with what
    differs."""
    folder = Path(o.execution.keep_statistics)
    model = os.path.abspath(o.files.model) if Path(o.files.model).exists() else o.files.model
    options = o.by_name() | {"model": model, "offload_dir": run["offload_dir"]}
    run = {name: value for name, value in json.loads(json.dumps(run)).items() if name not in FREE}
    notes = {"release": release(), "options": options, "run": run}
    once([folder / RUN], lambda: write_tensors(folder / RUN, as_tensors(windows), notes))
    check_same(folder, _read(folder)[1]["run"], run)


def once(files: Sequence[Path], measure: Callable[[], Any]) -> None:
    """Call `measure`, which writes `files` into one folder, unless all are there. Of several runs that want them one
    measures, and the others wait. Raises InputError if the folder can't be written."""
    import fcntl  # not on Windows, where checkpoints can still be loaded

    folder = files[0].parent
    if all(file.is_file() for file in files):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a")
    except OSError as e:
        raise InputError(f"{folder}: can't be written ({e}): name another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"{folder}: waiting for another run, which measures what this one needs", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(file.is_file() for file in files):
            measure()


def save_stages(file: Path, stages: Sequence[Stage]) -> None:
    """Write what `load_stages` reads."""
    write_json(
        file,
        [
            {
                "names": stage.names,
                "shapes": stage.shapes,
                "costs": [asdict(scheme) | {"cost": cost} for scheme, cost in stage.costs.items()],
            }
            for stage in stages
        ],
    )


def load_stages(file: Path) -> list[Stage]:
    """All stages, to the bit as they were measured; raises DamagedError."""
    return [
        Stage(
            stage["names"],
            [tuple(shape) for shape in stage["shapes"]],
            {Scheme(**{k: v for k, v in row.items() if k != "cost"}): row["cost"] for row in stage["costs"]},
        )
        for stage in read_json(file)
    ]


def _read(directory: str | Path) -> tuple[list[Window], dict[str, Any]]:
    """The windows and notes of a folder; raises InputError if they are damaged, or of another release."""
    file = Path(directory) / RUN
    try:
        tensors, notes = read_sealed(file)
    except DamagedError as e:
        raise InputError(f"{e}: remove {directory}, and keep it again: `bpdq quantize --keep-statistics`") from None
    if "release" not in notes or "run" not in notes:
        raise InputError(f"{file} holds no statistics: name a folder of `bpdq quantize --keep-statistics`")
    if notes["release"] != release():
        raise InputError(
            f"{directory} was kept by vllm-bpdq {notes['release']}, this is {release()}: install that, or remove the "
            "folder and keep it again"
        )
    return from_tensors(tensors), notes
