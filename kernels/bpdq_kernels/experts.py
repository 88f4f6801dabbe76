"""The experts of a layer one by one, in the place of the module in which transformers has them fused.

    fused        gate_up_proj [E, 2I, H] and down_proj [E, H, I], or both transposed (gpt-oss, Llama 4, Aria), gate and
                 up interleaved and with biases (gpt-oss), or up_proj [E, I, H] without a gate (Nemotron-H)
    one by one   <i>.gate_proj [I, H], <i>.up_proj [I, H], <i>.down_proj [H, I], i = 0 .. E - 1, called w1, w3, w2 where
                 the family's own files call them so

Checkpoints hold the latter, as other programs write and read them, so each expert's matrices can be bit-planes.
"""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

FUSED = ("gate_up_proj", "up_proj", "down_proj")
_ONE = re.compile(r"experts\.(\d+)\.")


class Names(NamedTuple):
    """What an expert's matrices are called."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Routed(NamedTuple):
    """What a layer's experts are given: tokens [T, H], which experts they are for, [T, A], E where none, and what
    their outputs count, [T, A]."""

    tokens: Tensor
    index: Tensor
    weights: Tensor


class Matrix(NamedTuple):
    """Where a fused module holds a matrix of an expert: in its parameter, [E, outputs, inputs] or transposed, and of
    the outputs which."""

    parameter: str
    outputs: slice


class Experts(nn.Module):
    """The experts of a module of transformers' `use_experts_implementation`; their weights are views of its."""

    def __init__(self, fused: nn.Module, names: Names) -> None:
        super().__init__()
        self.names, self.num_experts = names, fused.num_experts
        self.has_gate = hasattr(fused, "gate_up_proj")
        self.is_concatenated = getattr(fused, "is_concatenated", True)
        self.is_transposed = _is_transposed(fused)
        self.matrices = matrices(fused, names)
        self.fused_shapes = {name: parameter.shape for name, parameter in fused.named_parameters()}
        for i in range(self.num_experts):
            linears = {name: _linear(fused, matrix, i) for name, matrix in self.matrices.items()}
            self.add_module(str(i), nn.ModuleDict(linears))
        gating = copy.copy(fused)  # for what it does between the matrices
        gating._parameters = {}
        self.__dict__["gating"] = gating  # not a submodule

    def routed(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Routed:
        """What `forward` is called with."""
        return Routed(tokens, index, weights)

    def forward(self, tokens: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(tokens, dtype=torch.float32)
        for i, rows, places in routes(index, self.num_experts):
            y.index_add_(0, rows, (self.expert(i, tokens[rows]) * weights[rows, places, None]).float())
        return y.to(tokens.dtype)

    def expert(self, i: int, x: Tensor) -> Tensor:
        """Expert i of x [T, H]."""
        return self.get_submodule(f"{i}.{self.names.down}")(self.middle(i, x))

    def middle(self, i: int, x: Tensor) -> Tensor:
        """What its last matrix reads, [T, I]."""
        up = self.get_submodule(f"{i}.{self.names.up}")(x)
        if not self.has_gate:
            return self.gating.act_fn(up)
        gate = self.get_submodule(f"{i}.{self.names.gate}")(x)
        if not hasattr(self.gating, "_apply_gate"):
            return self.gating.act_fn(gate) * up
        together = torch.cat((gate, up), -1) if self.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
        return self.gating._apply_gate(together)


class ExpertsInTurn(Experts):
    """Llama 4's: every expert is given all tokens, [E * T, H], multiplied by what the router says, often zero."""

    def routed(self, tokens: Tensor) -> Routed:
        tokens = tokens.view(-1, tokens.shape[-1])
        owner = torch.arange(self.num_experts, device=tokens.device)
        index = owner.repeat_interleave(len(tokens) // self.num_experts).where(tokens.any(-1), self.num_experts)
        return Routed(tokens, index[:, None], torch.ones_like(index[:, None], dtype=tokens.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(*self.routed(tokens))


class _Held(nn.Linear):
    """A Linear for tensors that are there already: a model has tens of thousands of experts' matrices."""

    def reset_parameters(self) -> None:
        pass


def matrices(fused: nn.Module, names: Names) -> dict[str, Matrix]:
    """Where a fused module holds an expert's matrices, by their own names."""
    last = Matrix("down_proj", slice(None))
    if not hasattr(fused, "gate_up_proj"):
        return {names.up: Matrix("up_proj", slice(None)), names.down: last}
    if not getattr(fused, "is_concatenated", True):
        gate, up = slice(0, None, 2), slice(1, None, 2)
    else:
        half = fused.gate_up_proj.shape[2 if _is_transposed(fused) else 1] // 2
        gate, up = slice(0, half), slice(half, None)
    return {names.gate: Matrix("gate_up_proj", gate), names.up: Matrix("gate_up_proj", up), names.down: last}


def fused_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Of the tensors, by name, that the module would have in whose place a model's `Experts` are."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    return {f"{name}.{tensor}": shape for name, m in modules.items() for tensor, shape in m.fused_shapes.items()}


def matrix_of(stacked: Tensor, outputs: slice, is_transposed: bool) -> Tensor:
    """Some outputs of an expert's matrix [outputs, inputs], or transposed, as [outputs, inputs]."""
    return (stacked.T if is_transposed else stacked)[outputs]


def _is_transposed(fused: nn.Module) -> bool:
    return getattr(fused, "is_transposed", True)  # Llama 4's, which does not say so


def _linear(fused: nn.Module, matrix: Matrix, i: int) -> nn.Linear:
    weight = matrix_of(getattr(fused, matrix.parameter)[i], matrix.outputs, _is_transposed(fused))
    bias = getattr(fused, f"{matrix.parameter}_bias", None)
    linear = _Held(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias[i][matrix.outputs].detach().clone(), requires_grad=False)
    return linear


def routes(index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that any of the tokens chose, which tokens did, and as which of their choices: index [T, A]."""
    chosen = index.flatten()
    counts = torch.bincount(chosen, minlength=experts + 1)
    for i, pairs in enumerate(chosen.argsort(stable=True).split(counts.tolist())[:experts]):
        if len(pairs):
            yield i, pairs // index.shape[1], pairs % index.shape[1]


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model, by name, in which experts are fused in a way that is known here."""
    return {name: module for name, module in model.named_modules() if _is_known(module)}


def _is_known(module: nn.Module) -> bool:
    says_how = hasattr(module, "is_transposed") or type(module).__name__ == "Llama4TextExperts"
    return says_how and getattr(getattr(module, "down_proj", None), "ndim", 0) == 3


def take_apart(model: "PreTrainedModel", fused: Mapping[str, nn.Module] | None = None) -> list[str]:
    """Put `Experts` in the place of a model's fused ones; returns the names of the modules.

    fused: those to be replaced by theirs, by name, by default all `fused_experts`.
    """
    names = expert_names(model)
    found = fused_experts(model) if fused is None else fused
    for name, module in found.items():
        kind = ExpertsInTurn if not hasattr(module, "is_transposed") else Experts
        model.set_submodule(name, kind(module, names))
    return list(found)


def expert_names(model: "PreTrainedModel") -> Names:
    """What the files of a model's family call an expert's matrices."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for transform in get_model_conversion_mapping(model):
        if isinstance(transform, WeightConverter) and any("experts" in target for target in transform.target_patterns):
            sources = [re.search(r"experts\W+(\w+)", source) for source in transform.source_patterns]
            if len(sources) == 2 and all(sources) and sources[0][1] == "w1":
                return Names("w1", "w3", "w2")
    return Names()


def are_apart(stored: Iterable[str]) -> bool:
    """Whether a checkpoint with tensors of these names holds experts one by one, in bit-planes."""
    return any(name.endswith(".B") and _ONE.search(name) for name in stored)


def without_fusing(transforms: Iterable["WeightTransform"]) -> list["WeightTransform"]:
    """What transformers makes of the tensors of a family's files, but that it fuses experts."""
    from transformers.core_model_loading import WeightConverter

    return [
        transform
        for transform in transforms
        if not isinstance(transform, WeightConverter)
        or not any(re.search(rf"experts\.({'|'.join(FUSED)})$", target) for target in transform.target_patterns)
    ]
