"""llama.cpp as a peer on a CPU: a 16-bit model as GGUF files of its types, and how fast those are.

    pip install llama-cpp-python gguf
    python -m benchmarks.llama_peer MODEL --types BF16 Q2_K Q4_0 --output DIR

For dense models of the Llama and Qwen2 families; no tokenizer is written. `cpu_bench --llama` has the rows beside
vLLM's.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2"}  # model_type: gguf.MODEL_ARCH
FTYPE = "LLAMA_FTYPE_MOSTLY_"
PREFILL_TOKENS = 512
PROMPT_TOKENS, DECODE_TOKENS = 16, 32  # before the tokens that are decoded, and those
ROUNDS = 5

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Write the files and measure them; returns the exit status."""
    args = parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.model, torch.get_num_threads())))
        return 0
    for row in peer_rows(args.model, args.types, args.output):
        print(json.dumps(row))
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_peer", description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a 16-bit model")
    parser.add_argument("--types", nargs="+", default=["Q2_K", "Q4_0"], metavar="TYPE", help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("bench-output"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # a file, in a process of its own
    return parser.parse_args(argv)


def peer_rows(model: Path, types: list[str], output: Path) -> Iterator[Row]:
    """Yield a row of `measure` for each type. Raises SystemExit as `check`, and for what llama.cpp can't write
    or run."""
    check(model, types)
    output.mkdir(parents=True, exist_ok=True)
    plain = output / f"{model.name}-BF16.gguf"
    write_gguf(model, plain)
    for kind in types:
        file = output / f"{model.name}-{kind}.gguf"
        if file != plain:
            quantize(plain, file, kind)
        command = [sys.executable, "-m", "benchmarks.llama_peer", "--measure", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"llama_peer: {file} was not measured: {done.stderr.strip().splitlines()[-1]}")
        yield {"model": f"llama.cpp {kind}"} | json.loads(done.stdout.splitlines()[-1])


def check(model: Path, types: list[str]) -> None:
    """Raises SystemExit for a package, a family or a type that is not there."""
    try:
        import gguf  # noqa: F401
        import llama_cpp
    except ImportError as e:
        raise SystemExit(f"llama_peer: {e.name} is not installed: pip install llama-cpp-python gguf") from None
    kind = json.loads((model / "config.json").read_text())["model_type"]
    if kind not in ARCHITECTURES:
        raise SystemExit(f"llama_peer: {model} is a {kind}: give one of {', '.join(ARCHITECTURES)}")
    for name in types:
        if not hasattr(llama_cpp, FTYPE + name):
            raise SystemExit(f"llama_peer: llama.cpp has no type {name}, but Q2_K or Q4_0")


def write_gguf(model: Path, file: Path) -> None:
    """A folder's matrices in bf16 and vectors in fp32, as llama.cpp names them. `file` appears when it is complete."""
    import gguf
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    kind = config["model_type"]
    arch = gguf.MODEL_ARCH[ARCHITECTURES[kind]]
    heads, blocks = config["num_attention_heads"], config["num_hidden_layers"]
    shared_heads = config.get("num_key_value_heads", heads)
    partial = file.with_name(f"{file.name}.partial")
    writer = gguf.GGUFWriter(partial, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(blocks)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared_heads)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(arch, blocks)
    for source in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(source).items():
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if stored is None:
                raise SystemExit(f"llama_peer: {source}: {name} has no place in a {kind}: give a model in 16 bits")
            if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs, not halves, are turned
                count = heads if "q_proj" in name else shared_heads
                tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
            if tensor.ndim == 1:
                writer.add_tensor(stored, tensor.float().numpy())
            else:
                raw = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
                writer.add_tensor(stored, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(file)


def quantize(plain: Path, file: Path, kind: str) -> None:
    """Write `file`, `plain` in llama.cpp's mix `kind`, such as Q2_K, whose head and some layers are larger. It appears
    when it is complete."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, FTYPE + kind)
    partial = file.with_name(f"{file.name}.partial")
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(partial).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_peer: llama.cpp could not write {file}: see its messages above")
    partial.rename(file)


def measure(file: Path, threads: int) -> Row:
    """As `cpu_bench.measure_engine`: prefill and greedy decode tokens/s, bytes of weights and of the process."""
    import llama_cpp

    model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8 * 1024, 1024, 512, 8
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, params)
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(1024, 0, 1)

    def step(tokens: list[tuple[int, int, int]], wanted: int) -> np.ndarray:
        """Compute (token, position, sequence) at once; the greedy choices after the last `wanted`."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, i >= len(tokens) - wanted
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_peer: llama.cpp could not compute {len(tokens)} tokens of {file}")
        logits = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(logits, shape=(wanted, words)).argmax(1)

    def first_tokens(sequences: int, prompt_tokens: int) -> np.ndarray:
        """The greedy choices after each of new prompts, which are computed one after the other."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        prompts = [[((7 * i + s) % 1000 + 10, i, s) for i in range(prompt_tokens)] for s in range(sequences)]
        return np.concatenate([step(prompt, 1) for prompt in prompts])

    def prefill() -> float:
        start = time.perf_counter()
        first_tokens(1, PREFILL_TOKENS)
        return time.perf_counter() - start

    def decode(sequences: int) -> float:
        chosen = first_tokens(sequences, PROMPT_TOKENS)
        start = time.perf_counter()
        for i in range(DECODE_TOKENS):
            chosen = step([(int(chosen[s]), PROMPT_TOKENS + i, s) for s in range(sequences)], sequences)
        return time.perf_counter() - start

    row: Row = {"weight_bytes": llama_cpp.llama_model_size(model)}
    prefill()
    row["prefill_tokens_s"] = PREFILL_TOKENS / statistics.median(prefill() for _ in range(ROUNDS))
    for sequences in (1, 8):
        seconds = statistics.median(decode(sequences) for _ in range(ROUNDS))
        row[f"decode_{sequences}_tokens_s"] = sequences * DECODE_TOKENS / seconds
    row["resident_bytes"] = psutil.Process().memory_info().rss
    return row


if __name__ == "__main__":
    sys.exit(main())
