"""Tiny models with random weights, their BPDQ checkpoints in both dialects, and the same weights dequantized.

The planes here are rounded to nearest, not solved: loaders and kernels don't care, and tests stay fast.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from bpdq_kernels import dequantize, layout
from bpdq_kernels.format import KV_CACHE_SCHEME, PLAIN, TRELLIS, Scheme
from bpdq_kernels.layout import Stored
from bpdq_quantizer.algorithm.solver import quantize_linear
from bpdq_quantizer.passes.layers import stored

TEXT = "The bit-plane of a weight is one bit; two planes and three coefficients make four levels. " * 20
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=CHAT_TEMPLATE)


def tiny_model(
    folder: Path,
    arch: str = "llama",
    hidden: int = 128,
    ffn: int = 352,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    gains: float = 0.0,
    **config: object,
) -> Path:
    """Write a Hugging Face folder of a random `arch` model; ffn = 352 is 2.75 groups of 128: ragged on purpose.

    gains: standard deviation of the weights of norms, which are otherwise all one (of Gemma: zero).
    """
    torch.manual_seed(seed)
    cfg = AutoConfig.for_model(
        arch,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=384,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **config,
    )
    model = AutoModelForCausalLM.from_config(cfg).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif gains and "norm" in name:
            parameter.data += gains * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder, of however many files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def round_to_planes(
    W: torch.Tensor, bits: int, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """B and c of W [N, K] on a per-group min-max grid of 2^k levels."""
    n, k_in = W.shape
    groups = -(-k_in // group_size)
    padded = torch.nn.functional.pad(W.float(), (0, groups * group_size - k_in), mode="replicate")
    padded = padded.view(n, groups, group_size)
    low, high = padded.amin(-1, keepdim=True), padded.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    codes = ((padded - low) / step).round().to(torch.int32).view(n, -1)[:, :k_in]
    c = torch.cat([step * 2**p for p in range(bits)] + [low], dim=-1)  # [N, groups, k+1]
    return layout.pack_codes(codes, bits), c.permute(1, 2, 0).to(dtype).contiguous()


def narrowed(c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c [groups, k+1, N] in 8 bits, and its scales [k+1, N] in bf16."""
    s = (c.float().abs().amax(0) / 127).bfloat16()
    return (c.float() / s.float().clamp_min(1e-30)).round().clamp(-127, 127).to(torch.int8), s


def on_paths(W: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Stored:
    """W [N, K] as trellis-coded planes, c in `dtype` if in 16 bits."""
    options = {"iterations": 2, "dtype": dtype, "trellis": True}
    H = torch.eye(W.shape[1])
    found = quantize_linear(W.float(), H, scheme.bits, scheme.group_size, scheme.coefficient_bits, **options)
    return stored(found, scheme)


def bpdq_checkpoint(
    model: Path,
    out: Path,
    bits: int = 2,
    group_size: int = 64,
    dialect: str = "ours",
    coefficient_dtype: torch.dtype = torch.bfloat16,
    layers: dict[str, dict] | None = None,
    ignore: tuple[str, ...] = (),
    coefficient_bits: int = 16,
    linears: tuple[str, ...] = LINEARS,
) -> Path:
    """Write `out` (BPDQ) and `out`-dequantized (the same weights, plain) from the 16-bit folder `model`.

    linears: how the names of those end that are in bit-planes, unless they are in `ignore`. layers: what differs from
    bits, group_size and coefficient_bits, by name.
    """
    plain = out.with_name(out.name + "-dequantized")
    shutil.copytree(model, out)
    shutil.copytree(model, plain)
    tensors, dequantized, widths, codes = {}, {}, set(), set()
    for name, tensor in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        dequantized[name] = tensor
        table = layer in ("model.embed_tokens", "lm_head") and layer in (layers or {})
        if not (layer.endswith(linears) or table) or name.endswith(".bias") or layer in ignore:
            tensors[name] = tensor
            continue
        scheme = {"bits": bits, "group_size": group_size, "coefficient_bits": coefficient_bits}
        scheme |= (layers or {}).get(layer, {})
        widths.add(scheme["coefficient_bits"])
        codes.add(scheme.get("code", PLAIN))
        if scheme.get("code") == TRELLIS:
            B, c, s = on_paths(tensor, Scheme(**scheme), coefficient_dtype)
        else:
            B, c = round_to_planes(tensor, scheme["bits"], scheme["group_size"], coefficient_dtype)
            c, s = narrowed(c) if scheme["coefficient_bits"] == 8 else (c, None)
        if s is not None:
            tensors[layer + ".s"] = s
        dequantized[name] = dequantize(B, c, scheme["group_size"], tensor.shape[1], s).to(tensor.dtype)
        if dialect == "authors" and scheme["group_size"] == 256:
            B = torch.nn.functional.pad(B, (0, 0, 0, 0, 0, -B.shape[0] % 8))
        tensors[layer + ".B"], tensors[layer + ".c"] = B, c
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    save_file(dequantized, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    quantization = {"checkpoint_format": "bpdq", "group_size": group_size}
    quantization["meta"] = {"bpdq": {"msbits": bits, "n_iters": 10, "alpha": 1e-4}}
    if dialect == "ours":
        quantization |= {"quant_method": "bpdq", "format_version": 1, "bits": bits}
        if 8 in widths:
            quantization |= {"format_version": 2, "coefficient_bits": coefficient_bits}
        if TRELLIS in codes:
            quantization["format_version"] = 3
        quantization |= {"ignore": [*({"lm_head"} - set(layers or {})), *ignore], "layers": layers or {}}
    else:
        quantization |= {"quant_method": "gptq", "format": "bpdq", "bits": 8, "lm_head": False, "desc_act": False}
    config["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out


def with_kv_scales(checkpoint: Path, out: Path, scales: dict[str, float]) -> Path:
    """Write `out`: `checkpoint` with scales of an fp8 KV cache, by tensor name."""
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors") | {name: torch.tensor([value]) for name, value in scales.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = KV_CACHE_SCHEME
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return out
