"""Models of transformers, opened from their files or from their config.json alone."""

from collections.abc import Collection
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig, PreTrainedModel

from bpdq_kernels.experts import take_apart
from bpdq_kernels.folder import FLOATS
from bpdq_kernels.skeleton import auto_class, embedding_names, forget_attention
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.quantized import open_config
from bpdq_quantizer.model.sources import check_stored, gguf_arguments


def misfit(model: str, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What is said of a tensor whose shape is not the one that config.json gives it."""
    return f"{model}: {name} is {stored} in its files, but {wanted} by its config.json: download the model again"


def load_pretrained(
    model: str, dtype: torch.dtype | str = "auto", unread: Collection[str] = (), **options: Any
) -> PreTrainedModel:
    """A causal LM, or one that sees images, on the CPU: of a Hugging Face folder, hub id or `.gguf` file (dequantized).

    unread: names of weights that may be of any shape, as something else comes in their place; options: others of
    `from_pretrained`. Only safetensors (or GGUF) weights are read and no code from the folder runs.
    Raises InputError.
    """
    source = gguf_arguments(model)
    check_stored(model)
    quantization = {"quantization_config": GgufConfig(dequantize=True)} if "gguf_file" in source else {}
    try:
        config = AutoConfig.from_pretrained(trust_remote_code=False, **source)
        forget_attention(config)
        auto = auto_class(config) or AutoModelForCausalLM  # which then names what it can't take
        lm, info = auto.from_pretrained(
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **source,
            **quantization,
            **{"config": config, **options},
        )
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # damaged files raise all kinds
        raise InputError(f"{model}: can't be loaded as a causal language model: {e}") from e
    for name, stored, wanted in sorted(key for key in info["mismatched_keys"] if key[0] not in unread):
        raise InputError(misfit(model, name, tuple(stored), tuple(wanted)))
    if info["missing_keys"]:  # transformers would serve random numbers in their place
        raise InputError(f"{model}: {_missing(min(info['missing_keys']), lm)}")
    return lm.eval()


def _missing(name: str, lm: PreTrainedModel) -> str:
    """What is said of a tensor that a model's files lack."""
    said = f"{name} is not in its files: download the model again"
    if name != f"{embedding_names(lm)[1]}.weight":
        return said
    return (
        f"{said}, or where it is an embedding model, which has no LM head, set tie_word_embeddings to true in its "
        "config.json and give --calibration TEXT --output-tokens 0 --evaluate 0"
    )


def check_dtype(model: str, dtype: torch.dtype) -> None:
    """Raise InputError for a dtype that no checkpoint holds."""
    if dtype not in FLOATS.values():
        names = ", ".join(str(known).removeprefix("torch.") for known in FLOATS.values())
        raise InputError(
            f"{model}: is a model in {str(dtype).removeprefix('torch.')}, and checkpoints hold {names}: set dtype in "
            "its config.json to one of them"
        )


def plain_skeleton(model: str, buffers: bool = False, apart: bool = True) -> PreTrainedModel:
    """A 16-bit model on the meta device, from its config.json alone: in a folder or by its own path, of a hub id or a
    `.gguf` file. buffers: they have their values, for which much of the model is in memory for a moment; apart: its
    experts are one by one. Raises InputError, also for models that are quantized in a way that can't be undone."""
    config, _ = open_config(model)
    try:
        with init_empty_weights() if buffers else torch.device("meta"):
            skeleton = auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as e:  # sizes that contradict each other
        raise InputError(f"{model}: can't be built from its config.json: {e}") from e
    check_dtype(model, skeleton.dtype)
    if apart:
        take_apart(skeleton)
    return skeleton
