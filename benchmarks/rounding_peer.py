"""Rounding to nearest, the simplest of peers: each group between its least and its largest weight.

    python -m benchmarks.rounding_peer MODEL --output DIR --bits 2 --group-size 32

Writes the 16-bit model that 2^bits even levels a group stand for, of the Linears and experts that `bpdq
quantize` takes.
A group costs a 16-bit scale and a zero point of `bits` bits beside its weights.
"""

import argparse
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

from bpdq_kernels.experts import fused_experts, take_apart
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.model.stream import decoder_blocks
from bpdq_quantizer.model.weights import kept, weights_in


def main(argv: list[str] | None = None) -> int:
    """Round a model; returns the exit status."""
    args = parse_args(argv)
    model = load_model(args.model)
    fused = fused_experts(model)
    take_apart(model)  # in the memory of the fused ones
    prefix, blocks = decoder_blocks(model)
    weights = weights_in(blocks, prefix)
    for name in weights.keys() - kept(weights).keys():
        weights[name].assign(rounded(weights[name].matrix, args.bits, args.group_size))
    for name, module in fused.items():
        model.set_submodule(name, module)
    model.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output)
    print(f"{args.bits + (16 + args.bits) / args.group_size:.3f} bits per weight")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="rounding_peer", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=32)
    return parser.parse_args(argv)


def rounded(W: Tensor, bits: int, group_size: int) -> Tensor:
    """W [N, K], K a multiple of the group size, on 2^bits even levels between each group's extremes, 0 among them."""
    groups = W.float().unflatten(1, (-1, group_size))
    least, largest = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = ((largest - least) / (2**bits - 1)).clamp(min=1e-8)
    zero = (-least / scale).round()
    codes = (groups / scale + zero).round().clamp(0, 2**bits - 1)
    return ((codes - zero) * scale).flatten(1)


if __name__ == "__main__":
    raise SystemExit(main())
