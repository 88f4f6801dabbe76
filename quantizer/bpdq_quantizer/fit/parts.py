"""The parts of a 16-bit model that the arithmetic of `plan` needs, from its config.json alone."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from bpdq_kernels.experts import Experts
from bpdq_kernels.skeleton import embedding_names, is_tied
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.kv_bytes import Attention, Layers
from bpdq_quantizer.fit.kv_layers import kept_layers, value
from bpdq_quantizer.model.opening import plain_skeleton
from bpdq_quantizer.model.stream import Streamed, decoder_blocks, leave_alone, solved
from bpdq_quantizer.model.support import check_dense

IMAGE_SIDE = 1024  # pixels of the one image that is planned with
# keys of configs that say how many experts a token goes through; the last is that of Gemma 4, which has it without any
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")

Shape = tuple[int, int]


class Mixture(NamedTuple):
    """A block's experts. count: how many; chosen: by a token; linears and stages of one of them, as `Block` has them;
    kept: elements of one of them that stay in 16 bits."""

    count: int
    chosen: int
    linears: tuple[Shape, ...]
    stages: tuple[Shape, ...]
    kept: int


class Block(NamedTuple):
    """Decoder blocks that are alike. linears: (outputs, inputs) of those that are quantized; stages: the same of those
    that are, at most, solved together; both but for experts'."""

    count: int
    linears: tuple[Shape, ...]
    stages: tuple[Shape, ...]
    experts: tuple[Mixture, ...] = ()

    @property
    def all_linears(self) -> tuple[Shape, ...]:
        return sum((mixture.linears * mixture.count for mixture in self.experts), self.linears)

    @property
    def active_linears(self) -> tuple[Shape, ...]:
        """Those that a token is multiplied with."""
        return sum((mixture.linears * mixture.chosen for mixture in self.experts), self.linears)


class Tower(NamedTuple):
    """What sees images (and hears) beside the text model, projectors too. elements: of its tensors; activations: of an
    image of IMAGE_SIDE x IMAGE_SIDE, at most at once; modalities: others than images that it takes."""

    elements: int = 0
    activations: int = 0
    modalities: tuple[str, ...] = ()


class Model(NamedTuple):
    """What the arithmetic needs of a model. embedding and head: (vocabulary, hidden size), head None where it is tied;
    others: elements of all other tensors of the text model; wide: of all tensors, those in fp32 where the model is in
    16 bits; doubled: Linears that vLLM holds twice, as keys and as values; mtp: elements of a head that predicts
    further tokens, which vLLM loads for speculative decoding only, and whether there is one of unknown size; rotations:
    elements of vLLM's tables of rotations."""

    architecture: str
    blocks: list[Block]
    embedding: Shape
    head: Shape | None
    others: int
    wide: int
    itemsize: int
    layers: Layers
    max_positions: int
    doubled: list[Shape]
    tower: Tower
    mtp: int
    unknown_mtp: bool
    rotations: int

    @property
    def linears(self) -> list[Shape]:
        return [shape for block in self.blocks for shape in block.all_linears * block.count]

    @property
    def active_linears(self) -> list[Shape]:
        """Those that a token is multiplied with."""
        return [shape for block in self.blocks for shape in block.active_linears * block.count]

    @property
    def idle_others(self) -> int:
        """Elements of `others` that a token leaves alone: of experts that it does not choose."""
        mixtures = [(block.count, mixture) for block in self.blocks for mixture in block.experts]
        return sum(count * (mixture.count - mixture.chosen) * mixture.kept for count, mixture in mixtures)

    @property
    def mixtures(self) -> list[Mixture]:
        """Of one block of each kind."""
        return [mixture for block in self.blocks for mixture in block.experts]

    @property
    def heaviest(self) -> tuple[Shape, ...]:
        """The Linears of the block with most weights."""
        return max((block.all_linears for block in self.blocks), key=lambda linears: sum(n * k for n, k in linears))


def read_model(model: str, ignore: Sequence[str] = ()) -> Model:
    """Sizes of a model from its config.json; raises InputError for what `bpdq quantize` or this arithmetic refuses.

    ignore: names, or `re:` patterns, of the blocks' Linears that stay in 16 bits.
    """
    skeleton = plain_skeleton(model)
    config = skeleton.config
    text = config.get_text_config(decoder=True)
    prefix, blocks = decoder_blocks(skeleton)
    check_dense(prefix, blocks)
    layers = kept_layers(model, config)
    source = leave_alone(Streamed(skeleton, prefix, blocks, {}), ignore)
    found = [quantized_parts(source, index, text) for index in range(len(blocks))]
    kinds = kinds_of(found)
    embedding, head = skeleton.get_input_embeddings().weight, skeleton.get_output_embeddings().weight
    tied = set(skeleton.all_tied_weights_keys)
    head_is_tied = is_tied(skeleton)
    sizes = {name: t.numel() for name, t in skeleton.state_dict().items() if name not in tied}
    beside = beside_text(sizes, prefix, skeleton)
    embeddings = embedding.numel() + (0 if head_is_tied else head.numel())
    linears = sum(block.count * sum(n * k for n, k in block.all_linears) for block in kinds)
    return Model(
        architecture=type(skeleton).__name__,
        blocks=kinds,
        embedding=tuple(embedding.shape),
        head=None if head_is_tied else tuple(head.shape),
        others=sum(sizes.values()) - sum(beside.values()) - embeddings - linears,
        wide=wide_elements(skeleton, prefix),
        itemsize=(config.dtype or text.dtype or torch.bfloat16).itemsize,  # GGUF files and some old configs don't say
        layers=layers,
        max_positions=text.max_position_embeddings,
        doubled=doubled_keys(text, [linears for linears, _ in found]),
        tower=tower(skeleton, beside),
        mtp=mtp_elements(text, blocks),
        unknown_mtp=bool(value(text, "num_nextn_predict_layers")),
        rotations=rotations(text, layers),
    )


def wide_elements(skeleton: PreTrainedModel, prefix: str) -> int:
    """Of tensors in fp32 in a model of 16 bits, as its class says, or as transformers keeps them; what that keeps so in
    fp16 alone is so around the blocks."""
    if skeleton.dtype.itemsize != 2:
        return 0
    strict = skeleton._keep_in_fp32_modules_strict or ()
    around = [*strict, *(skeleton._keep_in_fp32_modules or () if skeleton.dtype == torch.float16 else ())]

    def is_wide(name: str, tensor: Tensor) -> bool:
        patterns = strict if name.startswith(f"{prefix}.") else around
        return tensor.dtype == torch.float32 or any(re.search(p.replace("*", ".*"), name) for p in patterns)

    return sum(tensor.numel() for name, tensor in skeleton.state_dict().items() if is_wide(name, tensor))


def quantized_parts(
    source: Streamed, index: int, text: PreTrainedConfig
) -> tuple[dict[str, Shape], tuple[Mixture, ...]]:
    """What `bpdq quantize` quantizes of a block: its Linears but for experts', by name, and the latter."""
    shapes = {name: weight.shape for name, weight in solved(source, index).items()}
    modules = source.blocks[index].named_modules(prefix=f"{source.prefix}.{index}")
    layers = {name: module for name, module in modules if isinstance(module, Experts)}
    mixtures = []
    for name, module in layers.items():
        one = {n: shape for n, shape in shapes.items() if n.startswith(f"{name}.0.")}
        size = sum(p.numel() for p in module.get_submodule("0").parameters())
        kept = size - sum(n * k for n, k in one.values())
        mixtures.append(Mixture(module.num_experts, chosen_experts(text), tuple(one.values()), stages_of(one), kept))
    linears = {n: shape for n, shape in shapes.items() if not n.startswith(tuple(f"{name}." for name in layers))}
    return linears, tuple(mixtures)


def chosen_experts(text: PreTrainedConfig) -> int:
    """How many a token goes through; raises InputError where the config does not say so."""
    for key in CHOSEN:
        found = value(text, key)
        if isinstance(found, list):  # HunYuan's, by layer
            found = max(found)
        if found:
            return found
    raise InputError(f"config.json does not say how many experts a token chooses: add {CHOSEN[0]}")


def kinds_of(found: list[tuple[dict[str, Shape], tuple[Mixture, ...]]]) -> list[Block]:
    """Blocks by what they hold."""
    counts, stages = defaultdict(int), {}
    for block, experts in found:
        kind = tuple(block.values()), experts
        counts[kind] += 1
        stages[kind] = stages_of(block)
    return [Block(count, kind[0], stages[kind], kind[1]) for kind, count in counts.items()]


def stages_of(linears: dict[str, Shape]) -> tuple[Shape, ...]:
    """Linears of one module with as many inputs, summed: shapes alone don't tell that the output projection of an
    attention layer reads something else than its queries: an upper bound."""
    rows = defaultdict(int)
    for name, (outputs, inputs) in linears.items():
        rows[name.rpartition(".")[0], inputs] += outputs
    return tuple((outputs, inputs) for (_, inputs), outputs in rows.items())


def doubled_keys(text: PreTrainedConfig, quantized: list[dict[str, Shape]]) -> list[Shape]:
    """vllm/model_executor/models/gemma4.py: k_eq_v layers load K weights into both K and V."""
    if not value(text, "attention_k_eq_v"):
        return []
    found = [(name, shape) for block in quantized for name, shape in block.items() if name.endswith(".k_proj")]
    values = {name for block in quantized for name in block if name.endswith(".v_proj")}
    return [shape for name, shape in found if name.replace(".k_proj", ".v_proj") not in values]


def beside_text(sizes: dict[str, int], prefix: str, skeleton: PreTrainedModel) -> dict[str, int]:
    """The tensors of towers and projectors: neither of the module that holds the blocks, nor of the LM head."""
    if skeleton.config.get_text_config(decoder=True) is skeleton.config:
        return {}
    text = (f"{prefix.rpartition('.')[0]}.", f"{embedding_names(skeleton)[1]}.")
    return {name: size for name, size in sizes.items() if not name.startswith(text)}


def tower(skeleton: PreTrainedModel, beside: dict[str, int]) -> Tower:
    """Activations as in `plan.overhead`: three of the widest Linear's inputs for each patch."""
    patch = value(value(skeleton.config, "vision_config"), "patch_size")
    if not beside or patch is None:
        return Tower(sum(beside.values()))
    patch = patch if isinstance(patch, int) else patch[0]
    shapes = {n: t.shape for n, t in skeleton.state_dict().items() if n in beside and "vis" in n and t.ndim == 2}
    widest = max((max(shape) for n, shape in shapes.items() if ".layers." in n or ".blocks." in n), default=0)
    others = {"video": "video_token_id", "audio": "audio_config"}
    modalities = [name for name, key in others.items() if value(skeleton.config, key) is not None]
    return Tower(sum(beside.values()), 3 * widest * (IMAGE_SIDE // patch) ** 2, tuple(modalities))


def mtp_elements(text: PreTrainedConfig, blocks: nn.ModuleList) -> int:
    """Of Qwen3.5's: a block with full attention for each layer, the projection of two hidden states, three norms
    (vllm/model_executor/models/qwen3_5_mtp.py). Its embedding and LM head are the model's."""
    layers = value(text, "mtp_num_hidden_layers") or 0
    if not layers or "full_attention" not in (value(text, "layer_types") or ()):
        return 0
    block = blocks[text.layer_types.index("full_attention")]
    return layers * sum(p.numel() for p in block.parameters()) + 2 * text.hidden_size**2 + 3 * text.hidden_size


def rotations(text: PreTrainedConfig, layers: Layers) -> int:
    """A table for each head size; of latent attention for its rotated part, in fp32 (rotary_embedding/
    deepseek_scaling_rope.py)."""
    if any(isinstance(kind, Attention) and kind.latent for kind in layers):
        return 2 * text.max_position_embeddings * text.qk_rope_head_dim
    sizes = {(kind.head_size, kind.window is None) for kind in layers if isinstance(kind, Attention)}
    return text.max_position_embeddings * sum(size for size, _ in sizes)
