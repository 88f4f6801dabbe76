"""The CPU benchmark times every layer and token count asked for, and compares models with the first one."""

import json
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

import bpdq_quantizer  # noqa: F401  # so that transformers loads bit-planes
from benchmarks import cpu_bench
from benchmarks.dense_experts import dense_experts
from benchmarks.packed_models import RANDOM_MODELS, write_random_models
from benchmarks.random_planes import random_experts
from benchmarks.shapes import Experts
from bpdq_kernels import Activation, dequantize, moe, prepare_experts
from bpdq_kernels.experts import routes
from bpdq_kernels.format import PLAIN, TRELLIS, Scheme

OF_LAYERS = [("--layers", "64x64"), ("--tokens", "1"), ("--rounds", "15"), ("--cpu-time",)]
OF_PLANES = [("--bits", "2"), ("--group-size", "64"), ("--coefficient-bits", "8"), ("--code", "plain")]


def test_layers_are_timed_for_every_number_of_tokens(tmp_path, capsys):
    argv = ["--layers", "64x96", "48x40", "6x2x64x32", "--tokens", "1", "9", "--rounds", "3", "--output", str(tmp_path)]
    assert cpu_bench.main(argv) == 0
    report = json.loads((tmp_path / "cpu-layers.json").read_text())
    assert [(row["layer"], row["tokens"]) for row in report["layers"]] == [
        ("64x96", 1),
        ("64x96", 9),
        ("48x40", 1),
        ("48x40", 9),
        ("6x2x64x32", 1),
        ("6x2x64x32", 9),
    ]
    assert all(row["rounds"] == 3 and row["bpdq_ms"] >= row["bpdq_min_ms"] > 0 for row in report["layers"])
    assert (tmp_path / "cpu-layers.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| 48x40 | 48 x 40 | 9 |" in printed
    assert "| 6x2x64x32 | 6 x 2 x 64 x 32 | 1 |" in printed


def test_trellis_coded_planes_are_timed_beside_plain_ones(tmp_path, capsys):
    argv = ["--layers", "64x96", "6x2x64x32", "--tokens", "1", "--rounds", "3", "--code", "plain", "trellis"]
    assert cpu_bench.main([*argv, "--coefficient-bits", "8", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cpu-layers.json").read_text())["layers"]
    assert [row["layer"] for row in rows] == ["64x96", "64x96, trellis", "6x2x64x32", "6x2x64x32, trellis"]
    printed = capsys.readouterr().out
    for plain, trellis in (rows[:2], rows[2:]):
        assert trellis["of_first_code"] == pytest.approx(trellis["packed_gb_s"] / plain["packed_gb_s"])
        assert trellis["bf16_ms"] == plain["bf16_ms"]
        assert f"({trellis['of_first_code']:.2f})" in printed


def test_experts_in_bf16_are_what_the_op_computes():
    layer = Experts("", count=5, chosen=2, hidden=64, inner=32)
    stored = [random_experts(5, n, k, Scheme(2, 64, 8), torch.default_generator) for n, k in ((64, 64), (64, 32))]
    dense = [
        torch.stack([dequantize(B, c, 64, k, s) for B, c, s in zip(*matrix, strict=True)]).bfloat16()
        for matrix, k in zip(stored, (64, 32), strict=True)
    ]
    x, weights = torch.randn(7, 64).bfloat16(), torch.rand(7, 2)
    ids = torch.rand(7, layer.count).argsort(1)[:, :2]
    prepared = [prepare_experts(matrix, 64, k) for matrix, k in zip(stored, (64, 32), strict=True)]
    y = moe(x, weights, ids, *prepared, Activation("silu"))
    torch.testing.assert_close(dense_experts(x, weights, routes(ids, 5), *dense), y, rtol=0.05, atol=0.02)


def test_cpu_time_leaves_out_what_a_layer_waits(tmp_path, monkeypatch):
    def waits(*_):
        time.sleep(0.02)

    monkeypatch.setattr(cpu_bench, "linear", waits)
    found = []
    for options in ([], ["--cpu-time"]):
        argv = ["--layers", "64x96", "--tokens", "1", "--rounds", "3", "--output", str(tmp_path), *options]
        assert cpu_bench.main(argv) == 0
        found.append(json.loads((tmp_path / "cpu-layers.json").read_text())["layers"][0]["bpdq_ms"])
    assert found[1] < 20 <= found[0]


def test_layer_table_gives_speed_over_bf16_and_the_share_of_copy_bandwidth():
    row = {"layer": "o", "shape": "8192 x 8192", "tokens": 1, "bpdq_ms": 2.0, "bf16_ms": 12.0, "fp32_ms": 20.0}
    rates = {"packed_gb_s": 10.0, "copy_gb_s": 20.0}
    last = cpu_bench.layer_table([row | rates]).splitlines()[-1]
    assert last == "| o | 8192 x 8192 | 1 | 2.00 | 12.00 | 20.00 | 6.00 | 10.0 | 20.0 | 50% |"
    row.pop("fp32_ms")  # of experts
    last = cpu_bench.layer_table([row | rates]).splitlines()[-1]
    assert last == "| o | 8192 x 8192 | 1 | 2.00 | 12.00 |  | 6.00 | 10.0 | 20.0 | 50% |"


def test_model_table_gives_ratios_to_the_first_model():
    speeds = {"decode_1_tokens_s": 10.0, "decode_8_tokens_s": 40.0, "prefill_tokens_s": 100.0}
    times = {"first_of_1_ms": 100.0, "first_of_4_ms": 400.0, "first_of_8_ms": 800.0}
    memory = {"weight_bytes": 300_000_000, "resident_bytes": 2_000_000_000}
    base = {"model": "base"} | speeds | times | memory
    bpdq = base | {"model": "bpdq"} | {key: 2 * speeds[key] for key in speeds} | {"first_of_1_ms": 50.0}
    peer = {"model": "peer"} | speeds | memory
    lines = cpu_bench.model_table([base, bpdq, peer]).splitlines()
    assert lines[-2] == (
        "| bpdq | 20.0 (2.00) | 80.0 (2.00) | 200.0 (2.00) | 50 (2.00) | 400 (1.00) | 800 (1.00) |  |  | 300 | 2000 |"
    )
    assert lines[-1] == "| peer | 10.0 (1.00) | 40.0 (1.00) | 100.0 (1.00) |  |  |  |  |  | 300 | 2000 |"
    blocks = {"block_1_ms": 4.0, "block_8_ms": 9.0}
    lines = cpu_bench.model_table([base | blocks, bpdq | {"block_1_ms": 1.0, "block_8_ms": 3.0}]).splitlines()
    assert "| 1 (4.00) | 3 (3.00) | 300 |" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1


def test_tied_tensors_are_weighed_once():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False))
    model[1].weight = torch.nn.Parameter(model[0].weight.data)
    model.register_buffer("extra", torch.zeros(3))
    assert cpu_bench.weight_bytes(model) == 4 * (32 + 3)


def as_engine(tmp_path, monkeypatch):
    """Put a shell script in place of the process that runs a model: a model of the name `broken` fails."""
    figures = {"decode_1_tokens_s": 1.0, "decode_8_tokens_s": 2.0, "prefill_tokens_s": 3.0}
    figures |= {"weight_bytes": 4, "resident_bytes": 5}
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ncase \"$4\" in */broken) exit 3;; esac\necho '{json.dumps(figures)}'\n")
    script.chmod(0o755)
    monkeypatch.setattr(cpu_bench.sys, "executable", str(script))


def test_figures_before_a_model_that_fails_are_kept(tmp_path, monkeypatch, capsys):
    as_engine(tmp_path, monkeypatch)
    argv = ["--output", str(tmp_path), "--models"]
    assert cpu_bench.main([*argv, "a/broken", "a/whole"]) == 1
    error = "cpu_bench: error: a/broken: vLLM ended with status 3, its messages above say why"
    assert capsys.readouterr().err == f"{error}\n"
    assert cpu_bench.main([*argv, "a/whole", "a/broken", "a/last"]) == 1
    assert capsys.readouterr().err == f"{error}; {tmp_path / 'cpu-models.json'} has the models before it\n"
    (row,) = json.loads((tmp_path / "cpu-models.json").read_text())["models"]
    assert (row["model"], row["prefill_tokens_s"]) == ("whole", 3.0)
    assert cpu_bench.main([*argv, "a/whole", "a/last"]) == 0
    assert "| last | 1.0 (1.00) |" in capsys.readouterr().out


@pytest.mark.parametrize(("option", "code"), [([], PLAIN), (["--code", "trellis"], TRELLIS)])
def test_random_models_have_the_code_that_is_asked_for(tmp_path, monkeypatch, option, code):
    as_engine(tmp_path, monkeypatch)
    written = []
    monkeypatch.setattr(cpu_bench, "write_random_models", lambda *args: written.append(args) or ["plain"])
    assert cpu_bench.main(["--random-models", "1.5B", "--output", str(tmp_path), *option]) == 0
    assert written == [("1.5B", tmp_path, Scheme(2, 128, 16, code))]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        *((["--models", "m", *option], f"{option[0]} is not for --models") for option in OF_LAYERS + OF_PLANES),
        *((["--random-models", "1.5B", *option], f"{option[0]} is not for --random-models") for option in OF_LAYERS),
        (["--random-models", "1.5B", "--code", "plain", "trellis"], "--code: --random-models takes one"),
        (["--models", "a/m", "b/m/"], "--models: two folders have the same name"),
    ],
)
def test_options_that_would_not_count_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        cpu_bench.parse_args(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--layers", "64"],
        ["--layers", "axb"],
        ["--layers", "8x2x64"],
        ["--layers", "1x2x3x4x5"],
        ["--tokens", "0"],
        ["--rounds", "0"],
        ["--llama", "Q2_K"],
        ["--eager", "--layers", "64x64"],
        ["--code", "trellis", "--bits", "4"],
        ["--code", "trellis", "--layers", "64x40"],
        ["--code", "trellis", "--layers", "8x2x64x40"],
    ],
)
def test_wrong_options_are_refused(argv):
    with pytest.raises(SystemExit) as exit_info:
        cpu_bench.parse_args(argv)
    assert exit_info.value.code == 2


@pytest.mark.parametrize(
    ("size", "scheme"),
    [
        ("135M", Scheme(2, 32, 8)),
        ("0.5B", Scheme(2, 32)),
        ("0.5B", Scheme(2, 32, 8, TRELLIS)),
        ("30B-A3B", Scheme(2, 32, 8)),
        ("30B-A3B", Scheme(2, 32, 8, TRELLIS)),
    ],
)
def test_random_models_are_whole_checkpoints(tmp_path, monkeypatch, size, scheme):
    """Of fewer and smaller layers; transformers loads them, and says if a tensor is missing."""
    small = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"vocab_size": 384, "num_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 4}
    monkeypatch.setitem(RANDOM_MODELS, size, {**RANDOM_MODELS[size], **small, "num_key_value_heads": 2, "head_dim": 32})
    plain, *packed = write_random_models(size, tmp_path, scheme)
    assert len(packed) == (1 if "A" in size else 2)
    for folder in (plain, *packed):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
        has_planes = any(name.endswith("down_proj.B") for name in model.state_dict())
        assert has_planes == (folder != plain)


def test_blocks_are_timed_one_by_one():
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
    times: list[float] = []
    cpu_bench.time_blocks(times, model)
    for block in model.model.layers:
        block(torch.zeros(1, 4))
    assert len(times) == 2
    assert all(seconds > 0 for seconds in times)
