"""A model that sees images, calibrated on some, answers about one over HTTP as the dequantized weights do."""

import base64
from pathlib import Path

import openai
import pytest

import bpdq_quantizer
from architectures import dequantized
from benchmarks.server import serve
from generate import TOKENS
from tiny import TEXT
from vision import picture, processor, rows, seeing_model

QUICK = {"bits": 2, "group_size": 32, "samples": 6, "seq_len": 64, "iterations": 1, "solver": "paper"}
GREEDY = {"temperature": 0, "max_tokens": TOKENS, "logprobs": True, "top_logprobs": 2}
GREEDY |= {"extra_body": {"ignore_eos": True, "return_token_ids": True}}
NEAR = 0.1  # difference of log-probabilities that bf16 may turn round


def served(model: Path, *args: str) -> list[list[tuple[int, float]]]:
    """Of answers about three images and about none the tokens, each with its lead over the next in log-probability."""
    options = ["--served-model-name", "tiny", "--dtype", "bfloat16", "--max-model-len", "256", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", "256M", "--limit-mm-per-prompt", '{"image": 1, "video": 0}', *args]
    with serve(model, options, model.parent / "serve.log", timeout=400) as server:
        client = openai.OpenAI(base_url=server.base_url + "/v1", api_key="none")
        return [ask(client, model.parent, color) for color in (0, 100, 250, None)]


def ask(client: openai.OpenAI, folder: Path, color: int | None) -> list[tuple[int, float]]:
    parts = [{"type": "text", "text": "What is the weight of a plane?"}]
    if color is not None:
        data = base64.b64encode((folder / picture(folder / "asked.png", color)).read_bytes()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    messages = [{"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="tiny", messages=messages, **GREEDY).choices[0]
    tops = [entry.top_logprobs for entry in answer.logprobs.content]
    return list(zip(answer.token_ids, [first.logprob - second.logprob for first, second in tops], strict=True))


def check(found: list[list[tuple[int, float]]], expected: list[list[tuple[int, float]]]) -> None:
    """Equal up to the first near tie of each answer, which is not at its beginning."""
    compared = 0
    for answer, reference in zip(found, expected, strict=True):
        for (token, lead), (other, other_lead) in zip(answer, reference, strict=True):
            if min(lead, other_lead) < NEAR:
                break
            assert token == other
            compared += 1
    assert compared > len(expected) * TOKENS / 2


@pytest.mark.slow
def test_an_image_is_answered_about_with_and_without_the_option(tmp_path):
    source = seeing_model(tmp_path / "model", "qwen3_5")
    out, plain = tmp_path / "out", tmp_path / "plain"
    report = bpdq_quantizer.quantize(str(source), out, calibration=str(rows(tmp_path, TEXT)), **QUICK)
    dequantized("qwen3_5", source, out, report).save_pretrained(plain)
    processor("qwen3_5").save_pretrained(plain)
    expected = served(plain)
    assert len({tuple(token for token, _ in answer) for answer in expected}) > 2, "it sees what is in an image"
    check(served(out), expected)
    check(served(out, "--quantization", "bpdq"), expected)
