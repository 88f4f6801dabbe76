"""Names of a checkpoint's layers as vLLM's models have them, and back.

A model's WeightsMapper is for names of tensors: its prefixes may end in a dot, so a layer is mapped as its weight is.
"""

import re
from typing import TYPE_CHECKING, Any

from bpdq_kernels.format import KV_SCALES

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import ShardIds, WeightsMapper

TENSOR = ".weight"
DRAFT = "draft_model."  # before the names of a model that drafts for another (vLLM's v1/spec_decode/draft_model.py)


def is_classifier(name: str) -> bool:
    """Whether vLLM's layer `name` is the one that it puts on a language model for classification (`as_seq_cls_model`):
    no causal model's checkpoint has it, and where files do, it is in 16 bits."""
    return re.fullmatch(r"(\w+[.])?score", name) is not None


def renamed(name: str, mapper: "WeightsMapper") -> str:
    """What `mapper` makes of layer `name`."""
    return (mapper.map_name(name + TENSOR) or name + TENSOR).removesuffix(TENSOR)


def origins(name: str, mapper: "WeightsMapper") -> list[str]:
    """The names that `mapper` turns into `name` by a prefix, a substring or both, or by nothing.

    There may be several, as checkpoints of different ages call a layer differently. None is found of those that a
    regular expression or transformers' renamings turn into `name`.
    """
    prefixes = [(old, new) for old, new in mapper.orig_to_new_prefix.items() if new is not None]
    parts = [(old, new) for old, new in mapper.orig_to_new_substr.items() if new]
    found = [name + TENSOR]
    found += [old + found[0].removeprefix(new) for old, new in prefixes if found[0].startswith(new)]
    found += [tensor.replace(new, old, 1) for tensor in found for old, new in parts if new in tensor]
    layers = dict.fromkeys(tensor.removesuffix(TENSOR) for tensor in found)
    return [layer for layer in layers if renamed(layer, mapper) == name]


# Models with a loader of their own, which takes experts that are one tensor only, by where it looks for them
FUSED_EXPERTS = {"gpt_oss": ".mlp.experts.", "granitemoehybrid": ".block_sparse_moe.experts."}
PARTS = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}


def numbered_experts(config: Any) -> "WeightsMapper":
    """For the model of a transformers config whose loader knows no experts with numbers: the names of their tensors
    become those of vLLM's parameters, and each tensor's `shard_id`, as WeightsMapper sets it, tells the expert and the
    part: "3.w1". Other models' loaders tell that themselves."""
    from vllm.model_executor.models.utils import WeightsMapper

    where = FUSED_EXPERTS.get(getattr(config, "model_type", None))
    stacked: dict[str, tuple[str, ShardIds]] = {}
    for number in range(config.num_local_experts if where else 0):
        for name, (key, part) in PARTS.items():
            stored, place = f"{where}{number}.{name}.", f"{number}.{part}"
            # gpt-oss has a loader of numbered biases, beside one of all experts' that takes the parameter's name
            stacked[stored + "bias"] = f"{where}{number}.{key}_bias", place
            stacked[stored] = f"{where}routed_experts.{key}_", place
    return WeightsMapper(orig_to_new_stacked=stacked)


def without_cache_scales() -> "WeightsMapper":
    """Drop the scales of a KV cache, which not all of vLLM's loaders pass over where no layer has a place for them."""
    from vllm.model_executor.models.utils import WeightsMapper

    return WeightsMapper(orig_to_new_suffix={f".{name}": None for name in KV_SCALES})


def rotated_pairs(config: Any, layers: list[str]) -> dict[str, int]:
    """The heads of those layers whose outputs vLLM's model reorders where they are called a `weight`: queries and keys
    of Llama 4, of which rotary embeddings turn pairs that are next to each other."""
    if not getattr(config, "model_type", "").startswith("llama4"):
        return {}
    text = config.get_text_config()
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads}
    return {layer: heads[name] for layer in layers if (name := layer.rpartition(".")[2]) in heads}
