"""The CPU benchmark times every layer and token count asked for, and compares models with the first one."""

import json

import pytest
import torch

from benchmarks import cpu_bench


def test_layers_are_timed_for_every_number_of_tokens(tmp_path, capsys):
    argv = ["--layers", "64x96", "48x40", "--tokens", "1", "9", "--rounds", "3", "--output", str(tmp_path)]
    assert cpu_bench.main(argv) == 0
    report = json.loads((tmp_path / "cpu-layers.json").read_text())
    assert [(row["layer"], row["tokens"]) for row in report["layers"]] == [
        ("64x96", 1),
        ("64x96", 9),
        ("48x40", 1),
        ("48x40", 9),
    ]
    assert all(row["rounds"] == 3 and row["bpdq_ms"] >= row["bpdq_min_ms"] > 0 for row in report["layers"])
    assert (tmp_path / "cpu-layers.png").read_bytes().startswith(b"\x89PNG")
    assert "| 48x40 | 48 x 40 | 9 |" in capsys.readouterr().out


def test_layer_table_gives_speed_over_bf16_and_the_share_of_copy_bandwidth():
    row = {"layer": "o", "n": 8192, "k": 8192, "tokens": 1, "bpdq_ms": 2.0, "bf16_ms": 12.0, "fp32_ms": 20.0}
    last = cpu_bench.layer_table([row | {"packed_gb_s": 10.0}], copy_gb_s=20.0).splitlines()[-1]
    assert last == "| o | 8192 x 8192 | 1 | 2.00 | 12.00 | 20.00 | 6.00 | 10.0 | 50% |"


def test_model_table_gives_ratios_to_the_first_model():
    row = {"decode_1_tokens_s": 10.0, "decode_8_tokens_s": 40.0, "prefill_tokens_s": 100.0}
    memory = {"weight_bytes": 300_000_000, "resident_bytes": 2_000_000_000}
    rows = [{"model": "base"} | row | memory, {"model": "bpdq"} | {key: 2 * row[key] for key in row} | memory]
    last = cpu_bench.model_table(rows).splitlines()[-1]
    assert last == "| bpdq | 20.0 (2.00) | 80.0 (2.00) | 200.0 (2.00) | 300 | 2000 |"


def test_tied_tensors_are_weighed_once():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False))
    model[1].weight = torch.nn.Parameter(model[0].weight.data)
    model.register_buffer("extra", torch.zeros(3))
    assert cpu_bench.weight_bytes(model) == 4 * (32 + 3)


@pytest.mark.parametrize("argv", [["--layers", "64"], ["--layers", "axb"], ["--tokens", "0"], ["--rounds", "0"]])
def test_wrong_options_are_refused(argv):
    with pytest.raises(SystemExit) as exit_info:
        cpu_bench.parse_args(argv)
    assert exit_info.value.code == 2
