"""What `bpdq plan` says that quantizing needs, against the memory that it takes."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bpdq_quantizer.fit import memory, plan
from bpdq_quantizer.model.products import FP32Products, quick_products
from tiny import TEXT, tiny_tokenizer

ACTIVATIONS = 1 << 25  # for less work than activations.ACTIVATION_BYTES asks for
# Anonymous memory, at most, in one more line of JSON: pages of the model's files that are mapped can be dropped.
MEASURED = f"""
import json, re, sys, threading, time
from bpdq_quantizer import cli
from bpdq_quantizer.model import activations
activations.ACTIVATION_BYTES = {ACTIVATIONS}
peak = 0
def watch():
    global peak
    while True:
        with open("/proc/self/status") as status:
            peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+) kB", status.read())[1]) * 1024)
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
assert cli.main(sys.argv[1:]) == 0
print(json.dumps(peak))
"""
SHAPES = {  # hidden, FFN, layers, vocabulary, windows of 256 tokens
    "nothing": (64, 64, 1, 384, 1),
    "tables": (512, 64, 1, 100_000, 1),
    "states": (1024, 64, 1, 384, 192),
    "block": (1024, 1024, 1, 384, 1),
    "depth": (256, 256, 12, 384, 1),
}


def measured(folder, shape, *options):
    """Peak bytes of `bpdq quantize` on a random model, and the model as `bpdq plan` sees it."""
    hidden, ffn, layers, vocabulary, windows = SHAPES[shape]
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, head_dim=hidden // 8, vocab_size=vocabulary, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = folder / shape
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    (folder / "text.txt").write_text(TEXT * 3 * windows)
    argv = ["quantize", model, "--output", folder / f"{shape}-out", "--calibration", folder / "text.txt", *options]
    argv += ["--samples", windows, "--seq-len", 256, "--iterations", 1, "--group-size", 64]
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, argv)], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1]), plan.read_model(str(model))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """Bytes of a run of next to nothing: Python's, torch's and the tokenizer's own."""
    return measured(tmp_path_factory.mktemp("baseline"), "nothing")[0]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "nothing"])
def test_memory_to_quantize_is_what_plan_says(tmp_path, monkeypatch, baseline, shape):
    monkeypatch.setattr(memory, "ACTIVATION_BYTES", ACTIVATIONS if shape == "states" else 0)  # others fill no batch
    peak, model = measured(tmp_path, shape)
    if not isinstance(quick_products(torch.device("cpu")), FP32Products):
        monkeypatch.setattr(memory, "fp32_head_bytes", lambda m: 0)
    host = memory.quantize_host_bytes(model, (SHAPES[shape][4], 256), page_locked=False)
    device = memory.quantize_device_bytes(model, gpu=False)  # the CPU is the device
    print(f"{shape}: measured {(peak - baseline) / 1e6:.0f} MB, host {host / 1e6:.0f} + device {device / 1e6:.0f} MB")
    assert 0.6 * (host + device) - 30e6 < peak - baseline < 1.2 * (host + device) + 30e6
