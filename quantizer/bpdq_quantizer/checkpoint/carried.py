"""What a checkpoint takes over from its source as it is: tokenizer, processors, chat templates, settings, licence, and
what Sentence Transformers has behind the model."""

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bpdq_quantizer.checkpoint.sentences import SETTINGS, check_modules, module_patterns
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.sources import is_gguf

LICENCES = ("LICEN[CS]E*", "licen[cs]e*", "MODEL[_-]LICEN[CS]E*")
PATTERNS = (
    *("generation_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "tekken.json"),
    *("tokenizer*.json", "tokenizer.model*", "*.model", "*.tiktoken", "vocab*.json", "vocab*.txt"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja"),
    *(*LICENCES, "NOTICE*", "USE_POLICY*"),
    *SETTINGS,
)


def carry_over(model: str, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, to: Path) -> None:
    """Copy the files of a model folder or hub id that match PATTERNS, that its tokenizer reads or that are of its
    modules (`sentences`), into the folder `to`, byte for byte; of a `.gguf` file, which has none, tokenizer and
    generation settings are written there.

    Raises InputError.
    """
    shutil.rmtree(to, ignore_errors=True)
    try:
        to.mkdir()
        if is_gguf(model):
            tokenizer.save_pretrained(to)
            if lm.can_generate():
                lm.generation_config.save_pretrained(to)
            return
        patterns = [*PATTERNS, *getattr(tokenizer, "vocab_files_names", {}).values()]
        source = _here(model, [*patterns, "README.md"])
        modules = module_patterns(source)
        if modules:
            check_modules(_here(model, modules))
        for name in _names(source, [*patterns, *modules]):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, to / name)  # with the permissions of the umask
    except InputError:
        raise
    except (OSError, ValueError) as e:
        raise InputError(f"{model}: what goes with its weights can't be copied ({e})") from e


def _here(model: str, patterns: list[str]) -> Path:
    """The folder of a model, with the files of a hub id that match."""
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, revision=hub_commit(model), allow_patterns=patterns))


def hub_commit(model: str) -> str:
    """The commit of a hub id that has been loaded; raises InputError for one that has not."""
    file = try_to_load_from_cache(model, "config.json")
    if not isinstance(file, str):
        raise InputError(f"{model}: its config.json is not in the Hugging Face cache: check HF_HUB_CACHE")
    return Path(file).parent.name


def carried(folder: Path) -> list[Path]:
    """The files that `carry_over` put into a folder, relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def _names(source: Path, patterns: list[str]) -> list[Path]:
    return sorted({file.relative_to(source) for p in patterns for file in source.glob(p) if file.is_file()})
