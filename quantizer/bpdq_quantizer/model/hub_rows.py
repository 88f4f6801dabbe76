"""Rows of data sets on the Hugging Face hub, streamed, so that no more of them is fetched than is read."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.chat import turns

SHUFFLED = 1000  # rows from which the next one is drawn


class DataSet(NamedTuple):
    """A data set. turns: its columns of what a user says and what is answered, of one that has neither a `text` nor
    `messages`."""

    name: str
    config: str | None = None
    split: str = "train"
    turns: tuple[str, str] | None = None


PRESETS = {
    "general": (DataSet("allenai/c4", "en"), DataSet("HuggingFaceFW/fineweb-edu", "sample-10BT")),
    "code": (DataSet("m-a-p/CodeFeedback-Filtered-Instruction", turns=("query", "answer")),),
    "chat": (DataSet("HuggingFaceH4/ultrachat_200k", split="train_sft"),),
}

Rows = Iterator[tuple[str, dict[str, Any]]]  # each with its place, in words


def named_rows(name: str, seed: int) -> Rows:
    """Those of `NAME` or `NAME:CONFIG`, its train split; raises InputError as `rows_of` does."""
    name, _, config = name.partition(":")
    return rows_of(DataSet(name, config or None), f"hf:{name}", seed)


def preset_rows(name: str, seed: int, chat: bool) -> Rows:
    """A row of each data set of a preset in turn. chat: conversations are `messages`, otherwise `text`, as a model
    without a chat template reads them. Raises InputError as `rows_of` does, and for a preset that there is not."""
    if name not in PRESETS:
        raise InputError(f"--calibration preset:{name}: there are {', '.join(PRESETS)}")
    for rows in zip(*(rows_of(data, f"preset:{name}", seed) for data in PRESETS[name]), strict=False):
        yield from rows if chat else ((place, without_turns(row, place)) for place, row in rows)


def without_turns(row: dict[str, Any], place: str) -> dict[str, Any]:
    """A row whose `messages`, if it has any, are its `text`, one below the other; raises InputError as `turns` does."""
    if "messages" not in row:
        return row
    return {"text": "\n\n".join(turn["content"] for turn in turns(row["messages"], place))}


def rows_of(data: DataSet, source: str, seed: int) -> Rows:
    """The rows of a data set, shuffled by `seed`; raises InputError, which names `--calibration source`, for one that
    can't be read."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"--calibration {source} needs the datasets package: pip install 'vllm-bpdq[hub]'") from None
    try:
        stream = load_dataset(data.name, data.config, split=data.split, streaming=True)
        for number, row in enumerate(stream.shuffle(seed=seed, buffer_size=SHUFFLED), 1):
            if data.turns is not None:
                said = zip(("user", "assistant"), data.turns, strict=True)
                row = {"messages": [{"role": role, "content": row[column]} for role, column in said]}
            yield f"hf:{data.name}, row {number} of the shuffled {data.split} split", row
    except Exception as e:  # of the hub, the network, and every format that a data set can have
        raise InputError(f"--calibration {source}: {data.name} can't be read as a data set ({e})") from None
