"""Dequantize and multiply with plain torch: the oracle of every kernel, and the path of devices without one."""

import torch
from torch import Tensor

from bpdq_kernels.activation import Activation, activate
from bpdq_kernels.layout import WORD, PreparedExperts, check_layer, coefficients, expand_words, trim
from bpdq_kernels.trellis import planes_of

_CHUNK = 1 << 19  # weights computed at a time: 2 MiB of fp32 stay in cache


def dequantize_t(
    B: Tensor, c: Tensor, group_size: int, in_features: int, dtype: torch.dtype, s: Tensor | None = None
) -> Tensor:
    """Transposed weight [K, N] in `dtype`, computed in fp32 and rounded once.

    B: int32 [ceil(K/32), k, N] (may carry padding words), c: [ceil(K/G), k+1, N] floating point, or int8 with s; of
    trellis-coded planes [ceil(K/G), k+2, N].
    """
    B = trim(B, in_features)
    words, _, n = B.shape
    k = c.shape[1] - 1
    weight = torch.empty(words, WORD, n, dtype=dtype, device=B.device)
    step = max(1, _CHUNK // (WORD * max(1, n)))
    for start in range(0, words, step):
        block = slice(start, min(start + step, words))
        group = torch.arange(block.start, block.stop, device=B.device) * WORD // group_size
        coeff = coefficients(c[group], s).unsqueeze(1)  # [words, 1, k+1, N]
        w = coeff[:, :, k].expand(-1, WORD, -1).clone()
        for p, bits in enumerate(expand_words(planes_of(B[block], c))):  # [words, 32, N]
            w.addcmul_(coeff[:, :, p], bits.float())
        weight[block] = w
    return weight.flatten(0, 1)[:in_features]


def dequantize(B: Tensor, c: Tensor, group_size: int, in_features: int, s: Tensor | None = None) -> Tensor:
    """Weight [N, K] fp32 of bit-planes B, coefficients c and their scales s, if any (shapes in `bpdq_kernels.layout`).

    Raises ValueError where the shapes of B, c and s don't describe K = `in_features` inputs.
    """
    check_layer(B, c, group_size, in_features, s)
    return dequantize_t(B, c, group_size, in_features, torch.float32, s).T.contiguous()


def rows(
    B: Tensor,
    c: Tensor,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
    ids: Tensor,
    s: Tensor | None = None,
) -> Tensor:
    """[*ids.shape, K] in `dtype`, contiguous: weights of the outputs that B, c and s hold, one for each of `ids`."""
    weight = dequantize_t(B, c, group_size, in_features, dtype, s)
    return weight.T.contiguous().view(*ids.shape, in_features)


@torch.no_grad()  # a graph would hold every layer's dequantized weights
def linear(x: Tensor, B: Tensor, c: Tensor, group_size: int, bias: Tensor | None, s: Tensor | None = None) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias, with W rounded to x.dtype as a 16-bit layer would hold it."""
    weight = dequantize_t(B, c, group_size, x.shape[-1], x.dtype, s)
    return torch.nn.functional.linear(x, weight.T, bias)


@torch.no_grad()
def moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    up: PreparedExperts,
    down: PreparedExperts,
    activation: Activation,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    weights_on_input: bool,
) -> Tensor:
    """As `bpdq_kernels.moe.moe`, one expert after the other in fp32; `up` and `down` hold the tensors as stored."""
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        if not 0 <= expert < len(up.planes):
            continue
        token, choice = (topk_ids == expert).nonzero(as_tuple=True)
        weight = topk_weights[token, choice].float().unsqueeze(1)
        rows = x[token].float()
        h = _expert(rows * weight if weights_on_input else rows, up, expert, up_bias)
        out = _expert(activate(h, activation).to(x.dtype).float(), down, expert, down_bias)
        y.index_add_(0, token, out if weights_on_input else out * weight)
    return y.to(x.dtype)


def _expert(rows: Tensor, experts: PreparedExperts, expert: int, bias: Tensor | None) -> Tensor:
    """rows [M, K] fp32 @ W.T + bias of one of the experts, in fp32."""
    B, c, s = (None if tensor is None else tensor[expert] for tensor in experts.stored)
    return linear(rows, B, c, experts.group_size, None if bias is None else bias[expert].float(), s)
