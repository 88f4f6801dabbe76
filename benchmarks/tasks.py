"""lm-eval tasks on a checkpoint, in transformers or through vLLM's HTTP server.

Tasks are named as lm-eval names them; a folder adds the user's own YAML files, which may read local data and need no
network (`dataset_path: json`, `dataset_kwargs: {data_files: ...}`).
"""

from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.server import serve

BATCH = 8  # requests at a time


def in_transformers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: list[str], folder: str | None, limit: int | None
) -> dict[str, float]:
    """Scores of a loaded model by `task metric`. folder: of YAML files, beside lm-eval's own; limit: documents a task.

    Raises ValueError for a task that neither knows.
    """
    from lm_eval.models.huggingface import HFLM

    return _evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH), tasks, folder, limit)


def through_vllm(
    checkpoint: str, tasks: list[str], folder: str | None, limit: int | None, serve_args: list[str], log: Path
) -> dict[str, float]:
    """The same for a checkpoint folder that `vllm serve checkpoint *serve_args` serves, with its output in `log`.

    Raises benchmarks.server.ServerError if the server does not start.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with serve(checkpoint, serve_args, log) as server:
        lm = LocalCompletionsAPI(
            base_url=f"{server.base_url}/v1/completions",
            model=checkpoint,
            tokenizer=checkpoint,
            tokenizer_backend="huggingface",
            num_concurrent=BATCH,
        )
        return _evaluate(lm, tasks, folder, limit)


@cache
def _task_manager(folder: str | None) -> Any:
    """lm-eval's, which reads thousands of YAML files when it is made."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def _evaluate(lm: Any, tasks: list[str], folder: str | None, limit: int | None) -> dict[str, float]:
    from lm_eval import simple_evaluate

    manager = _task_manager(folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"--tasks {' '.join(unknown)}: lm-eval knows no such task, nor does --task-folder {folder}")
    results = simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False)
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, scores in results["results"].items()
        for metric, value in scores.items()
        if "_stderr" not in metric and isinstance(value, int | float) and metric not in ("sample_len", "alias")
    }
