"""What a checkpoint folder must hold: patterns, scales and architectures, below the loaders."""

import json
import logging
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from architectures import auto_class, config_of
from bpdq_kernels import format as bpdq_format
from bpdq_kernels import patterns
from bpdq_kernels.errors import InputError
from bpdq_kernels.folder import SCALE_RANGE, Entry, check_values, read_folder, read_headers
from bpdq_kernels.format import Format, Scheme, is_finite
from bpdq_kernels.skeleton import build, check_config, check_stored
from mutant_configs import PATTERNS
from tiny import bpdq_checkpoint, tiny_model
from vllm_bpdq.checkpoint import check_folder

NAME = "model.layers.10.self_attn.q_proj"


def answer(pattern):
    """Whether a pattern matches, or the sentence that refuses it."""
    try:
        patterns.check(f"re:{pattern}")
        return patterns.matches(NAME, f"re:{pattern}")
    except InputError as e:
        return str(e)


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_a_pattern_that_is_a_trap_takes_no_time(pattern):
    start = time.process_time()
    answered = answer(pattern)
    assert time.process_time() - start < 3
    assert answered is False or (answered.startswith("the pattern ") and len(answered) < 500)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r".*q_proj", True),
        (r".*\.layers\.(0|10)\..*_proj$", True),
        (r"model\.layers\.\d{1,2}\.self_attn\.[qkv]_proj", True),
        (r"^(?!.*lm_head).*proj$", True),
        (r"layers", False),
        (r"(?i)MODEL", True),
    ],
)
def test_patterns_match_at_the_start_as_they_did(pattern, expected):
    assert patterns.matches(NAME, f"re:{pattern}") is expected


@given(st.text(alphabet="ab.(|)*+?[]{1,}\\^$", max_size=12))
def test_any_pattern_answers_or_is_refused(pattern):
    assert answer(pattern) in (True, False) or answer(pattern).startswith("the pattern ")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folder")
    model = tiny_model(folder / "model", hidden=64, ffn=96, layers=1, heads=2, kv_heads=1)
    return bpdq_checkpoint(model, folder / "out", group_size=32)


def changed(sound, folder, change):
    folder.mkdir()
    tensors = load_file(sound / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((sound / "config.json").read_text())
    return folder


def test_nbytes_are_those_of_the_tensors(sound):
    headers = read_headers([sound / "model.safetensors"])
    assert {n: e.nbytes for n, e in headers.items()} == {
        n: t.nbytes for n, t in load_file(sound / "model.safetensors").items()
    }


@pytest.mark.parametrize("elements", [1, 64, 1 << 24])
def test_a_number_that_is_none_is_found_wherever_it_is(sound, tmp_path, monkeypatch, elements):
    monkeypatch.setattr("bpdq_kernels.folder._CHUNK", elements)
    check_values(read_folder(sound))
    folder = changed(sound, tmp_path / "bad", lambda t: t["lm_head.weight"][383, 63].fill_(torch.nan))
    with pytest.raises(InputError, match=r"lm_head\.weight holds NaN or infinity"):
        check_values(read_folder(folder))


@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), st.integers(0, 200), st.data())
def test_one_number_that_is_none_is_enough(dtype, size, data):
    x = torch.randn(size).to(dtype)
    assert is_finite(x)
    if size:
        x[data.draw(st.integers(0, size - 1))] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
        assert not is_finite(x)


def unknown(sound, folder, change, config=None):
    fmt = bpdq_format.parse(json.loads((sound / "config.json").read_text())["quantization_config"])
    return check_folder(changed(sound, folder, change), config, fmt)


def test_what_needs_no_skeleton_is_checked_of_architectures_that_transformers_lacks(sound, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        unknown(sound, tmp_path / "right", lambda t: None)
    assert "can't be checked" in caplog.text
    layer = "model.layers.0.mlp.down_proj"
    for i, (change, message) in enumerate(
        [
            (lambda t: t.pop(f"{layer}.B"), "B is not in the checkpoint"),
            (lambda t: t.update({f"{layer}.B": t[f"{layer}.B"][:, :1].clone()}), r"down_proj\.B is .* expected int32"),
            (lambda t: t.update({f"{layer}.c": t[f"{layer}.c"][:1].clone()}), r"down_proj\.c is .* expected 16-bit"),
            (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].int()}), r"lm_head\.weight is I32"),
            (lambda t: t["model.norm.weight"].fill_(torch.inf), r"model\.norm\.weight holds NaN or infinity"),
        ]
    ):
        with pytest.raises(InputError, match=message):
            unknown(sound, tmp_path / str(i), change)


def test_layers_in_8_bits_too_are_checked_of_architectures_that_transformers_lacks(tmp_path):
    sizes = {"hidden": 64, "ffn": 96, "layers": 1, "heads": 2, "kv_heads": 1}
    layer = "model.layers.0.mlp.down_proj"
    wide = {"model.layers.0.mlp.up_proj": {"coefficient_bits": 16}}
    model = tiny_model(tmp_path / "model", **sizes)
    narrow = bpdq_checkpoint(model, tmp_path / "out", group_size=32, coefficient_bits=8, layers=wide)
    unknown(narrow, tmp_path / "right", lambda t: None)
    one = torch.ones(3, 64).bfloat16()
    for i, (change, message) in enumerate(
        [
            (lambda t: t.pop(f"{layer}.s"), r"down_proj\.s is not in the checkpoint"),
            (lambda t: t.update({f"{layer}.s": t[f"{layer}.s"].float()}), r"down_proj\.s is torch.float32"),
            (lambda t: t.update({f"{layer}.s": one[:, 1:].clone()}), r"down_proj\.s is .* expected 16-bit floats"),
            (lambda t: t.update({f"{layer}.c": t[f"{layer}.c"].half()}), r"down_proj\.c is .* expected int8"),
            (lambda t: t.update({"model.layers.0.mlp.up_proj.s": one}), r"up_proj\.s has no place"),
            (lambda t: t[f"{layer}.s"].fill_(torch.nan), r"down_proj\.s holds NaN or infinity"),
        ]
    ):
        with pytest.raises(InputError, match=message):
            unknown(narrow, tmp_path / str(i), change)


@pytest.mark.parametrize("value", [2, "LlamaForCausalLM", {"a": 1}])
def test_architectures_that_are_no_list_are_named(sound, value):
    config = AutoConfig.from_pretrained(sound)
    config.architectures = value
    with pytest.raises(InputError, match=r"config\.json: architectures = .* is no list of names: download or quantize"):
        check_config(config, read_headers(sorted(sound.glob("*.safetensors"))))


def test_another_class_than_transformers_builds_is_an_architecture_that_is_not_known(sound, tmp_path, caplog):
    config = AutoConfig.from_pretrained(sound, architectures=["OtherForCausalLM"])
    with caplog.at_level(logging.WARNING):
        unknown(sound, tmp_path / "other", lambda t: None, config)
    assert "can't be checked" in caplog.text


def test_the_largest_scale_serves_all_numbers_of_float16():
    assert SCALE_RANGE[1] * torch.finfo(torch.float8_e4m3fn).max == torch.finfo(torch.float16).max


IN_16_BITS = Format(Scheme(2, 32), ignore=("re:.*",))


def headers_of(arch):
    """A family's config, and what transformers would save of its model."""
    config = config_of(arch)
    with torch.device("meta"):
        model = auto_class(arch).from_config(config)
    tensors = {n: tensor for n, tensor in model.state_dict().items() if n not in model.all_tied_weights_keys}
    saved = revert_weight_conversion(model, tensors)
    return config, {name: Entry(Path("file"), "BF16", tuple(tensor.shape)) for name, tensor in saved.items()}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("qwen3_moe (experts)", "model.layers.1.mlp.experts.3.gate_proj.weight"),
        ("qwen3_moe (experts)", "model.layers.1.mlp.experts.7.down_proj.weight"),
        ("lfm2_moe (experts)", "model.layers.1.feed_forward.experts.0.w3.weight"),
        ("nemotron_h (experts)", "backbone.layers.1.mixer.experts.7.up_proj.weight"),
        ("olmo_hybrid", "model.layers.0.linear_attn.k_conv1d.weight"),
        ("qwen3_vl_moe", "model.language_model.layers.1.mlp.experts.down_proj"),
    ],
)
def test_what_transformers_makes_tensors_of_is_checked(arch, name):
    config, stored = headers_of(arch)
    entry, model = stored[name], build(config, stored)
    check_stored(stored, model, IN_16_BITS)
    check_stored({key.removeprefix(f"{model.base_model_prefix}."): e for key, e in stored.items()}, model, IN_16_BITS)
    end = re.escape(name.partition(".layers.")[2])  # the model's name may begin otherwise
    with pytest.raises(InputError, match=rf"{end} is not in the checkpoint: download or quantize it again"):
        check_stored({key: e for key, e in stored.items() if key != name}, model, IN_16_BITS)
    short = (entry.shape[0] - 1, *entry.shape[1:])
    for wrong in (entry._replace(shape=short), entry._replace(dtype="I32")):
        with pytest.raises(InputError, match=rf"{end} is .*, expected F16 or BF16 or F32 \({entry.shape[0]}, "):
            check_stored(stored | {name: wrong}, model, IN_16_BITS)


def test_an_expert_that_the_config_lacks_has_no_place():
    config, stored = headers_of("qwen3_moe (experts)")
    for number, place in (("1.mlp.experts.8", "in .*gate_up_proj"), ("2.mlp.experts.0", "in the model")):
        name = f"model.layers.{number}.gate_proj.weight"
        entry = stored["model.layers.1.mlp.experts.0.gate_proj.weight"]
        with pytest.raises(InputError, match=f"{re.escape(name)} has no place {place}"):
            check_stored(stored | {name: entry}, build(config, stored), IN_16_BITS)


EXPERT = "model.layers.0.mlp.experts.0.up_proj.weight"


@pytest.mark.parametrize(
    ("twin", "name"),
    [
        ("norm.weight", "model.norm.weight"),
        (EXPERT.removeprefix("model."), EXPERT),
        ("model.layers.0.mlp.experts.gate_up_proj", EXPERT.replace("up_proj", "gate_proj")),
    ],
)
def test_a_tensor_that_is_there_twice_is_refused(twin, name):
    """With and without the prefix of the base model, or fused and not."""
    config, stored = headers_of("qwen3_moe (experts)")
    with pytest.raises(InputError, match=rf"file: {re.escape(twin)} and {re.escape(name)} are the same tensor"):
        check_stored(stored | {twin: stored[name]}, build(config, stored), IN_16_BITS)
