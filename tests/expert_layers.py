"""vLLM's layers of experts, built one rank at a time in one process."""

from typing import NamedTuple

import torch
from vllm.config import LoRAConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    MoEActivation,
    RoutedExperts,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from vllm_bpdq.config import BPDQConfig

PREFIX = "model.layers.0.mlp.experts"
PARTS = GATE, UP, DOWN = ("gate_proj", "up_proj", "down_proj")


class Rank(NamedTuple):
    """One of `size` processes, which share experts out, or the inner size of each."""

    rank: int = 0
    size: int = 1
    experts: bool = False

    def parallel(self) -> FusedMoEParallelConfig:
        one = FusedMoEParallelConfig.make_no_parallel()
        shared_out = "ep" if self.experts else "tp"
        setattr(one, f"{shared_out}_size", self.size)
        setattr(one, f"{shared_out}_rank", self.rank)
        one.use_ep = self.experts
        return one


ALONE = Rank()


def expert_layer(
    quant: BPDQConfig,
    hidden: int = 128,
    inner: int = 64,
    experts: int = 4,
    rank: Rank = ALONE,
    activation: str = "silu",
    biases: bool = False,
    dtype: torch.dtype = torch.float32,
    names: tuple[str, str, str | None] = ("gate_proj", "down_proj", "up_proj"),
    lora: LoRAConfig | None = None,
    prefix: str = PREFIX,
    **settings: object,
) -> RoutedExperts:
    """A layer as vLLM's models build it, for one rank. settings: more arguments of RoutedExperts."""
    parallel = rank.parallel()
    placed = ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=2,
        global_num_experts=experts,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    config = FusedMoEConfig(
        num_experts=experts,
        num_local_experts=placed.local_num_experts,
        num_logical_experts=experts,
        experts_per_token=2,
        hidden_dim=hidden,
        intermediate_size=inner,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=parallel,
        in_dtype=dtype,
        has_bias=biases,
    )
    config.activation = MoEActivation(activation)  # later, as some are for GPUs only
    vllm_config = VllmConfig()
    vllm_config.lora_config = lora
    with set_current_vllm_config(vllm_config):
        return RoutedExperts(prefix, dtype, config, quant, placed, *names, **settings)
