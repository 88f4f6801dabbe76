"""The op `bpdq::moe`: the experts of a decoder layer, both matrices and the activation between, for routed tokens.

All dispatch on device and sizes happens inside the op, as for those of `bpdq_kernels.ops`.
"""

import functools

import torch
from torch import Tensor

from bpdq_kernels import activation as activations
from bpdq_kernels import cpu, reference
from bpdq_kernels.activation import Activation
from bpdq_kernels.layout import PreparedExperts, Stored
from bpdq_kernels.ops import ANYWHERE, arrange, check_activations, check_bias, check_traced

_lib = torch.library.Library("bpdq", "FRAGMENT")
_MATRIX = (
    "Tensor {0}_planes, Tensor {0}_coefficients, Tensor? {0}_scales, Tensor? {0}_ratios, "
    "int {0}_inputs, int {0}_outputs, int {0}_group_size"
)
_lib.define(
    f"moe(Tensor x, Tensor topk_weights, Tensor topk_ids, {_MATRIX.format('up')}, {_MATRIX.format('down')}, "
    "Tensor? up_bias, Tensor? down_bias, str activation, float alpha, float limit, bool weights_on_input) -> Tensor"
)
_short_lived = functools.partial(torch.empty, dtype=torch.int32)
_FIELDS = len(PreparedExperts._fields)


def moe_anywhere(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *rest: object) -> Tensor:
    """`bpdq::moe` where no kernel takes its place, in Python."""
    on = reference if x.device.type != "cpu" else cpu
    return on.moe(x, topk_weights, topk_ids, *_unpacked(*rest))


def _moe_cuda(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *rest: object) -> Tensor:
    if x.dtype == torch.float32:
        return reference.moe(x, topk_weights, topk_ids, *_unpacked(*rest))
    from bpdq_kernels.tiled_moe import tiled_moe

    return tiled_moe(x, topk_weights, topk_ids, *_unpacked(*rest))


def _moe_fake(x: Tensor, *rest: object) -> Tensor:
    check_traced(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _unpacked(
    *arguments: object,
) -> tuple[PreparedExperts, PreparedExperts, Activation, Tensor | None, Tensor | None, bool]:
    """The op's arguments after `topk_ids`, as `moe` takes them."""
    up, down = PreparedExperts(*arguments[:_FIELDS]), PreparedExperts(*arguments[_FIELDS : 2 * _FIELDS])
    up_bias, down_bias, name, alpha, limit, weights_on_input = arguments[2 * _FIELDS :]
    return up, down, Activation(name, alpha, limit), up_bias, down_bias, weights_on_input


_lib.impl("moe", moe_anywhere, ANYWHERE)
_lib.impl("moe", _moe_cuda, "CUDA")
_lib.impl("moe", _moe_fake, "Meta")
_lib.impl("moe", torch.library.fallthrough_kernel, "Autograd")


def prepare_experts(
    experts: Stored,
    group_size: int,
    in_features: int,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> PreparedExperts:
    """Make one matrix of E experts ready for `moe` on `device`, for activations of `dtype` (fp32, fp16 or bf16).

    experts: B int32 [E, ceil(K/32), k, N], c [E, ceil(K/G), k+1, N] floating point, or int8 with s [E, k+1, N].
    K = `in_features`. One expert at a time is held beside the result.
    Raises ValueError as `ops.prepare` does.
    """
    held: list[Tensor | None] = []
    for expert in range(len(experts.B)):
        B, c, s = (None if tensor is None else tensor[expert] for tensor in experts)
        one = arrange(B, c, group_size, in_features, dtype, device, s, _short_lived)
        if not held:
            held = [None if t is None else t.new_empty(len(experts.B), *t.shape) for t in one[:4]]
            if held[0].device.type == "cpu":
                held[0] = cpu.pages().tensor(held[0].shape)
        for all_experts, tensor in zip(held, one[:4], strict=True):
            if tensor is not None:
                all_experts[expert] = tensor
    return PreparedExperts(*held, in_features, experts.B.shape[-1], group_size)


def moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    up: PreparedExperts,
    down: PreparedExperts,
    activation: Activation,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    weights_on_input: bool = False,
) -> Tensor:
    """y [T, H] in x.dtype: y[t] = sum over a of w (down_e(act(up_e(x[t]) + up_bias[e])) + down_bias[e]), where
    e = topk_ids[t, a] and w = topk_weights[t, a].

    x: [T, H] fp32, fp16 or bf16; topk_weights: fp32 [T, A]; topk_ids: int32 or int64 [T, A]. Ids outside [0, E), such
    as -1 for experts of other ranks, contribute nothing. up: K = H and N = 2I, the gate's outputs before those of up,
    or N = I for an activation without a gate; down: K = I, N = H; biases [E, N]. With `weights_on_input` (Llama 4)
    w multiplies x, and the output no more.
    Sums are fp32, the activation's output is rounded to x.dtype. Inference only: no gradient flows. On CUDA neither
    host nor device waits for the other, but in fp32.
    Raises ValueError for an unknown activation, x in another dtype and sizes that don't fit together.
    """
    activations.check(activation)
    check_activations(x)
    if x.ndim != 2 or x.shape[1] != up.in_features:
        raise ValueError(f"x {tuple(x.shape)} is not [tokens, {up.in_features}], what the experts were quantized with")
    if (activation.inner(up.out_features), x.shape[1]) != (down.in_features, down.out_features):
        raise ValueError(
            f"experts of {up.in_features} inputs and {up.out_features} outputs with {activation.name} don't fit "
            f"second matrices of {down.in_features} inputs and {down.out_features} outputs"
        )
    experts = up.planes.shape[0]
    if down.planes.shape[0] != experts:
        raise ValueError(f"{experts} experts don't fit second matrices of {down.planes.shape[0]}")
    check_bias(up_bias, experts, up.out_features)
    check_bias(down_bias, experts, down.out_features)
    if topk_ids.shape != topk_weights.shape or topk_ids.ndim != 2 or len(topk_ids) != len(x):
        raise ValueError(
            f"topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} must both be "
            f"[{len(x)} tokens, experts of each]"
        )
    return torch.ops.bpdq.moe(x, topk_weights, topk_ids, *up, *down, up_bias, down_bias, *activation, weights_on_input)
