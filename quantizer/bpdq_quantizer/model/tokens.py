"""A model's tokenizer, held to what its tokenizer.json says, and the tokens that it puts before a text."""

import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.sources import gguf_arguments

PROBES = (
    "The plane  of a\n\n weight,\tisn't 1234.5 or 67890!\r\n",
    "def f(x):\n    return x[0] + 1e-3  # {a: 'b'}\n",
    "日本語 中文，한국어 é e\u0301 ß 🙂",
)


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the same sources as `loader.load_model`; no code from the folder runs.

    It gives the ids of the model's tokenizer.json, if there is one. Some classes of transformers put another
    pre-tokenizer in place of the file's (LlamaTokenizer that of Llama 2, which loses the spaces of byte-level ones):
    the file alone is then used, and stderr says so. Raises InputError.
    """
    source = gguf_arguments(model)
    tokenizer = _from_pretrained(AutoTokenizer, model, source)
    file = None if "gguf_file" in source else _tokenizer_file(model)
    if file is None or agrees(tokenizer, file):
        return tokenizer
    plain = _from_pretrained(PreTrainedTokenizerFast, model, source)
    if not agrees(plain, file):
        raise InputError(
            f"{file} gives other token ids than transformers' {type(tokenizer).__name__} and {type(plain).__name__}: "
            "set tokenizer_class in tokenizer_config.json to one that follows the file"
        )
    tqdm.write(
        f"{model}: transformers' {type(tokenizer).__name__} changes the token ids of tokenizer.json, which is used "
        "without it",
        file=sys.stderr,
    )
    return plain


def _from_pretrained(kind: type, model: str, source: dict[str, str]) -> PreTrainedTokenizerBase:
    try:
        return kind.from_pretrained(trust_remote_code=False, **source)
    except Exception as e:  # of many kinds, Rust's among them
        raise InputError(f"{model}: its tokenizer can't be loaded: {e}") from e


def _tokenizer_file(model: str) -> Path | None:
    """tokenizer.json in a folder or of a hub id, if there is one."""
    if Path(model).is_dir():
        file = Path(model) / "tokenizer.json"
        return file if file.is_file() else None
    found = cached_file(model, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def agrees(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """Whether a tokenizer gives PROBES the ids that its tokenizer.json gives them."""
    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    return all(ids_of(text, tokenizer) == own.encode(text, add_special_tokens=False).ids for text in PROBES)


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[int]:
    """The token ids of a text of any length, without special tokens unless `options` say otherwise."""
    return tokenizer(text, **{"add_special_tokens": False, "verbose": False, **options})["input_ids"]


def leading_tokens(tokenizer: PreTrainedTokenizerBase, special_tokens: str) -> list[int]:
    """Ids that the tokenizer puts before every text, such as <bos>; [] if it adds none or special_tokens is `none`."""
    if special_tokens not in ("auto", "none"):
        raise InputError(f"--special-tokens {special_tokens}: expected auto or none")
    if special_tokens == "none":
        return []
    text, whole = ids_of("a", tokenizer), ids_of("a", tokenizer, add_special_tokens=True)
    starts = [i for i in range(len(whole)) if whole[i : i + len(text)] == text]
    if not text or not starts:
        raise InputError("the tokenizer changes a text where it adds special tokens: use --special-tokens none")
    return whole[: starts[0]]
