"""The model card: what it says of a checkpoint, what it takes from the source's, and what it leaves out."""

import getpass
import json
import re
import shutil
import socket
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

import bpdq_quantizer
from architectures import model_folder
from bpdq_quantizer.checkpoint.card import CARD, PICTURE, UNMEASURED, licence_of, origin
from bpdq_quantizer.checkpoint.manifest import verify
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.evaluation.compare import summary, token_scores
from bpdq_quantizer.evaluation.logits import opened
from bpdq_quantizer.model.calibration import file_windows, text_name
from bpdq_quantizer.model.tokens import load_tokenizer
from bpdq_quantizer.run.resolved import command, resolved
from gguf_files import gguf_file
from mixtures import EXPERTS
from tiny import TEXT, load_tensors, tiny_model

APACHE = "                 Apache License\n           Version 2.0, January 2004"
SOURCE = """---
license: other
license_name: planes
license_link: LICENSE
language: [en, de]
pipeline_tag: text-generation
tags: [tiny]
base_model: someone/tiny-base
---
# Tiny

Trained by /home/someone.
"""


def small(text, **more):
    return {"calibration": text, "samples": 4, "seq_len": 32, "iterations": 1, "solver": "paper"} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("card") / "secret-place"
    tiny_model(root / "tiny", dtype=torch.bfloat16)
    (root / "tiny" / CARD).write_text(SOURCE)
    (root / "tiny" / "LICENSE").write_text("Planes may be flown.")
    (root / "text.txt").write_text(TEXT * 4)
    options = small(str(root / "text.txt"), ignore=["re:.*o_proj"], embed_bits=4, evaluate=8)
    bpdq_quantizer.quantize(root / "tiny", root / "tiny-bpdq", offload_dir=str(root / "states"), **options)
    return root


@pytest.fixture
def card(folder):
    return ModelCard.load(folder / "tiny-bpdq" / CARD)


def test_metadata_is_what_the_hub_reads(card):
    found = card.data.to_dict()
    assert found == {
        "language": ["en", "de"],
        "library_name": "vllm",
        "license": "other",
        "license_name": "planes",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "tags": ["bpdq", "2-bit", "4-bit", "quantized"],
    }


def test_the_card_says_what_was_done(folder, card):
    report = json.loads((folder / "tiny-bpdq" / "quantization_report.json").read_text())
    for part in ("# tiny-bpdq\n", "vllm serve ./tiny-bpdq\n", "import bpdq_quantizer", "128 tokens of `text.txt`"):
        assert part in card.text, part
    planes = [layer for layer in report["layers"] if "embed" not in layer["name"]]
    weights = [layer["in_features"] * layer["out_features"] for layer in planes]
    bits = sum(n * layer["bits_per_weight"] for n, layer in zip(weights, planes, strict=True)) / sum(weights)
    assert f"| Linears of the blocks | {sum(weights) / 1e6:.1f} | {bits:.3f} |" in card.text
    assert "| `model.embed_tokens` |" in card.text
    size = sum(tensor.nbytes for tensor in load_tensors(folder / "tiny-bpdq").values())
    assert f"| all tensors | | | {size / 1e6:.1f} |" in card.text


def test_a_checkpoint_that_was_not_measured_says_so(folder, card, tmp_path, capsys):
    bpdq_quantizer.quantize(folder / "tiny", tmp_path / "plain", **small(str(folder / "text.txt")))
    text = (tmp_path / "plain" / CARD).read_text()
    assert UNMEASURED in text
    assert UNMEASURED not in card.text
    assert "128 tokens are few to calibrate on" in capsys.readouterr().out


def test_its_command_makes_the_same_checkpoint(folder, card, monkeypatch, tmp_path):
    (command,) = re.findall(r"```bash\n(bpdq quantize .*)\n```", card.text)
    monkeypatch.chdir(folder)
    words = [word.strip("'") for word in command.split()[1:]]
    words[words.index("--output") + 1] = str(tmp_path / "again")
    assert main(words) == 0
    expected, found = load_tensors(folder / "tiny-bpdq"), load_tensors(tmp_path / "again")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_nothing_of_this_machine_is_in_it(folder):
    text = (folder / "tiny-bpdq" / CARD).read_text()
    private = {*folder.parts[1:], "/home", "states", socket.gethostname()} | ({getpass.getuser()} - {"root"})
    assert [part for part in private if part in text] == []


def test_no_file_of_a_checkpoint_tells_where_it_was_made(folder, tmp_path):
    tuned = small(str(folder / "text.txt"), tune="model", tune_steps=1, target_bpw=3.0)
    bpdq_quantizer.quantize(folder / "tiny", folder / "tuned", **tuned)
    model = gguf_file(tiny_model(tmp_path / "qwen2", "qwen2"), folder / "tiny.gguf")
    bpdq_quantizer.quantize(model, folder / "from-gguf", **small(str(folder / "text.txt")))
    for name in ("tiny-bpdq", "tuned", "from-gguf"):
        files = [path for path in (folder / name).rglob("*") if path.is_file()]
        assert len(files) > 8
        assert [path for path in files if b"secret-place" in path.read_bytes()] == [], name


def test_the_report_has_names_of_files(folder):
    report = json.loads((folder / "tiny-bpdq" / "quantization_report.json").read_text())
    names = report["model"], report["options"]["calibration"], report["options"]["offload_dir"]
    assert names == ("tiny", "text.txt", "states")


def test_quality_is_that_of_held_out_windows(folder, card):
    report = json.loads((folder / "tiny-bpdq" / "quantization_report.json").read_text())["evaluation"]
    model, device = str(folder / "tiny"), torch.device("cpu")
    windows = file_windows(str(folder / "text.txt"), load_tokenizer(model), 32, 12)[4:]
    with opened(model, windows, device, "") as p, opened(str(folder / "tiny-bpdq"), windows, device, "") as q:
        expected = summary(token_scores(p, q, windows))
    assert (report["windows"], report["seq_len"]) == (8, 32)
    for key in ("perplexity", "kl", "kl_p99", "top1_agreement"):
        assert report[key] == pytest.approx(expected[key], rel=1e-3), key
    assert report["kl_interval"] == pytest.approx(expected["kl_interval"], rel=1e-3)
    row = next(line for line in card.text.splitlines() if line.startswith("| KL to the original"))
    assert f"| {expected['kl']:.3f}" in row.replace(f"{report['kl']:.4f}", f"{report['kl']:.3f}")


@pytest.mark.parametrize("arch", ["gemma4_text", "qwen3_5", f"mixtral{EXPERTS}", "gguf"])  # keys shared, tower, experts
def test_it_is_what_eval_finds_of_other_sources(folder, tmp_path, capsys, arch):
    text = str(folder / "text.txt")
    if arch == "gguf":
        model = gguf_file(tiny_model(tmp_path / "qwen2", "qwen2"), tmp_path / "tiny.gguf")
    else:
        model = model_folder(tmp_path / "model", arch, gain=4)
    report = bpdq_quantizer.quantize(model, tmp_path / "out", **small(text, evaluate=2))["evaluation"]
    argv = ["eval", str(tmp_path / "out"), "--reference", str(model), "--text", str(tmp_path / "rest.txt")]
    tokenizer = load_tokenizer(str(model))
    (tmp_path / "rest.txt").write_text(tokenizer.decode(file_windows(text, tokenizer, 32, 6)[4:].flatten()))
    assert main([*argv, "--seq-len", "32", "--windows", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["reference_perplexity"] == pytest.approx(found["reference"]["perplexity"], rel=1e-3)
    for key in ("perplexity", "kl", "kl_p99", "top1_agreement"):
        assert report[key] == pytest.approx(found["models"][0][key], rel=1e-2), key


@pytest.mark.parametrize(
    ("options", "left"), [({}, None), ({"samples": 50, "evaluate": 8}, 0), ({"samples": 48, "evaluate": 8}, 2)]
)  # 50 windows: all of the text
def test_without_held_out_text_the_card_has_no_figures_and_a_line_says_why(folder, tmp_path, capsys, options, left):
    text = str(folder / "text.txt")
    report = bpdq_quantizer.quantize(folder / "tiny", tmp_path / "out", **small(text, **options))
    assert report.get("evaluation", {"windows": 0})["windows"] == (left or 0)
    assert ("## Quality" in (tmp_path / "out" / CARD).read_text()) == bool(left)
    said = [line for line in capsys.readouterr().err.splitlines() if "--evaluate" in line]
    line = f"{text}: holds {left} windows of text behind those used, --evaluate asked for 8: bring more text"
    assert [line in found for found in said] == ([] if left is None else [True])


def test_the_tensors_do_not_depend_on_the_evaluation(folder, tmp_path):
    for name, evaluate in (("with", 2), ("without", 0)):
        options = small(str(folder / "text.txt"), evaluate=evaluate, rotate="hadamard", head_bits=4)
        bpdq_quantizer.quantize(folder / "tiny", tmp_path / name, **options)
    tensors = [load_tensors(tmp_path / name) for name in ("with", "without")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_a_stopped_run_goes_on_without_the_evaluation(folder, tmp_path, stops_after_a_block):
    text = str(folder / "text.txt")
    with stops_after_a_block():
        bpdq_quantizer.quantize(folder / "tiny", tmp_path / "out", **small(text, evaluate=8))
    bpdq_quantizer.quantize(folder / "tiny", tmp_path / "out", **small(text), resume=True)
    assert verify(tmp_path / "out")


def test_the_publisher_may_change_the_card_but_not_its_picture(folder, tmp_path):
    copy = shutil.copytree(folder / "tiny-bpdq", tmp_path / "copy")
    (copy / CARD).write_text("# Mine")
    assert verify(copy)
    (copy / CARD).unlink()
    assert verify(copy)
    assert (copy / PICTURE).read_bytes().startswith(b"\x89PNG")
    (copy / PICTURE).write_bytes(b"")
    with pytest.raises(InputError, match=PICTURE):
        verify(copy)


def test_without_matplotlib_a_table_stands_for_the_picture_and_without_a_card_the_licence_file(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model = shutil.copytree(folder / "tiny", tmp_path / "model")
    (model / CARD).unlink()
    (model / "LICENSE").write_text(APACHE)
    bpdq_quantizer.quantize(model, tmp_path / "out", **small(str(folder / "text.txt"), target_bpw=3.5))
    assert ModelCard.load(tmp_path / "out" / CARD).data.license == "apache-2.0"
    text = (tmp_path / "out" / CARD).read_text()
    assert "| `mlp.down_proj` | 2 | " in text
    assert not (tmp_path / "out" / PICTURE).exists()
    assert PICTURE not in text
    assert verify(tmp_path / "out")


OTHER = {"license": "other", "license_name": "source", "license_link": "LICENSE"}
GRANT = "Permission is hereby granted, free of charge, to any person obtaining a copy"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (APACHE, {"license": "apache-2.0"}),
        ("Copyright 2024 Someone\n\nApache License 2.0\n", {"license": "apache-2.0"}),
        ("MIT License\n\nCopyright", {"license": "mit"}),
        ("# The MIT License (MIT)\n", {"license": "mit"}),
        (f"Modified MIT License\n\nCopyright (c) 2025\n\n{GRANT}", OTHER),
        ("MIT License with one more condition", OTHER),
        ("Community Licence\n\nParts are under the\n\nMIT License\n", OTHER),
        ("Mine.", OTHER),
        (None, {}),
    ],
)
def test_a_licence_file_is_known_by_its_title(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "LICENSE").write_text(content)
    assert licence_of(tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"LICENSE-CODE": "MIT License", "LICENSE-MODEL": "Ours."}, OTHER | {"license_link": "LICENSE-MODEL"}),
        ({"LICENSE": "MIT License", "MODEL_LICENSE": "Ours."}, OTHER | {"license_link": "MODEL_LICENSE"}),
        ({"LICENSE": "Ours.", "LICENSE-MODEL.txt": APACHE}, {"license": "apache-2.0"}),
        ({"LICENSE": APACHE, "LICENSE_CODE": "MIT License"}, {"license": "apache-2.0"}),
        ({"LICENSE": APACHE, "LICENSE.md": APACHE}, {"license": "apache-2.0"}),
        ({"LICENSE": APACHE, "LICENSE.md": "MIT License"}, OTHER),
        ({"LICENSE-CODE": "MIT License"}, {}),
    ],
)
def test_of_several_licence_files_that_of_the_model_counts(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert licence_of(tmp_path) == expected


def test_a_model_of_the_hub_is_the_base_model(folder, tmp_path, monkeypatch):
    cached = tmp_path / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    snapshot = shutil.copytree(folder / "tiny", cached / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for model in ("someone/tiny", str(snapshot)):
        found = origin(model)
        assert (found.name, found.hub_id) == ("someone/tiny", "someone/tiny")
        assert found.metadata["license_name"] == "planes"
    bpdq_quantizer.quantize("someone/tiny", tmp_path / "out", **small(str(folder / "text.txt")))
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/tiny", "quantized")
    assert "[someone/tiny](https://huggingface.co/someone/tiny)" in card.text
    assert "bpdq quantize someone/tiny --calibration" in card.text


@settings(deadline=None, max_examples=30)
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(lambda text: f"---\n{text}\n---\n".encode())))
def test_a_damaged_card_of_the_source_stops_no_run(folder, content):
    (folder / "odd").mkdir(exist_ok=True)
    (folder / "odd" / CARD).write_bytes(content)
    assert set(origin(str(folder / "odd")).metadata) <= {"license", "license_name", "license_link", "language"}


def test_a_card_that_cannot_be_read_is_one_line(folder, capsys):
    (folder / "odd").mkdir(exist_ok=True)
    (folder / "odd" / CARD).write_text("---\n- a\n- list\n---\n")
    assert origin(str(folder / "odd")).metadata == {}
    assert f"{folder / 'odd' / CARD}: its metadata can't be read" in capsys.readouterr().out


def test_texts_have_names_without_paths():
    assert text_name("python") == "the Python language reference"
    assert text_name("self") == "text that the original itself wrote"
    assert text_name("self:Qwen/Qwen2.5-0.5B") == "text that `Qwen/Qwen2.5-0.5B` wrote"
    assert text_name("self:/home/me/small") == "text that `small` wrote"
    assert (
        text_name("preset:chat")
        == "[HuggingFaceH4/ultrachat_200k](https://huggingface.co/datasets/HuggingFaceH4/ultrachat_200k)"
    )
    assert text_name("/home/me/wiki.txt") == "`wiki.txt`"
    assert text_name("hf:a/b:c") == "[a/b](https://huggingface.co/datasets/a/b), c"
    assert text_name("hf:/home/me/rows:c") == "`rows`, c"


@pytest.mark.parametrize("name", ["mine", "./mine", "../texts/mine/", "{}/texts/mine"])
def test_a_data_set_in_a_folder_is_named_without_its_path(tmp_path, monkeypatch, name):
    (tmp_path / "texts" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "texts")
    text = f"hf:{name.format(tmp_path)}"
    assert text_name(text) == "`mine`"
    for config in ("", ":en"):
        assert (
            resolved(model="a/b", output="out", calibration=text + config).public()["calibration"] == f"hf:mine{config}"
        )


def test_a_command_has_what_differs_from_the_defaults():
    o = resolved(model="a/b", output="/x/out", solver="paper", tune="model", samples=9, calibration="hf:a/b", seed=3)
    words = "bpdq quantize a/b --calibration hf:a/b --samples 9 --solver paper --seed 3 --tune model --output out"
    assert command(o, "a/b") == words
    o = resolved(model="/x/a", output="out", kv_cache_scales=True, ignore=["x", "y"])
    words = "bpdq quantize a/b --calibration self --ignore x --ignore y --kv-cache-scales --output out"
    assert command(o, "a/b") == words
    for text, shown in (
        ("self:/x/small", "self:small"),
        ("self:a/b", "self:a/b"),
        ("/x/t.txt", "t.txt"),
        ("hf:/x/rows:en", "hf:rows:en"),
    ):
        o = resolved(model="/x/a", output="out", calibration=text)
        assert command(o, "a/b") == f"bpdq quantize a/b --calibration {shown} --output out"
