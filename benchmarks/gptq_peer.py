"""GPTQ through llm-compressor, for `quality_bench`: a 16-bit folder in, the same model with GPTQ's weights out.

Runs in an environment of its own, as llm-compressor needs versions that vLLM does not. Weights are per-group
asymmetric integers; the output stays uncompressed, so that every method is evaluated by the same code.
"""

import argparse
import json
import resource
import time
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    for option in ("--bits", "--group-size", "--samples", "--seq-len"):
        parser.add_argument(option, type=int, required=True)
    args = parser.parse_args()
    started, cpu_started = time.perf_counter(), time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    ids = tokenizer(args.calibration.read_text(encoding="utf-8-sig"), add_special_tokens=False)["input_ids"]
    starts = range(0, min(len(ids), args.samples * args.seq_len) - args.seq_len + 1, args.seq_len)
    windows = [ids[start : start + args.seq_len] for start in starts]
    dataset = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * args.seq_len for _ in windows]})
    weights = {"num_bits": args.bits, "type": "int", "symmetric": False, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | {"group_size": args.group_size}}}
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        recipe=GPTQModifier(config_groups=groups, ignore=["lm_head"]),
        num_calibration_samples=len(windows),
        max_seq_length=args.seq_len,
        shuffle_calibration_samples=False,
    )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    partial = args.output.with_name(args.output.name + ".partial")
    plain = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    quantized = model.state_dict()
    plain.load_state_dict({name: quantized[name] for name in plain.state_dict()})  # without scales and zero points
    plain.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    report = {
        "bits_per_weight": args.bits + (16 + args.bits) / args.group_size,  # a scale and a zero point per group
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (partial / "quantization_report.json").write_text(json.dumps(report) + "\n")
    partial.rename(args.output)


if __name__ == "__main__":
    main()
