"""A small mixture of experts that has learned something, for comparisons that random weights say nothing in.

    python -m benchmarks.train_mixture --text train.txt --output mixture

Qwen3-MoE's architecture, 2 million parameters, 16 experts of which a token takes two, with a tokenizer made of the same
text: minutes on a CPU, and the same weights every time on one machine.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bpdq_kernels.experts import fused_experts, take_apart

SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SIZES |= {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "intermediate_size": 128}
VOCABULARY, END = 1024, "<|endoftext|>"
WINDOWS, LENGTH = 16, 128  # of a step
PEAK, WARM_UP = 5e-3, 0.05  # learning rate, and the share of the steps in which it rises


def main(argv: list[str] | None = None) -> int:
    """Train, and write a Hugging Face folder; returns the exit status."""
    args = parse_args(argv)
    texts = [file.read_text() for file in args.text]
    tokenizer = train_tokenizer(texts)
    tokens = torch.tensor(tokenizer(END.join(texts))["input_ids"])
    model = train(tokens, tokenizer.eos_token_id, args.steps, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    return 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="train_mixture", description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files to learn from")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1200, help=f"of {WINDOWS} windows of {LENGTH} tokens")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, pad_token=END)


def train(tokens: Tensor, end: int, steps: int, seed: int) -> Qwen3MoeForCausalLM:
    """A model that predicts the text `tokens` [N], in fp32."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        **SIZES, vocab_size=VOCABULARY, max_position_embeddings=2048, eos_token_id=end, tie_word_embeddings=True,
        output_router_logits=True, router_aux_loss_coef=1e-3,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).train()
    fused = fused_experts(model)
    take_apart(model)  # in the same memory: gradients of fused ones are as large as all of them, for each expert
    model.requires_grad_(True)
    adam = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate(step / steps))
    with trange(steps, desc="training", file=sys.stderr) as bar:
        for _ in bar:
            starts = torch.randint(len(tokens) - LENGTH, (WINDOWS,))
            ids = torch.stack([tokens[start : start + LENGTH] for start in starts.tolist()])
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            schedule.step()
            adam.zero_grad()
            bar.set_postfix_str(f"loss {loss.item():.3f}")
    for name, module in fused.items():
        model.set_submodule(name, module)
    model.config.output_router_logits = False
    return model.eval()


def rate(progress: float) -> float:
    """The learning rate's share of PEAK: a rise, then half a cosine."""
    return min(1.0, progress / WARM_UP) * (1 + math.cos(math.pi * progress)) / 2


if __name__ == "__main__":
    raise SystemExit(main())
