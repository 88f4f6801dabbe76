"""What Mamba-2's mixer makes of in_proj over tensor-parallel ranks: outputs dealt by heads, an only group to each."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.mamba import mamba_mixer2
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

from ranks import become, config, finish, load, stored

INNER, STATE, HEADS = 256, 32, 8


def mixer(groups: int, width: int) -> MambaMixer2:
    with set_current_vllm_config(VllmConfig()):
        return MambaMixer2(
            hidden_size=128,
            ssm_state_size=STATE,
            conv_kernel_size=4,
            intermediate_size=INNER,
            use_conv_bias=True,
            use_bias=False,
            n_groups=groups,
            num_heads=HEADS,
            head_dim=INNER // HEADS,
            quant_config=config(width=width),
            prefix="m.mixer",
        )


@pytest.mark.parametrize("width", [16, 8])
@pytest.mark.parametrize(("groups", "tp_size"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)])
def test_ranks_get_the_outputs_of_their_heads(monkeypatch, groups, tp_size, width):
    parts = [INNER, INNER, groups * STATE, groups * STATE, HEADS]
    tensors, W = stored(sum(parts), 128, 64, width=width)
    for tp_rank in range(tp_size):
        become(monkeypatch, tp_rank, tp_size)
        for name, value in ("rank", tp_rank), ("world_size", tp_size):
            monkeypatch.setattr(mamba_mixer2, f"get_tensor_model_parallel_{name}", lambda value=value: value)
        layer = mixer(groups, width).in_proj
        load(layer, tensors)
        finish(layer)
        shares = [1 if groups == 1 and part == STATE else tp_size for part in parts]
        split = zip(W.split(parts), shares, strict=True)
        expected = torch.cat([part.chunk(share)[tp_rank % share] for part, share in split])
        eye = torch.eye(128, dtype=layer.params_dtype)
        assert torch.equal(layer.quant_method.apply(layer, eye, None).T, expected)
        assert not hasattr(layer, "weight_scale")
