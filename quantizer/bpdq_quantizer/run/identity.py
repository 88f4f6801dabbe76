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
    model, offload = Path(o.files.model), o.execution.offload_dir
    given = {name: value for name, value in o.by_name().items() if name not in ("calibration", "evaluate", "model")}
    return given | {
        "model": str(model.resolve()) if model.exists() else o.files.model,
        "offload_dir": None if offload is None else os.path.abspath(offload),
        "device": str(device),
        "calibration tokens": tensors_digest(as_tensors(windows)),
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
        "instruction set": instruction_set() if cpu_solver.library() else "none",
        "release": release(),
        "torch": torch.__version__,
        "model files": stamps or hub_commit(o.files.model),
    }


def release() -> str:
    try:
        return version("vllm-bpdq")
    except PackageNotFoundError:
        return "not installed"
