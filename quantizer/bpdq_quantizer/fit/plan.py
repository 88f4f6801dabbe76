"""What a model will weigh in bit-planes, and what then fits on a card under vLLM, from its config.json alone."""

from collections import defaultdict
from dataclasses import replace
from functools import reduce
from itertools import count
from math import ceil, floor, inf, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import GROUP_SIZES, MAX_PLANES
from bpdq_quantizer.algorithm.refine import CHUNK_ELEMENTS
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit import hours, kv_bytes
from bpdq_quantizer.fit.kv_bytes import KV_TYPES, Attention
from bpdq_quantizer.model.activations import ACTIVATION_BYTES, windows_per_batch
from bpdq_quantizer.model.opening import plain_skeleton
from bpdq_quantizer.model.sources import is_gguf
from bpdq_quantizer.model.stream import decoder_blocks
from bpdq_quantizer.model.support import check_dense, tied_bits
from bpdq_quantizer.model.weights import weights_in

GIB = 2**30
VISIBLE = 23.69 / 24
CONTEXT_BYTES = int(0.45 * GIB)
LOADED_BYTES = int(0.15 * GIB)
GRAPH_BYTES = int(0.5 * GIB)
STEP_TOKENS = 512
MAX_SEQUENCES = 256  # vLLM's default on such cards, engine/arg_utils.py: get_batch_defaults
VOCABULARY_PADDING = 64  # model_executor/layers/vocab_parallel_embedding.py: DEFAULT_VOCAB_PADDING_SIZE
DEFAULT_CONTEXT = 2048
CALIBRATION = 128, 2048  # windows and their tokens, defaults of `bpdq quantize`
MOST_BITS = Scheme(MAX_PLANES, GROUP_SIZES[0]).bits_per_weight

ASSUMPTIONS = (
    f"CUDA sees {VISIBLE:.1%} of a card's nominal GiB (RTX 3090: 23.69 of 24); nothing else uses the card, no display",
    f"CUDA context {CONTEXT_BYTES / GIB:.2f} GiB, kernels and cuBLAS workspaces {LOADED_BYTES / GIB:.2f} GiB (assumed; "
    "a log of vLLM on an RTX 3090 among others shows 0.63 before the weights, NCCL included)",
    "vLLM may use as much as is free beside the CUDA context, which its start-up check demands, rounded down to 1 %",
    f"activations: {STEP_TOKENS} tokens per step x 2 bytes x 3 (MLP + hidden size): gate, up, their product; a down "
    "projection's output, the MLP's input, the residual",
    "logits of one token per sequence, not of the prompt: (2 + 4) bytes x vocabulary, and 4.125 for penalties",
    f"CUDA graphs {GRAPH_BYTES / GIB:.1f} GiB (assumed; estimates in vLLM's logs: 0.2 to 0.6), --enforce-eager where "
    "they don't fit",
    f"beside the cache: FlashInfer {kv_bytes.FLASHINFER_WORKSPACE / GIB:.2f} GiB of workspace, TurboQuant one layer's "
    "16-bit cache",
    "one card, nothing offloaded; activations and unquantized tensors in 16 bits",
    f"time: {CALIBRATION[0]} x {CALIBRATION[1]} calibration tokens, the default solver, {hours.PASSES} forward passes "
    "of each block; on a CPU what one core needs for each part (--probe: this one; else an EPYC of 2021, AVX2), "
    f"on a GPU {hours.RTX_3090.name} by its data sheet: {hours.RTX_3090.half / 1e12:.0f} Tflop/s in 16 and "
    f"{hours.RTX_3090.full / 1e12:.0f} in 32 bits, of which the solver's own loops are assumed to reach "
    f"{hours.RTX_3090.share:.0%}, {hours.RTX_3090.bytes / 1e9:.0f} GB/s, {hours.RTX_3090.launch * 1e6:.0f} us a launch",
    "memory to quantize, without Python's and torch's own: on the device a block twice, four fp32 matrices [K, K] and "
    f"[N, K] of the largest stage, {4 * 4 * CHUNK_ELEMENTS / GIB:.0f} GiB to refine, {ACTIVATION_BYTES / GIB:.0f} GiB "
    "of activations; on the host the embedding, the head, a block and, without --offload-dir, the hidden states of "
    f"{CALIBRATION[0]} x {CALIBRATION[1]} calibration tokens twice, in page-locked batches, which torch rounds up to "
    "powers of two; without a GPU the sum of device and host",
)


class Model(NamedTuple):
    """What the arithmetic needs of a model. linears: (outputs, inputs) of those that are quantized; stages: the same of
    those in a block that are, at most, solved together; embedding and head: (vocabulary, hidden size), head None where
    it is tied; others: elements of all other tensors."""

    architecture: str
    linears: list[tuple[int, int]]
    stages: list[tuple[int, int]]
    embedding: tuple[int, int]
    head: tuple[int, int] | None
    others: int
    itemsize: int
    attention: Attention
    max_positions: int


class Settings(NamedTuple):
    """scheme: of the Linears; embedding and head: None for 16 bits; gpu_memory in GiB."""

    scheme: Scheme
    embedding: Scheme | None
    head: Scheme | None
    gpu_memory: float
    context: int


class Weights(NamedTuple):
    """Bytes by part."""

    linear: int
    embedding: int
    head: int
    other: int


def plan(
    model: str,
    *,
    bits: int = 2,
    group_size: int | None = None,
    coefficient_bits: int = 8,
    embed_bits: int | None = None,
    head_bits: int | None = None,
    gpu_memory: float = 24,
    context: int | None = None,
    probe: bool = False,
) -> dict[str, Any]:
    """Bytes of the BPDQ checkpoint of `model` (folder, config.json or hub id), and how vLLM would serve it on a card.

    group_size: 128, or 256 with coefficients in 16 bits; embed_bits, head_bits: bit-planes of the embedding and LM
    head, None for 16 bits; tied ones need to name but one. gpu_memory: nominal GiB; context: tokens that a request must
    be able to take, 2048 by default; probe: measure this CPU for the hours that quantizing takes, some seconds.
    Raises InputError for a model that can't be planned, and for one that doesn't fit.
    """
    m = read_model(model)
    if m.head is None:
        embed_bits = head_bits = tied_bits(embed_bits, head_bits)
    context = min(DEFAULT_CONTEXT, m.max_positions) if context is None else context
    if not 1 <= context <= m.max_positions:
        raise InputError(f"--context {context}: {m.architecture} takes 1 to {m.max_positions} tokens")
    if not 0 < gpu_memory < inf:
        raise InputError(f"--gpu-memory {gpu_memory}: expected a number of GiB")
    if group_size is None:
        group_size = 256 if coefficient_bits == 16 else 128
    try:
        scheme = Scheme(bits, group_size, coefficient_bits)
        embedding, head = (None if k is None else replace(scheme, bits=k) for k in (embed_bits, head_bits))
    except ValueError as e:
        options = "--bits / --group-size / --coefficient-bits / --embed-bits / --head-bits"
        raise InputError(f"{options}: {e}") from None
    settings = Settings(scheme, embedding, head, gpu_memory, context)
    kv_type = best_kv_type(m, settings)
    if kv_type is None:
        raise InputError(f"{model} {_shortage(m, settings)}")
    stored, on_card = checkpoint_bytes(m, settings), card_bytes(m, settings)
    eager = needed(m, settings, kv_type, graphs=True) > budget(settings.gpu_memory)
    free = budget(gpu_memory) - sum(on_card) - overhead(m, graphs=False)
    return {
        "model": model,
        "architecture": m.architecture,
        "bits_per_weight": 8 * stored.linear / sum(n * k for n, k in m.linears),
        "linear_bytes": stored.linear,
        "embedding_bytes": stored.embedding,
        "head_bytes": stored.head,
        "other_bytes": stored.other,
        "checkpoint_bytes": sum(stored),
        "card_bytes": int(VISIBLE * gpu_memory * GIB),
        "card_budget_bytes": budget(gpu_memory),
        "card_weight_bytes": sum(on_card),
        "card_overhead_bytes": overhead(m, graphs=False),
        "free_bytes": free,
        "kv_bytes_per_token": {name: kv_bytes.bytes_per_token(name, m.attention) for name in KV_TYPES},
        "tokens_that_fit": {name: kv_bytes.tokens_that_fit(name, m.attention, free) for name in KV_TYPES},
        "context": context,
        "kv_cache_dtype": kv_type,
        "fill_bpw": fill_bpw(m, settings, kv_type),
        "serve_command": serve_command(model, m, settings, kv_type, eager),
        **quantize_seconds(m, scheme, hours.probe(bits, group_size) if probe else hours.EPYC),
        "quantize_device_bytes": quantize_device_bytes(m),
        "quantize_host_bytes": quantize_host_bytes(m),
        "assumptions": list(ASSUMPTIONS),
    }


def read_model(model: str) -> Model:
    """Sizes of a model from its config.json; raises InputError for what `bpdq quantize` or this arithmetic refuses."""
    skeleton = plain_skeleton(model)
    config = skeleton.config
    prefix, blocks = decoder_blocks(skeleton)
    check_dense(prefix, blocks)
    linears = [weight.shape for weight in weights_in(blocks).values()]
    embedding, head = skeleton.get_input_embeddings().weight, skeleton.get_output_embeddings().weight
    tied = set(skeleton.all_tied_weights_keys)
    head_is_tied = bool(config.get_text_config(decoder=True).tie_word_embeddings)
    state = {name: t for name, t in skeleton.state_dict().items() if name not in tied}
    embeddings = embedding.numel() + (0 if head_is_tied else head.numel())
    quantized = sum(n * k for n, k in linears)
    return Model(
        architecture=type(skeleton).__name__,
        linears=linears,
        stages=_stages(blocks[0]),
        embedding=tuple(embedding.shape),
        head=None if head_is_tied else tuple(head.shape),
        others=sum(t.numel() for t in state.values()) - embeddings - quantized,
        itemsize=(config.dtype or torch.bfloat16).itemsize,  # GGUF files and some old configs don't say
        attention=_attention(model, skeleton),
        max_positions=config.get_text_config(decoder=True).max_position_embeddings,
    )


def _stages(block: nn.Module) -> list[tuple[int, int]]:
    """Linears of one module with as many inputs, summed: shapes alone don't tell that the output projection of an
    attention layer reads something else than its queries, which makes this an upper bound."""
    rows = defaultdict(int)
    for name, weight in weights_in(block).items():
        outputs, inputs = weight.shape
        rows[name.rpartition(".")[0], inputs] += outputs
    return [(outputs, inputs) for (_, inputs), outputs in rows.items()]


def _attention(model: str, skeleton: PreTrainedModel) -> Attention:
    config = skeleton.config.get_text_config(decoder=True)
    layers, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if hasattr(config, "kv_lora_rank"):
        kinds = {"latent_attention"}
    if kinds != {"full_attention"}:
        raise InputError(
            f"{model}: `bpdq plan` counts the KV cache of full attention only, and {type(skeleton).__name__} has "
            f"{', '.join(sorted(kinds - {'full_attention'}))}; `bpdq quantize` and vLLM may take it all the same"
        )
    missing = [key for key in ("num_key_value_heads", "max_position_embeddings") if not getattr(config, key, None)]
    if missing:
        raise InputError(f"{model}: its config.json says nothing of {' or '.join(missing)}, which `bpdq plan` needs")
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Attention(layers, config.num_key_value_heads, head_size)


def checkpoint_bytes(m: Model, settings: Settings) -> Weights:
    """What `bpdq quantize` writes: planes and coefficients, everything else in the model's dtype."""
    return _weights(m, settings, Scheme.stored_bytes, m.itemsize, lambda n: n)


def card_bytes(m: Model, settings: Settings) -> Weights:
    """The same in the arrangement of the CUDA kernels, vocabularies padded, everything else in 16 bits. Layers that
    vLLM fuses are padded one by one here, an upper bound where their outputs are no multiples of 64."""
    return _weights(m, settings, Scheme.tiled_bytes, 2, lambda n: -(-n // VOCABULARY_PADDING) * VOCABULARY_PADDING)


def _weights(m: Model, settings: Settings, packed: Any, itemsize: int, padded: Any) -> Weights:
    def embedding(shape: tuple[int, int], scheme: Scheme | None) -> int:
        n, k = padded(shape[0]), shape[1]
        return n * k * itemsize if scheme is None else packed(scheme, n, k)

    return Weights(
        linear=sum(packed(settings.scheme, n, k) for n, k in m.linears),
        embedding=embedding(m.embedding, settings.embedding),
        head=0 if m.head is None else embedding(m.head, settings.head),
        other=m.others * itemsize,
    )


def utilization(gpu_memory: float) -> float:
    """`--gpu-memory-utilization`: the largest that vLLM accepts beside the CUDA context (v1/worker/utils.py:
    request_memory), rounded down."""
    return max(0.0, floor(100 * (1 - CONTEXT_BYTES / (VISIBLE * gpu_memory * GIB))) / 100)


def budget(gpu_memory: float) -> int:
    """Bytes that vLLM takes for weights, activations, graphs and cache (v1/worker/gpu_worker.py:
    determine_available_memory)."""
    return int(utilization(gpu_memory) * VISIBLE * gpu_memory * GIB)


def overhead(m: Model, graphs: bool) -> int:
    """Bytes of the budget beside weights and cache, with one sequence: ASSUMPTIONS, and the table of rotations."""
    hidden, widest = m.embedding[1], max(k for _, k in m.linears)
    activations = STEP_TOKENS * 2 * 3 * (widest + hidden)
    rotations = m.max_positions * m.attention.head_size * 2
    return LOADED_BYTES + activations + rotations + _sequence_bytes(m) + (GRAPH_BYTES if graphs else 0)


def _sequence_bytes(m: Model) -> int:
    """vLLM's sampler for one more sequence: logits in 16 and 32 bits, v1/worker/gpu/sample/penalties.py's counts."""
    return ceil(m.embedding[0] * (2 + 4 + 4 + 1 / 8))


def needed(m: Model, settings: Settings, kv_type: str, graphs: bool) -> int:
    """Bytes of the budget with which one request of the wanted context can be served."""
    null_block = kv_bytes.bytes_for(kv_type, m.attention, 1)
    blocks = kv_bytes.bytes_for(kv_type, m.attention, settings.context) + null_block
    workspace = kv_bytes.workspace(kv_type, m.attention, settings.context)
    return sum(card_bytes(m, settings)) + overhead(m, graphs) + blocks + workspace


def best_kv_type(m: Model, settings: Settings) -> str | None:
    """The KV-cache type with most bytes per token, of those that run on any card, with which the context fits."""
    names = [name for name, kv_type in KV_TYPES.items() if kv_type.recommended]
    names.sort(key=lambda name: -kv_bytes.bytes_per_token(name, m.attention))
    limit = budget(settings.gpu_memory)
    return next((name for name in names if needed(m, settings, name, graphs=False) <= limit), None)


def fill_bpw(m: Model, settings: Settings, kv_type: str) -> float:
    """Bits per weight of the Linears with which the card is full, for `bpdq quantize --target-bpw`, rounded down to
    hundredths: the Linears' bytes in proportion to their bits, and no CUDA graphs. At most what most bits take."""
    now = 8 * checkpoint_bytes(m, settings).linear / sum(n * k for n, k in m.linears)
    left = budget(settings.gpu_memory) - needed(m, settings, kv_type, graphs=False)
    return min(floor(100 * now * (1 + left / card_bytes(m, settings).linear)) / 100, MOST_BITS)


def serve_command(model: str, m: Model, settings: Settings, kv_type: str, eager: bool) -> str:
    """`vllm serve` with as many sequences at once as fit at full length."""
    left = budget(settings.gpu_memory) - needed(m, settings, kv_type, graphs=not eager)
    more = left // (kv_bytes.bytes_for(kv_type, m.attention, settings.context) + _sequence_bytes(m))
    path = Path(model).absolute()
    name = path.parent.name if path.suffix == ".json" else (path.stem if is_gguf(model) else path.name)
    flags = {
        "--max-model-len": settings.context,
        "--max-num-seqs": min(1 + more, MAX_SEQUENCES),
        "--max-num-batched-tokens": STEP_TOKENS,
        "--gpu-memory-utilization": utilization(settings.gpu_memory),
    }
    if kv_type != "auto":
        flags["--kv-cache-dtype"] = kv_type
    parts = [f"vllm serve ./{name}-bpdq", *(f"{flag} {value}" for flag, value in flags.items())]
    return " ".join([*parts, *(["--enforce-eager"] if eager else [])])


def quantize_seconds(m: Model, scheme: Scheme, rates: hours.Rates) -> dict[str, float]:
    """What `bpdq quantize` takes by default: `quantize_cpu_seconds` of one core, `quantize_gpu_seconds` of a card."""
    hidden = m.embedding[1]
    block = hours.Block(m.stages, [k for _, k in m.stages] + [hidden])  # attention's output has a Hessian of its own
    tokens, blocks = prod(CALIBRATION), m.attention.layers
    work = hours.block_work(block, scheme.bits, scheme.group_size, tokens)
    card = hours.card_seconds(block, scheme.bits, scheme.group_size, tokens, hours.RTX_3090)
    return {"quantize_cpu_seconds": blocks * hours.seconds(work, rates), "quantize_gpu_seconds": blocks * card}


def quantize_device_bytes(m: Model, gpu: bool = True) -> int:
    """What `bpdq quantize` needs where it solves: a block and its copy, one stage's matrices, a batch's activations."""
    block = m.linears[: len(m.linears) // m.attention.layers]
    stage = max(stage_bytes(n, k, gpu) for n, k in m.stages)
    return 2 * m.itemsize * sum(n * k for n, k in block) + stage + ACTIVATION_BYTES


def stage_bytes(n: int, k: int, gpu: bool = True) -> int:
    """Of that, a stage with weights [n, k]: about four fp32 [k, k] (H, its factors, a solver's copy) and four [n, k]
    (W, the target, what is left of it), and four of the refinement's temporaries: on a GPU features of its rows, with
    two planes and a bias, on a CPU the rows themselves."""
    refined = min(3 * n * k, CHUNK_ELEMENTS) if gpu else min(n * k, CHUNK_ELEMENTS // 3)
    return 4 * 4 * (k * k + n * k + refined)


def quantize_host_bytes(m: Model, calibration: tuple[int, int] = CALIBRATION, page_locked: bool = True) -> int:
    """What `bpdq quantize` needs of the host beside it: embedding and head, one block, hidden states of both models.

    calibration: windows and their tokens; page_locked: as with a GPU, where each batch takes a power of two bytes.
    """
    embeddings = prod(m.embedding) + (0 if m.head is None else prod(m.head))
    block = m.linears[: len(m.linears) // m.attention.layers]
    (windows, length), hidden_size = calibration, m.embedding[1]
    batch = windows_per_batch(length, hidden_size, sum(n for n, _ in block), m.itemsize)
    batches = [min(batch, windows - first) for first in range(0, windows, batch)]
    states = [m.itemsize * count * length * hidden_size for count in batches]
    if page_locked:
        states = [1 << (size - 1).bit_length() for size in states]
    return m.itemsize * (embeddings + sum(n * k for n, k in block)) + 2 * sum(states)


def _four_bit_embeddings(settings: Settings) -> Settings:
    four = replace(settings.scheme, bits=4)
    return settings._replace(embedding=four, head=four)


def _largest_groups(settings: Settings) -> Settings:
    size = GROUP_SIZES[-1]
    schemes = {name: getattr(settings, name) for name in ("scheme", "embedding", "head")}
    return settings._replace(**{name: s and replace(s, group_size=size) for name, s in schemes.items()})


def _one_bit_less(settings: Settings) -> Settings:
    return settings._replace(scheme=replace(settings.scheme, bits=settings.scheme.bits - 1))


def _shortage(m: Model, settings: Settings) -> str:
    """Why nothing fits, and what would: single changes, or else all of them together."""
    changes = {}
    if settings.embedding is None or (m.head is not None and settings.head is None):
        changes["--embed-bits 4 --head-bits 4"] = _four_bit_embeddings
    if settings.scheme.group_size < GROUP_SIZES[-1]:
        changes[f"--group-size {GROUP_SIZES[-1]}"] = _largest_groups
    if settings.scheme.bits > 2:  # at 1 bit no model is of use
        changes[f"--bits {settings.scheme.bits - 1}"] = _one_bit_less
    fitting = [text for text, change in changes.items() if best_kv_type(m, change(settings))]
    together = reduce(lambda s, change: change(s), changes.values(), settings)
    if not fitting and best_kv_type(m, together):
        fitting.append(" ".join(changes))
    names = [name for name, kv_type in KV_TYPES.items() if kv_type.recommended]
    free = budget(settings.gpu_memory) - sum(card_bytes(m, settings)) - overhead(m, graphs=False)
    longest, name = max((kv_bytes.tokens_that_fit(name, m.attention, free), name) for name in names)
    if longest:
        fitting.append(f"--context {longest} ({name})")
    cards = count(floor(settings.gpu_memory) + 1)
    fitting.append(f"--gpu-memory {next(g for g in cards if best_kv_type(m, settings._replace(gpu_memory=g)))}")
    short = needed(m, settings, names[-1], graphs=False) - budget(settings.gpu_memory)
    return (
        f"does not fit {settings.gpu_memory:g} GiB with {settings.context} tokens of context in any KV-cache type "
        f"({short / GIB:.2f} GiB short with {names[-1]}); this would: {', or '.join(fitting)}"
    )
