"""The ops `bpdq::linear` and `bpdq::embedding`, and the functions that everything above the kernels calls.

All dispatch on device and number of tokens happens inside the ops: vLLM traces with a symbolic token count, so
a branch outside would be frozen into the graph. On a CPU cpu_op.cpp takes the place of the first two where it can be
compiled (`cpu.use`).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bpdq_kernels import cpu, reference
from bpdq_kernels.layout import GROUP_SIZES, Stored, Tiles, check_layer, to_tiles, trim

ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Prepared(NamedTuple):
    """A layer as the kernels of one device want it; build it with `prepare`.

    On CUDA, for fp16 and bf16: the fields of `bpdq_kernels.layout.Tiles`. On a CPU: those of `bpdq_kernels.cpu.prepare`
    and None. Elsewhere: B, c, s (of coefficients in 8 bits) and None.
    """

    planes: Tensor
    coefficients: Tensor
    scales: Tensor | None
    ratios: Tensor | None
    in_features: int
    out_features: int
    group_size: int


ANYWHERE = "CompositeExplicitAutograd"  # the dispatch key of what any device has that has nothing of its own
_lib = torch.library.Library("bpdq", "DEF")
_LAYER = "Tensor planes, Tensor coefficients, Tensor? scales, Tensor? ratios"
_lib.define(f"linear(Tensor x, {_LAYER}, int out_features, int group_size, Tensor? bias) -> Tensor")
_lib.define(
    f"embedding(Tensor ids, {_LAYER}, int in_features, int out_features, int group_size, ScalarType dtype) -> Tensor"
)
_lib.define("stored_linear(Tensor x, Tensor B, Tensor c, int group_size, Tensor? bias, Tensor? s) -> Tensor")


def check_traced(tensor: Tensor) -> None:
    """For what stands in for an op where a tensor has no values: raise RuntimeError unless its input has none either,
    as where torch traces a model. With values it meets a layer without."""
    if not tensor.is_meta:
        raise RuntimeError(
            "bpdq: a layer's weights are not loaded, as after a reload that was refused: start the server again"
        )


def _linear_fake(
    x: Tensor,
    planes: Tensor,
    coefficients: Tensor,
    scales: Tensor | None,
    ratios: Tensor | None,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    check_traced(x)
    return x.new_empty((*x.shape[:-1], out_features))


def linear_anywhere(
    x: Tensor,
    planes: Tensor,
    coefficients: Tensor,
    scales: Tensor | None,
    ratios: Tensor | None,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    """`bpdq::linear` where no kernel takes its place, in Python."""
    if x.device.type != "cpu":
        return reference.linear(x, planes, coefficients, group_size, bias, scales)
    return cpu.linear(x, planes, coefficients, scales, group_size, out_features, bias)


def _linear_cuda(
    x: Tensor,
    planes: Tensor,
    coefficients: Tensor,
    scales: Tensor | None,
    ratios: Tensor | None,
    out_features: int,
    group_size: int,
    bias: Tensor | None,
) -> Tensor:
    if is_stored(planes):
        return _stored_linear_cuda(x, planes, coefficients, group_size, bias, scales)
    from bpdq_kernels.tiled_linear import tiled_linear

    return tiled_linear(x, Tiles(planes, coefficients, scales, ratios), out_features, group_size, bias)


def is_stored(planes: Tensor) -> bool:
    """Whether planes of a `Prepared` are B as it was stored: on CUDA for fp32."""
    return planes.ndim == 3


def _stored_linear_cuda(
    x: Tensor, B: Tensor, c: Tensor, group_size: int, bias: Tensor | None, s: Tensor | None
) -> Tensor:
    from bpdq_kernels.triton_linear import stored_linear

    return stored_linear(x, B, c, group_size, bias, s)


def _stored_linear_fake(
    x: Tensor, B: Tensor, c: Tensor, group_size: int, bias: Tensor | None, s: Tensor | None
) -> Tensor:
    return x.new_empty((*x.shape[:-1], B.shape[2]))


def embedding_anywhere(
    ids: Tensor,
    planes: Tensor,
    coefficients: Tensor,
    scales: Tensor | None,
    ratios: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """`bpdq::embedding` likewise."""
    rows = ids.flatten()
    if ids.device.type == "cpu":
        if len(rows) and not 0 <= rows.min() <= rows.max() < out_features:
            raise RuntimeError(f"bpdq: token ids from {rows.min()} to {rows.max()} of {out_features}")
        B, c, s = cpu.stored_rows(planes, coefficients, scales, group_size, rows)
    else:
        B, c, s = Stored(planes, coefficients, scales).outputs(rows)
    return reference.rows(B, c, group_size, in_features, dtype, ids, s)


def _embedding_cuda(
    ids: Tensor,
    planes: Tensor,
    coefficients: Tensor,
    scales: Tensor | None,
    ratios: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    from bpdq_kernels import triton_embedding

    if is_stored(planes):
        arguments = planes, coefficients, scales, ratios, in_features, out_features, group_size, dtype
        return embedding_anywhere(ids, *arguments)
    y = scales.new_empty((*ids.shape, in_features), dtype=dtype)
    with torch.cuda.device_of(y):
        tiles = Tiles(planes, coefficients, scales, ratios)
        triton_embedding.launch(ids.reshape(-1), tiles, group_size, y.view(-1, in_features))
    return y


def _embedding_fake(
    ids: Tensor,
    planes: Tensor,
    coefficients: Tensor,
    scales: Tensor | None,
    ratios: Tensor | None,
    in_features: int,
    out_features: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    check_traced(ids)
    return planes.new_empty((*ids.shape, in_features), dtype=dtype)


_lib.impl("linear", linear_anywhere, ANYWHERE)
_lib.impl("linear", _linear_cuda, "CUDA")
_lib.impl("linear", _linear_fake, "Meta")
_lib.impl("stored_linear", reference.linear, "CPU")
_lib.impl("stored_linear", _stored_linear_cuda, "CUDA")
_lib.impl("stored_linear", _stored_linear_fake, "Meta")
_lib.impl("embedding", embedding_anywhere, ANYWHERE)
_lib.impl("embedding", _embedding_cuda, "CUDA")
_lib.impl("embedding", _embedding_fake, "Meta")
for _op in ("linear", "stored_linear", "embedding"):
    # no gradient, and no warning where x wants one
    _lib.impl(_op, torch.library.fallthrough_kernel, "Autograd")


def prepare(
    B: Tensor,
    c: Tensor,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    s: Tensor | None = None,
) -> Prepared:
    """Make a stored layer ready for `linear` on `device`, for activations of `dtype` (fp32, fp16 or bf16).

    B: int32 [ceil(K/32), k, N], padding words allowed; c: [ceil(K/G), k+1, N] floating point, or int8 with s [k+1, N].
    K = `in_features`.
    Raises ValueError for a group size or dtype that no kernel takes, and for shapes that don't fit together.
    """
    return arrange(B, c, group_size, in_features, dtype, device, s, cpu.pages().tensor)


def arrange(
    B: Tensor,
    c: Tensor,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    device: torch.device | str,
    s: Tensor | None,
    empty: Callable[[torch.Size], Tensor],
) -> Prepared:
    """As `prepare`; planes on a CPU are in memory that `empty` makes."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size {group_size} is not supported: use one of {GROUP_SIZES}")
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"activations in {dtype} are not supported: use float32, float16 or bfloat16")
    check_layer(B, c, group_size, in_features, s)
    out_features = B.shape[2]
    B, c, s = trim(B, in_features).to(device), c.to(device), None if s is None else s.to(device)
    if B.is_cuda and dtype != torch.float32:
        return Prepared(*to_tiles(B, c, group_size, dtype, s), in_features, out_features, group_size)
    if B.device.type == "cpu":
        return Prepared(*cpu.prepare(B, c, group_size, s, empty), None, in_features, out_features, group_size)
    s = None if s is None else s.contiguous()
    return Prepared(B.contiguous(), c.contiguous(), s, None, in_features, out_features, group_size)


def check_activations(x: Tensor) -> None:
    """Raise ValueError unless x is in a dtype that kernels multiply."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"x in {x.dtype} is not supported: use float32, float16 or bfloat16")


def check_bias(bias: Tensor | None, *shape: int) -> None:
    """Raise ValueError for a bias of another shape."""
    if bias is not None and bias.shape != shape:
        raise ValueError(f"bias {tuple(bias.shape)} is not {shape}, which the layer's outputs are")


def linear(x: Tensor, prepared: Prepared, bias: Tensor | None = None) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias [N], in x.dtype. Inference only: no gradient flows.

    Raises ValueError where x is not as wide as the layer or in another dtype, and for a bias of another size.
    """
    planes, coefficients, scales, ratios, in_features, out_features, group_size = prepared
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} inputs, but the layer was quantized with {in_features}")
    check_activations(x)
    check_bias(bias, out_features)
    return torch.ops.bpdq.linear(x, planes, coefficients, scales, ratios, out_features, group_size, bias)


def stored_linear(
    x: Tensor, B: Tensor, c: Tensor, group_size: int, bias: Tensor | None = None, s: Tensor | None = None
) -> Tensor:
    """As `linear`, for tensors as a checkpoint stores them: no preparation and no second copy, but slower.

    Raises ValueError where they don't describe a layer as wide as x, and for a bias of another size.
    """
    check_layer(B, c, group_size, x.shape[-1], s)
    check_bias(bias, B.shape[2])
    return torch.ops.bpdq.stored_linear(x, trim(B, x.shape[-1]), c, group_size, bias, s)


def embedding(ids: Tensor, prepared: Prepared, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (any shape, int32 or int64) of the weight [N, K]: [*ids.shape, K] in `dtype`. On a CPU raises
    RuntimeError for an id that is none."""
    return torch.ops.bpdq.embedding(ids, *prepared, dtype)
