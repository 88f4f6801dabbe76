"""vLLM plugin for BPDQ checkpoints (entry point `vllm.general_plugins`)."""


def register() -> None:
    """Make the quantization method "bpdq" known to vLLM. Runs in every vLLM process; cheap and idempotent."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if "bpdq" in QUANTIZATION_METHODS:
        return
    from vllm_bpdq.config import BPDQConfig

    register_quantization_config("bpdq")(BPDQConfig)
