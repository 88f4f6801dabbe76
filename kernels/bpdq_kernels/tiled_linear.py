"""The fast CUDA path: picks the kernel for a batch, and brings the activations into a shape that it takes."""

from functools import cache

import torch
from torch import Tensor

from bpdq_kernels import triton_dequantize, triton_gemm, triton_gemv
from bpdq_kernels.dispatch import Config, Dense, Gemv, linear_config
from bpdq_kernels.layout import Tiles

_ALIGNED = 8  # activations of 16 bits in 16 bytes


@cache
def machine(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and compute capability: 86 for 8.6."""
    if device.type == "cpu":  # Triton's interpreter
        return 1, 86
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def tiled_linear(x: Tensor, tiles: Tiles, out_features: int, group_size: int, bias: Tensor | None) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias [N] in x.dtype (fp16 or bf16), accumulated in fp32.

    tiles: W. Allocates nothing but y, unless x's inputs are strided, or its rows not aligned to 16 bytes (up to sm_90
    one token to 4); and from some hundred tokens on DENSE_BYTES of weights. Raises ValueError if the layer was prepared
    for another dtype.
    """
    if x.dtype != tiles.dtype:
        raise ValueError(f"the layer was prepared for {tiles.dtype} activations, not {x.dtype}: pass dtype to prepare")
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = x.reshape(-1, x.shape[-1])
    tokens, in_features = rows.shape
    if not tokens:
        return y
    with torch.cuda.device_of(x):
        layer = (tiles.multiplied, group_size, out_features, in_features)
        config = linear_config(tokens, *layer, *machine(x.device), tiles.coefficient_bits, tiles.has_trellis)
        launch(rows, tiles, group_size, bias, y.view(-1, out_features), config)
    return y


def launch(
    rows: Tensor,
    tiles: Tiles,
    group_size: int,
    bias: Tensor | None,
    y: Tensor,
    config: Config,
    compile_only: bool = False,
) -> None:
    """Write rows [M, K] W^T + bias into y [M, N] as `config` says, one row where it is a Gemv; or only compile that."""
    if isinstance(config, Gemv):
        triton_gemv.launch(in_words(rows[0]), tiles, group_size, bias, y[0], config, compile_only)
    elif isinstance(config, Dense):
        triton_dequantize.launch(rows, tiles, group_size, bias, y, config, compile_only)
    else:
        x = aligned(rows)
        triton_gemm.launch(x, tiles, group_size, bias, y, config, compile_only)


def aligned(rows: Tensor) -> Tensor:
    """rows [M, K] as they are if 16-byte vectors can read them, else a copy, padded to a multiple of 8 inputs."""
    missing = -rows.shape[1] % _ALIGNED
    if missing:
        return torch.nn.functional.pad(rows, (0, missing))
    if rows.stride(1) != 1 or rows.stride(0) % _ALIGNED or rows.data_ptr() % 16:
        return rows.clone(memory_format=torch.contiguous_format)
    return rows


def in_words(x: Tensor) -> Tensor:
    """x, of 16 bits, as it is if 32-bit words can read it from its start on, else a copy."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 4 else x
