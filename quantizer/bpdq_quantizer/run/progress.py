"""What a run keeps to go on from (`run.run_folder`): hidden states, reports, and what they cost."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bpdq_quantizer.passes.blocks import States
from bpdq_quantizer.storage.files import read_sealed, write_tensors
from bpdq_quantizer.storage.offload import Offloaded, state_files


class Progress(NamedTuple):
    """What a run has come to: the states to go on from, the reports of the layers, seconds spent, and the combined
    digest of each finished block's tensors, by file."""

    states: States | None
    layers: list[dict[str, Any]]
    cost: dict[str, float]
    blocks: dict[str, str]


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
