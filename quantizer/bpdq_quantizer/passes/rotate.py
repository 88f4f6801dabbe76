"""Incoherence: the residual stream and the values of attention in a rotated basis, with the model's function as it was.

Outliers of a weight row, or of the hidden states, are spread over all channels by an orthogonal Q (QuIP, arXiv
2307.13304). With hidden states x Q in place of x (rows), and norms that have handed their gains g to what reads them,

    embedding  E Q        reads: q, k, v, gate, up, LM head  (W diag(g)) Q        writes: o, down  Q^T W,  bias b Q
    in every attention head, values v R: v_proj gets R^T W (and b R), o_proj W R

RMSNorm without gain commutes with Q, so the served graph is the stock one (QuaRot, arXiv 2404.00456, and SpinQuant,
arXiv 2405.16406, without their online transforms). A tied LM head becomes a tensor of its own, unless the last gain is
all ones.

Q = diag(s) (F_1 x F_2 x ...), a Kronecker product: random signs s, a random orthogonal matrix of the odd part of the
width (896 = 7 x 128), and Hadamard matrices of its power of two.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bpdq_kernels.skeleton import embedding_names, is_tied
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.modules import looks_up_rows
from bpdq_quantizer.model.stream import Streamed

READERS = {  # the norm whose output they read
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
UNMOVED = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")  # per head, between projection and rotary embedding
FACTOR = 128  # largest Hadamard factor: several small products cost less than one large one
CHUNK_ROWS = 8192  # of an embedding in fp32 at a time


class Rotation(NamedTuple):
    """Q [n, n] = diag(signs) (factors[0] x factors[1] x ...), fp32; signs: [n]; factors: orthogonal, product n."""

    signs: Tensor
    factors: list[Tensor]


def random_rotation(width: int, generator: torch.Generator) -> Rotation:
    """A random-sign Hadamard rotation of `width` channels; the odd part of the width has a random orthogonal matrix."""
    signs = torch.randint(2, (width,), generator=generator).float() * 2 - 1
    power = width & -width
    odd = width // power
    factors = []
    if odd > 1:
        factors.append(torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q.float())
    while power > 1:
        factors.append(hadamard(min(power, FACTOR)))
        power //= len(factors[-1])
    return Rotation(signs, factors)


def hadamard(n: int) -> Tensor:
    """Sylvester's Hadamard matrix [n, n] over sqrt(n), fp32; n is a power of two."""
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return (H / n**0.5).float()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x Q for x [..., n], in fp32."""
    shape, x = x.shape, x.float() * rotation.signs
    for factor in reversed(rotation.factors):  # each product takes the last axis and makes it the first
        x = (x.reshape(-1, shape[-1] // len(factor), len(factor)) @ factor).transpose(1, 2)
    return x.reshape(shape)


def rotate_heads(x: Tensor, rotation: Rotation) -> Tensor:
    """The same in every head of x [..., heads * n]."""
    return rotate(x.unflatten(-1, (-1, len(rotation.signs))), rotation).flatten(-2)


class RotatedWeights(Mapping[str, Tensor]):
    """The tensors of decoder blocks, rotated when they are looked up, in their dtype."""

    def __init__(self, source: Streamed, stream: Rotation, values: Rotation, offset: float) -> None:
        """stream: of the hidden states; values: of an attention head; offset: see `gain_offset`."""
        self.weights, self.prefix = source.weights, source.prefix
        self.stream, self.values, self.offset = stream, values, offset

    def __getitem__(self, name: str) -> Tensor:
        stored = self.weights[name]
        index, _, part = name.removeprefix(f"{self.prefix}.").partition(".")
        layer, _, kind = part.rpartition(".")
        if layer in READERS.values():
            return torch.full_like(stored, 1 - self.offset)
        x = stored.float()
        if layer in READERS and kind == "weight":
            gain = self.weights[f"{self.prefix}.{index}.{READERS[layer]}.weight"].float() + self.offset
            x = rotate(x * gain, self.stream)
        if layer == "self_attn.v_proj":
            x = rotate_heads(x.movedim(0, -1), self.values).movedim(-1, 0)
        if layer == "self_attn.o_proj" and kind == "weight":
            x = rotate_heads(x, self.values)
        if layer in WRITERS:
            x = rotate(x.movedim(0, -1), self.stream).movedim(-1, 0)
        return x.to(stored.dtype).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@torch.no_grad()
def rotated(source: Streamed, seed: int) -> Streamed:
    """The same model in a rotated basis: embedding, last norm and LM head in place, blocks as they are read.

    Products are taken in fp32 and rounded once to the tensors' dtype. `seed` determines the rotations. Raises
    InputError for an architecture that they do not fold into.
    """
    lm, prefix, blocks = source.model, source.prefix, source.blocks
    norm_name = f"{prefix.rpartition('.')[0]}.norm"
    check_foldable(source, norm_name)
    norm, embedding, head = lm.get_submodule(norm_name), lm.get_input_embeddings(), lm.get_output_embeddings()
    offset = gain_offset(norm_name, norm)
    generator = torch.Generator().manual_seed(seed)
    stream = random_rotation(len(norm.weight), generator)
    values = random_rotation(blocks[0].self_attn.head_dim, generator)
    gain = norm.weight.float() + offset
    if is_tied(lm) and not torch.all(gain == 1):
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        lm.config.tie_word_embeddings = False
        lm._tied_weights_keys, lm.all_tied_weights_keys = {}, {}
    if not is_tied(lm):
        for rows in head.weight.split(CHUNK_ROWS):
            rows.copy_(rotate(rows * gain, stream))
    for rows in embedding.weight.split(CHUNK_ROWS):
        rows.copy_(rotate(rows, stream))
    norm.weight.fill_(1 - offset)
    return source._replace(weights=RotatedWeights(source, stream, values, offset))


def gain_offset(name: str, norm: nn.Module) -> float:
    """0 for an RMSNorm that multiplies by its weight, 1 if by one plus its weight (Gemma); InputError for others."""
    probe = copy.deepcopy(norm).float()
    x = 1e3 * torch.randn(4, len(probe.weight), generator=torch.Generator().manual_seed(0))  # large: eps is nothing
    for offset in (0.0, 1.0):
        expected = x / x.square().mean(-1, keepdim=True).sqrt() * (probe.weight + offset)
        if torch.allclose(probe(x), expected, rtol=1e-3, atol=1e-3):
            return offset
    raise InputError(f"--rotate: {name} is a {type(norm).__name__}, not an RMSNorm: leave the option out")


def check_foldable(source: Streamed, norm_name: str) -> None:
    """Raise InputError unless the model is what the module's docstring describes, and nothing else."""
    lm, prefix, blocks = source.model, source.prefix, source.blocks
    embedding, head = embedding_names(lm)
    linears = [*READERS, *WRITERS]
    required = {f"{name}.weight" for name in [*linears, *READERS.values()]}
    allowed = required | {f"{linear}.bias" for linear in linears} | set(UNMOVED)
    around = {name for name in lm.state_dict() if not name.startswith(f"{prefix}.")} - {f"{head}.bias"}
    odd = sorted(around ^ {f"{embedding}.weight", f"{head}.weight", f"{norm_name}.weight"})
    if not looks_up_rows(lm.get_input_embeddings()):
        odd.append(embedding)
    for index, block in enumerate(blocks):
        names = set(block.state_dict())
        odd += [f"{prefix}.{index}.{name}" for name in sorted((required - names) | (names - allowed))]
        if odd:
            break
        norms = {type(block.get_submodule(name)) for name in READERS.values()}
        if norms != {type(lm.get_submodule(norm_name))}:
            odd.append(f"{prefix}.{index}.input_layernorm")
        attention = block.self_attn
        if attention.q_proj.out_features != attention.o_proj.in_features:  # the outputs of heads are gated
            odd.append(f"{prefix}.{index}.self_attn.q_proj")
    if odd:
        raise InputError(
            f"--rotate: a rotation does not fold into {type(lm).__name__} because of {odd[0]}: leave the option out"
        )
