"""Heads for multi-token prediction, which transformers drops, go into the checkpoint as they are; vLLM drafts with
them."""

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration

import bpdq_quantizer
from bpdq_kernels.errors import InputError
from bpdq_kernels.folder import Entry
from bpdq_quantizer.checkpoint import heads
from bpdq_quantizer.checkpoint.heads import find_heads, head_files
from bpdq_quantizer.checkpoint.inspection import inspect
from bpdq_quantizer.checkpoint.manifest import verify
from bpdq_quantizer.model.opening import load_pretrained, plain_skeleton
from generate import vllm_tokens
from mtp_models import COUNT, with_head
from tiny import load_tensors, tiny_model
from vllm_bpdq.config import BPDQConfig
from vllm_bpdq.linear import BPDQLinearMethod

QUICK = {"bits": 2, "group_size": 32, "samples": 3, "seq_len": 32, "iterations": 1, "solver": "paper"}


def head_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: W for n, W in load_tensors(folder).items() if n.startswith(("mtp.", "model.layers.2."))}


@pytest.fixture(scope="module", params=["qwen3_5", "deepseek_v3"])
def source(request, tmp_path_factory) -> Path:
    return with_head(tmp_path_factory.mktemp(request.param) / request.param, request.param)


@pytest.fixture(scope="module")
def out(source, text) -> Path:
    bpdq_quantizer.quantize(str(source), source.parent / "out", calibration=text, **QUICK)
    return source.parent / "out"


def test_a_head_is_copied_as_it_is(source, out):
    before, after = head_of(source), head_of(out)
    assert before.keys() == after.keys()
    assert len(before) > 10
    for name, W in before.items():
        assert (after[name].dtype, after[name].tolist()) == (W.dtype, W.tolist())
    arch = source.name
    assert getattr(AutoConfig.from_pretrained(out).get_text_config(), COUNT[arch]) == 1
    assert verify(out)["tensors"] == len(load_tensors(out))
    assert inspect(out)["mtp_bytes"] == sum(W.nbytes for W in before.values())
    report = json.loads((out / "quantization_report.json").read_text())
    assert {n.removesuffix(".weight") for n, W in before.items() if W.ndim == 2} <= report["left_in_16_bits"].keys()


def test_transformers_drops_a_head_without_a_word(out, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        model = load_pretrained(str(out), torch.float32)
    assert not any(name.startswith(("mtp.", "model.layers.2.")) for name in model.state_dict())
    assert "UNEXPECTED" not in caplog.text


class Stop(Exception):  # noqa: N818, stands for a crash
    pass


def test_a_run_that_stopped_while_it_copied_goes_on(source, out, text, tmp_path, monkeypatch):
    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(heads, "write_tensors", stop)
        with pytest.raises(Stop):
            bpdq_quantizer.quantize(str(source), tmp_path / "out", calibration=text, **QUICK)
    bpdq_quantizer.quantize(str(source), tmp_path / "out", calibration=text, **QUICK, resume=True)
    for file in out.glob("model-*"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_head_of_a_hub_model_is_found_in_the_cache(source, tmp_path, monkeypatch):
    cached = tmp_path / "models--someone--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(source, cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_heads("someone/model", plain_skeleton(str(source))).keys() == head_of(source).keys()


def test_files_of_heads_keep_to_their_size_and_to_one_source(tmp_path):
    entries = [("a", 5), ("a", 3), ("a", 4), ("b", 1), ("b", 20), ("b", 1)]
    found = {f"mtp.{i}": Entry(tmp_path / file, "F16", (size, 512)) for i, (file, size) in enumerate(entries)}
    parts = [[int(name[4:]) for name in names] for names in head_files(tmp_path, found, largest=8192).values()]
    assert parts == [[0, 1], [2], [3], [4], [5]]


def changed(source: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """A copy of a model folder with other tensors."""
    shutil.copytree(source, to)
    save_file(change(load_tensors(source)), to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize(("lost", "whole"), [("", 0), ("mlp.up_proj.weight", 0), (None, 1)])
def test_one_line_says_that_layers_of_a_head_are_missing(source, tmp_path, capfd, lost, whole):
    """lost: of the head, None if nothing is."""

    def lose(tensors):
        gone = [name for name in head_of(source) if lost is not None and name.endswith(lost)]
        return {name: W for name, W in tensors.items() if name not in gone}

    model = str(changed(source, tmp_path / "model", lose))
    found = find_heads(model, plain_skeleton(model))
    assert len(found) == len(head_of(source)) - {"": len(head_of(source)), None: 0}.get(lost, 1)
    said = capfd.readouterr().out
    assert said.count("\n") == 1 - whole
    assert whole or f"{model}: its files hold 0 whole layers for multi-token prediction" in said


def test_a_head_in_8_bits_is_refused_before_any_work(source, text, tmp_path):
    name = next(name for name in head_of(source) if name.endswith("mlp.up_proj.weight"))
    model = changed(source, tmp_path / "model", lambda tensors: tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(
        InputError, match=rf"model.safetensors: {re.escape(name)} of a head .* is F8_E4M3, .*16-bit model"
    ):
        bpdq_quantizer.quantize(str(model), tmp_path / "out", calibration=text, **QUICK)
    assert not list(tmp_path.glob("out*"))


def test_a_head_that_holds_nan_is_refused_before_any_work(source, text, tmp_path):
    name = next(name for name in head_of(source) if name.endswith("mlp.up_proj.weight"))
    model = changed(source, tmp_path / "model", lambda tensors: tensors | {name: tensors[name] * torch.nan})
    with pytest.raises(InputError, match=rf"model.safetensors: {re.escape(name)} holds NaN or infinity"):
        bpdq_quantizer.quantize(str(model), tmp_path / "out", calibration=text, **QUICK)
    assert not list(tmp_path.glob("out*"))


def test_a_rotated_model_leaves_its_head_behind(text, tmp_path, capfd):
    tiny_model(tmp_path / "plain", dtype=torch.bfloat16)
    head = {f"mtp.layers.0.mlp.{name}_proj.weight": torch.ones(32, 32) for name in ("gate", "up")}
    model = changed(tmp_path / "plain", tmp_path / "model", lambda tensors: tensors | head)
    for rotate, kept in ("hadamard", False), ("none", True):
        out = tmp_path / rotate
        bpdq_quantizer.quantize(str(model), out, calibration=text, **QUICK, rotate=rotate)
        assert (load_tensors(out).keys() >= head.keys()) is kept
        assert ("--rotate" in capfd.readouterr().out) is not kept
        assert load_pretrained(str(out))


def test_a_target_size_counts_a_head(source, out, text, tmp_path):
    size = sum(W.nbytes for W in load_tensors(out).values())
    bpdq_quantizer.quantize(str(source), tmp_path / "out", calibration=text, **QUICK, target_size=str(size))
    assert sum(W.nbytes for W in load_tensors(tmp_path / "out").values()) <= size


def test_layers_of_a_head_are_in_16_bits_in_vllm_too(out):
    """By vLLM's names, which for a draft model that comes with the target are given to the target's config."""
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    quant = BPDQConfig.from_config(settings)
    quant.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    mapper = Qwen3_5ForConditionalGeneration.hf_to_vllm_mapper
    quant.apply_vllm_mapper(mapper.get_rename_mapper())
    linear = ColumnParallelLinear.__new__(ColumnParallelLinear)
    head, block = (
        ("mtp.", "language_model.model.") if out.parent.name.startswith("qwen") else ("model.layers.2.", "model.")
    )
    for name in ("layers.0.self_attn.qkv_proj", "layers.0.mlp.down_proj", "fc", "eh_proj"):
        assert isinstance(quant.get_quant_method(linear, f"{head}{name}"), UnquantizedLinearMethod)
    assert isinstance(quant.get_quant_method(linear, f"{block}layers.1.mlp.down_proj"), BPDQLinearMethod)


@pytest.mark.parametrize("head_bits", [None, 4])
@pytest.mark.slow
def test_vllm_drafts_with_a_head(text, tmp_path, head_bits):
    source = with_head(tmp_path / "model", "qwen3_5")
    bpdq_quantizer.quantize(str(source), tmp_path / "out", calibration=text, **QUICK, head_bits=head_bits)
    load = {"model": str(tmp_path / "out"), "dtype": "bfloat16", "limit_mm_per_prompt": {"image": 0, "video": 0}}
    load |= {"enable_prefix_caching": False}  # of a GatedDeltaNet, for which vLLM's CPU backend lacks a kernel
    drafting = load | {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}, "disable_log_stats": False}
    plain, drafted = vllm_tokens([{"load": load}, {"load": drafting, "drafts": True}])
    assert isinstance(drafted, list), drafted
    *tokens, (drafts, accepted) = drafted
    assert tokens == plain
    assert drafts / 8 < accepted < drafts  # of vocabularies of 384: not by chance
