"""Experts one by one compute what transformers' fused ones do, and are loaded from bit-planes."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import bpdq_quantizer  # noqa: F401, registers the loader
from architectures import EXPERTS, config_of
from bpdq_kernels import dequantize
from bpdq_kernels.experts import Experts, routes, take_apart
from bpdq_quantizer.model.stream import decoder_blocks
from bpdq_quantizer.model.weights import kept, weights_in
from mixtures import MIXTURES

IDS = torch.arange(30)[None] * 7 % 379
EACH_KIND = ("mixtral", "gpt_oss", "llama4_text", "granitemoe", "nemotron_h")
EVERY = [pytest.param(arch, marks=() if arch in EACH_KIND else pytest.mark.slow) for arch in MIXTURES]


def random_model(arch: str) -> PreTrainedModel:
    """With biases, and routers that choose, which transformers initializes to nearly zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(arch + EXPERTS)).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or "bias" in name:
            parameter.data.normal_(0, 0.1)
    return model


@torch.inference_mode()
def logits(model):
    return model(IDS).logits


@pytest.mark.parametrize("arch", EVERY)
def test_taken_apart_they_compute_the_same_in_the_same_memory(arch):
    fused = random_model(arch)
    model = copy.deepcopy(fused)
    before = sum(p.untyped_storage().nbytes() for p in model.parameters())
    names = take_apart(model)
    assert names
    assert all(isinstance(model.get_submodule(name), Experts) for name in names)
    expected = logits(fused)
    assert (logits(model) - expected).std() < 1e-5 * expected.std()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) <= before


def test_a_token_goes_where_it_is_routed_and_nowhere_for_an_expert_that_there_is_not():
    index = torch.tensor([[2, 0], [3, 2], [3, 3]])  # of 3 experts
    found = {i: (rows.tolist(), places.tolist()) for i, rows, places in routes(index, 3)}
    assert found == {0: ([0], [1]), 2: ([0, 1], [0, 1])}


def write_planes(model: PreTrainedModel, folder: Path) -> None:
    """Random bit-planes for all Linears of a model's blocks, and the weights that they stand for in their place."""
    take_apart(model)
    prefix, blocks = decoder_blocks(model)
    weights, tensors = weights_in(blocks, prefix), model.state_dict()
    alone = kept(weights)
    for name in weights.keys() - alone.keys():
        outputs, inputs = weights[name].shape
        B = torch.randint(-(2**31), 2**31, (-(-inputs // 32), 2, outputs), dtype=torch.int32)
        c = (torch.randn(-(-inputs // 32), 3, outputs) / 10).bfloat16()
        weights[name].assign(dequantize(B, c, 32, inputs))
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.B": B, f"{name}.c": c}
    folder.mkdir()
    tensors = {name: tensor for name, tensor in tensors.items() if name not in model.all_tied_weights_keys}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ignore = ["lm_head", *alone]
    planes = {"quant_method": "bpdq", "format_version": 1, "bits": 2, "group_size": 32, "ignore": ignore}
    model.config.quantization_config = planes
    model.config.save_pretrained(folder)


@pytest.mark.parametrize("arch", [arch for arch in EACH_KIND if arch != "granitemoe"])
def test_they_are_loaded_one_by_one_from_bit_planes(tmp_path, arch):
    model = random_model(arch)
    write_planes(model, tmp_path / "out")
    expected = logits(model)
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (found - expected).std() < 1e-3 * expected.std()
