"""llama.cpp's quantization types as a peer, through libgguf: what their weights stand for, as a 16-bit model.

    pip install libgguf
    python -m benchmarks.gguf_peer MODEL --output DIR --type IQ2_S --calibration TEXT --samples 32 --seq-len 512

Of a dense model the Linears that `bpdq quantize` takes, each with an importance matrix: the mean square of its inputs.
Rows are padded to whole blocks of 256 weights, whose bytes are not counted: llama.cpp takes another, larger type for
such rows. For `bpdq eval DIR --reference MODEL`.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoTokenizer, PreTrainedModel

from bpdq_kernels.experts import fused_experts
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.model.calibration import calibration_windows
from bpdq_quantizer.model.stream import decoder_blocks
from bpdq_quantizer.model.weights import Weight, hooked, kept, weights_in
from bpdq_quantizer.model.windows import Window

BLOCK = 256  # weights


def main(argv: list[str] | None = None) -> int:
    """Quantize a model and write what that stands for; returns the exit status."""
    args = parse_args(argv)
    try:
        import libgguf

        kind = libgguf.GGMLQuantizationType[args.type]
    except ImportError:
        raise SystemExit("gguf_peer: needs libgguf: pip install libgguf") from None
    except KeyError:
        raise SystemExit(f"gguf_peer: --type {args.type}: libgguf has no such type, but Q2_K or IQ2_S") from None
    model, tokenizer = load_model(args.model), AutoTokenizer.from_pretrained(args.model)
    if fused_experts(model):
        raise SystemExit(f"gguf_peer: {args.model} has experts, whose inputs are not measured here")
    prefix, blocks = decoder_blocks(model)
    weights = weights_in(blocks, prefix)
    weights = {name: weight for name, weight in weights.items() if name not in kept(weights)}
    windows = calibration_windows(args.calibration, tokenizer, args.samples, args.seq_len, 0, [], None)
    importance = mean_squares(model, weights, windows)
    for name, weight in weights.items():
        weight.assign(approximated(weight.matrix, kind, importance[name]))
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{libgguf.row_size(kind, BLOCK) * 8 / BLOCK:.4g} bits per weight")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="gguf_peer", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--type", default="IQ2_S", help="such as Q2_K, IQ2_XS, IQ3_XXS")
    parser.add_argument("--calibration", required=True, metavar="TEXT", help="as of `bpdq quantize`")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    return parser.parse_args(argv)


@torch.no_grad()
def mean_squares(model: PreTrainedModel, weights: Mapping[str, Weight], windows: Sequence[Window]) -> dict[str, Tensor]:
    """E[x^2] of every weight's inputs, fp32 [K], by name."""
    sums = {name: torch.zeros(weight.shape[1]) for name, weight in weights.items()}
    tokens = sum(window.tokens.numel() for window in windows)

    def add(name: str, x: Tensor) -> None:
        sums[name] += x.reshape(-1, x.shape[-1]).float().square().sum(0)

    with hooked(weight.on_input(partial(add, name)) for name, weight in weights.items()):
        for window in windows:
            model.base_model(input_ids=window.tokens, use_cache=False)
    return {name: total / tokens for name, total in sums.items()}


def approximated(W: Tensor, kind: int, importance: Tensor) -> Tensor:
    """W [N, K] as blocks of a type give it back, fp32; importance [K] of its inputs."""
    import libgguf

    gap = -W.shape[1] % BLOCK
    rows = np.ascontiguousarray(pad(W.detach().float(), (0, gap)).numpy())
    imatrix = np.ascontiguousarray(pad(importance, (0, gap), value=1e-9).numpy())
    packed = libgguf.quantize_rows(rows, kind, imatrix)
    return torch.from_numpy(libgguf.dequantize_rows(packed, kind, n_per_row=rows.shape[1]))[:, : W.shape[1]]


if __name__ == "__main__":
    raise SystemExit(main())
