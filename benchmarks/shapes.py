"""Linear layers of the models that the kernel benchmark runs, as vLLM fuses them."""

from typing import NamedTuple


class Layer(NamedTuple):
    """A Linear of `out_features` x `in_features` weights."""

    name: str
    out_features: int
    in_features: int


class Experts(NamedTuple):
    """A layer's experts, of which each token has `chosen`: gate and up of `inner` x `hidden` weights, and down."""

    name: str
    count: int
    chosen: int
    hidden: int
    inner: int


class Model(NamedTuple):
    """One decoder block's Linears, how many blocks there are, and the LM head."""

    blocks: int
    layers: tuple[Layer, ...]
    head: Layer


def _qwen(blocks: int, hidden: int, qkv: int, intermediate: int) -> Model:
    layers = (
        Layer("qkv", qkv, hidden),
        Layer("o", hidden, hidden),
        Layer("gate_up", 2 * intermediate, hidden),
        Layer("down", hidden, intermediate),
    )
    return Model(blocks, layers, Layer("head", 152064, hidden))


MODELS = {
    "qwen2.5-7b": _qwen(28, 3584, 4608, 18944),
    "qwen2.5-32b": _qwen(64, 5120, 7168, 27648),
    "qwen2.5-72b": _qwen(80, 8192, 10240, 29568),
}

EXPERTS = {
    "qwen3-30b-a3b": Experts("30B-A3B experts", count=128, chosen=8, hidden=2048, inner=768),
    "qwen3-next-80b-a3b": Experts("Next-80B-A3B experts", count=512, chosen=10, hidden=2048, inner=512),
}
