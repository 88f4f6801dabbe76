"""Experts one by one compute what transformers' fused ones do, and are loaded from bit-planes."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import bpdq_quantizer
from architectures import EXPERTS, config_of, model_folder
from bpdq_kernels import dequantize
from bpdq_kernels.experts import Experts, Routed, routes, take_apart
from bpdq_quantizer.algorithm.solver import Solution, quantize_linear
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.stream import decoder_blocks, open_model
from bpdq_quantizer.model.weights import kept, weights_in
from bpdq_quantizer.passes import experts
from bpdq_quantizer.passes.experts import FILL_WEIGHT, layer_tokens
from bpdq_quantizer.run import workers
from mixtures import MIXTURES
from tiny import load_tensors

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


QUICK = {"bits": 2, "group_size": 32, "samples": 3, "seq_len": 32, "iterations": 1, "solver": "paper"}


def quantize(source: Path, text: str, **options: object) -> dict:
    return bpdq_quantizer.quantize(str(source), source.with_name("out"), calibration=text, **QUICK | options)


def test_each_expert_reports_its_tokens_and_rare_ones_are_told_of(tmp_path, text, capfd):
    report = quantize(model_folder(tmp_path / "model", f"mixtral{EXPERTS}"), text)
    tokens = {layer["name"]: layer["tokens"] for layer in report["layers"]}
    seen = [n for name, n in tokens.items() if name.startswith("model.layers.0.") and name.endswith(".w2")]
    assert len(seen) == 8
    assert sum(seen) == 2 * 3 * 32  # each token chooses two
    assert tokens["model.layers.0.self_attn.q_proj"] == 3 * 32
    assert "48 matrices of experts were fitted to fewer than 256 tokens of their own" in capfd.readouterr().out


def test_experts_are_solved_some_at_a_time_and_as_alone(tmp_path, text, monkeypatch):
    """Of 8 experts as many at once as are allowed, or as have inputs that fit the device."""
    monkeypatch.setattr(experts, "matrices_at_once", lambda rows, inputs: 3)
    solved = []

    def solve(W: torch.Tensor, H: torch.Tensor, *args: object, **options: object) -> Solution:
        solved.append(len(W) if W.ndim == 3 else 1)
        return quantize_linear(W, H, *args, **options)

    monkeypatch.setattr(workers, "quantize_linear", solve)
    source = model_folder(tmp_path / "model", f"mixtral{EXPERTS}")
    found = []
    for room, sizes in ((1 << 30, [3, 3, 3, 3, 2, 2]), (1, [1] * 16)):
        monkeypatch.setattr(experts, "ACTIVATION_BYTES", room)
        quantize(source, text)
        found.append(load_tensors(source.with_name("out")))
        assert solved == 2 * [1, 1, *sizes]  # two blocks: q, k, v, then o, then experts
        solved.clear()
        shutil.rmtree(source.with_name("out"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_experts_of_a_layer_are_one_pattern_in_the_config(tmp_path, text):
    folder = model_folder(tmp_path / "model", f"mixtral{EXPERTS}")
    quantize(folder, text, ignore=["re:model.layers.1.mlp.experts"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", r"re:model\.layers\.1\.block_sparse_moe\.experts[.]"]
    stored = load_tensors(tmp_path / "out")
    assert "model.layers.0.block_sparse_moe.experts.7.w2.B" in stored
    assert "model.layers.1.block_sparse_moe.experts.7.w2.weight" in stored
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(
        model.model.layers[1].mlp.experts.get_submodule("7.w2").weight,
        AutoModelForCausalLM.from_pretrained(folder).model.layers[1].mlp.experts.down_proj[7],
    )


@pytest.mark.parametrize(
    ("arch", "ignore", "message"),
    [
        ("mixtral", r"re:.*\.experts\.3\.", "the experts of a layer are all quantized or none"),
        ("mixtral", "re:.*w2", r"--ignore leaves model\.layers\.0\.mlp\.experts\.7\.w2 alone, but not model"),
        ("gpt_oss", "re:.*experts", "files of GptOssForCausalLM have experts fused, and are not written so"),
    ],
)
def test_experts_that_cannot_be_left_alone_are_refused(tmp_path, text, arch, ignore, message):
    with pytest.raises(InputError, match=message):
        quantize(model_folder(tmp_path / "model", f"{arch}{EXPERTS}"), text, ignore=[ignore])
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize(
    ("arch", "name", "change", "message"),
    [
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.5.w3.weight",
            None,
            r"experts\.5\.w3\.weight is not in its",
        ),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", None, r"experts\.0\.down_proj\.weight is not in its files"),
        (
            "gpt_oss",
            "model.layers.1.mlp.experts.down_proj",
            slice(1, None),
            r"down_proj is \(7, 96, 128\) in its files",
        ),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.5.w3.weight",
            slice(1, None),
            r"w3\.weight is \(95, 128\)",
        ),
    ],
)
def test_files_that_lack_experts_or_hold_others(tmp_path, text, arch, name, change, message):
    folder = model_folder(tmp_path / "model", f"{arch}{EXPERTS}")
    tensors = load_tensors(folder)
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = tensor[change].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        quantize(folder, text)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["experts.8.w1.weight"], r"experts\.8\.w1\.weight has no place: config\.json has 8 experts"),
        (["experts.gate_up_proj"], r"experts\.0\.w1\.weight is in its files twice, also in model.*gate_up_proj"),
    ],
)
def test_experts_that_files_have_besides_are_refused(tmp_path, text, names, message):
    folder = model_folder(tmp_path / "model", f"mixtral{EXPERTS}")
    shapes = {"experts.8.w1.weight": (96, 128), "experts.gate_up_proj": (8, 192, 128)}
    extra = {f"model.layers.1.block_sparse_moe.{name}": torch.zeros(shapes[name]) for name in names}
    save_file(load_tensors(folder) | extra, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        quantize(folder, text)


def test_fused_experts_are_turned_only_where_transformers_turns_them(tmp_path, text):
    folder = model_folder(tmp_path / "model", f"gpt_oss{EXPERTS}")
    tensors = load_tensors(folder)
    name = "model.layers.1.mlp.experts.down_proj"
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"down_proj is \(8, 128, 96\) in its files, but \(8, 96, 128\)"):
        quantize(folder, text)


def test_fused_experts_in_integers_are_refused(tmp_path, text):
    folder = model_folder(tmp_path / "model", f"gpt_oss{EXPERTS}")
    tensors = load_tensors(folder)
    tensors["model.layers.1.mlp.experts.down_proj"] = tensors["model.layers.1.mlp.experts.down_proj"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts\.down_proj is I8, no 16-bit float"):
        quantize(folder, text)


def test_an_expert_that_no_token_chose_is_fitted_to_others():
    index, counts = torch.arange(50)[:, None] % 3, torch.full((50, 1), 0.5)
    counts[1] = 1.0
    tokens = layer_tokens(4, [Routed(torch.randn(50, 8), index, counts)], None)
    x, original, weights, routed = tokens.of(3)
    assert routed == 0
    assert original is None
    assert sorted(x.tolist()) == sorted(tokens.x.tolist())
    assert (weights == FILL_WEIGHT).all()
    x, _, weights, routed = tokens.of(1)
    assert routed == 17
    assert torch.equal(x[:17], tokens.x[1::3])
    assert len(x) == 50
    assert weights[0] == 4 * weights[1]
    torch.testing.assert_close(weights[:17].mean(), torch.tensor(1.0))
    assert (weights[17:] == FILL_WEIGHT).all()


def test_what_transformers_makes_of_several_tensors_is_not_called_like_one_of_them(tmp_path):
    """Kimi Linear's convolutions."""
    names = open_model(str(model_folder(tmp_path / "model", f"kimi_linear{EXPERTS}"))).names
    assert names.tensor("model.layers.0.self_attn.conv1d.weight") == "model.layers.0.self_attn.conv1d.weight"
    assert names.tensor("model.layers.1.mlp.experts.0.w1.weight") != "model.layers.1.mlp.experts.0.w1.weight"
