"""What of a model can be solved: matrices, the inputs that they multiply, and where bit-planes go.

The passes know of a weight what `Weight` offers and nothing else. Weights that read the same input are a stage: they
share a Hessian, so that their rows are solved together. The experts of a layer are one stage, too, and get one scheme,
but each has its own tokens and Hessians (`passes.experts`). A weight that no scheme is given stays in 16 bits: it is in
no stage, and `ignore` of the checkpoint's config names it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bpdq_kernels.experts import Experts
from bpdq_kernels.format import is_finite
from bpdq_kernels.layout import Stored
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.modules import replace_linear


class ExpertLayer(NamedTuple):
    """The experts of a layer, a module called `name`, of which each has its own inputs."""

    name: str
    module: Experts


@dataclass(frozen=True, eq=False)
class Weight:
    """The matrix of an nn.Linear. name: in the checkpoint, which holds `<name>.weight`, or `<name>.B` and `<name>.c`;
    parent, key: the module that has the Linear, and as what; layer, expert: of an expert's, the experts that it is
    among, and which one it is."""

    name: str
    parent: nn.Module
    key: str
    layer: ExpertLayer | None = None
    expert: int = 0

    @property
    def linear(self) -> nn.Linear:
        return self.parent.get_submodule(self.key)

    @property
    def matrix(self) -> Tensor:
        """W [N, K], in the model's dtype."""
        return self.linear.weight

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs N and inputs K."""
        return tuple(self.matrix.shape)

    def on_input(self, see: Callable[[Any], None]) -> RemovableHandle:
        """Show every forward pass's input [..., K] before it is multiplied. Weights with one input see one tensor.

        Of an expert's weight that is what all experts of its layer are given, `Routed`.
        """
        if self.layer is None:
            return self.on_rows(see)

        def hook(module: Experts, args: tuple) -> None:
            see(module.routed(*args))

        return self.layer.module.register_forward_pre_hook(hook)

    def on_rows(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Show what every forward pass multiplies [..., K]; of an expert's weight, the tokens that are routed to it."""

        def hook(_: nn.Module, args: tuple) -> None:
            see(args[0])

        return self.linear.register_forward_pre_hook(hook)

    def on_gradient(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Show every backward pass's gradient [..., N] of the outputs."""

        def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
            output.register_hook(see)

        return self.linear.register_forward_hook(hook)

    @torch.no_grad()
    def assign(self, W: Tensor) -> None:
        """Go on with W [N, K], of any float dtype, in the matrix's place."""
        self.matrix.copy_(W)

    def replace(self, stored: Stored, group_size: int) -> None:
        """Put the module of these bit-planes and coefficients where the Linear is."""
        replace_linear(self.parent, self.key, stored, group_size)


def weights_in(module: nn.Module, name: str = "") -> dict[str, Weight]:
    """All that can be solved in a module called `name`, by name; what has become bit-planes is not among it."""
    found, layer = {}, None
    for path, child in module.named_modules(prefix=name):
        if isinstance(child, Experts):
            layer = ExpertLayer(path, child)
        if isinstance(child, nn.Linear):
            parent, _, key = path.removeprefix(f"{name}.").rpartition(".")
            owner = module.get_submodule(parent)
            if layer is not None and path.startswith(f"{layer.name}."):
                number = int(path.removeprefix(f"{layer.name}.").partition(".")[0])
                found[path] = Weight(path, owner, key, layer, number)
            else:
                found[path] = Weight(path, owner, key)
    return found


SMALLEST = 32  # outputs, or inputs: less are no group's worth of weights, nor of time
# What decides which expert or how much of a state, at less than a percent of a block's weights; and what vLLM absorbs
# into the attention (multi-head latent attention) through its 16-bit weight.
KEPT = {
    r"(router|gate|shared_expert_gate)(\.(proj|linear|layer|wg))?": "routing",
    r"(in_proj_ba|in_proj_a|in_proj_b|dt_proj|x_proj|f_[ab]_proj|[ab]_proj)": "gates of a state",
    r"kv_b_proj": "absorbed by latent attention",
}


def kept(weights: Mapping[str, Weight]) -> dict[str, str]:
    """Those of some weights of blocks that stay in 16 bits by default, by name, and why."""
    found = {}
    for name, weight in weights.items():
        if min(weight.shape) < SMALLEST:
            found[name] = f"narrower than {SMALLEST}"
        for pattern, reason in KEPT.items():
            if re.search(rf"\.{pattern}$", name):
                found[name] = reason
    return found


def check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError for NaN or infinity in floats, by name."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            if tensor.dtype == torch.float16:
                raise InputError(
                    f"{name} holds NaN or infinity in float16: convert the model to bfloat16 first, or download it "
                    "again"
                )
            raise InputError(f"{name} holds NaN or infinity: the model is damaged, download it again")


@contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens: those that a generator registers, too."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield
