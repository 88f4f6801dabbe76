"""Tuning after the solver: with the planes fixed W_hat is linear in c, so the coefficients are trained like weights.

The whole model is distilled from its 16-bit self: forward KL of the next-token distributions, or, as an option, a mix
of forward and reverse KL by the 16-bit model's confidence (BitDistiller, arXiv 2402.10631, eq. 5). The LM head is not
tuned, and if at all quantized afterwards, so the 16-bit model's final hidden states stand for its logits: they are
computed once, kept on the CPU, and no second model is needed while tuning.

Device memory for W quantized weights with P = W (k+1) / G coefficients: W k / 8 bytes of planes, 16 P of fp32
coefficients with their gradient and Adam's moments, the embedding and head, one Linear's dense weight and its gradient
at a time, and one hidden state per token and block. That is about 8 GB for a 7B model at k = 2, G = 128.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from bpdq_kernels.layout import WORD, Stored, coefficients, expand_words
from bpdq_kernels.reference import dequantize_t
from bpdq_kernels.trellis import planes_of
from bpdq_quantizer.algorithm.rounding import stored_coefficients
from bpdq_quantizer.cost import Clock
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.activations import LOSS_ELEMENTS
from bpdq_quantizer.model.calls import trunk
from bpdq_quantizer.model.modules import BPDQLinear
from bpdq_quantizer.storage.files import DamagedError, read_sealed, write_tensors

LEARNING_RATE = 1e-3  # of Adam, times a Linear's root mean square coefficient; cosine decay to zero
BATCH_TOKENS = 1024  # a step takes as many windows as hold these
EVALUATIONS = 10  # of the held-out windows, evenly spread over the steps
PATIENCE = 3  # evaluations without a new best before tuning stops
ACTIVATION_BYTES = 1 << 30  # more than that in all blocks together, and they are recomputed in the backward pass


class PlaneMatmul(torch.autograd.Function):
    """y [..., N] = x [..., K] @ W_hat^T, differentiable in x and in the fp32 coefficients c, not in the planes.

    c is rounded as the checkpoint stores it on the way, to `dtype`, with `steps` to multiples of them (its gradient
    passes as if it were not), so that what is tuned is what will be stored. W_hat is rebuilt in the backward pass: no
    graph holds a dense weight.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, c: Tensor, B: Tensor, steps: Tensor | None, group_size: int, dtype: torch.dtype
    ) -> Tensor:
        c = stored_coefficients(c, steps, dtype)
        ctx.save_for_backward(x, c, B, steps)
        ctx.group_size = group_size
        return x @ dequantize_t(B, c, group_size, x.shape[-1], x.dtype, steps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, c, B, steps = ctx.saved_tensors
        grad_x = grad_c = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dequantize_t(B, c, ctx.group_size, x.shape[-1], x.dtype, steps).T
        if ctx.needs_input_grad[1]:
            grad_c = coefficient_gradient(x.flatten(0, -2).T @ grad.flatten(0, -2), planes_of(B, c), ctx.group_size)
        return grad_x, grad_c, None, None, None, None


def coefficient_gradient(grad_W: Tensor, B: Tensor, group_size: int) -> Tensor:
    """Gradient of c, fp32 [ceil(K/G), k+1, N], from that of W_hat^T [K, N]: sums over each group under its planes,
    B [ceil(K/32), k, N]."""
    K, N = grad_W.shape
    grad_c = torch.empty(-(-K // group_size), B.shape[1] + 1, N, device=grad_W.device)
    for g, part in enumerate(grad_W.split(group_size)):
        part = part.float()
        first = g * group_size // WORD
        bits = expand_words(B[first : first + -(-len(part) // WORD)]).flatten(1, 2)[:, : len(part)]
        for p, plane in enumerate(bits):
            grad_c[g, p] = (part * plane).sum(0)
        grad_c[g, -1] = part.sum(0)
    return grad_c


class TunableLinear(nn.Module):
    """A BPDQLinear with trainable coefficients, held in fp32 [ceil(K/G), k+1, N]; the scales of int8 ones stay.

    The bias of a group moves with its planes as `middle` - sum_p c_p / 2: planes and middle of the grid are nearly
    uncorrelated, planes and c0 are not, and Adam scales each by itself.
    """

    def __init__(self, linear: BPDQLinear) -> None:
        super().__init__()
        self.group_size, self.in_features, self.dtype = linear.group_size, linear.in_features, linear.c.dtype
        self.register_buffer("B", linear.B)
        self.register_buffer("s", linear.s)
        c = coefficients(linear.c, linear.s)
        self.planes = nn.Parameter(c[:, :-1].clone())
        self.middle = nn.Parameter(c[:, -1] + c[:, :-1].sum(1) / 2)
        self.bias = linear.bias

    def coefficients(self) -> Tensor:
        """c, fp32 [ceil(K/G), k+1, N]."""
        return torch.cat([self.planes, (self.middle - self.planes.sum(1) / 2).unsqueeze(1)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        y = PlaneMatmul.apply(x, self.coefficients(), self.B, self.s, self.group_size, self.dtype)
        return y if self.bias is None else y + self.bias


class DistillationLoss(torch.autograd.Function):
    """Sum over tokens of (1 - reverse) KL(teacher || student) + reverse KL(student || teacher) from final hidden
    states [T, D], a chunk of logits at a time."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, head: nn.Module, cap: float | None, reverse: float
    ) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device)
        step = max(1, LOSS_ELEMENTS // head.weight.shape[0])
        for start in range(0, len(student), step):
            rows = slice(start, start + step)
            log_p = log_probabilities(teacher[rows], head, cap)
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                hidden = student[rows].detach().requires_grad_(ctx.needs_input_grad[0])
                log_q = log_probabilities(hidden, head, cap)
                loss = (1 - reverse) * nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
                if reverse:
                    loss = loss + reverse * nn.functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
            if ctx.needs_input_grad[0]:
                (gradient[rows],) = torch.autograd.grad(loss, hidden)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None, None, None


def log_probabilities(hidden: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    logits = head(hidden).float()
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)


@torch.inference_mode()
def final_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the LM head would read for windows [W, L] of token ids: [W, L, D] in the model's dtype, on the CPU."""
    states = [trunk(model)(w[None].to(model.device), use_cache=False).last_hidden_state.cpu() for w in tokens]
    return torch.cat(states).clone()


def tune_model(
    model: PreTrainedModel, tokens: Tensor, teacher: Tensor, *, steps: int, seed: int, state: Path, mix: bool = False
) -> dict[str, Any]:
    """Distill the coefficients of a quantized model's BPDQLinears in place; returns a report.

    tokens: [W, L]; teacher: `final_states` of the 16-bit model for them; mix: its `confidence` is the share of reverse
    KL in the loss. The last windows are held out: the state with the lowest KL on them is kept, and PATIENCE
    evaluations without a new one end the run, as does one that is NaN or infinite. At every other one all that is
    needed to go on is written to the file `state`; a run that finds one there continues as if never stopped, unless it
    is damaged.
    Raises InputError for less than two windows, and where the KL is NaN or infinite from the start.
    """
    if len(tokens) < 2:
        raise InputError("--tune model needs two calibration windows or more: raise --samples or bring more text")
    held_out = min(8, -(-len(tokens) // 16))
    train = len(tokens) - held_out
    per_step = min(train, max(1, BATCH_TOKENS // tokens.shape[1]))
    interval = -(-steps // EVALUATIONS)
    layers = make_tunable(model)
    adam = optimizer(layers)
    reverse = confidence(model, tokens[:train], teacher[:train]) if mix else 0.0
    saved = load_state(state)
    if saved is None:
        step, best, history, cost = 0, snapshot(layers), [first_kl(model, tokens[train:], teacher[train:])], {}
    else:
        step, best, history, cost = (saved[key] for key in ("step", "best", "history", "cost"))
        restore(layers, saved["current"])
        adam.load_state_dict({**adam.state_dict(), "state": saved["adam"]})
    clock = Clock(cost)
    with checkpointed_blocks(model, tokens[:per_step]), tqdm(total=steps, initial=step, desc="tuning") as bar:
        while step < steps and history.index(min(history)) >= len(history) - 1 - PATIENCE:
            windows = draw(train, per_step, step, seed)
            take_step(adam, distillation_loss(model, tokens[windows], teacher[windows], reverse), step / steps)
            step += 1
            bar.update()
            if step % interval == 0 or step == steps:
                kl = mean_kl(model, tokens[train:], teacher[train:])
                if not math.isfinite(kl):
                    tqdm.write(f"tuning: the held-out KL is {kl} after {step} steps: the best before is kept")
                    break
                history.append(kl)
                if history[-1] == min(history):
                    best = snapshot(layers)
                notes = {"step": step, "history": history, "cost": clock.read()}
                save_state(state, best, snapshot(layers), adam, notes)
            bar.set_postfix_str(f"held-out KL {history[-1]:.4f} (best {min(history):.4f})")
    restore(layers, best)
    make_packed(model, layers)
    return {
        "steps": step,
        "tokens_per_step": per_step * tokens.shape[1],
        "reverse_share": reverse,
        "held_out_windows": held_out,
        "held_out_kl": history,
        "best_evaluation": history.index(min(history)),
        **clock.read(),
    }


def make_tunable(model: nn.Module) -> dict[str, TunableLinear]:
    """Replace the BPDQLinears in `model`; nothing but their coefficients is left to train."""
    model.requires_grad_(False)
    layers = {name: TunableLinear(m) for name, m in model.named_modules() if isinstance(m, BPDQLinear)}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def make_packed(model: nn.Module, layers: dict[str, TunableLinear]) -> None:
    """Undo `make_tunable`, with the coefficients as they are now."""
    for name, layer in layers.items():
        c = stored_coefficients(layer.coefficients().detach(), layer.s, layer.dtype)
        model.set_submodule(
            name, BPDQLinear(Stored(layer.B, c, layer.s), layer.group_size, layer.in_features, layer.bias)
        )


def optimizer(layers: dict[str, TunableLinear]) -> torch.optim.Adam:
    """Adam that knows each Linear's root mean square coefficient as the scale of its steps."""
    groups = [
        {"params": [m.planes, m.middle], "scale": m.coefficients().square().mean().sqrt().item()}
        for m in layers.values()
    ]
    return torch.optim.Adam(groups, lr=0.0, eps=1e-12)


def take_step(adam: torch.optim.Adam, loss: Tensor, progress: float) -> None:
    """One step at `progress` (0 to 1) of the cosine schedule."""
    loss.backward()
    for group in adam.param_groups:
        group["lr"] = LEARNING_RATE * group["scale"] * (1 + math.cos(math.pi * progress)) / 2
    adam.step()
    adam.zero_grad()


def snapshot(layers: dict[str, TunableLinear]) -> dict[str, tuple[Tensor, Tensor]]:
    """A copy of the trained tensors on the CPU."""
    return {name: tuple(p.detach().cpu().clone() for p in (m.planes, m.middle)) for name, m in layers.items()}


@torch.no_grad()
def restore(layers: dict[str, TunableLinear], tensors: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, layer in layers.items():
        for parameter, value in zip((layer.planes, layer.middle), tensors[name], strict=True):
            parameter.copy_(value)


def draw(windows: int, count: int, step: int, seed: int) -> Tensor:
    """Indices of a step's windows: every epoch is a new permutation, and a step's windows depend on nothing else."""
    steps = windows // count
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed + step // steps))
    first = step % steps * count
    return order[first : first + count]


def distillation_loss(model: PreTrainedModel, tokens: Tensor, teacher: Tensor, reverse: float = 0.0) -> Tensor:
    """`DistillationLoss` summed over all tokens of the windows [W, L]."""
    states = trunk(model)(tokens.to(model.device), use_cache=False).last_hidden_state
    teacher = teacher.to(states.device, states.dtype)
    return DistillationLoss.apply(
        states.flatten(0, 1), teacher.flatten(0, 1), model.get_output_embeddings(), softcap(model), reverse
    )


@torch.no_grad()
def confidence(model: PreTrainedModel, tokens: Tensor, teacher: Tensor) -> float:
    """Mean probability that the 16-bit model gives the next token, over windows [W, L]; teacher: its `final_states`."""
    total, head = 0.0, model.get_output_embeddings()
    step = max(1, LOSS_ELEMENTS // head.weight.shape[0])
    for window, states in zip(tokens, teacher, strict=True):
        for rows, targets in zip(states[:-1].split(step), window[1:].split(step), strict=True):
            log_p = log_probabilities(rows.to(model.device), head, softcap(model))
            total += log_p.gather(1, targets.to(log_p.device)[:, None]).exp().sum().item()
    return total / tokens[:, 1:].numel()


def softcap(model: PreTrainedModel) -> float | None:
    """Gemma's cap on the logits."""
    return getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)


@torch.no_grad()
def mean_kl(model: PreTrainedModel, tokens: Tensor, teacher: Tensor) -> float:
    """KL(teacher || model) per token in nats, over windows [W, L]."""
    total = sum(distillation_loss(model, w[None], t[None]).item() for w, t in zip(tokens, teacher, strict=True))
    return total / tokens.numel()


def first_kl(model: PreTrainedModel, tokens: Tensor, teacher: Tensor) -> float:
    """`mean_kl` before anything is tuned; raises InputError unless it is a number."""
    found = mean_kl(model, tokens, teacher)
    if not math.isfinite(found):
        raise InputError(
            f"--tune model: the KL to the 16-bit model is {found} in {model.dtype}: check the model and its dtype, or "
            "leave the option out"
        )
    return found


@contextmanager
def checkpointed_blocks(model: PreTrainedModel, batch: Tensor) -> Iterator[None]:
    """Keep one hidden state per block, and recompute the rest in the backward pass, where all would be too much."""
    linears = [module for module in model.modules() if isinstance(module, TunableLinear)]
    channels = sum(linear.in_features + linear.B.shape[2] for linear in linears)
    if batch.numel() * channels * model.dtype.itemsize <= ACTIVATION_BYTES:
        yield
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            block.training = True  # what switches it on; the modules inside stay in eval mode, without dropout
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def save_state(
    file: Path,
    best: dict[str, tuple[Tensor, Tensor]],
    current: dict[str, tuple[Tensor, Tensor]],
    adam: torch.optim.Adam,
    notes: dict[str, Any],
) -> None:
    """Write what `load_state` reads: two `snapshot`s, the optimizer's moments, and notes as JSON."""
    moments = adam.state_dict()["state"]
    named = {f"adam/{key}/{i}": value for i, slot in moments.items() for key, value in slot.items()}
    for kind, layers in (("best", best), ("current", current)):
        named |= {f"{kind}/{i}/{name}": value for name, pair in layers.items() for i, value in enumerate(pair)}
    write_tensors(file, named, notes)


def load_state(file: Path) -> dict[str, Any] | None:
    """Notes and tensors of `save_state`; None where there is no file, or a damaged one, which one line says."""
    if not file.is_file():
        return None
    try:
        named, notes = read_sealed(file)
    except DamagedError as e:
        tqdm.write(f"{e}: tuning starts again", file=sys.stderr)
        return None
    found: dict[str, Any] = {kind: defaultdict(dict) for kind in ("best", "current", "adam")}
    for key, value in named.items():
        kind, part, owner = key.split("/", 2)
        found[kind][int(owner) if kind == "adam" else owner][part] = value
    layers = {k: {name: (pair["0"], pair["1"]) for name, pair in found[k].items()} for k in ("best", "current")}
    return {**notes, **layers, "adam": dict(found["adam"])}
