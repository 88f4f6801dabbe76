"""Scores of lm-eval's tasks, and of the user's own YAML files, which may read local data and need no network
(`dataset_path: json`, `dataset_kwargs: {data_files: ...}`)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bpdq_quantizer.errors import InputError

BATCH = 8  # requests at a time


def check_tasks(tasks: Sequence[str], folder: str | None) -> None:
    """Raise InputError where lm-eval is missing, or for a task that neither it nor the YAML files in `folder` have."""
    manager = _task_manager(folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        known = "" if folder is None else f", nor does --task-folder {folder}"
        raise InputError(f"--tasks {','.join(unknown)}: lm-eval knows no such task{known}")


def in_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: str | None,
    limit: int | None,
) -> dict[str, float]:
    """Scores of a loaded model by `task metric`, of tasks that pass `check_tasks`; limit: documents a task."""
    from lm_eval.models.huggingface import HFLM

    return scores(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH), tasks, folder, limit)


@cache
def _task_manager(folder: str | None) -> Any:
    """lm-eval's, which reads thousands of YAML files when it is made."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise InputError("--tasks needs lm-eval: pip install 'vllm-bpdq[eval]'") from None
    return TaskManager(include_path=folder)


def scores(lm: Any, tasks: Sequence[str], folder: str | None, limit: int | None) -> dict[str, float]:
    """The same of a model of lm-eval's, `lm`."""
    from lm_eval import simple_evaluate

    manager = _task_manager(folder)
    results = simple_evaluate(
        lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, found in results["results"].items()
        for metric, value in found.items()
        if "_stderr" not in metric and isinstance(value, int | float) and metric not in ("sample_len", "alias")
    }
