"""lm-eval tasks on a checkpoint, through vLLM's HTTP server."""

from pathlib import Path

from benchmarks.server import serve
from bpdq_quantizer.evaluation.tasks import BATCH, scores


def through_vllm(
    checkpoint: str, tasks: list[str], folder: str | None, limit: int | None, serve_args: list[str], log: Path
) -> dict[str, float]:
    """`in_transformers` of a checkpoint folder that `vllm serve checkpoint *serve_args` serves, with its output in
    `log`.

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
        return scores(lm, tasks, folder, limit)
