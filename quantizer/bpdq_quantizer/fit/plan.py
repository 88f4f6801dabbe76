"""What a model will weigh in bit-planes, and what then fits on a card under vLLM, from its config.json alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import count
from math import ceil, floor, prod
from pathlib import Path
from shlex import quote
from typing import Any

from bpdq_kernels.format import CODE_OPTIONS, Scheme
from bpdq_kernels.layout import GROUP_SIZES, MAX_PLANES
from bpdq_quantizer.algorithm.refine import CHUNK_ELEMENTS
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit import hours, kv_bytes
from bpdq_quantizer.fit.kv_bytes import IN_FLIGHT, MAX_SEQUENCES, STEP_TOKENS, Attention, State
from bpdq_quantizer.fit.kv_types import FLASHINFER_WORKSPACE, KV_TYPES
from bpdq_quantizer.fit.memory import (
    CALIBRATION,
    experts_at_once,
    quantize_device_bytes,
    quantize_host_bytes,
)
from bpdq_quantizer.fit.parts import IMAGE_SIDE, Model, read_model
from bpdq_quantizer.fit.weight_bytes import Settings, card_bytes, checkpoint_bytes, token_figures
from bpdq_quantizer.model.activations import ACTIVATION_BYTES
from bpdq_quantizer.model.sources import is_gguf
from bpdq_quantizer.model.support import FLOATS, table_bits, tied_bits
from bpdq_quantizer.model.windows import MOST_TOKENS

GIB = 2**30
VISIBLE = 23.69 / 24
CONTEXT_BYTES = int(0.45 * GIB)
LOADED_BYTES = int(0.15 * GIB)
GRAPH_BYTES = int(0.5 * GIB)
LEAST_MEMORY, MOST_MEMORY = 0.001, 1_000_000  # of a card, in GiB
DEFAULT_CONTEXT = 2048
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
    f"beside the cache: FlashInfer {FLASHINFER_WORKSPACE / GIB:.2f} GiB of workspace, TurboQuant one layer's "
    "16-bit cache",
    "one card, nothing offloaded; activations and unquantized tensors in 16 bits",
    f"tokens/s: weights are read at {hours.RTX_3090.bytes / 1e9:.0f} GB/s, a bound by {hours.RTX_3090.name}'s data "
    "sheet; neither the cache nor anything else takes time",
    f"time: {CALIBRATION[0]} x {CALIBRATION[1]} calibration tokens, the default solver, {hours.PASSES} forward passes "
    "of each block; on a CPU what one core needs for each part (--probe: this one; else an EPYC of 2021, AVX2), "
    f"on a GPU {hours.RTX_3090.name} by its data sheet: {hours.RTX_3090.half / 1e12:.0f} Tflop/s in 16 and "
    f"{hours.RTX_3090.full / 1e12:.0f} in 32 bits, of which the solver's own loops are assumed to reach "
    f"{hours.RTX_3090.share:.0%}, {hours.RTX_3090.bytes / 1e9:.0f} GB/s, {hours.RTX_3090.launch * 1e6:.0f} us a launch",
    "neither time nor memory of a model that writes its own calibration text (--calibration self), nor the time of "
    "gradients (--output-tokens)",
    "memory to quantize, without Python's and torch's own: on the device a block twice, four fp32 matrices [K, K] and "
    f"[N, K] of the largest stage, covariances of a block's outputs, {4 * 4 * CHUNK_ELEMENTS / GIB:.0f} GiB to refine, "
    f"{ACTIVATION_BYTES / GIB:.0f} GiB of activations; on the host the embedding, the head, a block and, without "
    f"--offload-dir, the hidden states of {CALIBRATION[0]} x {CALIBRATION[1]} calibration tokens twice, in page-locked "
    f"batches, which torch rounds up to powers of two, or before that the head in fp32 and {MOST_TOKENS} tokens' "
    "states in front of 2 sqrt(blocks) blocks, or after it embedding, head and a block twice more (--evaluate); "
    "without a GPU the sum of device and host",
)


def plan(
    model: str,
    *,
    bits: int = 2,
    group_size: int | None = None,
    coefficient_bits: int = 8,
    code: str = "plain",
    embed_bits: int | None = None,
    head_bits: int | None = None,
    gpu_memory: float = 24,
    context: int | None = None,
    language_model_only: bool = False,
    ignore: Sequence[str] | None = None,
    probe: bool = False,
) -> dict[str, Any]:
    """Bytes of the BPDQ checkpoint of `model` (folder, config.json or hub id), and how vLLM would serve it on a card.

    group_size: 128, or 256 with coefficients in 16 bits; code: plain or trellis; embed_bits, head_bits: bit-planes of
    the embedding and LM head, or 16 bits, None for what `bpdq quantize` takes by default; tied ones need to name but
    one. gpu_memory: nominal GiB; context:
    tokens that a request must be able to take, 2048 by default; language_model_only: of a model that sees images serve
    the text model alone; ignore: names, or `re:` patterns, of Linears that stay in 16 bits; probe: measure this CPU for
    the hours that quantizing takes, some seconds.
    Raises InputError for a model that can't be planned, and for one that doesn't fit.
    """
    m = read_model(model, ignore or ())
    if language_model_only and not m.tower.elements:
        raise InputError(f"--language-model-only: {m.architecture} sees no images, leave the option out")
    if m.head is None:
        weights = sum(n * k for n, k in m.linears) + prod(m.embedding) + m.others
        default = table_bits(m.architecture, prod(m.embedding), weights)
        embed_bits = head_bits = tied_bits(embed_bits, head_bits) or default
    context = min(DEFAULT_CONTEXT, m.max_positions) if context is None else context
    if not 1 <= context <= m.max_positions:
        raise InputError(f"--context {context}: {m.architecture} takes 1 to {m.max_positions} tokens")
    if not LEAST_MEMORY <= gpu_memory <= MOST_MEMORY:
        raise InputError(f"--gpu-memory {gpu_memory}: expected a number of GiB, from {LEAST_MEMORY} to {MOST_MEMORY}")
    if code not in CODE_OPTIONS:
        raise InputError(f"--code {code}: expected {' or '.join(CODE_OPTIONS)}")
    if group_size is None:
        group_size = 256 if coefficient_bits == 16 else 128
    try:
        scheme = Scheme(bits, group_size, coefficient_bits, CODE_OPTIONS[code])
        embedding, head = (None if k in (None, FLOATS) else scheme.with_bits(k) for k in (embed_bits, head_bits))
    except ValueError as e:
        options = "--bits / --group-size / --coefficient-bits / --code / --embed-bits / --head-bits"
        raise InputError(f"{options}: {e}") from None
    settings = Settings(scheme, embedding, head, gpu_memory, context, language_model_only)
    kv_type = best_kv_type(m, settings)
    if kv_type is None:
        raise InputError(f"{model} {_shortage(m, settings)}")
    stored, on_card = checkpoint_bytes(m, settings), card_bytes(m, settings)
    eager = needed(m, settings, kv_type, graphs=True) > budget(settings.gpu_memory)
    beside = overhead(m, settings, graphs=False)
    free = budget(gpu_memory) - sum(on_card) - beside
    return {
        "model": model,
        "architecture": m.architecture,
        "bits_per_weight": 8 * stored.linear / sum(n * k for n, k in m.linears),
        **token_figures(m, settings),
        "linear_bytes": stored.linear,
        "embedding_bytes": stored.embedding,
        "head_bytes": stored.head,
        "other_bytes": stored.other,
        "tower_bytes": stored.tower,
        "mtp_bytes": stored.mtp,
        "checkpoint_bytes": sum(stored),
        "card_bytes": int(VISIBLE * gpu_memory * GIB),
        "card_budget_bytes": budget(gpu_memory),
        "card_weight_bytes": sum(on_card),
        "card_overhead_bytes": beside,
        "free_bytes": free,
        **cache_figures(m, free),
        "context": context,
        "kv_cache_dtype": kv_type,
        "fill_bpw": fill_bpw(m, settings, kv_type),
        "serve_command": serve_command(model, m, settings, kv_type, eager),
        **quantize_seconds(m, scheme, hours.probe(scheme.planes, group_size) if probe else hours.EPYC),
        "quantize_device_bytes": quantize_device_bytes(m),
        "quantize_host_bytes": quantize_host_bytes(m),
        "assumptions": [*ASSUMPTIONS, *assumptions_for(m, settings)],
    }


def cache_figures(m: Model, free: int) -> dict[str, dict[str, Any]]:
    """Of each type of KV cache that is counted for the model, in bytes and tokens; `free` is left for it."""
    names = kv_bytes.types_for(m.layers)
    fixed = {name: kv_bytes.fixed_bytes(name, m.layers) for name in names}
    return {
        "kv_cache_needs": {name: kv_type.needs for name, kv_type in names.items()},
        "kv_bytes_per_token": {name: kv_bytes.bytes_per_token(name, m.layers) for name in names},
        "state_bytes_per_sequence": {name: fixed[name]["state"] for name in names},
        "window_bytes_per_sequence": {name: fixed[name]["window"] for name in names},
        "kv_block_tokens": {name: kv_bytes.block_size(name, m.layers) for name in names},
        "tokens_that_fit": {name: kv_bytes.tokens_that_fit(name, m.layers, free, m.max_positions) for name in names},
    }


def assumptions_for(m: Model, settings: Settings) -> list[str]:
    """Those that not every model needs."""
    found = []
    if any(isinstance(kind, State) for kind in m.layers):
        found.append(
            "states: prefix caching is on, vLLM's default, which keeps two states for each sequence, of Mamba-2 three; "
            "blocks hold so many tokens that a page of keys and values holds a state; no speculative decoding"
        )
    if any(isinstance(kind, Attention) and kind.window for kind in m.layers):
        found.append(f"windows: a sequence holds a window and {IN_FLIGHT} tokens more, those of two steps under way")
    if m.mixtures:
        found.append(
            f"experts: a token reads those that it chooses; {STEP_TOKENS} tokens per step x chosen ones x (4 bytes x "
            "hidden size + 2 bytes x inner size) of activations besides"
        )
        found.append(
            f"to quantize experts: {' or '.join(str(experts_at_once(x)) for x in dict.fromkeys(m.mixtures))} at once "
            "on the device (fewer where their inputs take more than "
            f"{ACTIVATION_BYTES / GIB:.0f} GiB), the four matrices for each; on the host what all of a layer are given "
            f"in the quantized and in the 16-bit model: 4 x 2 bytes x {prod(CALIBRATION)} tokens x hidden size"
        )
    if len(kv_bytes.types_for(m.layers)) < len(KV_TYPES):
        found.append("types of KV cache that are not shown are not counted for such layers, or vLLM refuses them")
    if m.tower.elements:
        with_images = (
            f"images: 16-bit weights of what sees them, {IMAGE_SIDE} x {IMAGE_SIDE} pixels at a time, for each patch 2 "
            "bytes x 3 x the widest of its layers (assumed)"
        )
        found.append("images are refused, what sees them is not loaded" if settings.text_only else with_images)
    if m.mtp:
        found.append("the MTP head is kept in 16 bits in the checkpoint, and not loaded without speculative decoding")
    elif m.unknown_mtp:
        found.append("the bytes of an MTP head, which config.json names, are not counted")
    return found


def utilization(gpu_memory: float) -> float:
    """`--gpu-memory-utilization`: the largest that vLLM accepts beside the CUDA context (v1/worker/utils.py:
    request_memory), rounded down."""
    return max(0.0, floor(100 * (1 - CONTEXT_BYTES / (VISIBLE * gpu_memory * GIB))) / 100)


def budget(gpu_memory: float) -> int:
    """Bytes that vLLM takes for weights, activations, graphs and cache (v1/worker/gpu_worker.py:
    determine_available_memory)."""
    return int(utilization(gpu_memory) * VISIBLE * gpu_memory * GIB)


def overhead(m: Model, settings: Settings, graphs: bool) -> int:
    """Bytes of the budget beside weights and cache, with one sequence: ASSUMPTIONS, and the table of rotations."""
    hidden, widest = m.embedding[1], max(k for _, k in m.linears)
    activations = STEP_TOKENS * 2 * 3 * (widest + hidden)
    image = 0 if settings.text_only else 2 * m.tower.activations
    rotations = 2 * m.rotations
    parts = (activations, _expert_bytes(m), image, rotations, _sequence_bytes(m))
    return LOADED_BYTES + sum(parts) + (GRAPH_BYTES if graphs else 0)


def _expert_bytes(m: Model) -> int:
    """Of both matrices' outputs, for each token and expert that it chose: fp32 and 16 bits."""
    each = [x.chosen * (4 * m.embedding[1] + 2 * min(n for n, _ in x.linears)) for x in m.mixtures if x.linears]
    return STEP_TOKENS * max(each, default=0)


def _sequence_bytes(m: Model) -> int:
    """vLLM's sampler for one more sequence: logits in 16 and 32 bits, v1/worker/gpu/sample/penalties.py's counts."""
    return ceil(m.embedding[0] * (2 + 4 + 4 + 1 / 8))


def needed(m: Model, settings: Settings, kv_type: str, graphs: bool) -> int:
    """Bytes of the budget with which one request of the wanted context can be served."""
    blocks = kv_bytes.bytes_for(kv_type, m.layers, settings.context) + kv_bytes.null_block(kv_type, m.layers)
    workspace = kv_bytes.workspace(kv_type, m.layers, settings.context)
    return sum(card_bytes(m, settings)) + overhead(m, settings, graphs) + blocks + workspace


def best_kv_type(m: Model, settings: Settings) -> str | None:
    """The KV-cache type with most bytes per token, of those that run on any card, with which the context fits; 16 bits
    if they do: padding may make others' tokens as large."""
    names = kv_bytes.recommended_types(m.layers)
    names.sort(key=lambda name: (name != "auto", -kv_bytes.bytes_per_token(name, m.layers)))
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
    more = left // (kv_bytes.bytes_for(kv_type, m.layers, settings.context) + _sequence_bytes(m))
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
    if m.tower.elements and not settings.text_only:
        image = {"count": 1, "width": IMAGE_SIDE, "height": IMAGE_SIDE}
        limits = {"image": image, **dict.fromkeys(m.tower.modalities, 0)}
        flags["--limit-mm-per-prompt"] = f"'{json.dumps(limits)}'"
    parts = [f"vllm serve {quote(f'./{name}-bpdq')}", *(f"{flag} {value}" for flag, value in flags.items())]
    switches = {"--language-model-only": settings.text_only, "--enforce-eager": eager}
    return " ".join([*parts, *(name for name, on in switches.items() if on)])


def quantize_seconds(m: Model, scheme: Scheme, rates: hours.Rates) -> dict[str, float]:
    """What `bpdq quantize` takes by default: `quantize_cpu_seconds` of one core, `quantize_gpu_seconds` of a card."""
    hidden, tokens, cpu, card = m.embedding[1], prod(CALIBRATION), 0.0, 0.0
    for kind in m.blocks:
        hessians = [k for _, k in kind.stages] + [hidden]  # attention's output has its own
        writers = [(hidden, hidden), *((n, k) for n, k in kind.stages if n == hidden)]
        block = hours.Block(kind.stages, hessians, writers=writers)
        parts = [(1, block, tokens, 1)]
        for mixture in kind.experts:
            expert = hours.Block(mixture.stages, [k for _, k in mixture.stages], in_turn=False)
            inputs = tokens * mixture.chosen // mixture.count
            parts.append((mixture.count, expert, inputs, experts_at_once(mixture)))
        for times, part, inputs, at_once in parts:
            work = hours.block_work(part, scheme.planes, scheme.group_size, inputs)
            cpu += kind.count * times * hours.seconds(work, rates)
            spent = hours.card_seconds(part, scheme.planes, scheme.group_size, inputs, hours.RTX_3090, at_once)
            card += kind.count * times * spent
    return {"quantize_cpu_seconds": cpu, "quantize_gpu_seconds": card}


def _four_bit_embeddings(settings: Settings) -> Settings:
    four = settings.scheme.with_bits(4)
    return settings._replace(embedding=four, head=four)


def _largest_groups(settings: Settings) -> Settings:
    size = GROUP_SIZES[-1]
    schemes = {name: getattr(settings, name) for name in ("scheme", "embedding", "head")}
    return settings._replace(**{name: s and replace(s, group_size=size) for name, s in schemes.items()})


def _one_bit_less(settings: Settings) -> Settings:
    return settings._replace(scheme=replace(settings.scheme, bits=settings.scheme.bits - 1))


def _text_only(settings: Settings) -> Settings:
    return settings._replace(text_only=True)


def _shortage(m: Model, settings: Settings) -> str:
    """Why nothing fits, and what would: single changes, or else all of them together."""
    changes = {}
    if settings.embedding is None or (m.head is not None and settings.head is None):
        changes["--embed-bits 4 --head-bits 4"] = _four_bit_embeddings
    if settings.scheme.group_size < GROUP_SIZES[-1]:
        changes[f"--group-size {GROUP_SIZES[-1]}"] = _largest_groups
    if settings.scheme.bits > 2:  # at 1 bit no model is of use
        changes[f"--bits {settings.scheme.bits - 1}"] = _one_bit_less
    if m.tower.elements and not settings.text_only:
        changes["--language-model-only"] = _text_only
    fitting = [text for text, change in changes.items() if best_kv_type(m, change(settings))]
    together = reduce(lambda s, change: change(s), changes.values(), settings)
    if not fitting and best_kv_type(m, together):
        fitting.append(" ".join(changes))
    names = kv_bytes.recommended_types(m.layers)
    free = budget(settings.gpu_memory) - sum(card_bytes(m, settings)) - overhead(m, settings, graphs=False)
    longest, name = max((kv_bytes.tokens_that_fit(name, m.layers, free, m.max_positions), name) for name in names)
    if longest:
        fitting.append(f"--context {longest} ({name})")
    cards = count(floor(settings.gpu_memory) + 1)
    fitting.append(f"--gpu-memory {next(g for g in cards if best_kv_type(m, settings._replace(gpu_memory=g)))}")
    short = needed(m, settings, names[-1], graphs=False) - budget(settings.gpu_memory)
    return (
        f"does not fit {settings.gpu_memory:g} GiB with {settings.context} tokens of context in any KV-cache type "
        f"({short / GIB:.2f} GiB short with {names[-1]}); this would: {', or '.join(fitting)}"
    )
