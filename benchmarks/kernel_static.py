"""Kernels compiled without a GPU, and the time their machine code and bytes allow: `kernel_bench --static`."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.sass import MACHINES, Code, Machine, clocks, ctas_per_sm, read_cubin
from benchmarks.shapes import MODELS, Layer
from bpdq_kernels import triton_activation, triton_expert_gemm, triton_expert_gemv, triton_gemm, triton_gemv
from bpdq_kernels.activation import Activation
from bpdq_kernels.dispatch import Config, Dense, balance, linear_config
from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import GROUP_SIZES, MAX_PLANES, TILE_ROWS, UNIT, cdiv, groups_in_unit

SWEEP_TOKENS = (1, 8, 16, 64)
MIN_IN_FLIGHT = 7000  # bytes per SM that cover DRAM latency on an RTX 3090: 936 GB/s x 0.6 us / 82
MAX_IDLE = 0.15


class Variant(NamedTuple):
    """One compilation of a kernel: stored planes, group size, tile, the activations' dtype (Triton's name), the width
    of the coefficients, of experts which matrix: "gate_up" or "down", and whether the planes are trellis-coded."""

    planes: int
    group: int
    config: Config
    dtype: str = "bf16"
    coefficient_bits: int = 16
    matrix: str = ""
    trellis: bool = False

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.planes, self.group, self.coefficient_bits)

    @property
    def tokens(self) -> int:
        """Tokens per block."""
        return getattr(self.config, "tokens", 1)

    @property
    def name(self) -> str:
        if isinstance(self.config, Dense):
            return f"dense-{scheme_name(self.scheme, self.trellis)}-n{self.config.outputs}"
        tile = f"t{self.config.tiles}-w{self.config.warps}-s{self.split}"
        kernel = f"{self.matrix and 'experts-'}{'gemv' if self.tokens == 1 else 'gemm'}"
        matrix = self.matrix and f"-{self.matrix}"
        return f"{kernel}-{scheme_name(self.scheme, self.trellis)}-m{self.tokens}-{tile}{matrix}"

    @property
    def multiplied(self) -> int:
        """Planes that are multiplied."""
        return self.planes + self.trellis

    @property
    def split(self) -> int:
        """Warps among which a tile's inputs are divided."""
        return getattr(self.config, "split", self.config.warps)

    @property
    def outputs(self) -> int:
        """Outputs per block."""
        return TILE_ROWS * self.config.tiles * self.config.warps // self.split

    @property
    def weights_per_trip(self) -> int:
        """Weights that a block consumes in one trip of the main loop: a unit of each of its tiles per warp."""
        return self.config.warps * self.config.tiles * TILE_ROWS * UNIT

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return self.planes + self.coefficient_bits * (self.multiplied + 1) / self.group

    def tiled_bytes(self, layer: Layer) -> int:
        """Bytes of a layer's `bpdq_kernels.layout.Tiles`."""
        size = self.scheme.tiled_bytes(layer.out_features, layer.in_features)
        if self.trellis:  # one coefficient more of each group, and ratio
            groups = cdiv(cdiv(layer.in_features, UNIT) * UNIT, self.group)
            each = 2 * groups if self.coefficient_bits == 16 else groups + 2
            size += cdiv(layer.out_features, 4 * TILE_ROWS) * 4 * TILE_ROWS * each
        return size

    @property
    def bytes_ahead(self) -> int:
        """Bytes of planes and coefficients that a warp has requested and not yet received, at most."""
        groups = groups_in_unit(self.group)
        per_tile = TILE_ROWS * (UNIT * self.planes + self.coefficient_bits * (self.multiplied + 1) * groups) // 8
        return self.config.tiles * per_tile


class Kernel(NamedTuple):
    """A compiled variant: its cubin and what it says; `shared` in bytes and `ctas` per SM."""

    variant: Variant
    cubin: bytes
    code: Code
    shared: int
    ctas: int


def scheme_name(scheme: Scheme, trellis: bool = False) -> str:
    width = "-c8" if scheme.coefficient_bits == 8 else ""
    return f"k{scheme.bits}{'-trellis' if trellis else ''}-g{scheme.group_size}{width}"


def config_for(
    tokens: int,
    layer: Layer,
    planes: int,
    group: int,
    multiprocessors: int,
    arch: int,
    coefficient_bits: int = 16,
    trellis: bool = False,
) -> Config:
    """What `bpdq_kernels.tiled_linear` dispatches to; planes: those multiplied."""
    sizes = (layer.out_features, layer.in_features, multiprocessors, arch)
    return linear_config(tokens, planes, group, *sizes, coefficient_bits, trellis)


@cache
def compile_kernel(variant: Variant, arch: str) -> Kernel:
    """Compile for sizes and pointers that 16 divides and inputs that 128 divides, without a bias, as `launch` would;
    experts with a gate and silu."""
    kernel, options = kernel_of(variant)
    activations = f"*{variant.dtype}"
    types = {"x_ptr": activations, "planes_ptr": "*i32", "scales_ptr": "*fp32"}
    eight = variant.coefficient_bits == 8
    types |= {"coefficients_ptr": "*i16", "ratios_ptr": "*i32"} if eight else {"coefficients_ptr": "*i32"}
    types |= {"y_ptr": activations, "M": "i32", "N": "i32", "K": "i32", "stride_x": "i32"}
    constants: dict[str, Any] = {"PLANES": variant.multiplied, "STORED": variant.planes, "GROUP": variant.group}
    constants |= {"WHOLE": True, "bias_ptr": None}
    constants |= {} if eight else {"ratios_ptr": None}
    constants |= {"TILES": variant.config.tiles, "WARPS": variant.config.warps, "SPLIT": variant.split}
    constants |= {"TOKENS": variant.tokens, "BF16": variant.dtype == "bf16"}
    if variant.matrix:
        types |= dict.fromkeys(("ids_ptr", "blocks_ptr", "order_ptr"), "*i32") | {"y_ptr": "*fp32"}
        types |= dict.fromkeys(("E", "stride_y", "choices"), "i32")
        gated = variant.matrix == "gate_up"
        types |= {"y_ptr": activations} if gated else {}
        constants |= triton_activation.constants(Activation("silu") if gated else None, gated)
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={name: value for name, value in constants.items() if name in names},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if name in types and name not in ("M", "E", "choices")
        },
    )
    target = GPUTarget("cuda", MACHINES[arch].capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    cubin, shared = compiled.asm["cubin"], compiled.metadata.shared
    code = read_cubin(cubin)
    ctas = ctas_per_sm(code.registers, shared, variant.config.warps, MACHINES[arch])
    return Kernel(variant, cubin, code, shared, ctas)


def kernel_of(variant: Variant) -> tuple[triton.JITFunction, dict[str, Any]]:
    """The kernel and its compiler options."""
    planes, group, config, bits = variant.multiplied, variant.group, variant.config, variant.coefficient_bits
    if variant.matrix and variant.tokens == 1:
        return triton_expert_gemv.expert_gemv_kernel, triton_expert_gemv.options(config, planes, group)
    if variant.matrix:
        return triton_expert_gemm.expert_gemm_kernel, triton_expert_gemm.options(config, planes, bits)
    if variant.tokens == 1:
        return triton_gemv.gemv_kernel, triton_gemv.options(config)
    return triton_gemm.gemm_kernel, triton_gemm.options(config, planes, bits, variant.trellis)


def variants(
    models: Sequence[str],
    tokens: Sequence[int],
    planes: int,
    group: int,
    machine: Machine,
    dtype: str = "bf16",
    coefficient_bits: int = 16,
    trellis: bool = False,
) -> list[Variant]:
    """The layers' kernels at `planes` and `group`; then all k and G = 32..256 with the tile of a gate_up layer."""
    layers = [layer for name in models for layer in (*MODELS[name].layers, MODELS[name].head)]
    widest = max((layer for name in models for layer in MODELS[name].layers), key=lambda layer: layer.out_features)
    wanted = [(planes, group, m, layer) for m in tokens for layer in layers]
    wanted += [(k, g, m, widest) for k in stored_planes(trellis) for g in GROUP_SIZES for m in SWEEP_TOKENS]
    rest = (machine, dtype, coefficient_bits, trellis)
    chosen = [variant_for(m, layer, k, g, *rest) for k, g, m, layer in wanted]
    return [variant for variant in dict.fromkeys(chosen) if not isinstance(variant.config, Dense)]


def stored_planes(trellis: bool) -> range:
    """Which numbers of planes may be stored."""
    return range(1, MAX_PLANES + 1 - trellis)


def variant_for(
    tokens: int,
    layer: Layer,
    planes: int,
    group: int,
    machine: Machine,
    dtype: str,
    coefficient_bits: int = 16,
    trellis: bool = False,
) -> Variant:
    """The kernel that multiplies so many tokens with a layer."""
    multiplied, sms, arch = planes + trellis, machine.multiprocessors, machine.capability
    config = config_for(tokens, layer, multiplied, group, sms, arch, coefficient_bits, trellis)
    return Variant(planes, group, config, dtype, coefficient_bits, trellis=trellis)


def over_dram(kernel: Kernel, machine: Machine) -> dict[str, float]:
    """Time of the main loop on each pipe, over the time in which DRAM delivers its weights once."""
    variant = kernel.variant
    dram = variant.weights_per_trip * variant.bits / 8 / machine.bytes_per_clock
    busy = clocks(kernel.code.trip, machine.rates)
    return {pipe: variant.config.warps * time / dram for pipe, time in busy.items()}


def instructions_per_weight(kernel: Kernel) -> float:
    """Thread instructions of the main loop per weight."""
    return kernel.code.trip["issue"] * 32 * kernel.variant.config.warps / kernel.variant.weights_per_trip


def dequantization_share(kernel: Kernel, machine: Machine) -> float:
    """What makes weights, of the issue slots in the time that a trip's busiest pipe takes. A GEMV makes none."""
    if kernel.variant.tokens == 1:
        return 0.0
    return kernel.code.dequantization / (max(clocks(kernel.code.trip, machine.rates).values()) * machine.rates["issue"])


def bars(variant: Variant) -> tuple[float, float] | None:
    """Upper bounds of HMMA and of every other pipe over DRAM time on an RTX 3090, where there are any."""
    k, group, m = variant.planes, variant.group, variant.tokens
    eight = variant.coefficient_bits == 8  # fewer bytes, so that DRAM takes less time
    if variant.trellis:  # as much work as with a plane more, and again fewer bytes
        if group != 128 or k == 1:
            return None
        few = {2: (0.80, 0.84) if eight else (0.80, 0.76), 3: (0.70, 0.75) if eight else (0.70, 0.70)}
        return {1: (0.45, 0.45), 8: few[k]}.get(m)
    if m == 1:
        return (0.40, 0.40) if k > 1 and group > 32 else None
    if m <= 8 and k in (3, 4) and group == 128:
        return 0.70, 0.70
    if m <= 8 and k == 2 and group in (64, 256):
        return 0.81 if eight else 0.80, 0.65
    if (k, group) != (2, 128):
        return None
    wide = {8: (0.72, 0.60), 16: (1.43, 0.70)}
    return ({8: (0.78, 0.63), 16: (1.55, 0.70)} if eight else wide).get(m)


def missed(kernel: Kernel, machine: Machine) -> list[str]:
    """Bars that a kernel misses, in words: spills and subroutines anywhere, pipes on an RTX 3090."""
    found = [f"{kernel.code.spills} spills"] if kernel.code.spills else []
    found += [f"{kernel.code.subroutines} subroutines"] if kernel.code.subroutines else []
    times, limits = over_dram(kernel, machine), bars(kernel.variant)
    if machine.arch != "sm_86":
        return found
    if limits:
        limit = {pipe: limits[not pipe.startswith("hmma")] for pipe in times}
        found += [f"{pipe} {time:.2f} > {limit[pipe]:.2f}" for pipe, time in times.items() if time > limit[pipe]]
    if kernel.variant.tokens == 64:
        hmma = times["hmma32"]
        found += [f"{p} {t / hmma:.0%} of HMMA" for p, t in times.items() if p != "hmma32" and t >= 0.6 * hmma]
        share = dequantization_share(kernel, machine)
        found += [f"dequantization {share:.0%} of issue slots"] if share > 0.15 else []
    return found


def kernel_row(kernel: Kernel, machine: Machine) -> dict[str, Any]:
    """A kernel's figures for the table and the JSON file."""
    times, variant = over_dram(kernel, machine), kernel.variant
    return {
        "name": variant.name,
        "registers": kernel.code.registers,
        "spills": kernel.code.spills,
        "shared": kernel.shared,
        "ctas_per_sm": kernel.ctas,
        "warps_per_sm": kernel.ctas * variant.config.warps,
        "instructions_per_weight": instructions_per_weight(kernel),
        "over_dram": times | {"bmma_at_half_rate": 2 * times["bmma"]},
        "dequantization_share": dequantization_share(kernel, machine),
        "missed": missed(kernel, machine),
    }


def layer_row(
    layer: Layer,
    tokens: int,
    planes: int,
    group: int,
    machine: Machine,
    dtype: str,
    coefficient_bits: int = 16,
    trellis: bool = False,
) -> dict[str, Any]:
    """How a layer's kernel fills the machine, and its predicted time: `fill` of its packed weights, read once."""
    variant = variant_for(tokens, layer, planes, group, machine, dtype, coefficient_bits, trellis)
    return fill(variant, layer, tokens, cdiv(tokens, variant.tokens), variant.tiled_bytes(layer), machine)


def fill(
    variant: Variant, layer: Layer, tokens: int, token_blocks: float, size: float, machine: Machine
) -> dict[str, Any]:
    """How blocks for all outputs of a layer and each of `token_blocks` fill the machine, and their predicted time: the
    larger of that in which DRAM delivers `size` bytes and the busiest pipe's.

    Pipes: the SM with most blocks, all their instructions, those around the loop too.
    """
    sms = machine.multiprocessors
    kernel = compile_kernel(variant, machine.arch)
    ctas = round(token_blocks * cdiv(layer.out_features, variant.outputs))
    trips = cdiv(cdiv(layer.in_features, UNIT), variant.split)
    trip, once = (clocks(part, machine.rates) for part in (kernel.code.trip, kernel.code.once))
    busy = {p: cdiv(ctas, sms) * variant.config.warps * (trips * trip[p] + once[p]) for p in machine.rates}
    pipe = max(busy, key=lambda p: busy[p])
    dram_us, pipe_us = size / machine.gbps / 1e3, busy[pipe] / machine.ghz / 1e3
    in_flight = min(kernel.ctas, ctas / sms) * variant.config.warps * variant.bytes_ahead
    idle = 1 - balance(ctas, sms)
    flags = [f"{ctas} CTAs for {sms} SMs"] if ctas < sms else []
    flags += [f"{idle:.0%} idle"] if idle > MAX_IDLE else []
    flags += [f"{in_flight:.0f} bytes in flight"] if in_flight < MIN_IN_FLIGHT else []
    return {
        "layer": layer._asdict(),
        "tokens": tokens,
        "kernel": variant.name,
        "ctas": ctas,
        "waves": ctas / sms,
        "idle": idle,
        "trips": trips,
        "bytes_in_flight": in_flight,
        "activation_bytes_over_weights": ctas * min(tokens, variant.tokens) * layer.in_features * 2 / size,
        "packed_bytes": size,
        "dram_us": dram_us,
        "pipe": pipe,
        "pipe_us": pipe_us,
        "predicted_us": max(dram_us, pipe_us),
        "missed": flags if tokens == 1 and machine.arch == "sm_86" else [],
    }


def model_row(
    model: str,
    planes: int,
    group: int,
    machine: Machine,
    dtype: str,
    coefficient_bits: int = 16,
    trellis: bool = False,
) -> dict[str, Any]:
    """Predicted tokens/s of one-token decoding and its DRAM roofline: all Linears and a 16-bit LM head only."""
    blocks, layers, head = MODELS[model]
    rows = [layer_row(layer, 1, planes, group, machine, dtype, coefficient_bits, trellis) for layer in layers]
    head_bytes = 2 * head.out_features * head.in_features
    size = blocks * sum(row["packed_bytes"] for row in rows) + head_bytes
    seconds = blocks * sum(row["predicted_us"] for row in rows) / 1e6 + head_bytes / machine.gbps / 1e9
    return {
        "model": model,
        "planes": planes,
        "group_size": group,
        "bytes_per_token": size,
        "bytes_in_memory": size + head_bytes,  # the embedding is as large as the head
        "tokens_per_s": 1 / seconds,
        "roofline_tokens_per_s": machine.gbps * 1e9 / size,
    }


def emit(kernels: Sequence[Kernel], folder: Path) -> None:
    """Write NAME.cubin for every kernel, and manifest.json for tools that read machine code."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = []
    for kernel in kernels:
        variant = kernel.variant
        (folder / f"{variant.name}.cubin").write_bytes(kernel.cubin)
        entry = {"name": variant.name, "m": variant.tokens, "k": variant.planes, "group_size": variant.group}
        entry |= {"trellis": True} if variant.trellis else {}
        entry |= {"block_n": variant.outputs, "weights_per_trip": variant.weights_per_trip}
        entry |= {"num_warps": variant.config.warps, "bits_per_weight": variant.bits, "loop": kernel.code.loop}
        manifest.append(entry)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
