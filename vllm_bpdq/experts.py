"""Experts of a BPDQ checkpoint in vLLM: allocate, load (over ranks of tensor or expert parallelism), check, compute.

vLLM routes tokens and adds shared experts. Its own loader of experts knows a tensor by words in its name, none of which
is in ours, so here is one that takes the same arguments.
"""

from collections.abc import Callable
from math import inf, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

from bpdq_kernels import Activation, PreparedExperts, moe, prepare_experts, warm_up_experts
from bpdq_kernels.activation import NAMES
from bpdq_kernels.format import Scheme, check_coefficients, check_finite, check_planes, check_scales, is_finite
from bpdq_kernels.layout import Stored, coefficient_shape, plane_shape, split_groups, trim
from vllm_bpdq.linear import MADE, check_reloadable, discard, in_use, nothing_yet, put, rank_group_size, replace


class Matrix(NamedTuple):
    """One of the two matrices of a layer's experts, of this rank.

    key: what vLLM calls its parameters: "w13" of gate and up, "w2" of down; parts: the names in the checkpoint of what
    it is made of, one after the other, by vLLM's names for them; inputs, outputs: of a part, of all ranks together;
    in_features, part_outputs: of this rank.
    """

    key: str
    parts: dict[str, str]
    inputs: int
    outputs: int
    in_features: int
    part_outputs: int
    group_size: int

    def shapes(self, scheme: Scheme) -> dict[str, tuple[int, ...]]:
        """Of an expert's tensors on this rank."""
        out_features = len(self.parts) * self.part_outputs
        sizes = self.in_features, out_features, scheme.bits
        coefficients = coefficient_shape(*sizes, self.group_size, scheme.trellis)
        return {"B": plane_shape(*sizes), "c": coefficients, "s": coefficients[1:], "bias": (out_features,)}

    def share(self, kind: str, name: str, tensor: Tensor, shape: tuple[int, ...], rank: int, scheme: Scheme) -> Tensor:
        """The rank's share of a part's tensor `kind` of the checkpoint, for a parameter of `shape`; raises ValueError
        unless the tensor fits the layer `name`."""
        if kind == "B":
            check_planes(name, tensor, self.inputs, self.outputs, scheme)
            tensor = trim(tensor, self.inputs)
        elif kind == "c":
            check_coefficients(name, tensor, self.inputs, self.outputs, scheme)
            tensor = split_groups(tensor, scheme.group_size, self.group_size)
        elif kind == "s":
            check_scales(name, tensor, self.outputs, scheme)
            tensor = tensor.float()
        elif tensor.shape != (self.outputs,):
            raise ValueError(
                f"{name}.bias is {tuple(tensor.shape)}, expected ({self.outputs},): download or quantize the model"
                " again"
            )
        if kind in ("B", "c"):
            tensor = _cut(tensor, 0, shape[0], rank)
        elif kind == "bias" and self.in_features != self.inputs and rank:
            tensor = torch.zeros_like(tensor)  # the ranks' outputs are added
        return _cut(tensor, -1, self.part_outputs, rank)


def _cut(tensor: Tensor, dim: int, size: int, rank: int) -> Tensor:
    return tensor if tensor.shape[dim] == size else tensor.narrow(dim, rank * size, size)


class ExpertsParameter(Parameter):
    """A tensor of all experts of a rank. `loaded`: the dtypes of what has arrived, by the expert's number in the
    checkpoint and the part; never changed in place, as vLLM's reload restores a shallow copy of these attributes."""

    def __new__(cls, data: Tensor, weight_loader: Callable[..., bool]) -> "ExpertsParameter":
        param = super().__new__(cls, data, requires_grad=False)
        param.weight_loader = weight_loader
        param.stored_shape = data.shape
        param.loaded = {}
        param.prepared = False  # whether data is in the order of the kernels
        return param

    def receive(self, name: str, dtype: torch.dtype, place: tuple[int, str]) -> None:
        """Make room for a tensor of `dtype`, of the layer `name`, as the checkpoint alone tells the dtype of c."""
        if self.prepared:
            raise in_use(name)
        if dtype != self.dtype and not self.loaded:
            self.data = torch.empty(self.stored_shape, dtype=dtype, device=self.device)
        if not self.is_meta:  # vLLM's reload first counts elements on meta tensors
            self.loaded = self.loaded | {place: dtype}


class BPDQExpertsMethod(FusedMoEMethodBase):
    """The experts of the layer `name`, all of them in `scheme`."""

    def __init__(self, layer: Module, scheme: Scheme, name: str) -> None:
        super().__init__(layer.moe_config)
        self.scheme = scheme
        self.name = name
        self.activation = activation_of(layer, name)
        self.coefficients_dtypes: dict[str, torch.dtype] = {}  # of those in use, by the matrix's key

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size: int, *args: Any) -> tuple[int, int]:
        """The sizes as they are."""
        return hidden_size, intermediate_size

    def create_weights(
        self,
        layer: Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register for `num_experts` experts of this rank, for w13 and w2 each, `B` int32 and `c` (NaN until loaded),
        or with coefficients in 8 bits `c` int8 (0) and `s` fp32 (NaN until loaded), and `bias` where they have any.

        Raises ValueError naming the layer where the ranks' shares of the inputs don't start at a word of B.
        """
        inner, share = self.moe.intermediate_size, intermediate_size_per_partition
        first = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name}
        down = layer.ckpt_down_proj_name
        group_size = self.scheme.group_size
        finer = rank_group_size(f"{self.name}.*.{down}", share, inner, group_size)
        self.params_dtype = params_dtype
        self.up = Matrix(
            "w13", {k: n for k, n in first.items() if n}, hidden_size, inner, hidden_size, share, group_size
        )
        self.down = Matrix("w2", {"w2": down}, inner, hidden_size, share, hidden_size, finer)
        placed = layer.expert_map_manager.expert_map  # of each expert, where on this rank it is, or -1
        numbers = range(num_experts) if placed is None else (placed >= 0).nonzero().flatten().tolist()
        self.numbers = [*numbers]
        places = {number: i for i, number in enumerate(self.numbers)}
        kinds = (*self.scheme.tensors, *(("bias",) if self.moe.has_bias else ()))
        c_dtype = params_dtype if self.scheme.coefficient_bits == 16 else torch.int8
        dtypes = {"B": torch.int32, "c": c_dtype, "s": torch.float32, "bias": params_dtype}
        for matrix in (self.up, self.down):
            for kind, shape in matrix.shapes(self.scheme).items():
                if kind in kinds:
                    fill = nan if dtypes[kind].is_floating_point else 0
                    data = torch.full((num_experts, *shape), fill, dtype=dtypes[kind])
                    loader = self._loader(matrix, kind, shape, places)
                    layer.register_parameter(f"{matrix.key}_{kind}", ExpertsParameter(data, loader))
            for kind in MADE:
                layer.register_parameter(f"{matrix.key}_{kind}", nothing_yet())

    def _loader(self, matrix: Matrix, kind: str, shape: tuple[int, ...], places: dict[int, int]) -> Callable[..., bool]:
        def load(
            param: ExpertsParameter,
            loaded_weight: Tensor,
            weight_name: str = "",
            shard_id: str = "",
            expert_id: int = -1,
            return_success: bool = False,
        ) -> bool:
            """Weight loader: whether the expert, by its number in the checkpoint, is one of this rank."""
            where = getattr(loaded_weight, "shard_id", None)  # of names.numbered_experts
            number, part = (expert_id, shard_id) if where is None else (int(where.split(".")[0]), where.split(".")[1])
            if number not in places:
                return False
            name = f"{self.name}.{number}.{matrix.parts[part]}"
            tensor = matrix.share(kind, name, loaded_weight, shape, self.moe.tp_rank, self.scheme)
            param.receive(name, tensor.dtype if kind == "c" else param.dtype, (number, part))
            start = [*matrix.parts].index(part) * matrix.part_outputs
            param.data[places[number], ..., start : start + matrix.part_outputs].copy_(tensor)
            return True

        return load

    def process_weights_after_loading(self, layer: Module) -> None:
        """Check that every tensor of every expert arrived, finite, and prepare them for the kernels.

        Loaders that fill parameters themselves (`--load-format dummy`) never call a weight loader; for them, only
        coefficients that are still NaN count as missing. Raises ValueError naming the tensors and the remedy; the layer
        then has no weights, which the op refuses.
        """
        params = {name: param for name, param in layer.named_parameters() if isinstance(param, ExpertsParameter)}
        if all(param.prepared for param in params.values()):
            return
        try:
            self._check_arrived(params)
            for matrix in (self.up, self.down):
                self._prepare(layer, matrix)
        except Exception:
            discard(layer, params)
            raise
        for param in params.values():
            param.prepared = True
        self.coefficients_dtypes = {m.key: getattr(layer, f"{m.key}_c").dtype for m in (self.up, self.down)}
        warm_up_experts(*self._matrices(layer), self.activation, self.moe.experts_per_token, *self._rest(layer))

    def _prepare(self, layer: Module, matrix: Matrix) -> None:
        params = [getattr(layer, f"{matrix.key}_{kind}") for kind in self.scheme.tensors]
        stored = Stored(*(param.data for param in params))
        self._check_finite(matrix, stored)
        group, inputs, device = matrix.group_size, matrix.in_features, stored.B.device
        prepared = prepare_experts(stored, group, inputs, self.params_dtype, device)
        check_reloadable(f"{self.name}.*", prepared.coefficients.dtype, self.coefficients_dtypes.get(matrix.key))
        put(params[0], prepared.planes)
        put(params[1], prepared.coefficients)
        if stored.s is not None:
            put(params[2], stored.s.new_empty(0))  # it is in these now
        for kind in MADE:
            replace(layer, f"{matrix.key}_{kind}", getattr(prepared, kind))

    def _check_arrived(self, params: dict[str, ExpertsParameter]) -> None:
        if not any(param.loaded for param in params.values()):
            return
        missing = [
            f"{self.name}.{number}.{part}.{name.removeprefix(f'{matrix.key}_')}"
            for matrix in (self.up, self.down)
            for name, param in params.items()
            if name.startswith(f"{matrix.key}_")
            for number in self.numbers
            for key, part in matrix.parts.items()
            if (number, key) not in param.loaded
        ]
        if missing:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise ValueError(
                f"{', '.join(missing[:4])}{more} not in the checkpoint, though its config.json says that the experts "
                "are quantized: download or quantize it again"
            )
        for matrix in (self.up, self.down):
            c = params[f"{matrix.key}_c"]
            for (number, key), dtype in c.loaded.items():
                if dtype != c.dtype:
                    raise ValueError(
                        f"{self.name}.{number}.{matrix.parts[key]}.c is {dtype}, but other experts of the layer have "
                        f"theirs in {c.dtype}: quantize the model again"
                    )

    def _check_finite(self, matrix: Matrix, stored: Stored) -> None:
        numbers = stored.c if stored.s is None else stored.s
        if is_finite(numbers):
            return
        for i, number in enumerate(self.numbers):
            for start, part in enumerate(matrix.parts.values()):
                outputs = slice(start * matrix.part_outputs, (start + 1) * matrix.part_outputs)
                c, s = (None if t is None else t[i, ..., outputs] for t in stored[1:])
                check_finite(f"{self.name}.{number}.{part}", c, s)

    def get_fused_moe_quant_config(self, layer: Module) -> None:
        """None: vLLM's own kernels are not used."""

    def apply(
        self,
        layer: Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Module | None = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """What this rank adds to the outputs [T, H] of tokens x [T, H], of the experts topk_ids [T, A]."""
        if layer.expert_map is not None:
            topk_ids = torch.where(topk_ids < 0, -1, layer.expert_map[topk_ids.clamp(min=0)])
        return moe(x, topk_weights, topk_ids, *self._matrices(layer), self.activation, *self._rest(layer))

    def _matrices(self, layer: Module) -> tuple[PreparedExperts, PreparedExperts]:
        return self.prepared(layer, self.up), self.prepared(layer, self.down)

    def _rest(self, layer: Module) -> tuple[Tensor | None, Tensor | None, bool]:
        """Biases, and whether weights count on the input."""
        biases = (getattr(layer, f"{matrix.key}_bias", None) for matrix in (self.up, self.down))
        return *biases, layer.apply_router_weight_on_input

    def prepared(self, layer: Module, matrix: Matrix) -> PreparedExperts:
        """A matrix for the kernels; only after `process_weights_after_loading`."""
        kinds = ("B", "c", "scales", "ratios")
        tensors = (getattr(layer, f"{matrix.key}_{kind}", None) for kind in kinds)
        out_features = len(matrix.parts) * matrix.part_outputs
        return PreparedExperts(*tensors, matrix.in_features, out_features, matrix.group_size)


def activation_of(layer: Module, name: str) -> Activation:
    """Of vLLM's layer `name` of experts; raises ValueError for one that the kernels don't have."""
    found = layer.activation.value
    limit = inf if layer.swiglu_limit is None else layer.swiglu_limit
    alpha, beta = layer.swiglu_alpha, layer.swiglu_beta
    if found == "swigluoai":  # as vLLM's kernels have it, whatever the layer says
        return Activation(found, 1.702, 7.0)
    if found == "swigluoai_uninterleave" and beta == 1:
        return Activation("swigluoai", 1.0 if alpha is None else alpha, limit)
    if found == "silu":
        return Activation(found, limit=limit)
    if found not in NAMES:
        raise ValueError(
            f"{name}: the activation {found} is not supported in BPDQ: quantize the model again with "
            "--ignore 're:.*experts.*'"
        )
    return Activation(found)
