"""Random models of real shapes, for benchmarks that need no trained weights: on a device, or as a folder on disk."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.random_planes import STD
from bpdq_quantizer.model.calibration import python_topics
from bpdq_quantizer.model.opening import plain_skeleton

VOCABULARY = 2048  # of `tokenizer`


def _qwen2(hidden: int, intermediate: int, blocks: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }


CONFIGS = {  # config.json
    "qwen2.5-7b": _qwen2(3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-32b": _qwen2(5120, 27648, 64, 40, 8, 152064),
    "qwen2.5-72b": _qwen2(8192, 29568, 80, 64, 8, 152064),
    "narrow": _qwen2(256, 704, 2, 4, 2, VOCABULARY),
    "tiny": _qwen2(64, 160, 1, 2, 1, VOCABULARY),
}


def write_config(folder: Path, name: str, **changes: Any) -> Path:
    """Write `folder`/config.json, CONFIGS[name] with changes, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIGS[name] | changes))
    return file


def generator(device: torch.device | str, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def materialize(model: PreTrainedModel, random: torch.Generator) -> PreTrainedModel:
    """Give every parameter on the meta device random bf16 values on the generator's device, norms ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=random.device)
                norm = "norm" in type(module).__name__.lower()
                value = value.fill_(1) if norm else value.normal_(std=STD, generator=random)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model.to(random.device)  # buffers


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level one, made of the text that `--calibration python` is."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet)
    tokens.train_from_iterator(python_topics(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>")


def write_model(folder: Path, name: str, device: str, **changes: Any) -> Path:
    """A folder with a random model of CONFIGS[name] with changes, made on `device`, and `tokenizer`."""
    skeleton = plain_skeleton(str(write_config(folder, name, **changes)), buffers=True)
    materialize(skeleton, generator(device, 0)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
