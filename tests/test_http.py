"""`vllm serve DIR` on a BPDQ checkpoint answers OpenAI requests with the text of transformers on the same weights."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from generate import ENV, TOKENS, transformers_tokens
from tiny import bpdq_checkpoint, tiny_model, tiny_tokenizer

PROMPT = "The bit-plane of a weight"
CHAT = [{"role": "user", "content": "two planes and"}]
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "extra_body": {"ignore_eos": True, "return_token_ids": True}}


@contextmanager
def vllm_serve(model: Path, log: Path, seconds: int = 400) -> Iterator[str]:
    """Base URL of a server for `model`, stopped with all its processes on exit."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [Path(sys.executable).with_name("vllm"), "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        server = subprocess.Popen(command, env={**os.environ, **ENV}, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + seconds
        while not _healthy(url):
            assert server.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("http")
    return bpdq_checkpoint(tiny_model(folder / "model"), folder / "bpdq", group_size=128)


@pytest.fixture(scope="module")
def client(model) -> Iterator[openai.OpenAI]:
    with vllm_serve(model, model.parent / "serve.log") as url:
        yield openai.OpenAI(base_url=url + "/v1", api_key="none")


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
