"""What the tensors of a run depend on: noted in its folder, and compared before a stopped run goes on."""

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bpdq_kernels.compiled import instruction_set
from bpdq_quantizer.algorithm import cpu_solver
from bpdq_quantizer.checkpoint.carried import hub_commit
from bpdq_quantizer.model.stream import Stamps
from bpdq_quantizer.model.windows import Window, as_tensors
from bpdq_quantizer.run.options import Options
from bpdq_quantizer.storage.files import tensors_digest


def identity(
    o: Options, windows: Sequence[Window], dtype: torch.dtype, device: torch.device, stamps: Stamps
) -> dict[str, Any]:
    """As JSON; windows: all calibration windows; dtype, stamps: of the model and its files, none on the hub."""
    offload = o.execution.offload_dir
    given = {name: value for name, value in o.by_name().items() if name not in ("calibration", "evaluate", "model")}
    own = {
        "model": resolved_model(o.files.model),
        "offload_dir": None if offload is None else os.path.abspath(offload),
        "calibration tokens": tensors_digest(as_tensors(windows)),
        "dtype": str(dtype),
    }
    return given | own | circumstances(o.files.model, device, stamps)


def resolved_model(model: str) -> str:
    """A folder or file by its resolved path, or a hub id."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def circumstances(model: str, device: torch.device, stamps: Stamps) -> dict[str, Any]:
    """What anything depends on that a model computes here, as JSON; stamps: of its files, none on the hub."""
    return {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "instruction set": instruction_set() if cpu_solver.library() else "none",
        "release": release(),
        "torch": torch.__version__,
        "model files": stamps or hub_commit(model),
    }


def release() -> str:
    try:
        return version("vllm-bpdq")
    except PackageNotFoundError:
        return "not installed"
