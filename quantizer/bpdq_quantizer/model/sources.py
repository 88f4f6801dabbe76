"""What a model is named by, and what can be wrong with its files, said before any of them is loaded."""

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, PreTrainedConfig

from bpdq_kernels.folder import INDEX, SINGLE
from bpdq_kernels.skeleton import auto_class, forget_attention
from bpdq_quantizer.errors import InputError

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")  # or of other frameworks
INSTEAD = {  # suffixes of what holds weights, and what to do
    (".safetensors",): "download the index, too",
    (".gguf",): "name the .gguf file itself",
    PICKLED: "convert it to safetensors, as nothing is unpickled here",
}
TASKS = (  # how architectures are called that end in the head of a task, in place of the LM head
    *("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"),
    *("ForRewardModel", "ForProcessRewardModel"),
)
LFS_POINTER = b"version https://git-lfs"


def gguf_arguments(model: str) -> dict[str, str]:
    """Arguments of `from_pretrained` for a folder, hub id or `.gguf` file; raises InputError if it does not exist."""
    path = Path(model)
    if is_gguf(model):
        if not path.is_file():
            raise InputError(f"{model}: no such file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if not path.is_dir() and (path.is_absolute() or model.startswith(".")):
        raise InputError(f"{model}: no such folder")
    return {"pretrained_model_name_or_path": model}


def is_gguf(model: str) -> bool:
    return model.lower().endswith(".gguf")


def read_config(model: str) -> PreTrainedConfig:
    """The config of a causal language model: of a folder, hub id or `.gguf` file, or a config.json by its own path.

    No code that a model brings is run. Raises InputError, also for architectures that are no causal language models,
    with or without what sees images.
    """
    source = {"pretrained_model_name_or_path": model} if model.endswith(".json") else gguf_arguments(model)
    check_content(Path(model) if model.endswith(".json") else Path(model) / "config.json")
    try:
        raw = {} if is_gguf(model) else PreTrainedConfig.get_config_dict(model)[0]
        check_known(model, raw)
        config = AutoConfig.from_pretrained(trust_remote_code=False, **source)
        forget_attention(config)
    except InputError:
        raise
    except Exception as e:  # a config's own checks raise all kinds
        raise InputError(f"{model}: can't be loaded as a causal language model, for its config.json: {e}") from e
    if not isinstance(config.architectures, list | None):
        raise InputError(
            f"{model}: its config.json says architectures = {config.architectures!r}, which is no list of names: "
            "download the model again"
        )
    if auto_class(config) is None:
        architecture = (config.architectures or [type(config).__name__])[0]
        raise InputError(
            f"{model}: {architecture} is not a causal language model of transformers: choose a dense decoder-only model"
        )
    check_head(model, config)
    is_decoder = config.is_encoder_decoder or getattr(config, "is_decoder", True)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not is_decoder:
        raise InputError(
            f"{model}: is an encoder, whose attention sees later tokens, as its config.json does not set is_decoder: "
            "choose a dense decoder-only model"
        )
    text = config.get_text_config(decoder=True)
    padding, rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if padding is not None and rows is not None and padding >= rows:
        raise InputError(
            f"{model}: its config.json says pad_token_id {padding}, but the vocabulary ends at {rows - 1}: set it to "
            "null there, or to a token of the vocabulary"
        )
    return config


def check_known(model: str, raw: Any) -> None:
    """Raise InputError for the content of a config.json whose architecture transformers does not have."""
    if not isinstance(raw, dict):
        raise InputError(f"{model}: its config.json does not hold a JSON object: download the model again")
    kind = raw.get("model_type")
    if kind is None or kind in CONFIG_MAPPING:
        return
    code = "; the code that comes with the model is never run" if "auto_map" in raw else ""
    raise InputError(
        f"{model}: transformers {transformers.__version__} does not know the model_type {kind!r} of its config.json"
        f"{code}: install a release of transformers that does, or look for a version of the model made for it"
    )


def check_head(model: str, config: PreTrainedConfig) -> None:
    """Raise InputError for a model with the head of a task, which a causal language model has no place for."""
    for name in config.architectures or ():
        if str(name).endswith(TASKS):
            raise InputError(
                f"{model}: {name} ends in the head of a task, which would be lost, not in an LM head: start from the "
                "causal language model that it was made from, or serve it in 16 bits"
            )


def check_source(model: str) -> None:
    """Raise InputError for a model whose config or files can't be used: git-lfs pointers, cut or empty files.

    Of a hub id only the config is looked at. No tensor is read.
    """
    if is_gguf(model):
        check_gguf(Path(gguf_arguments(model)["pretrained_model_name_or_path"]) / Path(model).name)
    elif Path(model).is_dir():
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            check_content(Path(model) / name)
        for file in weight_files(Path(model)):
            check_content(file)
            try:
                with safe_open(file, framework="pt"):
                    pass
            except Exception as e:  # SafetensorError has no public home
                raise InputError(f"{file}: not a complete safetensors file ({e}): download it again") from None
    read_config(model)


def check_content(file: Path) -> None:
    """Raise InputError for a file that is there, but empty or a git-lfs pointer."""
    if not file.is_file():
        return
    with file.open("rb") as content:
        start = content.read(len(LFS_POINTER))
    if not start:
        raise InputError(f"{file} is empty: download it again")
    if start == LFS_POINTER:
        raise InputError(f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder")


def check_gguf(file: Path) -> None:
    """Raise InputError for a GGUF file that can't be read, as far as its header tells."""
    check_content(file)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(f"{file}: reading it needs the gguf package: pip install 'vllm-bpdq[gguf]'") from None
    try:
        GGUFReader(file)
    except Exception as e:  # what it computes from nonsense fails in all ways
        raise InputError(f"{file}: not a complete GGUF file ({e}): download it again") from None


def local_folder(model: str) -> Path:
    """A model's folder, or that of the Hugging Face cache where a hub id's files then are; raises InputError."""
    if Path(model).is_dir():
        return Path(model)
    try:
        folder = Path(snapshot_download(model, allow_patterns=["*.json", SINGLE]))
        shards = sorted(set(weight_map(folder).values()))
        return Path(snapshot_download(model, allow_patterns=shards)) if shards else folder
    except (OSError, ValueError) as e:
        raise InputError(f"{model}: its files can't be downloaded ({e})") from e


def weight_map(folder: Path) -> dict[str, str]:
    """The names of files by those of tensors, as the index of a model's folder says, empty without one; raises
    InputError for an index that is damaged."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    check_content(index)
    try:
        found = json.loads(index.read_text())["weight_map"]
        names = set(found.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        names = set()
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"{index}: not an index of safetensors files: download it again")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder that transformers reads; raises InputError for one that is missing."""
    names, single = set(weight_map(folder).values()), folder / SINGLE
    if not names:
        return [single] if single.is_file() else []
    if single.is_file() and names != {SINGLE}:
        raise InputError(f"{single}: {INDEX} beside it names other files: remove the one that is not the model's")
    for name in sorted(names):
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing, though {INDEX} names it: download it again")
    return [folder / name for name in sorted(names)]


def check_stored(model: str) -> None:
    """Raise InputError for a model's folder that holds no weights which can be read, with what it holds instead."""
    folder = Path(model)
    if folder.is_dir() and not weight_files(folder):
        raise InputError(f"{folder}: {_instead(folder)}")


def _instead(folder: Path) -> str:
    """What a folder without weights that can be read holds in their place, and what to do."""
    names = sorted(path.name for path in folder.iterdir())
    for suffixes, remedy in INSTEAD.items():
        if found := [name for name in names if name.lower().endswith(suffixes)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"holds {found[0]}{more}, but no {SINGLE} and no {INDEX}: {remedy}"
    return f"holds no weights, neither {SINGLE} nor {INDEX}: download the model again"
