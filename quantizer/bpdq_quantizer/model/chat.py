"""Conversations of a row, `messages` in OpenAI's format, as the text that a model's chat template makes of them."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from bpdq_quantizer.errors import InputError


def chat_text(messages: object, place: str, tokenizer: PreTrainedTokenizerBase) -> object:
    """`messages` as the chat template has them, or as it has lists of parts, where it reads nothing of a string.

    Raises InputError, which names `place`, for messages that `turns` refuses, and for a template that reads neither.
    """
    said = turns(messages, place)
    try:
        for shaped in (list, in_parts):
            seen = {tokenizer.apply_chat_template(shaped(_ending(said, mark)), tokenize=False) for mark in "?!"}
            if len(seen) > 1:
                return tokenizer.apply_chat_template(shaped(said), tokenize=False)
    except Exception as e:  # of the template, or there is none
        raise InputError(f"{place}: the model's chat template can't take its `messages` ({e})") from e
    raise InputError(f"{place}: the model's chat template drops what its `messages` say: give the row a `text` instead")


def in_parts(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns whose `content` is a list of one part."""
    return [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in said]


def _ending(said: list[dict[str, Any]], mark: str) -> list[dict[str, Any]]:
    """Turns that end with a mark each, which shows whether a template reads them."""
    return [turn | {"content": turn["content"] + mark} for turn in said]


def turns(messages: object, place: str) -> list[dict[str, Any]]:
    """`messages` whose `content` is a string each: parts of text one below the other, "" where tools are called.

    Raises InputError, which names `place`, for what is no list of objects with a role and text.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: `messages` holds no list of messages: convert it, or drop the row")
    return [_turn(message, f"{place}: message {number}") for number, message in enumerate(messages, 1)]


def _turn(message: object, place: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(
            f"{place} is no object with a string `role` and text as `content`: convert it, or drop the row"
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "\n".join(_part(part, place) for part in content)
    if not isinstance(content, str):
        raise InputError(f"{place} has no text as `content`: give it one, or drop the row")
    return message | {"content": content}


def _part(part: object, place: str) -> str:
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind != "text" or not isinstance(text, str):
        raise InputError(f"{place} has a part of type {kind} that is no text: drop it, or the row")
    return text
