"""Whether a checkpoint's files hold what vLLM is about to load: vLLM checks that for unquantized models only, and
computes with uninitialised memory where a tensor is missing."""

import copy
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm import envs
from vllm.config import ModelConfig, get_current_vllm_config_or_none
from vllm.config.load import LoadConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, finalize_layerwise_reload
from vllm.model_executor.model_loader.weight_utils import (
    download_safetensors_index_file_from_hf,
    download_weights_from_hf,
)

from bpdq_kernels import skeleton
from bpdq_kernels.errors import InputError
from bpdq_kernels.folder import INDEX, REMEDY, Headers, check_values, read_folder
from bpdq_kernels.format import Format

# that read the folder's safetensors files
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer")
# that fill parameters with what an engine saved, in the order of its kernels, or leave them as they were stored
FILLING = ("runai_streamer_sharded", "sharded_state", "tensorizer")

logger = init_logger(__name__)


def check(model: str, revision: str | None, config: Any, fmt: Format) -> None:
    """Check the files of `model` (folder or hub id), which is downloaded first, if vLLM is about to load them.

    config: transformers', of all of the model: what vLLM is building just now may be a part, with a config of its own.
    It is not looked at for a draft, nor are names then. fmt: the checkpoint's, by its own names. Raises InputError,
    also for a load format of FILLING; files of others than LOAD_FORMATS are not looked at, and a warning says so.
    """
    current = get_current_vllm_config_or_none()
    if current is None or current.load_config.load_format == "dummy":
        return
    load_format = current.load_config.load_format
    if load_format in FILLING:
        raise InputError(
            f"{model}: layers in bit-planes can't be loaded with --load-format {load_format}, past vLLM's weight "
            "loaders: serve the checkpoint folder itself, without --load-format"
        )
    if load_format not in LOAD_FORMATS:
        logger.warning("%s: its tensors are not checked with --load-format %s", model, load_format)
        return
    folder = local_folder(model, revision, current.load_config)
    if folder is None or not any(folder.glob("*.safetensors*")):
        logger.warning("%s: no safetensors files in reach, so that its tensors are not checked", model)
        return
    if current.model_config.model == model:
        check_folder(folder, config, fmt, current.model_config)
    else:
        check_folder(folder, None, fmt)


def source() -> tuple[str, str] | None:
    """Name or folder of the model that the engine loads, and its load format; None outside of vLLM's loading."""
    current = get_current_vllm_config_or_none()
    return None if current is None else (current.model_config.model, current.load_config.load_format)


def check_reload(config: Any, fmt: Format, served: str) -> None:
    """As `check` of the engine's model, for weights that are to take the place of those of `served`, which are in use
    again where this raises InputError: a reload is refused before it begins."""
    current = get_current_vllm_config_or_none()
    engine = current.model_config
    try:
        check(engine.model, engine.revision, config, fmt)
    except InputError:
        layers = [layer for layer, info in LAYERWISE_INFO.items() if info.can_load()]
        finalize_layerwise_reload(SimpleNamespace(modules=lambda: layers), engine)  # which nothing was loaded for
        engine.model = served
        raise


def check_folder(folder: Path, config: Any, fmt: Format, engine: ModelConfig | None = None) -> None:
    """Raise InputError unless the files of `folder` fill the model of `config`, a transformers config or None, in the
    shapes that it and `fmt` ask for, with finite numbers.

    engine: vLLM's own config of the model. Of an architecture that transformers doesn't have, or that vLLM builds as
    another class than transformers', names are not checked.
    """
    with torch.device("cpu"):  # vLLM builds towers that serve no image on the meta device
        stored = read_folder(folder)
        _check_routers(stored)
        model = None
        if config is not None:
            try:
                model = skeleton.build(copy.deepcopy(config), stored)
            except ImportError as e:
                logger.warning("%s", e)
        if model is not None:
            names = {type(model).__name__, type(model.base_model).__name__}  # of the latter vLLM builds the former
            is_built = any(_is_built(name, config.architectures, engine) for name in names)
            model = model if is_built else None
        spare = () if model is None or engine is None else _spare_layers(model, engine)
        if "score" in spare and not any(name.startswith("score.") for name in stored):
            raise InputError(f"{folder}: score.weight is not in the checkpoint, by which vLLM classifies: {REMEDY}")
        if model is not None and (engine is None or spare):
            model = skeleton.as_stored(model, stored)
        skeleton.check_stored(stored, model, fmt, spare)
        check_values(stored)


def _is_built(name: str, architectures: list[str] | None, engine: ModelConfig | None) -> bool:
    """Whether vLLM builds for `architectures` what it does for transformers' class `name`: it has one class for several
    architectures, and makes those for pooling out of those for text."""
    if not architectures or name in architectures:
        return True
    if engine is None:
        return False
    try:
        built, _ = engine.registry.resolve_model_cls(architectures, engine)
        return built is engine.registry.resolve_model_cls(name, engine)[0]
    except ValueError:  # vLLM knows no such architecture
        return False


def _spare_layers(model: Any, engine: ModelConfig) -> tuple[str, ...]:
    """Layers of the skeleton `model` that vLLM does without, and those that it has beside them, where it makes a model
    for pooling of one for text (models/adapters.py)."""
    if engine.convert_type == "none" or scores_by_head(engine):
        return ()
    head = skeleton.embedding_names(model)[1]
    return (head, "score") if engine.convert_type == "classify" else (head,)


def scores_by_head(engine: ModelConfig) -> bool:
    """Whether vLLM's classifier of this model is made of rows of its LM head, as Qwen3-Reranker's."""
    configs = engine.hf_config, engine.hf_config.get_text_config()
    return any(getattr(config, key, None) for config in configs for key in ("classifier_from_token", "method"))


def _check_routers(stored: Headers) -> None:
    """Raise InputError for bit-planes of a layer that vLLM's models build without a QuantizationConfig."""
    for name, entry in stored.items():
        if match := re.search(r"[.](shared_expert_gate|router)[.]B$", name):
            raise InputError(
                f"{entry.file}: {name.removesuffix('.B')}: vLLM takes this layer in 16 bits only: quantize the model "
                f"again with --ignore 're:.*[.]{match[1]}'"
            )


def local_folder(model: str, revision: str | None, load: LoadConfig) -> Path | None:
    """Where vLLM will read `model`; None if its files are not of the Hugging Face hub."""
    if os.path.isdir(model):
        return Path(model)
    if envs.VLLM_USE_MODELSCOPE:
        return None
    ignored = load.ignore_patterns
    folder = download_weights_from_hf(
        model, load.download_dir, ["*.safetensors"], revision=revision, ignore_patterns=ignored
    )
    download_safetensors_index_file_from_hf(model, INDEX, cache_dir=load.download_dir, revision=revision)
    return Path(folder)
