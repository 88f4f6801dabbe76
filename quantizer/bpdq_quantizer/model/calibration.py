"""Text files, and those with images, to windows of token ids, for calibration and for perplexity."""

import io
import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.chat import chat_text
from bpdq_quantizer.model.hub_rows import PRESETS, named_rows, preset_rows
from bpdq_quantizer.model.images import Sight, has_images
from bpdq_quantizer.model.tokens import ids_of
from bpdq_quantizer.model.windows import Window, text_windows

MARGIN = 1024  # tokens at the end of a part of a text: what follows it may change them
WHOLE = 1 << 24  # characters of a text that is used to its end; tokenizing takes some 140 bytes for each
CHARACTERS = 5  # read at first for a token; English has about 4.5


def windows(ids: list[int], seq_len: int, limit: int | None, source: str, lead: Sequence[int] = ()) -> Tensor:
    """At most `limit` windows [W, seq_len] int64: consecutive pieces of ids, each after `lead`; the rest is dropped."""
    if not ids:
        raise InputError(f"{source}: holds no text")
    length = text_length(seq_len, lead)
    count = min(len(ids) // length, limit or len(ids))
    if not count:
        raise InputError(f"{source}: {len(ids)} tokens are less than one window of {seq_len}: lower --seq-len")
    pieces = torch.tensor(ids[: count * length]).view(count, length)
    return torch.cat([torch.tensor(lead, dtype=torch.int64).expand(count, -1), pieces], dim=1)


def text_length(seq_len: int, lead: Sequence[int]) -> int:
    """Tokens of text in a window of `seq_len` that begins with `lead`; raises InputError if there is no room."""
    if seq_len <= len(lead):
        raise InputError(f"--seq-len {seq_len}: {len(lead)} of it are what the tokenizer puts before a text: raise it")
    return seq_len - len(lead)


def first_ids(text: TextIO, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[int]:
    """The first `limit` token ids of a text, by default all, without special tokens.

    No more is read than they take: the start of the text is tokenized, twice as much of it until that gives MARGIN
    tokens more than asked for. Those are dropped, so that the others are as if the whole text had been tokenized.
    """
    start = ""
    while True:
        wanted = -1 if limit is None else len(start) or CHARACTERS * (limit + MARGIN)
        more = text.read(wanted)
        start += more
        ids = ids_of(start, tokenizer)
        if limit is None or len(more) < wanted or len(ids) >= limit + MARGIN:
            return ids[:limit]


def next_ids(text: str, tokenizer: PreTrainedTokenizerBase, limit: int, lead: Sequence[int]) -> list[int]:
    """The first `limit` token ids of a text, without those at its start that are `lead`: what a chat template puts
    there, where a window begins with it as it is."""
    found = first_ids(io.StringIO(text), tokenizer, limit + len(lead))
    return (found[len(lead) :] if found[: len(lead)] == list(lead) else found)[:limit]


def tokenize(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int, length: int, lead: Sequence[int]
) -> list[int]:
    """The first `limit` token ids of the texts one after the other, for windows of `length` that begin with `lead`."""
    ids: list[int] = []
    for text in texts:
        ids += next_ids(text, tokenizer, limit - len(ids), () if len(ids) % length else lead)
        if len(ids) == limit:
            break
    return ids


def file_windows(
    path: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, limit: int | None, lead: Sequence[int] = ()
) -> Tensor:
    """The first `limit` windows [W, seq_len] of a UTF-8 text file, by default all, each after the token ids `lead`.

    Raises InputError if the file is missing, not UTF-8, too short for one, or, for all, longer than WHOLE.
    """
    length = text_length(seq_len, lead)
    try:
        with Path(path).open(encoding="utf-8-sig") as text:
            if limit is None and len(start := text.read(WHOLE + 1)) > WHOLE:
                raise InputError(f"{path}: more than {WHOLE >> 20} Mi characters: say how much of it with --windows")
            ids = first_ids(io.StringIO(start) if limit is None else text, tokenizer, limit and limit * length)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 text (byte 0x{e.object[e.start]:02x}): convert it to UTF-8") from None
    except OSError as e:
        raise InputError(f"{path}: can't be read ({e.strerror})") from None
    return windows(ids, seq_len, limit, path, lead)


def calibration_windows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    seed: int,
    lead: Sequence[int] = (),
    sight: Sight | None = None,
) -> list[Window]:
    """At most `samples` windows from `source`: text of `seq_len` tokens, or images with at most as many, each after the
    token ids `lead`.

    `FILE.txt`: as one text; `FILE.jsonl`: its rows in order, texts one after the other; `hf:NAME`: the train split of a
    Hugging Face dataset, streamed, rows shuffled by `seed`; `preset:NAME`: those of several (`hub_rows.PRESETS`);
    `python`: the Python reference topics, English prose and code that every CPython carries. No more is read than the
    windows take.
    sight: of a model that sees images; without it rows that have some are refused.
    """
    kind, _, name = source.partition(":")
    if kind in ("hf", "preset") and name:
        chat = tokenizer.chat_template is not None
        rows = named_rows(name, seed) if kind == "hf" else preset_rows(name, seed, chat)
        texts: Iterable[str] = (row_text(row, place, tokenizer) for place, row in rows)
    elif source == "python":
        texts = python_topics()
    elif source.endswith(".txt"):
        return text_windows(file_windows(source, tokenizer, seq_len, samples, lead))
    elif source.endswith(".jsonl"):
        return jsonl_windows(source, tokenizer, samples, seq_len, lead, sight)
    else:
        raise InputError(
            f"--calibration {source}: expected self, self:MODEL, FILE.txt, FILE.jsonl, hf:NAME, "
            f"preset:{'|'.join(PRESETS)} or python"
        )
    length = text_length(seq_len, lead)
    ids = tokenize(texts, tokenizer, samples * length, length, lead)
    return text_windows(windows(ids, seq_len, samples, source, lead))


def text_name(source: str) -> str:
    """What a `source` of `calibration_windows` is called in prose, without the path to it."""
    if source == "python":
        return "the Python language reference"
    kind, _, name = source.partition(":")
    if kind == "self":
        return f"text that {f'`{shown_name(name)}`' if name else 'the original itself'} wrote"
    if kind == "preset":
        return " and ".join(dataset_link(data.name, data.config) for data in PRESETS[name])
    if kind == "hf":
        return dataset_link(*name.partition(":")[::2])
    return f"`{Path(source).name}`"


def dataset_link(name: str, config: str | None) -> str:
    shown = f"`{shown_name(name)}`" if is_local(name) else f"[{name}](https://huggingface.co/datasets/{name})"
    return shown + (f", {config}" if config else "")


def shown_name(source: str) -> str:
    """A file, or a model or data set that may be a folder, without the path to it."""
    return Path(os.path.abspath(source)).name if is_local(source) else source


def is_local(source: str) -> bool:
    """Whether a model or data set is on this machine; else it is of the Hub."""
    return Path(source).exists() or Path(source).is_absolute()


def jsonl_windows(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seq_len: int,
    lead: Sequence[int],
    sight: Sight | None,
) -> list[Window]:
    """See `calibration_windows`. A row that has images is a window; the texts between such rows are one text."""
    length = text_length(seq_len, lead)
    found: list[Window] = []
    ids: list[int] = []
    for place, row in jsonl_rows(path):
        if has_images(row):
            if sight is None:
                raise InputError(f"{place}: has images, which the model does not see: drop the row")
            found.append(sight.window(row, Path(path).parent, place, seq_len, lead))
        else:
            text = row_text(row, place, tokenizer)
            if sight is not None:
                sight.check_text(text, place)
            wanted = (samples - len(found)) * length - len(ids)
            ids += next_ids(text, tokenizer, wanted, () if ids else lead)
            if whole := len(ids) // length * length:
                found += text_windows(windows(ids[:whole], seq_len, None, path, lead))
                ids = ids[whole:]
        if len(found) == samples:
            break
    return found or text_windows(windows(ids, seq_len, samples, path, lead))


def python_topics() -> list[str]:
    """The Python language reference's help topics, in alphabetical order."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def jsonl_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with the line's name; raises InputError, which names it, for others."""
    try:
        with Path(path).open("rb") as file:  # in text mode other characters than a newline could end a line
            for number, line in enumerate(file, 1):
                line = line.removeprefix(BOM_UTF8) if number == 1 else line
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, json_object(line, place)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as e:
        raise InputError(f"{path}: can't be read ({e.strerror})") from None


def json_object(line: bytes, place: str) -> dict[str, Any]:
    """A line of JSON; raises InputError, which names `place`."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as e:
        raise InputError(f"{place}: not UTF-8 text (byte 0x{line[e.start]:02x}): convert the file to UTF-8") from None
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise InputError(f"{place}: not a JSON object: give it a `text` field, or drop the line")
    return row


def row_text(row: dict[str, Any], place: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The `text` field of a row, or its `messages` as the chat template has them; raises InputError."""
    if row.get("text") is not None or row.get("messages") is None:
        return checked(row.get("text"), place)
    return checked(chat_text(row["messages"], place, tokenizer), place)


def checked(text: object, place: str) -> str:
    """`text`, if a tokenizer can take it; raises InputError, which names `place`."""
    if not isinstance(text, str):
        raise InputError(f"{place}: expected a `text` field that holds a string: give it one, or drop the row")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(
            f"{place}: its text holds half of a surrogate pair, \\u{ord(text[e.start]):04x}, which is no character: "
            "drop it, or the row"
        ) from None
    return text
