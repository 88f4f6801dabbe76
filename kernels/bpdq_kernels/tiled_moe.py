"""The experts of a layer on CUDA: picks the kernels for a batch, and brings everything into shapes that they take."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bpdq_kernels import triton_activation, triton_expert_gemm, triton_expert_gemv, triton_routing
from bpdq_kernels.activation import Activation
from bpdq_kernels.dispatch import Experts, Gemm, Gemv, Matrix, experts_config
from bpdq_kernels.layout import PreparedExperts, Tiles, cdiv
from bpdq_kernels.tiled_linear import aligned, in_words, machine

SCRATCH_BYTES = 128 << 20  # of outputs that are not yet summed over a token's experts, at a time


def tiled_moe(
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
    """As `bpdq_kernels.moe.moe` for x in fp16 or bf16 and tiles of experts.

    Allocates, besides y, SCRATCH_BYTES at most of the second matrices' outputs, and those of the first ones, up to I/2H
    as much. Raises ValueError if the experts were prepared for another dtype.
    """
    for matrix in (up, down):
        dtype = Tiles(*matrix[:4]).dtype
        if x.dtype != dtype:
            raise ValueError(
                f"the experts were prepared for {dtype} activations, not {x.dtype}: pass dtype to prepare_experts"
            )
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tokens, choices = topk_ids.shape
    if not choices:
        return y.zero_()
    ids = topk_ids if topk_ids.dtype == torch.int32 else topk_ids.clamp(-1, len(up.planes)).to(torch.int32)
    sizes = (choices, len(up.planes), matrix_of(up), matrix_of(down), activation.is_gated)
    step = max(1, SCRATCH_BYTES // (4 * x.shape[1] * choices))
    with torch.cuda.device_of(x):
        for start in range(0, tokens, step):
            part = slice(start, min(start + step, tokens))
            config = experts_config(part.stop - start, *sizes, *machine(x.device))
            batch = x[part], topk_weights[part], ids[part]
            for launch in launches(*batch, up, down, activation, up_bias, down_bias, weights_on_input, y[part], config):
                launch()
    return y


def matrix_of(experts: PreparedExperts) -> Matrix:
    """What the dispatch wants to know of them."""
    tiles = Tiles(*experts[:4])
    return Matrix(
        tiles.multiplied, experts.group_size, experts.out_features, experts.in_features, tiles.coefficient_bits
    )


def launches(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    up: PreparedExperts,
    down: PreparedExperts,
    activation: Activation,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    weights_on_input: bool,
    y: Tensor,
    config: Experts,
) -> Iterator[Callable[..., None]]:
    """The kernels that write y [T, H], one after the other, as `config` says; all take `compile_only`. topk_ids:
    int32."""
    experts, choices = len(up.planes), topk_ids.shape[1]
    ids, weights = topk_ids.reshape(-1), topk_weights.float().reshape(-1)
    if weights_on_input:
        x = (x.unsqueeze(1) * topk_weights.float().unsqueeze(2)).to(x.dtype).flatten(0, 1)
    inner = down.in_features
    new = x.new_empty if inner % 8 == 0 else x.new_zeros  # vectors may end beyond a row, where 0 counts nothing
    h = new(ids.numel(), cdiv(inner, 8) * 8)
    outputs = x.new_empty(ids.numel(), y.shape[1], dtype=torch.float32)
    routing = None
    if config.is_sorted:
        routing = triton_routing.new_routing(ids, experts, config.up.tokens)
        yield partial(triton_routing.route, ids, routing, config.up.tokens)
    first = choices if not weights_on_input else 1
    if activation.is_gated and not config.is_fused:
        gate_up = x.new_empty(ids.numel(), 2 * inner, dtype=torch.float32)
        yield partial(multiply, x, ids, routing, first, up, up_bias, None, gate_up, config.up)
        yield partial(triton_activation.launch, gate_up, activation, h[:, :inner])
    else:
        yield partial(multiply, x, ids, routing, first, up, up_bias, activation, h[:, :inner], config.up)
    yield partial(multiply, h, ids, routing, 1, down, down_bias, None, outputs, config.down)
    yield partial(triton_routing.combine, outputs, ids, None if weights_on_input else weights, experts, y)


def multiply(
    x: Tensor,
    ids: Tensor,
    routing: triton_routing.Routing | None,
    choices: int,
    experts: PreparedExperts,
    bias: Tensor | None,
    activation: Activation | None,
    y: Tensor,
    config: Gemv | Gemm,
    compile_only: bool = False,
) -> None:
    """Write the activation of one matrix's products into y, rows of pairs: of rows p // choices of x, pairs p."""
    tiles = Tiles(*experts[:4])
    rest = (choices, tiles, experts.group_size, bias, activation, y, config, compile_only)
    if isinstance(config, Gemv):
        triton_expert_gemv.launch(in_words(x), ids, *rest)
        return
    x = aligned(x)
    if routing is None:
        triton_expert_gemm.launch(x, ids, None, *rest)
    else:
        triton_expert_gemm.launch(x, routing.blocks, routing.order, *rest)
