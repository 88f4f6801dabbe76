"""Bytes of vLLM 0.32's and 0.33's KV cache, by `--kv-cache-dtype`, without importing vLLM (a test compares the two).

vLLM has one pool of blocks, of equal bytes (v1/core/kv_cache_utils.py, of 0.33 kv_cache_planning.py:
get_kv_cache_config_from_groups), and keeps one of them back (v1/core/block_pool.py: null_block). Layers of a kind form
groups, and a request draws blocks for each group: one for so many tokens, for those of a window, or for its state. If
all layers need equally many tokens, there is one group, and a block has the page of each layer. Otherwise all pages are
as large as the largest, and all groups have about as many layers: a smaller page covers more tokens, or is padded.

What is not in `Attention` and `State` is of vLLM's defaults: prefix caching, and two batches of STEP_TOKENS at once.
"""

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from bpdq_quantizer.fit.kv_types import KV_TYPES, LATENT_TYPES, KVType

BLOCK_TOKENS = 16  # config/cache.py: DEFAULT_BLOCK_SIZE, and what each backend's sizes are multiples of
STEP_TOKENS = 512
IN_FLIGHT = 2 * STEP_TOKENS  # config/vllm.py: max_in_flight_tokens, with asynchronous scheduling
LATENT_ROWS = 64 * 1024  # model_executor/layers/attention/mla_attention.py: determine_chunked_prefill_workspace_size
LATENT_PAGES = 4
MAX_SEQUENCES = 256  # vLLM's default on such cards, engine/arg_utils.py: get_batch_defaults


class Attention(NamedTuple):
    """Attention layers that are alike. window: tokens that are looked back at, None for all.

    latent: elements that a token's latent vector becomes when a context is read again, 0 for keys and values; then
    kv_heads is 1 and head_size the latent vector's, with its rotated part.
    """

    layers: int
    kv_heads: int
    head_size: int
    window: int | None = None
    latent: int = 0


class State(NamedTuple):
    """Layers that keep a state for each request: of a recurrence, a convolution, or both.

    size: its bytes in one layer; blocks: how many of them a request holds (v1/kv_cache_interface.py: MambaSpec,
    max_memory_usage_bytes with mamba_cache_mode "align": the last two, and for Mamba-2 one more).
    """

    layers: int
    size: int
    blocks: int = 2


Layers = Sequence[Attention | State]


class Group(NamedTuple):
    """Layers with a block table of their own. tokens: of a block; count: how many such groups there are."""

    kind: Attention | State
    tokens: int
    count: int

    @property
    def grows(self) -> bool:
        """Whether each further token needs room."""
        return isinstance(self.kind, Attention) and self.kind.window is None

    def blocks(self, context: int) -> int:
        """Of one request, in all `count` groups: v1/kv_cache_interface.py, max_memory_usage_bytes of the specs."""
        if isinstance(self.kind, State):
            return self.count * self.kind.blocks
        if self.kind.window is None:
            return self.count * ceil(context / self.tokens)
        return self.count * (ceil(min(self.kind.window - 1 + IN_FLIGHT, context) / self.tokens) + 1)


class Pool(NamedTuple):
    """vLLM's blocks of `size` bytes, and who draws them."""

    size: int
    groups: list[Group]


def types_for(layers: Layers) -> dict[str, KVType]:
    """The types of KV cache that are counted for a model: packed ones not beside windows, or heads of several sizes,
    where vLLM pads layers that stay in 16 bits in ways of its own; of latent attention those of its backend."""
    attention = [kind for kind in layers if isinstance(kind, Attention)]
    if any(kind.latent for kind in attention):
        return LATENT_TYPES
    plain = len(attention) == 1 and attention[0].window is None
    return {name: kv_type for name, kv_type in KV_TYPES.items() if plain or not kv_type.packed}


def recommended_types(layers: Layers) -> list[str]:
    return [name for name, kv_type in types_for(layers).items() if kv_type.recommended]


def block_size(kv_type: str, layers: Layers) -> int:
    """Tokens that are allocated at once for attention over the full context.

    Beside states as many as make a page that holds a state (platforms/interface.py: _align_hybrid_block_size). For
    packed types otherwise 32, as there _align_heterogeneous_kv_block_size makes a block of bytes cover 16 tokens in 16
    bits.
    """
    states = [kind.size for kind in layers if isinstance(kind, State)]
    if states:
        token = max(_slots(kv_type, layers, kind) for kind in layers if isinstance(kind, Attention))
        return BLOCK_TOKENS * ceil(max(states) / (BLOCK_TOKENS * token))
    return 2 * BLOCK_TOKENS if types_for(layers)[kv_type].packed else BLOCK_TOKENS


def _slots(kv_type: str, layers: Layers, kind: Attention) -> int:
    """Bytes of a token in one layer."""
    return kind.kv_heads * types_for(layers)[kv_type].slot(kind.head_size)


def pool(kv_type: str, layers: Layers) -> Pool:
    """v1/core/kv_cache_utils.py: get_kv_cache_groups, with a layout that is not block-outermost."""
    tokens = block_size(kv_type, layers)
    attention = [kind for kind in layers if isinstance(kind, Attention)]
    if len(attention) == len(layers) and len({kind.window for kind in attention}) == 1:
        size = tokens * sum(kind.layers * _slots(kv_type, layers, kind) for kind in attention)
        return Pool(size + tokens * _kept(kv_type, layers), [Group(attention[0], tokens, 1)])
    pages = [tokens * _slots(kv_type, layers, k) if isinstance(k, Attention) else k.size for k in layers]
    page = max(pages)
    counts = [kind.layers for kind in layers]
    together = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    groups = []
    for kind, own in zip(layers, pages, strict=True):
        count = ceil(kind.layers / together)
        covered = page // own if isinstance(kind, Attention) and page % own == 0 else 1
        groups.append(Group(kind, covered * tokens, count))
    return Pool(together * page, groups)


def _kept(kv_type: str, layers: Layers) -> int:
    """What a token takes more for the layers that stay in 16 bits under packed types: the first and last two
    (model_executor/layers/quantization/turboquant/config.py: get_boundary_skip_layers; engine/arg_utils.py does it for
    UltraQuant too), but none beside states."""
    if not types_for(layers)[kv_type].packed:
        return 0
    (kind,) = layers
    more = _slots("auto", layers, kind) - _slots(kv_type, layers, kind)
    return 2 * min(2, kind.layers // 2) * more


def bytes_per_token(kv_type: str, layers: Layers) -> int:
    """Bytes that each token of a long context takes, in all layers: those of states and full windows don't grow."""
    blocks = pool(kv_type, layers)
    return sum(ceil(blocks.size * group.count / group.tokens) for group in blocks.groups if group.grows)


def fixed_bytes(kv_type: str, layers: Layers) -> dict[str, int]:
    """Bytes that one request takes however long it is, by what they hold: `state`, and `window` once it is full."""
    blocks, found = pool(kv_type, layers), {"state": 0, "window": 0}
    for group in blocks.groups:
        if isinstance(group.kind, State):
            found["state"] += blocks.size * group.blocks(0)
        elif group.kind.window is not None:
            found["window"] += blocks.size * group.blocks(group.kind.window + IN_FLIGHT)
    return found


def workspace(kv_type: str, layers: Layers, context: int) -> int:
    """Bytes beside the cache while one request of `context` tokens is served.

    v1/attention/backends/turboquant_attn.py: _reserve_workspace holds one layer's cache in 16 bits; latent attention a
    context's latent vectors, and what they become (mla_attention.py: chunked_prefill_workspace, forward_impl).
    """
    kind = next(kind for kind in layers if isinstance(kind, Attention))
    if kind.latent:
        rows = min(max(8 * context, LATENT_PAGES * MAX_SEQUENCES * BLOCK_TOKENS), LATENT_ROWS)
        return 2 * (-(-rows // BLOCK_TOKENS) * BLOCK_TOKENS) * (kind.head_size + kind.latent)
    if not types_for(layers)[kv_type].packed:
        return types_for(layers)[kv_type].workspace
    tokens = block_size(kv_type, layers)
    return ceil(context / tokens) * tokens * _slots("auto", layers, kind)


def bytes_for(kv_type: str, layers: Layers, context: int) -> int:
    """Bytes of the blocks that one request of `context` tokens takes."""
    blocks = pool(kv_type, layers)
    return blocks.size * sum(group.blocks(context) for group in blocks.groups)


def null_block(kv_type: str, layers: Layers) -> int:
    """Bytes of the block that vLLM keeps back."""
    return pool(kv_type, layers).size


def tokens_that_fit(kv_type: str, layers: Layers, free: int, longest: int) -> int:
    """The longest context of one request in `free` bytes for cache and workspace; `longest` where nothing grows."""

    def fits(context: int) -> bool:
        needed = bytes_for(kv_type, layers, context) + workspace(kv_type, layers, context)
        return needed + null_block(kv_type, layers) <= free

    growth = bytes_per_token(kv_type, layers)
    low, high = 0, max(0, free) // growth + block_size(kv_type, layers) if growth else longest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
