"""Rows of `messages`: what is read of them, through every kind of chat template, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.calibration import calibration_windows
from bpdq_quantizer.model.chat import chat_text
from bpdq_quantizer.model.hub_rows import without_turns
from tiny import tiny_tokenizer

CALL = {"type": "function", "function": {"name": "count", "arguments": "{}"}}
OF_PARTS = (  # as SmolVLM's
    "{% for m in messages %}{{ m['role'] }}{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{{ '\\n' }}{% endfor %}"
)


def user(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


def templated(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


WRONG = [
    ("hello", "`messages` holds no list of messages"),
    (3, "`messages` holds no list of messages"),
    ([], "`messages` holds no list of messages"),
    ({"role": "user", "content": "a"}, "`messages` holds no list of messages"),
    (["hello"], "message 1 is no object with a string `role`"),
    ([{"from": "human", "value": "what is it"}], "message 1 is no object with a string `role`"),
    ([*user("a"), {"role": 3, "content": "a"}], "message 2 is no object with a string `role`"),
    ([*user("a"), {"role": "assistant", "value": "a"}], "message 2 has no text as `content`"),
    (user(None), "message 1 has no text as `content`"),
    (user({"text": "a"}), "message 1 has no text as `content`"),
    ([{"role": "assistant", "content": None, "tool_calls": []}], "message 1 has no text as `content`"),
    (user(["a"]), "message 1 has a part of type None that is no text"),
    (user([{"type": "text", "text": None}]), "message 1 has a part of type text that is no text"),
    (user([{"type": "video", "video": "a.mp4"}]), "message 1 has a part of type video that is no text"),
]


@pytest.mark.parametrize(("messages", "message"), WRONG)
def test_messages_of_another_shape_are_refused_with_their_line(tmp_path, messages, message):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in ({"text": "fine"}, {"messages": messages})))
    with pytest.raises(InputError) as error:
        calibration_windows(str(file), tiny_tokenizer(), 4, 8, 0)
    assert str(error.value).startswith(f"{file}, line 2: {message}")
    assert str(error.value).endswith("drop the row") or str(error.value).endswith("drop it, or the row")


@pytest.mark.parametrize(("messages", "message"), WRONG)
def test_so_they_are_where_a_model_has_no_template(messages, message):
    with pytest.raises(InputError, match="row 3: ") as error:
        without_turns({"messages": messages}, "row 3")
    assert message in str(error.value)


def test_calls_of_tools_need_no_content():
    for turn in ({"content": None}, {}):
        messages = [*user("How many?"), {"role": "assistant", "tool_calls": [CALL], **turn}]
        assert chat_text(messages, "row 1", tiny_tokenizer()) == "user: How many?\nassistant: \nassistant:"
        assert chat_text(messages, "row 1", templated(OF_PARTS)) == "user: How many?\nassistant: \n"
        assert chat_text(messages[1:], "row 1", tiny_tokenizer()) == "assistant: \nassistant:"


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=4), st.booleans())
def test_what_is_said_is_in_the_text_whatever_the_template_reads(said, of_parts):
    """Of lists of parts and of strings, which the other kind of template drops, or has as Python writes a list."""
    tokenizer = templated(OF_PARTS) if of_parts else tiny_tokenizer()
    whole = "\n".join(said)
    for content in (whole, [{"type": "text", "text": text} for text in said]):
        found = chat_text(user(content), "row 1", tokenizer)
        assert found == (f"user: {whole}\n" if of_parts else f"user: {whole}\nassistant:")


def test_a_template_that_drops_the_text_is_named():
    with pytest.raises(InputError, match=r"^row 1: the model's chat template drops what its `messages` say: give"):
        chat_text(user("a"), "row 1", templated("{% for m in messages %}{{ m['role'] }}{% endfor %}"))
