"""`make demo`: quantize a small language model to 2 bits, measure it, serve it with vLLM and talk to it over HTTP.

Everything it makes goes to demo-output/; the 16-bit model there is reused by the next run.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from openai import OpenAI

from benchmarks.server import Server, ServerError, serve
from scripts.demo_inputs import smollm2, wikipedia

OUTPUT = Path("demo-output")
MODEL = OUTPUT / "SmolLM2-135M-Instruct"
CHECKPOINT = OUTPUT / "SmolLM2-135M-Instruct-bpdq"
CALIBRATION, EVALUATION = OUTPUT / "calibration.txt", OUTPUT / "perplexity.txt"
SERVER_ARGS = ("--max-model-len", "1024", "--kv-cache-memory-bytes", "1G")


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a `kill` stops the server too
    start = time.monotonic()
    try:
        make_inputs()
        before = perplexity(MODEL)
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        quantized = quantize()
        after = perplexity(CHECKPOINT)
        memory = talk()
    except (ServerError, subprocess.CalledProcessError) as e:
        print(f"\ndemo: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; nothing is left running", file=sys.stderr)
        return 130
    summary(before, after, quantized, memory, time.monotonic() - start)
    return 0


def make_inputs() -> None:
    """Write the 16-bit model, unless it is there, and two texts that have no article in common."""
    step("Get SmolLM2-135M-Instruct and some Wikipedia articles")
    downloads = OUTPUT / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    if not MODEL.exists():
        smollm2(MODEL, downloads)
    beginnings = [article[:2000] for article in wikipedia(downloads)]  # 16 thousand tokens should not be one article
    CALIBRATION.write_text("\n\n".join(beginnings[0::2]), encoding="utf-8")
    EVALUATION.write_text("\n\n".join(beginnings[1::2]), encoding="utf-8")
    print(f"{MODEL}: its 4-bit GGUF file (Q4_1), dequantized to 16 bits, {megabytes(MODEL)}: the baseline here")
    print(f"{CALIBRATION} and {EVALUATION}: the beginnings of {len(beginnings) // 2} articles each")


def quantize() -> dict[str, Any]:
    step("Quantize it to 2 bit-planes in groups of 64 (3 to 8 minutes on two cores)")
    options = ("--bits", "2", "--group-size", "64", "--calibration", CALIBRATION, "--samples", "32", "--seq-len", "512")
    return bpdq("quantize", MODEL, "--output", CHECKPOINT, *options)


def perplexity(model: Path) -> float:
    step(f"Perplexity of {model.name}")
    return bpdq("eval", model, "--text", EVALUATION, "--seq-len", "1024", "--windows", "4")["perplexity"]


def talk() -> int:
    """Serve the checkpoint, ask it three things, and return the server's resident memory in bytes."""
    step("Serve the 2-bit checkpoint with vLLM (it compiles for a minute or two)")
    print("$ vllm serve", CHECKPOINT, *SERVER_ARGS, flush=True)
    with serve(CHECKPOINT, SERVER_ARGS, OUTPUT / "server.log") as server:
        ask(server)
        return server.memory_bytes()


def ask(server: Server) -> None:
    """A completion, a chat and a streamed completion, through the OpenAI client."""
    print(f"listening on {server.base_url}")
    client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none")
    model = str(CHECKPOINT)

    prompt = "The capital of France is"
    completion = client.completions.create(model=model, prompt=prompt, max_tokens=24, temperature=0)
    print(f"\ncompletion> {prompt}\n{completion.choices[0].text.strip()}")

    question = {"role": "user", "content": "What is a cat?"}
    chat = client.chat.completions.create(model=model, messages=[question], max_tokens=48, temperature=0)
    print(f"\nchat> {question['content']}\n{chat.choices[0].message.content}")

    prompt = "Once upon a time, there was a"
    print(f"\ncompletion, streamed> {prompt}")
    stream = client.completions.create(model=model, prompt=prompt, max_tokens=48, temperature=0, stream=True)
    for chunk in stream:
        print(chunk.choices[0].text, end="", flush=True)
    print()


def summary(before: float, after: float, quantized: dict[str, Any], memory: int, seconds: float) -> None:
    step("Summary")
    bits = quantized["bits_per_weight"]
    print(f"{'':<34}{'16-bit':>14}{'BPDQ':>14}")
    print(f"{'bits per weight of the linears':<34}{16:>14.2f}{bits:>14.2f}")
    print(f"{'checkpoint':<34}{megabytes(MODEL):>14}{megabytes(CHECKPOINT):>14}")
    print(f"{'perplexity, 4 x 1024 tokens':<34}{before:>14.2f}{after:>14.2f}")
    print(f"{'quantization, seconds':<34}{'':>14}{quantized['seconds']:>14.0f}")
    print(f"{'vLLM memory, 1 GiB of it KV cache':<34}{'':>14}{memory / 1e6:>11.0f} MB")
    print(
        f"\n{seconds / 60:.1f} minutes. The embedding, the LM head too and a fifth of this model, has 4 bits: in\n"
        "large ones it keeps 16. So small a model loses much at 2 bits; what carries over to large ones is the path.\n"
        f"Serve it yourself: vllm serve {CHECKPOINT} {' '.join(SERVER_ARGS)}"
    )


def bpdq(*args: str | Path) -> dict[str, Any]:
    """Run the `bpdq` command beside this Python and return the JSON object of its last line."""
    print("$ bpdq", *args, flush=True)
    command = [Path(sys.executable).with_name("bpdq"), *args, "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[:-1]))
    return json.loads(lines[-1])


def megabytes(folder: Path) -> str:
    """Size of a model folder's tensors."""
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.1f} MB"


def step(title: str) -> None:
    print(f"\n== {title}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
