"""The options of `bpdq quantize`: the same ones wherever they are shown, and one sentence for what can't be used."""

import inspect
import os
import shlex
from dataclasses import MISSING, fields
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

import bpdq_quantizer
from bpdq_kernels.format import TRELLIS, Scheme
from bpdq_quantizer import cli
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit import plan
from bpdq_quantizer.run.fields import flag
from bpdq_quantizer.run.options import FIELDS, PARTS, Text
from bpdq_quantizer.run.resolved import SILENT, command, default_output_tokens, resolved
from scripts.option_table import PAGE, updated

GIVEN = {"model": "m", "output": "o"}
OTHERS = {  # than the defaults
    **{
        "bits": 3,
        "group_size": 32,
        "coefficient_bits": 16,
        "code": "trellis",
        "embed_bits": 4,
        "head_bits": 2,
        "target_size": "20GiB",
        "kv_cache_scales": True,
    },
    **{"ignore": ["re:.*[.]o_proj", "model.layers.0.mlp.down_proj"]},
    **{"calibration": "t.txt", "samples": 9, "seq_len": 64, "special_tokens": "none", "evaluate": 8, "iterations": 2},
    **{"solver": "paper", "asymmetric": 0.25, "rotate": "hadamard", "seed": 7},
    **{"output_tokens": 99, "tune": "model", "tune_steps": 5},
    **{"tune_loss": "mix", "tune_samples": 11, "keep_statistics": "k", "offload_dir": "s", "device": "cpu"},
    **{"devices": "cpu", "resume": True},
    **{"push_to_hub": "me/m", "private": True, "force": True},
    "target_bpw": 2.5,
}
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
DRAWN = {  # some values of options that don't need another one, None among them: it is not given
    **{"bits": st.integers(1, 4) | st.none(), "group_size": st.sampled_from([None, 32, 64, 128, 256])},
    **{"coefficient_bits": st.sampled_from([None, 8, 16]), "code": st.sampled_from([None, "plain", "trellis"])},
    **{"embed_bits": st.sampled_from([None, 1, 4, 16]), "head_bits": st.sampled_from([None, 2, 3, 16])},
    "target_bpw": st.none() | st.floats(1, 16),
    "ignore": st.none() | st.lists(TEXTS, max_size=2),
    "kv_cache_scales": st.booleans(),
    "samples": st.sampled_from([None, 2, 64, 128, 130]),
    "seq_len": st.sampled_from([None, 2, 512, 2048]),
    "special_tokens": st.sampled_from([None, "none"]),
    "evaluate": st.sampled_from([None, 0, 8]),
    "iterations": st.sampled_from([None, 1]),
    "solver": st.sampled_from([None, "refined", "paper"]),
    "asymmetric": st.none() | st.floats(0, 1),
    "output_tokens": st.sampled_from([None, 0, 4096, 8192, 16384]),
    "rotate": st.sampled_from([None, "hadamard"]),
    "seed": st.none() | st.integers(0, 2**63 - 1),
    "offload_dir": st.sampled_from([None, "/x/states"]),
}
OF_TUNING = {
    "tune_steps": st.sampled_from([None, 1, 200]),
    "tune_samples": st.sampled_from([None, 2, 64, 128]),
    "tune_loss": st.sampled_from(["kl", "mix"]),
}
UNSEEN = ("output", "resume", "keep_statistics", "push_to_hub", "private", "force")  # by what is written


def test_defaults_follow_the_options_they_depend_on():
    found = resolved(**GIVEN, solver="paper", tune="model", samples=9)
    assert (found.method.asymmetric, found.tuning.tune_steps, found.tuning.tune_samples) == (0.0, 200, 9)
    assert found.schemes.coefficient_bits == 16
    for windows, tokens in ((2, 4096), (32, 4096), (48, 6144), (64, 8192), (999, 16384)):
        assert default_output_tokens("refined", windows * 512) == tokens
    assert default_output_tokens("paper", 999 * 512) == 0
    assert resolved(**GIVEN, output_tokens=0).method.output_tokens == 0
    assert resolved(**GIVEN, ignore=[]).schemes.ignore is None
    assert resolved(**GIVEN).method.asymmetric == 0.5
    assert resolved(**GIVEN).schemes.coefficient_bits == 8
    for windows, given in ((8, {}), (0, {"samples": 127}), (0, {"offload_dir": "s"}), (3, {"evaluate": 3})):
        assert resolved(**GIVEN, **given).text.evaluate == windows


@pytest.mark.parametrize("bits", [2, 3])
def test_the_default_of_either_width_takes_as_many_bytes(bits):
    schemes = [resolved(**GIVEN, bits=bits, coefficient_bits=width).schemes for width in (8, 16)]
    eight, sixteen = (Scheme(s.bits, s.group_size, s.coefficient_bits) for s in schemes)
    assert eight.bits_per_weight == sixteen.bits_per_weight


@pytest.mark.parametrize("option", ["tune_steps", "tune_samples", "tune_loss"])
def test_options_of_tuning_need_it(option):
    value = OTHERS[option]
    with pytest.raises(InputError, match=f"{flag(FIELDS[option])} {value} needs --tune model"):
        resolved(**GIVEN, **{option: value})
    assert resolved(**GIVEN, tune="model", **{option: value}).by_name()[option] == value


def test_paths_become_strings():
    given = {"model": Path("a/m"), "calibration": Path("t.txt"), "offload_dir": Path("s")}
    found = resolved(**GIVEN | given).by_name()
    assert {name: found[name] for name in given} == {name: str(value) for name, value in given.items()}


def test_a_path_of_bytes_becomes_a_string(tmp_path):
    (tmp_path / "m").mkdir()
    (entry,) = os.scandir(os.fsencode(tmp_path))
    assert resolved(**GIVEN | {"model": entry}).files.model == str(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("solver", "refind", "--solver refind: expected refined or paper"),
        ("rotate", "yes", "--rotate yes: expected none or hadamard"),
        ("rotate", None, "--rotate None: expected none or hadamard"),
        ("tune", ["model"], "expected none or model"),
        ("tune_loss", "l2", "--tune-loss l2: expected kl or mix"),
        ("device", "tpu", "--device tpu: expected auto or cpu or cuda"),
        ("bits", "2", "--bits 2: expected a whole number"),
        ("bits", None, "--bits None: expected a whole number"),
        ("samples", 1.5, "--samples 1.5: expected a whole number"),
        ("samples", True, "--samples True: expected a whole number"),
        ("seed", 10**20, "--seed 100000000000000000000: expected 0 to 9223372036854775807"),
        ("seq_len", -1, "--seq-len -1: expected 2 or more"),
        ("seq_len", 1, "--seq-len 1: expected 2 or more, of which the first is not predicted"),
        ("samples", -1, "--samples -1: expected 0 to"),
        ("samples", 0, "must be at least 1"),
        ("asymmetric", "much", "--asymmetric much: expected a number"),
        ("asymmetric", float("nan"), "--asymmetric nan: expected 0 .off. to 1"),
        ("target_bpw", float("inf"), "--target-bpw inf: expected bits per weight"),
        ("target_bpw", 10**400, "--target-bpw 10+: expected bits per weight"),
        ("asymmetric", -(10**400), "--asymmetric -10+: expected 0 .off. to 1"),
        ("target_size", 10, "--target-size 10: expected text"),
        ("kv_cache_scales", "no", "--kv-cache-scales no: expected True or False"),
        ("ignore", "lm_head", "--ignore lm_head: expected a list of texts"),
        ("ignore", [""], "expected a list of texts"),
        ("model", 3, "MODEL 3: expected a path or a name"),
        ("model", "", "MODEL : expected a path or a name"),
        ("calibration", "a\0b.txt", "--calibration a\0b.txt: expected a path or a name"),
        ("calibration", "\ud800.txt", "--calibration .*: expected a path or a name"),
        ("output", "", "--output : expected the name of a folder that is to be created"),
        ("output", 3, "--output 3: expected a path or a name"),
        ("calibration", None, "--calibration None: expected a path or a name"),
        ("group_size", 48, "group_size = 48 is not supported"),
    ],
)
def test_what_cannot_be_used_is_named(name, value, message):
    with pytest.raises(InputError, match=message):
        resolved(**GIVEN | {name: value})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("bit", "bits"), ("groupsize", "group_size"), ("seq-len", "seq_len"), ("kv_scales", "kv_cache_scales")],
)
def test_an_unknown_keyword_is_named_with_the_nearest_option(tmp_path, name, nearest):
    with pytest.raises(TypeError, match=f"quantize has no option '{name}', the nearest is '{nearest}'"):
        bpdq_quantizer.quantize("m", tmp_path / "out", **{name: 2})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def from_command_line(monkeypatch):
    """The options that a command line means, as `quantize` is called with them."""

    def parse(*argv):
        found = []

        def stop(**options):
            found.append(resolved(**options))
            raise InputError("stop here")

        monkeypatch.setattr(cli, "quantize", stop)
        assert cli.main(["quantize", *argv]) == 2
        return found[0]

    return parse


def test_the_command_line_has_the_defaults_of_python(from_command_line):
    assert from_command_line("m", "--output", "o") == resolved(**GIVEN)


@pytest.mark.parametrize("left_out", ["target_bpw", "target_size"])
def test_what_the_command_line_says_is_what_python_means(from_command_line, left_out):
    given = {name: value for name, value in (GIVEN | OTHERS).items() if name != left_out}
    argv = ["m"]
    for name, value in given.items():
        if name != "model":
            for part in value if isinstance(value, list) else [value]:
                argv += [flag(FIELDS[name])] if part is True else [flag(FIELDS[name]), str(part)]
    found = from_command_line(*argv)
    assert found == resolved(**given)
    assert found.by_name() == {name: value for name, value in given.items() if name not in UNSEEN} | {left_out: None}


@hypothesis.settings(deadline=None)  # on a busy machine
@hypothesis.given(st.data())
def test_the_cards_command_means_the_same_options(data):
    given = GIVEN | {name: value for name, values in DRAWN.items() if (value := data.draw(values, name)) is not None}
    if data.draw(st.booleans(), "tuned"):
        given |= {"tune": "model"} | {name: data.draw(values, name) for name, values in OF_TUNING.items()}
    try:
        o = resolved(**given)
    except InputError:  # a trellis of four planes
        hypothesis.assume(False)
    words = shlex.split(command(o, "m"))[1:]
    parsed = {name: value for name, value in vars(cli._parser().parse_args(words)).items() if name in FIELDS}
    for found, asked in zip(resolved(**parsed).by_name().items(), o.by_name().items(), strict=True):
        assert found == asked or asked[0] in SILENT


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"coefficient_bits": 16, "group_size": 64}, "--group-size 64 --coefficient-bits 16"),
        ({"coefficient_bits": 16, "group_size": 128}, "--coefficient-bits 16"),
        ({"solver": "paper", "coefficient_bits": 8, "group_size": 128}, "--group-size 128 --coefficient-bits 8"),
        ({"output_tokens": 16384}, "--output-tokens 16384"),
        ({"tune": "model", "tune_steps": 200, "samples": 128, "tune_samples": 128}, "--tune model"),
        ({"ignore": ["-x"]}, "--ignore=-x"),
    ],
)
def test_a_command_is_short(options, shown):
    solver = " --solver paper" if "solver" in options else ""
    o = resolved(**GIVEN, calibration="t.txt", **options)
    assert command(o, "m") == f"bpdq quantize m --calibration t.txt {shown}{solver} --output o"


def test_python_shows_the_options():
    parameters = inspect.signature(bpdq_quantizer.quantize).parameters
    assert list(parameters) == list(FIELDS)
    for name, parameter in parameters.items():
        assert (parameter.default is parameter.empty) == (FIELDS[name].default is MISSING)
        assert f"\n- {name}: " in bpdq_quantizer.quantize.__doc__


def test_the_docs_have_every_option():
    page = PAGE.read_text()
    assert updated(page) == page, "run python -m scripts.option_table"
    assert all(f"| `{flag(of)}" in page for of in FIELDS.values())


def test_every_option_is_declared_once_and_tried_above():
    assert FIELDS.keys() == GIVEN.keys() | OTHERS.keys()
    assert len(FIELDS) == sum(len(fields(part)) for part in PARTS.values())


def test_plan_assumes_the_default_calibration():
    assert (Text().samples, Text().seq_len) == plan.CALIBRATION


@pytest.mark.parametrize("tables", [{}, {"embed_bits": 3, "head_bits": 2}])
def test_bits_that_have_no_trellis_are_refused_whatever_the_tables_have(tables):
    with pytest.raises(InputError, match=r"--bits .* / --code: bits = 4 with a trellis is not supported: use 1 to 3"):
        resolved(**GIVEN, bits=4, code="trellis", **tables)
    assert resolved(**GIVEN, bits=3, code="trellis", embed_bits=4).schemes.scheme().planes == 4


@pytest.mark.parametrize("target", [{"target_bpw": 4.4}, {"target_size": "1MB"}])
def test_bits_that_a_target_does_not_use_do_not_matter(target):
    assert resolved(**GIVEN, bits=4, code="trellis", **target).schemes.scheme() == Scheme(1, 64, 8, TRELLIS)
