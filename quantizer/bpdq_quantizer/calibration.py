"""Text files to windows of token ids, for calibration and for perplexity."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bpdq_quantizer.errors import InputError


def windows(ids: list[int], seq_len: int, limit: int | None, source: str) -> Tensor:
    """Cut ids into consecutive windows [W, seq_len] int64, at most `limit`; the rest is dropped."""
    count = min(len(ids) // seq_len, limit or len(ids))
    if not count:
        raise InputError(f"{source}: {len(ids)} tokens are less than one window of {seq_len}: lower --seq-len")
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def tokenize(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the texts one after the other, without special tokens."""
    encoded = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
    return [i for ids in encoded for i in ids]


def read_text(path: str | Path) -> str:
    """A text file as str; raises InputError if it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not a readable UTF-8 text file ({e})") from None


def calibration_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, samples: int, seq_len: int, seed: int
) -> Tensor:
    """Calibration tokens [<= samples, seq_len] from `source`.

    `default`: the Python reference topics, English prose and code that every CPython carries; `FILE.txt`:
    tokenized whole; `FILE.jsonl`: its `text` fields one after the other; `hf:NAME`: the train split of a Hugging
    Face dataset with a `text` column, streamed, documents shuffled by `seed`.
    """
    if source == "default":
        texts: Iterable[str] = python_topics()
    elif source.startswith("hf:"):
        texts = dataset_texts(source.removeprefix("hf:"), samples * seq_len, seed)
    elif source.endswith(".jsonl"):
        texts = jsonl_texts(source)
    elif source.endswith(".txt"):
        texts = [read_text(source)]
    else:
        raise InputError(f"--calibration {source}: expected default, FILE.txt, FILE.jsonl or hf:NAME")
    return windows(tokenize(texts, tokenizer), seq_len, samples, source)


def python_topics() -> list[str]:
    """The Python language reference's help topics, in alphabetical order."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def jsonl_texts(path: str) -> list[str]:
    """The `text` fields of a JSON-lines file."""
    texts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                texts.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{path}, line {number}: expected a JSON object with a `text` field") from None
    return texts


def dataset_texts(name: str, tokens: int, seed: int) -> Iterable[str]:
    """Texts of a Hugging Face dataset `NAME` or `NAME:CONFIG`, until they surely hold `tokens` tokens."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"--calibration hf:{name} needs the datasets package: pip install 'vllm-bpdq[hub]'") from None
    name, _, config = name.partition(":")
    try:
        dataset = load_dataset(name, config or None, split="train", streaming=True)
        characters = 0
        for row in dataset.shuffle(seed=seed, buffer_size=1000):
            yield row["text"]
            characters += len(row["text"])
            if characters > 8 * tokens:
                return
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"--calibration hf:{name}: can't be read as a dataset with a `text` column ({e})") from None
