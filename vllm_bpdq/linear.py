"""Linear layers of a BPDQ checkpoint in vLLM: allocate, load (over tensor-parallel ranks), check, multiply.

vLLM's layers say which outputs of which part of a fused layer a tensor holds; the inputs are cut here.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from math import gcd, nan
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    ReplicatedLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.model_loader.reload.meta import to_meta_tensor
from vllm.model_executor.parameter import ModelWeightParameter

from bpdq_kernels import Prepared, linear, prepare, warm_up
from bpdq_kernels.format import Scheme, check_coefficients, check_finite, check_planes, check_scales
from bpdq_kernels.layout import WORD, Stored, coefficient_shape, plane_shape, split_groups, trim

Fit = Callable[[str, Tensor, int], Tensor]
NO_PAIRS: Mapping[str, int] = MappingProxyType({})
MADE = ("scales", "ratios")  # what a layer may have beside its tensors once it is prepared


class OwnersLoader:
    """Where the module that owns a layer may leave a weight loader, for tensors [outputs, ...], as it does for what it
    finds under the names of other methods: Mamba-2's mixer with in_proj, of which each rank gets outputs of five
    parts, and all of a part that is one group's."""

    weight_loader: Callable[[Any, Tensor], None]  # until then there is none


class StoredParameter(ModelWeightParameter):
    """`B` or `c` [inputs, rows, outputs] or `s` [rows, outputs] on one rank.

    `parts` maps the first output of each part of a fused layer to the part's name in the checkpoint; `loaded` has the
    dtypes of those that have arrived. `fit(name, tensor, out_features)` checks a tensor of the checkpoint and
    returns it in the rows that all ranks together hold. `owners` may get a loader, which then chooses the outputs.
    """

    def __init__(
        self,
        *,
        data: Tensor,
        weight_loader: Callable[..., None],
        parts: dict[int, str],
        fit: Fit,
        owners: OwnersLoader,
    ) -> None:
        super().__init__(data=data, input_dim=0, output_dim=data.ndim - 1, weight_loader=weight_loader)
        self.parts = parts
        self.fit = fit
        self.owners = owners
        self.stored_shape = data.shape
        # never changed in place, as vLLM's reload restores a shallow copy of these attributes
        self.loaded: dict[int, torch.dtype] = {}
        self.prepared = False  # whether data is in the order of the kernels

    def receive(self, tensor: Tensor, out_features: int, start: int = 0) -> Tensor:
        """Check the part whose first output is `start` and whose outputs, of all ranks, are `out_features`."""
        name = self.parts[start]
        if self.prepared:
            raise in_use(name)
        tensor = self.fit(name, tensor, out_features)
        if tensor.dtype != self.dtype and not self.loaded:
            # c keeps the checkpoint's dtype, which only its tensors tell: fp16 would lose 3 bits in bf16
            self.data = torch.empty(self.stored_shape, dtype=tensor.dtype, device=self.device)
        if not self.is_meta:  # vLLM's reload first counts elements on meta tensors
            self.loaded = self.loaded | {start: tensor.dtype}
        return tensor

    def check_dtypes(self) -> None:
        """Raise ValueError if parts of a fused layer differ in dtype, of which it has one."""
        for start, dtype in self.loaded.items():
            if dtype != self.dtype:
                raise ValueError(
                    f"{self.parts[start]}.c is {dtype}, but vLLM fuses the layer with one in {self.dtype}: quantize "
                    "the model again"
                )

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        if hasattr(self.owners, "weight_loader"):
            tensor = self.receive(loaded_weight, loaded_weight.shape[-1])
            self.owners.weight_loader(SimpleNamespace(data=self.data.movedim(-1, 0)), tensor.movedim(-1, 0))
            return
        super().load_column_parallel_weight(self.receive(loaded_weight, self.stored_shape[-1] * self.tp_size))

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        super().load_row_parallel_weight(self.receive(loaded_weight, self.stored_shape[-1]))

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        out_features = kwargs["shard_size"] * self.tp_size
        super().load_merged_column_weight(self.receive(loaded_weight, out_features, kwargs["shard_offset"]), **kwargs)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        replicas = 1 if kwargs["shard_id"] == "q" else kwargs["num_heads"]
        out_features = kwargs["shard_size"] * self.tp_size // replicas
        super().load_qkv_weight(self.receive(loaded_weight, out_features, kwargs["shard_offset"]), **kwargs)


def in_use(name: str) -> ValueError:
    """Of a load over weights that the kernels have, whose order and place in memory are theirs."""
    return ValueError(f"{name}: its weights are in use: replace them with vLLM's reload_weights, not load_weights")


def check_reloadable(name: str, new: torch.dtype, held: torch.dtype | None) -> None:
    """Raise ValueError where coefficients in `new` would be rounded to the dtype of those in use, of which vLLM's
    reload keeps the memory. held: None before the first load."""
    if held is not None and torch.promote_types(new, held) != held:
        raise ValueError(
            f"{name}.c is {new}, which a reload would round to {held}, as the weights in use are: start the server "
            "with that checkpoint"
        )


def nothing_yet() -> Parameter:
    """In the place of a tensor that is made when a layer is prepared: a compiled graph looks for it in a layer that a
    refused reload has left without, before the op is called that says so."""
    return Parameter(torch.empty(0), requires_grad=False)


def replace(layer: Module, name: str, tensor: Tensor | None) -> None:
    """Put a tensor, or nothing, in the place of a parameter."""
    delattr(layer, name)
    if tensor is not None:
        layer.register_parameter(name, Parameter(tensor, requires_grad=False))


def put(param: Parameter, tensor: Tensor) -> None:
    """Give a parameter the tensor that the kernels read. What `--cpu-offload-gb` keeps in host memory vLLM takes back
    there (`device_loading_context`) where its mark is gone."""
    param.data = tensor
    vars(param).pop("_vllm_is_uva_offloaded", None)


def discard(layer: Module, names: Iterable[str]) -> None:
    """Leave nothing of parameters that can't be used that a kernel could read."""
    for name in names:
        layer.register_parameter(name, to_meta_tensor(getattr(layer, name)))


def rank_group_size(name: str, share: int, inputs: int, group_size: int) -> int:
    """The group size on a rank that holds `share` of a layer's inputs. It may start inside a group: there the groups
    are split, which repeats coefficients and changes nothing. Raises ValueError where it starts inside a word of B."""
    finer = group_size if share == inputs else gcd(group_size, share)
    if finer % WORD:
        raise ValueError(
            f"{name}: tensor parallelism gives each rank {share} of {inputs} inputs, which is not a multiple of "
            f"{WORD}: use a smaller --tensor-parallel-size"
        )
    return finer


def load_replicated(param: StoredParameter, loaded_weight: Tensor) -> None:
    """Weight loader of ReplicatedLinear, whose own knows neither padding nor c's dtype."""
    tensor = param.receive(loaded_weight, param.stored_shape[-1])
    param.data.copy_(tensor)


@register_weight_loader_v2_supported_method
class BPDQLinearMethod(LinearMethodBase):
    """Layer `name` in `scheme`; `parts` are the layers of the checkpoint that vLLM fuses into it. pairs: how many heads
    a part has whose rotary embeddings turn outputs 2i and 2i + 1, which vLLM's model has in the halves of a head."""

    def __init__(self, scheme: Scheme, name: str, parts: list[str], pairs: Mapping[str, int] = NO_PAIRS) -> None:
        self.scheme = scheme
        self.name = name
        self.parts = parts
        self.pairs = pairs
        self.coefficients_dtype: torch.dtype | None = None  # of those in use

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register `B` int32 and `c` (NaN until loaded) for this rank, or with coefficients in 8 bits `c` int8 (0) and
        `s` fp32 (NaN until loaded), which holds what fp16 and bf16 do.

        Raises ValueError naming the layer where the ranks' shares of the inputs don't start at a word of B.
        """
        self.in_features, self.out_features = input_size_per_partition, sum(output_partition_sizes)
        self.group_size = rank_group_size(self.name, self.in_features, input_size, self.scheme.group_size)

        def fit_planes(name: str, B: Tensor, out_features: int) -> Tensor:
            check_planes(name, B, input_size, out_features, self.scheme)
            return trim(B, input_size)

        def fit_coefficients(name: str, c: Tensor, out_features: int) -> Tensor:
            check_coefficients(name, c, input_size, out_features, self.scheme)
            return split_groups(c, self.scheme.group_size, self.group_size)

        def fit_scales(name: str, s: Tensor, out_features: int) -> Tensor:
            check_scales(name, s, out_features, self.scheme)
            return s.float().repeat(input_size // input_size_per_partition, 1)  # each rank's part is all of s

        def halved(fit: Fit, name: str, tensor: Tensor, out_features: int) -> Tensor:
            tensor = fit(name, tensor, out_features)
            if name not in self.pairs:
                return tensor
            return tensor.unflatten(-1, (self.pairs[name], -1, 2)).transpose(-1, -2).flatten(-3)

        loader = load_replicated if isinstance(layer, ReplicatedLinear) else extra_weight_attrs["weight_loader"]
        starts = list(accumulate(output_partition_sizes[:-1], initial=0))
        names = self.parts if len(self.parts) == len(starts) else [self.name] * len(starts)  # fused on disk, as Phi-3
        parts = dict(zip(starts, names, strict=True))
        sizes = self.in_features, self.out_features, self.scheme.bits
        shape = coefficient_shape(*sizes, self.group_size, self.scheme.trellis)
        B = torch.empty(plane_shape(*sizes), dtype=torch.int32)
        tensors = {"B": (B, fit_planes)}
        if "s" in self.scheme.tensors:
            tensors["c"] = torch.zeros(shape, dtype=torch.int8), fit_coefficients
            tensors["s"] = torch.full(shape[1:], nan, dtype=torch.float32), fit_scales
        else:
            tensors["c"] = torch.full(shape, nan, dtype=params_dtype), fit_coefficients
        owners = OwnersLoader()
        for name, (data, fit) in tensors.items():
            fitted = partial(halved, fit)
            param = StoredParameter(data=data, weight_loader=loader, parts=parts, fit=fitted, owners=owners)
            layer.register_parameter(name, param)
        for name in MADE:
            layer.register_parameter(name, nothing_yet())
        if type(layer) is ColumnParallelLinear:
            layer.weight_scale = owners  # a name that Mamba-2's mixer looks for; gone once the layer is loaded

    def process_weights_after_loading(self, layer: Module) -> None:
        """Check that every part arrived, whole and finite, prepare it for the kernels and compile those.

        Loaders that fill parameters themselves (`--load-format dummy`) never call a weight loader; for them, only
        coefficients that are still NaN count as missing. Raises ValueError naming the tensor and the remedy; the layer
        then has no weights, which the ops refuse.
        """
        vars(layer).pop("weight_scale", None)
        stored = {name: getattr(layer, name) for name in self.scheme.tensors}
        if all(param.prepared for param in stored.values()):
            return
        try:
            prepared = self._prepare(layer, stored)
        except Exception:
            discard(layer, stored)
            raise
        put(layer.B, prepared.planes)
        put(layer.c, prepared.coefficients)
        if "s" in stored:
            put(layer.s, layer.s.new_empty(0))  # it is in these now
        for name in MADE:
            replace(layer, name, getattr(prepared, name))
        # where vLLM looks for the device of LoRA adapters; a Parameter would be looked for in checkpoints
        layer.qweight = layer.B.new_empty(0)
        for param in stored.values():
            param.prepared = True
        self.coefficients_dtype = prepared.coefficients.dtype
        warm_up(prepared, getattr(layer, "bias", None))

    def _prepare(self, layer: Module, stored: dict[str, StoredParameter]) -> Prepared:
        if any(param.loaded for param in stored.values()):
            missing = [
                f"{name}.{tensor}"
                for tensor, param in stored.items()
                for start, name in param.parts.items()
                if start not in param.loaded
            ]
            if missing:
                raise ValueError(
                    f"{', '.join(missing)} not in the checkpoint, though its config.json says that the layer is "
                    f"quantized: download or quantize it again"
                )
        layer.c.check_dtypes()
        B, c, s = Stored(*(param.data for param in stored.values()))
        check_finite(self.name, c, s)
        prepared = prepare(B, c, self.group_size, self.in_features, layer.params_dtype, B.device, s)
        check_reloadable(self.name, prepared.coefficients.dtype, self.coefficients_dtype)
        return prepared

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y [..., N] = x [..., K] @ W.T + bias, of this rank's K and N."""
        return linear(x, self.prepared(layer), bias)

    def prepared(self, layer: Module) -> Prepared:
        """The layer for the kernels; only after `process_weights_after_loading`."""
        scales, ratios = getattr(layer, "scales", None), getattr(layer, "ratios", None)
        return Prepared(layer.B, layer.c, scales, ratios, self.in_features, self.out_features, self.group_size)
