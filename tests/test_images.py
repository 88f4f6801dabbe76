"""Calibration on images: rows of .jsonl files become windows of a model that sees them, which flow through its blocks
as through the model itself."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from transformers import AutoModelForImageTextToText
from vllm.multimodal.image import convert_image_mode, normalize_image

import bpdq_quantizer
from architectures import MROPE, WRAPPERS
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.activations import embed, run_batches
from bpdq_quantizer.model.calibration import calibration_windows
from bpdq_quantizer.model.calls import block_runs, head_inputs
from bpdq_quantizer.model.images import open_image, sight_of
from bpdq_quantizer.model.stream import load_block, open_model
from bpdq_quantizer.model.support import check_blocks
from bpdq_quantizer.model.tokens import load_tokenizer
from bpdq_quantizer.model.windows import Window, arguments
from bpdq_quantizer.passes.sensitivity import gradient_energies
from tiny import TEXT, load_tensors, tiny_model, tiny_tokenizer
from vision import FIRST, MORE, SEEING, picture, rows, seeing_model

QUICK = {"bits": 2, "group_size": 32, "samples": 6, "seq_len": 64, "iterations": 1, "solver": "paper"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return seeing_model(tmp_path_factory.mktemp("seeing") / "model", "qwen3_5")


def windows_of(model: Path, file: Path, samples: int = 6, seq_len: int = 64, lead: tuple = ()) -> list[Window]:
    tokenizer = load_tokenizer(str(model))
    return calibration_windows(str(file), tokenizer, samples, seq_len, 0, lead, sight_of(str(model), tokenizer))


def write(folder: Path, *found: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in found))
    return file


@pytest.mark.parametrize("arch", [*SEEING, *(pytest.param(arch, marks=pytest.mark.slow) for arch in MORE)])
@torch.no_grad()
def test_block_by_block_an_image_gives_what_it_gives_the_whole_model(tmp_path, arch):
    folder = seeing_model(tmp_path / "model", arch)
    windows = windows_of(folder, rows(tmp_path, TEXT), 9, 160 if arch == "gemma4" else 64)
    assert {bool(window.images) for window in windows} == {True, False}
    source = check_blocks(open_model(str(folder)), windows)
    hidden, calls = embed(source, windows, CPU, None)
    for index in range(len(source.blocks)):
        block = load_block(source, index, CPU)
        run_batches(block_runs(block, calls[index], CPU, len(hidden)), hidden)
    found = list(head_inputs(source.model, source.blocks, hidden))
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    for window, states in zip(windows, found, strict=True):
        expected = whole.base_model(**arguments(whole, window)).last_hidden_state
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
        if window.images:
            blind = whole.base_model(window.tokens, use_cache=False).last_hidden_state
            assert (blind - expected).abs().max() > 0.1, "the image makes a difference"


def test_rows_with_images_are_windows_and_texts_between_them_are_packed(tmp_path, model):
    picture(tmp_path / "a.png", 10, (64, 64))
    (tmp_path / "sub").mkdir()
    picture(tmp_path / "sub" / "b.jpg", 200, (32, 32))
    words = "two planes and three coefficients make four levels. "
    parts = [{"type": "image_url", "image_url": {"url": "sub/b.jpg"}}, {"type": "text", "text": "What?"}]
    file = write(
        tmp_path,
        {"text": words},
        {"image": "a.png", "text": "one"},
        {"text": words * 2},
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "levels"}]},
        {"images": ["a.png", "sub/b.jpg"], "text": words * 9},
    )
    tokenizer, length = load_tokenizer(str(model)), 24
    ids = [i for text in (words, words * 2) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    found = windows_of(model, file, 9, length, (5, 6))
    texts = [w.tokens[0].tolist() for w in found if not w.images]
    assert texts == [[5, 6, *ids[22 * i : 22 * i + 22]] for i in range(len(ids) // 22)]
    prompts = [
        "user: <|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>one\n",
        "user: <|vision_start|><|image_pad|><|vision_end|>What?\nassistant: levels\n",
        "user: "
        + "<|vision_start|>"
        + "<|image_pad|>" * 4
        + "<|vision_end|><|vision_start|><|image_pad|><|vision_end|>"
        + words * 9,
    ]
    seen = [w for w in found if w.images]
    for window, prompt, patches in zip(seen, prompts, (16, 4, 20), strict=True):
        expected = [5, 6, *tokenizer(prompt, add_special_tokens=False)["input_ids"]][:length]
        assert window.tokens.tolist() == [expected]
        assert len(window.images["pixel_values"]) == patches
        assert ((window.tokens == FIRST) == (window.images["mm_token_type_ids"] == 1)).all()


def test_what_the_template_begins_with_is_not_put_in_front_again(tmp_path, model):
    picture(tmp_path / "a.png", 10)
    file = write(tmp_path, {"image": "a.png", "text": "one"})
    (plain,) = windows_of(model, file)
    (led,) = windows_of(model, file, lead=tuple(plain.tokens[0, :2].tolist()))
    assert torch.equal(led.tokens, plain.tokens)


def test_what_the_template_begins_a_text_with_is_not_put_in_front_again(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ eos_token }}" + tokenizer.chat_template
    chat = [{"role": "user", "content": "one plane and two levels " * 4}]
    ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    file = str(write(tmp_path, {"messages": chat}))
    first, second = calibration_windows(file, tokenizer, 2, 16, 0, (tokenizer.eos_token_id,))
    assert [*first.tokens[0].tolist(), *second.tokens[0, 1:].tolist()] == ids[:31]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "no.png", "text": "a"}, "no.png: no such file"),
        ({"image": "broken.png", "text": "a"}, "broken.png can't be read as an image"),
        ({"image": "drawing.eps", "text": "a"}, "drawing.eps can't be read as an image"),
        ({"image": "https://example.com/a.png", "text": "a"}, "is no path of a file: download the image"),
        ({"image": 7, "text": "a"}, "`image` holds no path"),
        ({"image": "a.png"}, "expected a `text` field"),
        ({"image": "a.png", "messages": [{"role": "user", "content": "a"}]}, "names more images"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "expected a `text` field"),
        ({"image": "a.png", "messages": 3}, "`messages` must be a list"),
        ({"image": "a.png", "messages": [{"content": "a"}]}, "`messages` must be a list"),
        ({"image": ["a.png"] * 9, "text": "a"}, "its images take 36 of 6[0-9] tokens, which don't fit --seq-len 32"),
        ({"image": "a.png", "text": "half \ud800 of a pair"}, "can't take the row"),
        ({"image": "a.png", "images": ["a.png"], "text": "a"}, "has `image` and `images`"),
        ({"image": "a.png", "messages": [{"role": "user", "content": "a"}], "text": "a"}, "has `messages` and `text`"),
        ({"image": "a.png", "text": "a <|image_pad|>"}, r"its text holds <\|image_pad\|>"),
        ({"text": "a <|video_pad|>"}, r"its text holds <\|video_pad\|>"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]}, "a part of type video"),
        ({"image": "deep.png", "text": "a"}, r"deep\.png has more than 8 bits"),
        ({"image": "huge.png", "text": "a"}, r"huge\.png is too large an image"),
    ],
)
def test_rows_that_can_not_be_used_are_refused_with_their_line(tmp_path, model, row, message):
    picture(tmp_path / "a.png", 10, (64, 64))
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    Image.new("RGB", (32, 32)).save(tmp_path / "drawing.eps")
    Image.new("I;16", (32, 32), 300).save(tmp_path / "deep.png")
    Image.new("1", (14000, 13000)).save(tmp_path / "huge.png")
    file = write(tmp_path, {"text": "fine"}, row)
    with pytest.raises(InputError, match=f"^{file}, line 2: .*{message}") as error:
        windows_of(model, file, seq_len=32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("nothing", [{"image": None}, {"images": []}, {"images": None, "messages": None}])
def test_rows_that_say_they_have_no_images_are_text(tmp_path, model, nothing):
    text = {"text": "two planes and three coefficients make four levels. " * 4}
    found, expected = (windows_of(model, write(tmp_path, row), 1, 16)[0] for row in (text | nothing, text))
    assert torch.equal(found.tokens, expected.tokens)
    assert not found.images


def test_images_are_read_as_vllm_reads_them(tmp_path):
    image = Image.new("RGB", (40, 20), (10, 200, 30))
    image.paste((200, 10, 30), (0, 0, 20, 20))
    turned = image.getexif()
    turned[0x0112] = 6  # upright when it is turned to the right
    image.save(tmp_path / "turned.png", exif=turned)
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(tmp_path / "clear.png")
    table = image.quantize(4)
    table.save(tmp_path / "table.png", transparency=0)
    image.convert("LA").save(tmp_path / "gray.png")
    for name in ("turned.png", "clear.png", "table.png", "gray.png"):
        with Image.open(tmp_path / name) as stored:
            expected = convert_image_mode(normalize_image(stored), "RGB")
        for path in (name, f"file://{tmp_path / name}"):
            difference = ImageChops.difference(open_image(tmp_path, path, "line 1"), expected)
            assert max(high for _, high in difference.getextrema()) <= 1


def test_models_that_see_no_images_refuse_rows_with_some(tmp_path):
    picture(tmp_path / "a.png", 10)
    file = write(tmp_path, {"image": "a.png", "text": "a"})
    blind = tiny_model(tmp_path / "blind")
    with pytest.raises(InputError, match="line 1: has images, which the model does not see: drop the row"):
        bpdq_quantizer.quantize(str(blind), tmp_path / "out", calibration=str(file), **QUICK)
    seeing = seeing_model(tmp_path / "model", "qwen3_5")
    (seeing / "preprocessor_config.json").unlink(missing_ok=True)
    (seeing / "processor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json|image processor can't be loaded"):
        bpdq_quantizer.quantize(str(seeing), tmp_path / "out", calibration=str(file), **QUICK)


def test_messages_without_images_are_text_by_the_chat_template(tmp_path):
    chat = [{"role": "user", "content": "one plane"}, {"role": "assistant", "content": "two levels " * 9}]
    tokenizer = tiny_tokenizer()
    (window,) = calibration_windows(str(write(tmp_path, {"messages": chat})), tokenizer, 1, 16, 0)
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert window.tokens[0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][:16]
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="line 1: the model's chat template can't take its `messages`"):
        calibration_windows(str(write(tmp_path, {"messages": chat})), tokenizer, 1, 16, 0)


def test_a_model_is_quantized_on_images_and_a_stopped_run_goes_on(tmp_path, model, stops_after_a_block):
    calibration = str(rows(tmp_path, TEXT))
    report = bpdq_quantizer.quantize(str(model), tmp_path / "whole", calibration=calibration, asymmetric=0.5, **QUICK)
    assert report["calibration_windows_with_images"] == 5
    options = QUICK | {"asymmetric": 0.5, "calibration": calibration}
    with stops_after_a_block():
        bpdq_quantizer.quantize(str(model), tmp_path / "out", **options)
    picture(tmp_path / "0.png", 99)
    with pytest.raises(InputError, match="calibration tokens"):
        bpdq_quantizer.quantize(str(model), tmp_path / "out", resume=True, **options)
    rows(tmp_path, TEXT)
    bpdq_quantizer.quantize(str(model), tmp_path / "out", resume=True, **options)
    expected, found = load_tensors(tmp_path / "whole"), load_tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_another_size_sees_the_images_that_were_kept(tmp_path, model):
    (tmp_path / "rows").mkdir()
    options = QUICK | {"calibration": str(rows(tmp_path / "rows", TEXT))}
    bpdq_quantizer.quantize(str(model), tmp_path / "two", keep_statistics=tmp_path / "kept", **options)
    bpdq_quantizer.quantize(str(model), tmp_path / "start", **options | {"bits": 3})
    shutil.rmtree(tmp_path / "rows")
    report = bpdq_quantizer.requantize(tmp_path / "kept", tmp_path / "other", bits=3)
    assert report["calibration_windows_with_images"] == 5
    expected, found = load_tensors(tmp_path / "start"), load_tensors(tmp_path / "other")
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_bits_are_allocated_by_windows_with_images_and_tuning_is_refused(tmp_path, model, monkeypatch):
    monkeypatch.setattr("bpdq_quantizer.passes.sensitivity.GROUP_SIZES", (32,))
    monkeypatch.setattr("bpdq_quantizer.passes.sensitivity.MAX_PLANES", 2)
    calibration = str(rows(tmp_path, TEXT))
    report = bpdq_quantizer.quantize(
        str(model), tmp_path / "out", calibration=calibration, target_bpw=2.6, embed_bits=4, **QUICK
    )
    assert len({layer["bits"] for layer in report["layers"]}) > 1
    with pytest.raises(InputError, match=r"--tune model trains on text alone, and .* has images"):
        bpdq_quantizer.quantize(str(model), tmp_path / "tuned", calibration=calibration, tune="model", **QUICK)


def test_gradients_are_of_the_text_that_follows_an_image(tmp_path, model):
    """No model predicts an image's tokens, which the loss leaves out."""
    picture(tmp_path / "a.png", 10, (64, 64))
    windows = windows_of(model, write(tmp_path, {"image": "a.png", "text": "two planes"}))
    source = check_blocks(open_model(str(model)), windows)
    whole = AutoModelForImageTextToText.from_pretrained(model).eval()
    name = "model.language_model.layers.1.mlp.down_proj"
    outputs, states = {}, {}
    whole.get_submodule(name).register_forward_hook(lambda _, __, y: (y.retain_grad(), outputs.update(y=y))[0])
    for index, layer in enumerate(whole.model.language_model.layers):
        layer.register_forward_hook(lambda _, x, y, index=index: states.update({index: x[0], index + 1: y}))
    logits = whole(**arguments(whole, windows[0])).logits[0, :-1]
    targets = windows[0].tokens[0, 1:]
    torch.nn.functional.cross_entropy(logits[targets != FIRST], targets[targets != FIRST], reduction="sum").backward()
    before = [[states[i].detach()] for i in range(3)]
    energies = gradient_energies(source, windows, before, CPU)
    g = outputs["y"].grad[0]
    lengths = g.norm(dim=1, keepdim=True)
    expected = lengths.mean() * (g.square() / lengths.clamp(min=1e-30)).mean(0)
    torch.testing.assert_close(energies[name], expected, rtol=1e-3, atol=1e-9)


def test_models_that_add_something_after_their_last_block_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(
        WRAPPERS, "qwen3_vl", WRAPPERS["qwen3_vl"] | {"text_config": MROPE}
    )  # as many as the tower adds
    folder = seeing_model(tmp_path / "model", "qwen3_vl")
    with pytest.raises(InputError, match="Qwen3VLForConditionalGeneration adds something after its last block"):
        bpdq_quantizer.quantize(str(folder), tmp_path / "out", calibration=str(rows(tmp_path, TEXT)), **QUICK)
    assert not (tmp_path / "out.partial").exists()
