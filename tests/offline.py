"""The Triton kernels compiled without a GPU, as their launches would compile them."""

import re
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from benchmarks.sass import disassemble, read_listing
from bpdq_kernels import (
    triton_activation,
    triton_embedding,
    triton_expert_gemm,
    triton_expert_gemv,
    triton_gemm,
    triton_gemv,
    triton_linear,
)
from bpdq_kernels.activation import Activation
from bpdq_kernels.dispatch import MAX_COEFFICIENTS, MAX_COEFFICIENTS_TRELLIS, Dense, Gemm, Gemv, Matrix, many_tokens_fit
from bpdq_kernels.layout import groups_in_unit
from bpdq_kernels.triton_dequantize import UNITS, dequantize_kernel
from bpdq_kernels.triton_dequantize import options as dequantize_options
from bpdq_kernels.triton_linear import Tile, linear_kernel

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
POINTERS = {FP32: "*fp32", FP16: "*fp16", BF16: "*bf16"}
GEMV = [Gemv(tiles, warps) for tiles in (1, 2, 4) for warps in (4, 8)]
GEMM = [
    Gemm(tokens, *tile) for tokens in (8, 16) for tile in ((1, 8, 8), (2, 8, 8), (2, 4, 4), (1, 16, 16), (2, 16, 16))
]
GEMM_ONE_TILE = [Gemm(64, 1, 8, 8), Gemm(64, 1, 4, 4), Gemm(64, 1, 4, 2)]  # where two tiles do not fit
EXPERT_GEMV = [Gemv(tiles, warps) for tiles in (1, 2, 4) for warps in (2, 4, 8)]
EXPERT_GEMM = [Gemm(tokens, 2, 4, split) for tokens in (8, 16, 32, 64) for split in (2, 4)]
GEMM += [Gemm(32, 2, 8, 8), Gemm(32, 2, 4, 4), Gemm(64, 2, 8, 8), Gemm(64, 2, 4, 4), Gemm(64, 2, 4, 2)]

# of a block at most: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"
_SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class OfflineDriver:
    """What Triton asks of a GPU's driver before it launches; a device of its own, so that nothing compiled stays."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 86, 32)

    def get_current_device(self) -> str:
        return "offline"

    def get_current_stream(self, device: str) -> int:
        return 0


class Layer(NamedTuple):
    """The fields print as the test's name."""

    planes: int
    group: int
    N: int
    K: int
    dtype: torch.dtype
    coefficient_bits: int = 16
    trellis: bool = False  # one plane more is multiplied

    def __str__(self) -> str:
        code = "-trellis" if self.trellis else ""
        width = "-c8" if self.coefficient_bits == 8 else ""
        return f"k{self.planes}{code}-G{self.group}-N{self.N}-K{self.K}-{str(self.dtype)[6:]}{width}"

    @property
    def multiplied(self) -> int:
        return self.planes + self.trellis

    def constants(self) -> dict[str, int]:
        """What every kernel for tiles wants to know of it."""
        return {"PLANES": self.multiplied, "STORED": self.planes, "GROUP": self.group}


def name(value: object) -> str:
    """Of a test's parameter: no signs that `-k` would not take."""
    if isinstance(value, Gemv | Gemm | Tile):
        return type(value).__name__ + "x".join(str(field) for field in value)
    return "embedding" if value is None else str(value)


def fits(
    config: Gemv | Gemm, planes: int, group: int, coefficient_bits: int = 16, trellis: bool = False, arch: int = 86
) -> bool:
    """Whether the dispatch may pick this configuration for a layer of so many planes to multiply: not if its
    coefficients fill the registers."""
    eight = coefficient_bits == 8
    if isinstance(config, Gemm) and config.tokens == 64:
        if eight:
            return config.tiles == (1 if planes == 4 or (planes, arch) == (1, 100) else 2)
        return config.tiles == (1 if (config.split, planes, group) == (8, 3, 64) else 2)
    if isinstance(config, Gemm):
        if trellis and eight and arch == 90 and (config, planes) == (Gemm(16, 2, 8, 8), 3):
            return False
        few = (config.tokens <= 16 and group == 32) or (config.tokens == 8 and arch == 100)
        return config.tiles == 1 or not ((few and eight and planes == 4) or (config.warps == 16 and planes > 2))
    coefficients = config.tiles * groups_in_unit(group) * (planes + 1)
    if config == Gemv(2, 8) and planes == 4 and eight:
        return False
    if config.warps == 8:
        return coefficients < MAX_COEFFICIENTS
    room = MAX_COEFFICIENTS_TRELLIS if trellis and config.tiles == 2 else MAX_COEFFICIENTS
    return config.tiles == 1 or coefficients <= room


def compile_kernel(
    kernel: triton.JITFunction,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: set[str],
    arch: int,
    options: dict[str, int],
) -> CompiledKernel:
    """types: of every argument, constants come first; divisible: arguments that 16 divides."""
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={name: value for name, value in constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible - constants.keys()},
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_tiled(
    config: Gemv | Gemm, layer: Layer, bias: bool, arch: int = 86, result: torch.dtype | None = None
) -> CompiledKernel:
    """The kernel as its `launch` would start it for a layer of these sizes; result: fp32 in place of 16 bits."""
    if isinstance(config, Gemv):
        kernel, options = triton_gemv.gemv_kernel, triton_gemv.options(config)
    else:
        kernel = triton_gemm.gemm_kernel
        options = triton_gemm.options(config, layer.multiplied, layer.coefficient_bits, layer.trellis)
    x = POINTERS[layer.dtype]
    types = {"x_ptr": x, "planes_ptr": "*i32", "scales_ptr": "*fp32", "ratios_ptr": "*i32", "bias_ptr": x}
    types |= {"coefficients_ptr": "*i16" if layer.coefficient_bits == 8 else "*i32"}
    types |= {"y_ptr": POINTERS[result or layer.dtype], "M": "i32", "N": "i32", "K": "i32", "stride_x": "i32"}
    constants = layer.constants() | {"WHOLE": layer.K % 128 == 0, "TILES": config.tiles}
    constants |= {"WARPS": config.warps, "BF16": layer.dtype == BF16}
    if isinstance(config, Gemm):
        constants |= {"TOKENS": config.tokens, "SPLIT": config.split}
    if not bias:
        constants["bias_ptr"] = None
    if layer.coefficient_bits == 16:
        constants["ratios_ptr"] = None
    divisible = {name for name in types if name.endswith("_ptr")}
    divisible |= {"N"} if layer.N % 16 == 0 else set()
    divisible |= {"K", "stride_x"} & set(kernel.arg_names) if layer.K % 16 == 0 else set()
    return compile_kernel(kernel, types, constants, divisible, arch, options)


class ExpertLayer(NamedTuple):
    """One matrix of each expert; activation: None for the second one. The fields print as the test's name."""

    layer: Layer
    activation: Activation | None
    is_fused: bool = False  # the gate is multiplied where the matrix is
    is_sorted: bool = False

    def __str__(self) -> str:
        return "-".join([str(self.layer), self.activation.name if self.activation else "down"])

    def takes(self, config: Gemv | Gemm) -> bool:
        """Whether the dispatch may pick this configuration: not if the coefficients fill the registers."""
        if isinstance(config, Gemm):
            planes, group, N, K, _, coefficient_bits, trellis = self.layer
            matrix = Matrix(planes + trellis, group, N, K, coefficient_bits)
            return config.tokens < 64 or many_tokens_fit(matrix)
        if self.is_fused:
            full = 2 * groups_in_unit(self.layer.group) * (self.layer.multiplied + 1) >= MAX_COEFFICIENTS
            return config.tiles == 2 and (config.warps < 8 or not full)
        return fits(config, self.layer.multiplied, self.layer.group)


def compile_expert(config: Gemv | Gemm, experts: ExpertLayer, bias: bool, arch: int = 86) -> CompiledKernel:
    """The kernel as its `launch` would start it for experts of these sizes."""
    layer, x = experts.layer, POINTERS[experts.layer.dtype]
    if isinstance(config, Gemv):
        kernel = triton_expert_gemv.expert_gemv_kernel
        options = triton_expert_gemv.options(config, layer.multiplied, layer.group)
    else:
        kernel = triton_expert_gemm.expert_gemm_kernel
        options = triton_expert_gemm.options(config, layer.multiplied, layer.coefficient_bits)
    types = {"x_ptr": x, "planes_ptr": "*i32", "scales_ptr": "*fp32", "ratios_ptr": "*i32", "bias_ptr": x}
    types |= {"coefficients_ptr": "*i16" if layer.coefficient_bits == 8 else "*i32"}
    types |= {"ids_ptr": "*i32", "blocks_ptr": "*i32", "order_ptr": "*i32"}
    types |= {"y_ptr": x if experts.is_fused or experts.activation else "*fp32"}
    types |= dict.fromkeys(("E", "N", "K", "stride_x", "stride_y", "choices"), "i32")
    constants = layer.constants() | {"WHOLE": layer.K % 128 == 0, "TILES": config.tiles}
    constants |= {"WARPS": config.warps, "BF16": layer.dtype == BF16}
    constants |= triton_activation.constants(experts.activation, experts.is_fused)
    constants |= {"TOKENS": config.tokens, "SPLIT": config.split} if isinstance(config, Gemm) else {}
    constants |= {} if bias else {"bias_ptr": None}
    constants |= {"ratios_ptr": None} if layer.coefficient_bits == 16 else {}
    constants |= {} if experts.is_sorted else {"order_ptr": None}
    divisible = {"x_ptr", "planes_ptr", "coefficients_ptr", "scales_ptr", "ratios_ptr", "bias_ptr"} - (
        {"x_ptr"} if isinstance(config, Gemv) else set()
    )
    divisible |= {"N"} if layer.N % 16 == 0 else set()
    divisible |= {"K", "stride_x"} & set(kernel.arg_names) if layer.K % 16 == 0 else set()
    divisible |= {"stride_y"} if layer.N % 32 == 0 else set()
    return compile_kernel(kernel, types, constants, divisible, arch, options)


def compile_stored(
    arch: int,
    tile: Tile,
    dtype: torch.dtype,
    planes: int,
    group: int,
    aligned: bool = True,
    coefficient_bits: int = 16,
    trellis: bool = False,
) -> CompiledKernel:
    """The kernel as `stored_linear` would launch it, with pointers and sizes divisible by 16 or not."""
    x = POINTERS[dtype]
    types = {"x_ptr": x, "B_ptr": "*i32", "c_ptr": "*bf16", "s_ptr": "*bf16", "bias_ptr": x, "y_ptr": x}
    types |= {"c_ptr": "*i8"} if coefficient_bits == 8 else {}
    divisible = {*types, "N", "K", "stride_x"} if aligned else set()
    types |= {"M": "i32", "N": "i32", "K": "i32", "stride_x": "i32"}
    constants = {"PLANES": planes + trellis, "STORED": planes, "GROUP": group, "INTERPRETED": False}
    constants |= {"TILE_M": tile.m, "TILE_N": tile.n, "TILE_K": min(tile.k, group)}
    constants |= {} if coefficient_bits == 8 else {"s_ptr": None}
    return compile_kernel(linear_kernel, types, constants, divisible, arch, triton_linear.options(tile))


def coefficient_types(layer: Layer) -> dict[str, str]:
    """Of the pointers to coefficients, scales and ratios, for the kernels that read single coefficients."""
    width = "*i8" if layer.coefficient_bits == 8 else POINTERS[layer.dtype]
    return {"coefficients_ptr": width, "scales_ptr": "*fp32", "ratios_ptr": POINTERS[layer.dtype]}


def compile_embedding(arch: int, layer: Layer) -> CompiledKernel:
    """The kernel as `triton_embedding.launch` would start it for int64 numbers and rows in the layer's dtype."""
    types = {"ids_ptr": "*i64", "planes_ptr": "*i32", "y_ptr": POINTERS[layer.dtype]} | coefficient_types(layer)
    divisible = {*types, "N", "K"}
    types |= {"N": "i32", "K": "i32"}
    constants = layer.constants() | {"UNITS": 8}
    constants |= {} if layer.coefficient_bits == 8 else {"ratios_ptr": None}
    options = triton_embedding.options(layer.multiplied)
    return compile_kernel(triton_embedding.embedding_kernel, types, constants, divisible, arch, options)


def compile_dequantize(arch: int, layer: Layer) -> CompiledKernel:
    """The kernel as `triton_dequantize.dequantize` would start it for weights in the layer's dtype."""
    types = {"planes_ptr": "*i32", "w_ptr": POINTERS[layer.dtype]} | coefficient_types(layer)
    divisible = {*types, "K"}
    types |= {"first_tile": "i32", "N": "i32", "K": "i32"}
    constants = layer.constants() | {"UNITS": UNITS}
    constants |= {} if layer.coefficient_bits == 8 else {"ratios_ptr": None}
    return compile_kernel(dequantize_kernel, types, constants, divisible, arch, dequantize_options())


def flaws(arch: int, kernel: Gemv | Gemm | Dense | Tile | None, layer: Layer | ExpertLayer) -> list[str]:
    """What is wrong with the machine code of a layer's kernel: of the configuration, `stored_linear`'s of the tile, or
    the embedding's (None)."""
    if isinstance(layer, ExpertLayer):
        compiled = compile_expert(kernel, layer, bias=True, arch=arch)
        multiplies = "BMMA" if isinstance(kernel, Gemv) else "HMMA"
    elif isinstance(kernel, Dense):
        compiled, multiplies = compile_dequantize(arch, layer), ""
    elif kernel is None:
        compiled, multiplies = compile_embedding(arch, layer), ""
    elif isinstance(kernel, Tile):
        scheme = layer.planes, layer.group, True, layer.coefficient_bits, layer.trellis
        compiled = compile_stored(arch, kernel, layer.dtype, *scheme)
        multiplies = "FFMA" if layer.dtype == FP32 else r"(HMMA|HGMMA|UTCHMMA)"
    else:
        compiled = compile_tiled(kernel, layer, bias=True, arch=arch)
        multiplies = "BMMA" if isinstance(kernel, Gemv) else "HMMA"
    listing = disassemble(compiled.asm["cubin"])
    code = read_listing(listing)
    found = {
        f"{code.spills} spills": code.spills,
        f"{code.subroutines} subroutines": code.subroutines,
        f"no {multiplies}": not re.search(rf"\b{multiplies}", listing),
        f"{compiled.metadata.shared} bytes of shared memory": compiled.metadata.shared > _SHARED_BYTES[arch],
    }
    return [f"sm_{arch} {kernel} {layer}: {flaw}" for flaw, is_there in found.items() if is_there]
