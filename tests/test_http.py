"""`vllm serve DIR` on a BPDQ checkpoint answers OpenAI requests with the text of transformers on the same weights."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from benchmarks.server import serve
from generate import TOKENS, transformers_tokens
from tiny import bpdq_checkpoint, tiny_model, tiny_tokenizer

PROMPT = "The bit-plane of a weight"
CHAT = [{"role": "user", "content": "two planes and"}]
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "extra_body": {"ignore_eos": True, "return_token_ids": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("http")
    return bpdq_checkpoint(tiny_model(folder / "model"), folder / "bpdq", group_size=128)


@pytest.fixture(scope="module")
def client(model) -> Iterator[openai.OpenAI]:
    args = ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    args += ["--kv-cache-memory-bytes", "256M"]
    with serve(model, args, model.parent / "serve.log", timeout=400) as server:
        yield openai.OpenAI(base_url=server.base_url + "/v1", api_key="none")


@pytest.fixture(scope="module")
def expected(model) -> dict[str, list[int]]:
    """Greedy tokens of transformers for the completion and the chat."""
    tokenizer = tiny_tokenizer()
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    plain = model.with_name("bpdq-dequantized")
    return dict(zip(["text", "chat"], transformers_tokens(plain, [tokenizer.encode(PROMPT), chat]), strict=True))


def text(tokens: list[int]) -> str:
    """The server holds back a last character that has begun but not ended, here for good."""
    return tiny_tokenizer().decode(tokens).rstrip("\ufffd")


def test_a_completion_is_the_text_of_transformers(client, expected):
    choice = client.completions.create(model="tiny", prompt=PROMPT, **GREEDY).choices[0]
    assert choice.token_ids == expected["text"]
    assert choice.text.rstrip("\ufffd") == text(expected["text"])


def test_a_streamed_completion_is_the_same_text(client, expected):
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, stream=True, **GREEDY))
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in chunks).rstrip("\ufffd") == text(expected["text"])


def test_a_chat_is_the_text_of_transformers(client, expected):
    choice = client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY).choices[0]
    assert choice.token_ids == expected["chat"]
    assert choice.message.content.rstrip("\ufffd") == text(expected["chat"])


def test_the_served_model_is_listed(client):
    assert [entry.id for entry in client.models.list()] == ["tiny"]
