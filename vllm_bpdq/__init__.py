"""vLLM plugin for BPDQ checkpoints (entry point `vllm.general_plugins`)."""


def register() -> None:
    """Make `--quantization bpdq` known to vLLM. Runs in every vLLM process; cheap and idempotent."""
