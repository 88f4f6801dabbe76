"""AutoRound (Intel's) as a peer: a 16-bit folder in, the same model with its integers' weights out, for `bpdq eval`.

    pip install auto-round
    python -m benchmarks.autoround_peer MODEL --output DIR --bits 2 --group-size 32 --calibration TEXT \\
        --samples 32 --seq-len 512

Asymmetric integers with a scale and a zero point for each group, rounded by signed gradient steps block by block. The
output stays in 16 bits, so that every method is evaluated by the same code.
"""

import argparse
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from bpdq_quantizer.model.calibration import calibration_windows


def main(argv: list[str] | None = None) -> int:
    """Quantize a model and write what that stands for; returns the exit status."""
    args = parse_args(argv)
    try:
        from auto_round import AutoRound
    except ImportError as e:
        raise SystemExit(f"autoround_peer: needs auto-round: pip install auto-round ({e})") from None
    if args.output.exists():
        raise SystemExit(f"autoround_peer: --output {args.output} exists: name another folder")
    model, tokenizer = (c.from_pretrained(args.model) for c in (AutoModelForCausalLM, AutoTokenizer))
    windows = calibration_windows(args.calibration, tokenizer, args.samples, args.seq_len, 0, [], None)
    started = time.process_time()
    rounded = AutoRound(
        model,
        scheme=f"W{args.bits}A16",
        tokenizer=tokenizer,
        bits=args.bits,
        group_size=args.group_size,
        sym=False,
        iters=args.steps,
        batch_size=args.batch,
        nsamples=len(windows),
        seqlen=args.seq_len,
        dataset=[window.tokens for window in windows],
        device_map="cpu",
    ).quantize()
    found = (rounded[0] if isinstance(rounded, tuple) else rounded).state_dict()
    seconds = time.process_time() - started
    plain = AutoModelForCausalLM.from_pretrained(args.model)
    plain.load_state_dict({name: found[name] for name in plain.state_dict()})  # without scales and zero points
    plain.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    bits = args.bits + (16 + args.bits) / args.group_size
    print(f"{bits:.4g} bits per weight, {seconds:.0f} s of CPU time")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="autoround_peer", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", required=True, metavar="TEXT", help="as of `bpdq quantize`")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200, help="of each block")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
