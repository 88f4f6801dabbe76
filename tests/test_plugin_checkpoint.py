"""When the plugin looks at a checkpoint's files, and where it finds those of the hub."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
from vllm.config import DeviceConfig, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader import LoadFormats
from vllm.model_executor.model_loader.reload.layerwise import (
    LAYERWISE_INFO,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

import bpdq_quantizer  # noqa: F401, registers the loader
import vllm_bpdq
from benchmarks import vllm_models
from bpdq_kernels.errors import InputError
from bpdq_kernels.folder import read_folder
from mutant_files import split
from ranks import become, config, finish, load, stored
from tiny import bpdq_checkpoint, tiny_model
from vllm_bpdq import checkpoint
from vllm_bpdq.checkpoint import check_folder, local_folder
from vllm_bpdq.config import BPDQConfig
from vllm_bpdq.linear import BPDQLinearMethod

NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sound checkpoint and one without a norm."""
    folder = tmp_path_factory.mktemp("plugin")
    model = tiny_model(folder / "model", hidden=64, ffn=96, layers=1, heads=2, kv_heads=1)
    sound = bpdq_checkpoint(model, folder / "sound", group_size=32)
    incomplete = shutil.copytree(sound, folder / "incomplete")
    tensors = load_file(sound / "model.safetensors")
    del tensors[NORM]
    save_file(tensors, incomplete / "model.safetensors")
    return {"sound": sound, "incomplete": incomplete}


def read_quantization(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def first_layer(folder, load_format, compiler=MappingProxyType({}), settings=MappingProxyType({}), **part):
    """An engine for `folder`, of which vLLM builds a part first whose config differs in `part`, and what its config
    gives the first layer."""
    vllm_bpdq.register()
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, **settings)
    load = LoadConfig(load_format=load_format)
    engine = VllmConfig(model_config=model, load_config=load, device_config=DeviceConfig("cpu"))
    assert isinstance(engine.quant_config, BPDQConfig)
    engine.quant_config.packed_modules_mapping = {}
    engine.compilation_config.inductor_compile_config |= compiler
    text = copy.deepcopy(model.hf_config)
    text.update(part)
    with set_current_vllm_config(engine.with_hf_config(text)):
        layer = ReplicatedLinear.__new__(ReplicatedLinear)
        return engine, engine.quant_config.get_quant_method(layer, "model.layers.0.mlp.down_proj")


def method(*args, **part):
    return first_layer(*args, **part)[1]


@pytest.mark.parametrize("chosen", [{}, {"reorder_for_peak_memory": True}], ids=str)
def test_operations_stay_in_order_unless_the_user_asks_otherwise(folders, chosen):
    engine, _ = first_layer(folders["sound"], "auto", chosen)
    expected = {"reorder_for_peak_memory": False} | chosen
    assert engine.compilation_config.inductor_compile_config.items() >= expected.items()


@pytest.mark.parametrize("load_format", ["auto", "safetensors", "runai_streamer"])
def test_the_files_are_checked_before_the_first_layer(folders, load_format):
    assert isinstance(method(folders["sound"], load_format), BPDQLinearMethod)
    with pytest.raises(InputError, match=rf"{NORM} is not in the checkpoint: download or quantize it again"):
        method(folders["incomplete"], load_format)


@pytest.mark.parametrize("tie", [False, True])
def test_what_automodel_has_saved_is_whole(tmp_path, tie):
    """Its tensors lack the prefix that names in quantization_config have."""
    tiny_model(tmp_path / "model", hidden=64, ffn=96, layers=1, heads=2, kv_heads=1, tie_word_embeddings=tie)
    layers = {name: {"bits": 4} for name in ("model.layers.0.mlp.up_proj", "model.embed_tokens", "lm_head")}
    out = bpdq_checkpoint(tmp_path / "model", tmp_path / "out", layers=layers, group_size=32)
    again = tmp_path / "again"
    AutoModel.from_pretrained(out).save_pretrained(again)
    config, fmt = AutoConfig.from_pretrained(again), BPDQConfig.from_config(read_quantization(again)).format
    check_folder(again, config, fmt)
    tensors = load_file(again / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, again / "model.safetensors")
    with pytest.raises(InputError, match=r"norm\.weight is not in the checkpoint"):
        check_folder(again, config, fmt)


def called(architecture: str, **rest) -> dict:
    """An engine's settings for a model by another name, and with the rest of a config.json."""
    return {"hf_overrides": {"architectures": [architecture], **rest}}


POOLING = {"runner": "pooling"}
CLASSIFIER = called("LlamaForSequenceClassification") | POOLING
SCORE = {"score.weight": torch.zeros(2, 64)}


@pytest.mark.parametrize(
    ("settings", "extra"),
    [
        (called("LLaMAForCausalLM"), {}),
        (called("LlamaModel"), {}),
        (called("LlamaModel") | POOLING, {}),
        (CLASSIFIER, SCORE),
    ],
)
def test_names_are_checked_where_vllm_has_one_class_for_several_architectures(folders, tmp_path, settings, extra):
    for name in "sound", "incomplete":
        folder = shutil.copytree(folders[name], tmp_path / name)
        save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    assert isinstance(method(tmp_path / "sound", "auto", settings=settings), BPDQLinearMethod)
    with pytest.raises(InputError, match=rf"{NORM} is not in the checkpoint: download or quantize it again"):
        method(tmp_path / "incomplete", "auto", settings=settings)


def test_an_architecture_of_another_class_is_not_compared_with_the_one_of_transformers(folders, monkeypatch):
    said = []
    monkeypatch.setattr("bpdq_kernels.skeleton.logger.warning", said.append)
    settings = called("LlamaBidirectionalModel", pooling="avg")
    assert isinstance(method(folders["incomplete"], "auto", settings=settings), BPDQLinearMethod)
    assert said == ["whether all tensors of this architecture are in the checkpoint can't be checked"]


def test_an_lm_head_may_be_missing_where_vllm_puts_it_aside(folders, tmp_path):
    folder = shutil.copytree(folders["sound"], tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != HEAD}, folder / "model.safetensors")
    assert isinstance(method(folder, "auto", settings=POOLING | {"convert": "embed"}), BPDQLinearMethod)
    reranker = called("LlamaForSequenceClassification", classifier_from_token=["a", "b"]) | POOLING
    for settings in {}, reranker:
        with pytest.raises(InputError, match=rf"^{HEAD} is not in the checkpoint"):
            method(folder, "auto", settings=settings)


def test_classes_need_what_scores_them(folders):
    with pytest.raises(InputError, match=r"sound: score\.weight is not in the checkpoint, by which vLLM classifies: "):
        method(folders["sound"], "auto", settings=CLASSIFIER)


@pytest.mark.parametrize("layer", ["shared_expert_gate", "router"])
def test_bit_planes_that_vllm_would_not_find_a_place_for_are_refused(folders, tmp_path, layer):
    folder = shutil.copytree(folders["sound"], tmp_path / "out")
    planes = {f"model.layers.0.mlp.{layer}.B": torch.zeros(2, 2, 1, dtype=torch.int32)}
    save_file(load_file(folder / "model.safetensors") | planes, folder / "model.safetensors")
    message = rf"mlp\.{layer}: vLLM takes this layer in 16 bits only: .* --ignore 're:\.\*\[\.]{layer}'"
    with pytest.raises(InputError, match=message):
        method(folder, "auto")


def test_they_are_checked_for_all_of_the_model_where_a_part_of_it_is_built_first(folders):
    """InternVL's language model is, before its vision tower."""
    assert isinstance(method(folders["sound"], "auto", num_hidden_layers=2), BPDQLinearMethod)


@pytest.mark.parametrize(("load_format", "warnings"), [("dummy", 0), ("ipc_cache", 1), ("modelexpress", 1)])
def test_files_that_will_not_be_loaded_are_not_looked_at(folders, load_format, warnings, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoint.logger, "warning", lambda line, *values: said.append(line % values))
    assert isinstance(method(folders["incomplete"], load_format), BPDQLinearMethod)
    assert [line.partition(": ")[2] for line in said] == warnings * [
        f"its tensors are not checked with --load-format {load_format}"
    ]


@pytest.mark.parametrize("load_format", ["sharded_state", "runai_streamer_sharded", "tensorizer"])
def test_formats_that_pass_the_weight_loaders_by_are_refused(folders, load_format):
    """What an engine saves is in the order of its kernels, into which it would be brought a second time."""
    message = rf"sound: .*--load-format {load_format}, .*: serve the checkpoint folder itself, without --load-format"
    with pytest.raises(InputError, match=message):
        method(folders["sound"], load_format)


def test_every_load_format_of_vllm_is_known():
    known = {*checkpoint.LOAD_FORMATS, *checkpoint.FILLING}
    others = {"dummy", "ipc_cache", "mistral", "modelexpress", "npcache", "pt"}  # by weight loaders, or none
    assert known | others == {*get_args(LoadFormats)}


@contextmanager
def reloading(folders, monkeypatch) -> Iterator[tuple[VllmConfig, ReplicatedLinear]]:
    """An engine that serves the sound checkpoint and a layer of it, whose weights vLLM is about to load again."""
    LAYERWISE_INFO.clear()  # of layers that other tests left half loaded
    become(monkeypatch, 0, 1)
    engine, _ = first_layer(folders["sound"], "auto")
    layer = ReplicatedLinear(64, 32, bias=False, quant_config=config(), prefix="proj", return_bias=False)
    record_metadata_for_reloading(layer)
    load(layer, stored(32, 64, 64)[0])
    finish(layer)
    initialize_layerwise_reload(layer)
    with set_current_vllm_config(engine):
        yield engine, layer


def test_a_reload_of_what_is_not_whole_leaves_the_weights_in_use(folders, monkeypatch):
    with reloading(folders, monkeypatch) as (engine, layer):
        engine.model_config.model = str(folders["incomplete"])
        with pytest.raises(InputError, match=rf"^{NORM} is not in the checkpoint"):
            engine.quant_config.get_checkpoint_weight_mapper()
    assert torch.equal(layer(torch.eye(64)).T, stored(32, 64, 64)[1])
    assert engine.model_config.model == str(folders["sound"])


def test_a_reload_of_the_same_files_or_of_whole_ones_goes_on(folders, tmp_path, monkeypatch):
    with reloading(folders, monkeypatch) as (engine, layer):
        other = shutil.copytree(folders["sound"], tmp_path / "other")
        read = []
        monkeypatch.setattr(checkpoint, "check_folder", lambda folder, *rest: read.append(folder))
        for folder in folders["sound"], other, other:
            engine.model_config.model = str(folder)
            engine.quant_config.get_checkpoint_weight_mapper()
    assert read == [other], "files are read once"
    assert layer.B.is_meta, "until they are loaded"


def test_a_folder_without_safetensors_is_left_to_vllm(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders["sound"] / "config.json").read_text())
    assert isinstance(method(tmp_path, "auto"), BPDQLinearMethod)


def test_files_of_the_hub_are_found_in_its_cache(folders, tmp_path, monkeypatch):
    """There each file is a link to a blob."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sharded = shutil.copytree(folders["sound"], tmp_path / "sharded")
    split(sharded)
    cache = tmp_path / "models--some--model"
    snapshot = cache / "snapshots" / ("0" * 40)
    for place in (snapshot, cache / "refs", cache / "blobs"):
        place.mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    for i, file in enumerate(sharded.iterdir()):
        blob = file.rename(cache / "blobs" / f"{i:064}")
        (snapshot / file.name).symlink_to(blob)
    found = local_folder("some/model", None, LoadConfig(download_dir=str(tmp_path)))
    assert found == snapshot
    assert read_folder(found).keys() == read_folder(folders["sound"]).keys()


@pytest.mark.parametrize("name", vllm_models.TINY)
def test_the_checkpoint_of_the_gpu_check_is_whole(tmp_path, name):
    folder = tmp_path / name
    vllm_bpdq.register()
    vllm_models.write_tiny_checkpoint(folder, name)
    config = ModelConfig(model=str(folder), skip_tokenizer_init=True).hf_config
    check_folder(folder, config, BPDQConfig.from_config(config.quantization_config).format)


def test_the_check_leaves_device_and_dtype_as_they_were(folders):
    """The skeleton is built inside vLLM's device and dtype contexts."""
    with torch.device("cpu"):
        method(folders["sound"], "auto")
        assert torch.empty(1).device.type == "cpu"
    assert torch.get_default_dtype() == torch.float32
