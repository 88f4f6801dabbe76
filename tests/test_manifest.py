"""`digests.json`, what goes into a checkpoint as it is, and options that are refused."""

import json
import shutil

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialized

import bpdq_quantizer
from bpdq_quantizer.checkpoint import writer
from bpdq_quantizer.checkpoint.manifest import verify, write_manifest
from bpdq_quantizer.checkpoint.sentences import check_modules
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.storage.files import stored_digests
from tiny import bpdq_checkpoint, tiny_model

MODULES = {
    "modules.json": json.dumps(
        [
            {"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
            {"path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]
    ).encode(),
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "2_Dense/config.json": b'{"in_features": 128, "out_features": 2}',
    "2_Dense/model.safetensors": serialized({"linear.weight": torch.ones(2, 128, dtype=torch.bfloat16)}),
}
TAKEN = {
    "generation_config.json": b'{"temperature": 0.6,\n "top_p": 0.9}',  # without do_sample: transformers won't save it
    "LICENSE.txt": b"Do what you like.\r\n",
    "MODEL_LICENSE": b"But not with the model.",
    "NOTICE": b"\xff\x00",
    "tokenizer_config.json": None,
    "tokenizer.json": None,
    "vocab.txt": b"",
    "additional_chat_templates/tools.jinja": b"{{ messages }}  ",
    "config_sentence_transformers.json": b'{"prompts": {}}',
    "sentence_bert_config.json": b'{"max_seq_length": 128}',
    **MODULES,
}
LEFT = ("modeling.py", "pytorch_model.bin", "consolidated.pth", "tokenizer.py", "2_Dense/pytorch_model.bin")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model folder with all kinds of files."""
    folder = tiny_model(tmp_path_factory.mktemp("source") / "model", dtype=torch.bfloat16)
    for name, content in (TAKEN | dict.fromkeys(LEFT, b"x")).items():
        (folder / name).parent.mkdir(exist_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=7))  # as no program would write it again
    return folder


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def small(text):
    return {"group_size": 64, "calibration": text, "samples": 4, "seq_len": 32, "iterations": 1, "solver": "paper"}


@pytest.fixture(scope="module")
def out(source, text):
    bpdq_quantizer.quantize(source, source.parent / "out", **small(text))
    return source.parent / "out"


def test_files_are_taken_over_byte_for_byte(source, out):
    for name in TAKEN:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    assert not [name for name in LEFT if (out / name).exists()]


def test_a_hub_id_is_quantized_to_what_its_folder_gives(source, out, text, tmp_path, monkeypatch):
    cached = tmp_path / "models--someone--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    shutil.copytree(source, cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    bpdq_quantizer.quantize("someone/model", tmp_path / "out", **small(text))
    differ = {"quantization_report.json", "digests.json", "README.md"}  # the model's name
    found, expected = (content(folder) for folder in (tmp_path / "out", out))
    assert {n: x for n, x in found.items() if n not in differ} == {n: expected[n] for n in found if n not in differ}
    assert found.keys() == expected.keys()


def test_a_run_that_stops_once_they_are_there_goes_on(source, out, text, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_card", stop)
        with pytest.raises(KeyboardInterrupt):
            bpdq_quantizer.quantize(source, tmp_path / "out", **small(text))
    assert (tmp_path / "out.partial" / "2_Dense" / "model.safetensors").is_file()
    bpdq_quantizer.quantize(source, tmp_path / "out", **small(text), resume=True)
    assert verify(tmp_path / "out") == verify(out)


def folder_of(files, at):
    for name, data in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(data)
    return at


POOLING, DENSE = "1_Pooling/config.json", "2_Dense/model.safetensors"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({POOLING: None}, r"1_Pooling/config\.json is missing, though modules\.json names its folder: download it"),
        ({DENSE: None}, r"2_Dense/model\.safetensors is missing, where modules\.json has a projection: .* unpickled"),
        ({DENSE: MODULES[DENSE][:-1]}, r"2_Dense/model\.safetensors: not a complete safetensors file"),
        ({DENSE: b"version https://git-lfs"}, r"2_Dense/model\.safetensors is a git-lfs pointer"),
        ({DENSE: serialized({"x": torch.ones(2, dtype=torch.int32)})}, r"x is I32, and is copied only from F16, BF16"),
        ({DENSE: serialized({"x": torch.ones(2) / 0})}, r"2_Dense/model\.safetensors: x holds NaN or infinity"),
        ({"modules.json": b"{}}"}, r"modules\.json: not a list of modules"),
        ({"modules.json": b'{"modules": []}'}, r"modules\.json: not a list of modules"),
        ({"modules.json": b'[{"path": "../x", "type": "a.Pooling"}]'}, r"'\.\./x' is no folder beside it"),
        ({"modules.json": b'[{"path": "0_T", "type": "a.Transformer"}]'}, r"modules\.json: the model is in 0_T: put"),
    ],
)
def test_modules_that_can_not_be_copied_whole_are_refused(tmp_path, harm, message):
    check_modules(folder_of(MODULES, tmp_path / "intact"))
    files = {name: data for name, data in (MODULES | harm).items() if data is not None}
    with pytest.raises(InputError, match=message):
        check_modules(folder_of(files, tmp_path / "harmed"))


def test_an_unchanged_checkpoint_is_verified(out, capsys):
    names = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert verify(out)["tensors"] == len(names)
    assert main(["inspect", str(out), "--verify", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"{len(names)} tensors and ")
    assert json.loads(lines[-1])["verified"]["tensors"] == len(names)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_changed_bit_in_any_tensor_is_found_by_name(out, data):
    tensors = {name: file for file in sorted(out.glob("*.safetensors")) for name in load_file(file)}
    name = data.draw(st.sampled_from(sorted(tensors)))
    file, intact = tensors[name], tensors[name].read_bytes()
    start = 8 + int.from_bytes(intact[:8], "little")
    first, stop = json.loads(intact[8:start])[name]["data_offsets"]
    changed = bytearray(intact)
    changed[start + data.draw(st.integers(first, stop - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(changed)
        with pytest.raises(InputError) as found:
            verify(out)
    finally:
        file.write_bytes(intact)
    assert f"wrote: {name} in {file.name} has changed: download or quantize it again" in str(found.value)


def replace_tensors(change):
    def apply(folder):
        file = folder / "model-00002-of-00003.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (replace_tensors(lambda t: {n: v for n, v in t.items() if n != NORM}), f"{NORM} is missing from model-00002"),
        (replace_tensors(lambda t: t | {"odd": torch.ones(1)}), "odd was added to model-00002"),
        (replace_tensors(lambda t: t | {NORM: t[NORM].float()}), f"{NORM} in model-00002-of-00003.safetensors has"),
        (replace_tensors(lambda t: t | {NORM: t[NORM][None]}), f"{NORM} in model-00002-of-00003.safetensors has"),
        (lambda folder: (folder / "model-00003-of-00003.safetensors").unlink(), "model-00003-of-00003.* is missing"),
        (lambda folder: (folder / "model-00003-of-00003.safetensors").write_bytes(b""), "model-00003.* can't be read"),
        (lambda folder: save_file({"a": torch.ones(1)}, folder / "b.safetensors"), "b.safetensors was added"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json was added"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json has changed"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / DENSE).write_bytes(b""), f"{DENSE} has changed"),
        (lambda folder: (folder / "1_Pooling" / "a.json").write_text("{}"), "1_Pooling/a.json was added"),
        (lambda folder: (folder / "digests.json").unlink(), "digests.json is missing"),
        (lambda folder: (folder / "digests.json").write_text("[1]"), "digests.json can't be read"),
    ],
)
def test_every_other_change_is_found_too(out, tmp_path, harm, fault, capsys):
    folder = shutil.copytree(out, tmp_path / "out")
    harm(folder)
    with pytest.raises(InputError, match=fault):
        verify(folder)
    assert main(["inspect", str(folder), "--verify"]) == 2
    assert capsys.readouterr().err.startswith("bpdq: error: ")


def test_what_no_loader_reads_may_be_added(out, tmp_path):
    folder = shutil.copytree(out, tmp_path / "out")
    (folder / "README.md").write_text("A model")
    (folder / ".gitattributes").write_text("")
    (folder / ".cache").mkdir()
    assert verify(folder)


@pytest.mark.parametrize("kind", ["B", "c", "s"])
def test_one_bit_of_a_layer_with_coefficients_in_8_bits_is_named(tmp_path, kind):
    tiny_model(tmp_path / "model", hidden=64, ffn=96, layers=1, heads=2, kv_heads=1)
    out = bpdq_checkpoint(tmp_path / "model", tmp_path / "out", coefficient_bits=8)
    files = [path.name for path in out.iterdir() if path.suffix != ".safetensors"]
    digests = {"model.safetensors": stored_digests(out / "model.safetensors")}
    write_manifest(out, digests, {name: out / name for name in files})
    assert verify(out)["tensors"] == len(load_file(out / "model.safetensors"))
    tensors = load_file(out / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{kind}"
    tensors[name].view(torch.uint8).view(-1)[5] ^= 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} in model\.safetensors has changed"):
        verify(out)
