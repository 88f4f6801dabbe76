"""Block by block over a model: calibrate, quantize, move on with the quantized block's outputs.

Within a block the Linears are grouped into stages, those that read the same tensor (q/k/v, o, gate/up, down), in
the order in which the forward pass reaches them. Each stage's Hessian is taken with all earlier stages already
quantized, and the rows of its Linears are solved together, as they share H.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from bpdq_kernels import dequantize, layout
from bpdq_kernels.format import Scheme
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.hessian import accumulate, symmetrize
from bpdq_quantizer.loader import BPDQLinear
from bpdq_quantizer.solver import Solution, quantize_linear
from bpdq_quantizer.tune import tune_block

ACTIVATION_BYTES = 1 << 30  # a calibration batch is as many windows as keep a block's activations within this

SMALL_STAGE = 8192  # rows; torch splits an operation from 32768 elements on, and a column step has 2^k - 1 per row


@dataclass
class LayerReport:
    """One quantized Linear. loss: tr((W - W_hat) H (W - W_hat)^T) with H = (2/n) X X^T, which is twice the mean
    squared output error per token, summed over outputs; relative_error: loss / tr(W H W^T); seconds: this
    Linear's share of its stage."""

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    bits_per_weight: float
    loss: float
    relative_error: float
    damping: float
    seconds: float


class BlockInputs(NamedTuple):
    """hidden: one tensor [1, L, D] per calibration window, on the CPU; calls: each block's other arguments."""

    hidden: list[Tensor]
    calls: list[tuple[tuple, dict[str, Any]]]


class _Recorder(nn.Module):
    """Stands in for a block while the inputs of all blocks are recorded: passes hidden states through."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule
        self.calls: list[tuple[Tensor, tuple, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((hidden, args, kwargs))
        return hidden


class _StageReached(Exception):  # noqa: N818, control flow
    pass


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's decoder blocks: the first ModuleList as long as config.num_hidden_layers."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth and linear_layers(module):
            return name, module
    raise InputError(f"{type(model).__name__}: no list of {depth} decoder blocks with Linear layers found")


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}


def check_supported(name: str, block: nn.Module) -> None:
    """Raise InputError for blocks that hold weights other than in Linears: fused experts would stay in 16 bits."""
    for parameter_name, parameter in block.named_parameters():
        if parameter.ndim > 2:
            raise InputError(
                f"{name}.{parameter_name} has shape {tuple(parameter.shape)}: mixture-of-experts and convolution "
                "blocks are not supported, choose a dense model"
            )


@torch.no_grad()
def block_inputs(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> BlockInputs:
    """Run the windows [W, L] through embedding and rotary tables, recording what each block would be called with.

    The arguments besides hidden states (masks, position embeddings) must not depend on the tokens, so that the
    first window's serve all; raises InputError for an architecture where they do.
    """
    originals = list(blocks)
    recorders = [_Recorder(block) for block in originals]
    _fill(blocks, recorders)
    try:
        for window in tokens:
            model.base_model(input_ids=window[None], use_cache=False)
    finally:
        _fill(blocks, originals)
    for recorder in recorders:
        first, last = recorder.calls[0][1:], recorder.calls[-1][1:]
        if not _same(first, last):
            raise InputError(f"{type(model).__name__} passes token-dependent arguments to its blocks: not supported")
    return BlockInputs([call[0] for call in recorders[0].calls], [r.calls[0][1:] for r in recorders])


def _fill(blocks: nn.ModuleList, modules: Sequence[nn.Module]) -> None:
    for i, module in enumerate(modules):
        blocks[i] = module


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or a == b


def run_block(block: nn.Module, call: tuple[tuple, dict[str, Any]], device: torch.device, hidden: Tensor) -> Tensor:
    args, kwargs = call
    out = block(hidden.to(device), *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def find_stages(block: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor) -> list[list[str]]:
    """Names of the block's Linears, grouped by the input tensor they share, in the order of the forward pass."""
    stages: list[tuple[Tensor, list[str]]] = []

    def record(name: str, x: Tensor) -> None:
        if stages and stages[-1][0] is x:
            stages[-1][1].append(name)
        else:
            stages.append((x, [name]))

    linears = linear_layers(block)
    hooks = [m.register_forward_pre_hook(lambda _, args, n=name: record(n, args[0])) for name, m in linears.items()]
    run(hidden)
    for hook in hooks:
        hook.remove()
    reached = [name for _, names in stages for name in names]
    if sorted(reached) != sorted(linears):
        odd = sorted(set(linears).symmetric_difference(reached)) or "a Linear that runs twice"
        raise InputError(f"the forward pass does not reach each Linear of a block once: {odd}")
    return [names for _, names in stages]


def in_batches(windows: list[Tensor], block: nn.Module) -> list[Tensor]:
    """Concatenate windows [1, L, D] to as few batches as keep a block's activations within ACTIVATION_BYTES."""
    _, length, width = windows[0].shape
    channels = 4 * width + sum(linear.out_features for linear in linear_layers(block).values())
    count = max(1, ACTIVATION_BYTES // (length * channels * windows[0].element_size()))
    return list(torch.cat(windows).split(count))


@torch.no_grad()
def stage_hessian(linear: nn.Linear, run: Callable[[Tensor], Tensor], batches: list[Tensor]) -> Tensor:
    """H [K, K] fp32 of a Linear's inputs; each forward pass stops as soon as it reaches the Linear."""
    tokens = sum(batch.shape[:2].numel() for batch in batches)
    H = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)

    def collect(_: nn.Module, args: tuple) -> None:
        accumulate(H, args[0], tokens)
        raise _StageReached

    hook = linear.register_forward_pre_hook(collect)
    try:
        for batch in batches:
            with suppress(_StageReached):
                run(batch)
    finally:
        hook.remove()
    return symmetrize(H)


def quantize_in_one_pass(
    block: nn.Module,
    stages: list[list[str]],
    run: Callable[[Tensor], Tensor],
    batch: Tensor,
    quantize_stage: Callable[[list[str], Tensor], None],
) -> Tensor:
    """The quantized block's output for a single batch: each stage is quantized while the pass waits in front of it."""

    def quantize_here(linear: nn.Linear, args: tuple, names: list[str]) -> None:
        H = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        accumulate(H, args[0], batch.shape[:2].numel())
        quantize_stage(names, symmetrize(H))

    firsts = [(block.get_submodule(names[0]), names) for names in stages]
    hooks = [first.register_forward_pre_hook(partial(quantize_here, names=names)) for first, names in firsts]
    try:
        return run(batch)
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def quantize_blocks(
    model: PreTrainedModel,
    tokens: Tensor,
    scheme: Scheme,
    device: torch.device,
    *,
    tune_steps: int = 0,
    seed: int = 0,
    **solver: Any,
) -> Iterator[LayerReport]:
    """Quantize the model's decoder blocks in place (Linear -> BPDQLinear), yielding a report for each Linear.

    tokens: [W, L]; `solver`: options of `quantize_linear`. The model is on the CPU, one block at a time on `device`.
    If all windows fit one batch, a block takes one forward pass, otherwise about two for the four usual stages.
    With `tune_steps`, each block's coefficients are then tuned towards the hidden states that the 16-bit model has
    after it, which also makes up for errors of the blocks before. The reports are of the untuned weights.
    """
    prefix, blocks = decoder_blocks(model)
    for index, block in enumerate(blocks):
        check_supported(f"{prefix}.{index}", block)
    windows, calls = block_inputs(model, blocks, tokens)
    batches = in_batches(windows, blocks[0])
    solver["dtype"] = torch.float16 if model.dtype == torch.float16 else torch.bfloat16
    targets = batches
    for index, block in enumerate(blocks):
        block.to(device)
        run = partial(run_block, block, send_to_device(calls[index], device), device)
        if tune_steps:
            targets = [run(batch).cpu() for batch in targets]
        inputs = batches
        batches, reports = quantize_block(f"{prefix}.{index}", block, run, inputs, scheme, solver)
        if tune_steps:
            block.to(device)
            tune_block(block, run, torch.cat(inputs), torch.cat(targets), steps=tune_steps, seed=seed)
            batches = [run(batch).cpu() for batch in inputs]
        block.to("cpu")
        yield from reports


def quantize_block(
    name: str,
    block: nn.Module,
    run: Callable[[Tensor], Tensor],
    batches: list[Tensor],
    scheme: Scheme,
    solver: dict[str, Any],
) -> tuple[list[Tensor], list[LayerReport]]:
    """Quantize one block in place; returns its outputs, on the CPU, and a report for each Linear."""
    packed: dict[str, BPDQLinear] = {}
    reports: list[LayerReport] = []

    def quantize_stage(stage: list[str], H: Tensor) -> None:
        started = time.perf_counter()
        linears = {f"{name}.{part}": block.get_submodule(part) for part in stage}
        solution = solve_stage(linears, H, scheme, **solver)
        seconds = time.perf_counter() - started
        first = 0
        for part, (full_name, linear) in zip(stage, linears.items(), strict=True):
            rows = slice(first, first + linear.out_features)
            packed[part] = pack_rows(solution, rows, linear, scheme)
            reports.append(report(full_name, solution, rows, linear, scheme, seconds))
            first = rows.stop

    stages = find_stages(block, run, batches[0][:1])
    if len(batches) == 1:
        outputs = [quantize_in_one_pass(block, stages, run, batches[0], quantize_stage)]
    else:
        for stage in stages:
            quantize_stage(stage, stage_hessian(block.get_submodule(stage[0]), run, batches))
        outputs = [run(batch) for batch in batches]
    for part, module in packed.items():
        block.set_submodule(part, module)
    return [out.to("cpu") for out in outputs], reports


def solve_stage(linears: dict[str, nn.Linear], H: Tensor, scheme: Scheme, **solver: Any) -> Solution:
    """Quantize the stacked rows of Linears that share the input with Hessian H; raises InputError on NaN."""
    first = next(iter(linears))
    if not torch.isfinite(H).all():
        raise InputError(f"{first}: its calibration inputs hold NaN or infinity: check the model and its dtype")
    for name, linear in linears.items():
        if not torch.isfinite(linear.weight).all():
            raise InputError(f"{name}.weight holds NaN or infinity: the model is damaged, download it again")
    W = torch.cat([linear.weight for linear in linears.values()])
    with one_thread() if len(W) < SMALL_STAGE else nullcontext():
        solution = quantize_linear(W, H, scheme.bits, scheme.group_size, **solver)
    if not torch.isfinite(solution.c).all():
        raise InputError(f"{first}: its coefficients overflow {solution.c.dtype}: convert the model to bfloat16 first")
    return solution


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one CPU thread. The solver's column loops are thousands of small operations; shared by several
    threads, each waits for the slowest core, which on a busy machine is a hundred times its own work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pack_rows(solution: Solution, rows: slice, linear: nn.Linear, scheme: Scheme) -> BPDQLinear:
    """One Linear's packed module (on the CPU); the Linear's weight becomes the quantized one for later stages."""
    codes = solution.codes[rows]
    B = layout.pack(torch.stack([(codes >> p) & 1 for p in range(scheme.bits)]))
    c = solution.c[:, :, rows].contiguous()
    module = BPDQLinear(B.cpu(), c.cpu(), scheme.group_size, linear.in_features, linear.bias)
    linear.weight.copy_(dequantize(B, c, scheme.group_size, linear.in_features))
    return module


def report(
    name: str, solution: Solution, rows: slice, linear: nn.Linear, scheme: Scheme, stage_seconds: float
) -> LayerReport:
    loss, energy = solution.loss[rows].sum().item(), solution.energy[rows].sum().item()
    return LayerReport(
        name=name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        bits=scheme.bits,
        group_size=scheme.group_size,
        bits_per_weight=scheme.bits_per_weight,
        loss=loss,
        relative_error=loss / energy if energy else 0.0,
        damping=solution.damping,
        seconds=stage_seconds * linear.out_features / solution.codes.shape[0],
    )
