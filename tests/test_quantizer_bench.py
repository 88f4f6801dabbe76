"""The quantizer benchmark: parts that add up, and a table of every layer and method."""

import json

import pytest
import torch

from benchmarks import quantizer_bench
from bpdq_quantizer.algorithm import cpu_solver
from bpdq_quantizer.algorithm.solver import quantize_linear


def test_parts_add_up_to_a_report_of_every_method(tmp_path, capsys):
    argv = ["--layers", "96x64", "--rows", "40", "--repeats", "1", "--group-sizes", "32", "--output", str(tmp_path)]
    assert quantizer_bench.main([*argv, "--methods", "compiled", "torch", "--plot"]) == 0
    rows = json.loads((tmp_path / "quantizer.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["compiled", "torch"]
    for row in rows:
        assert set(row["per_million_weights"]) == set(quantizer_bench.PARTS)
        assert min(row["per_million_weights"].values()) >= 0
        assert sum(row["per_million_weights"].values()) == pytest.approx(row["total"])
        assert row["rows"] == 40
    assert rows[0]["loss_per_row"] == pytest.approx(rows[1]["loss_per_row"], rel=0.02)
    assert (tmp_path / "quantizer.md").read_text().strip() in capsys.readouterr().out
    assert (tmp_path / "quantizer.png").read_bytes().startswith(b"\x89PNG")


def test_timing_changes_no_result():
    W = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    H, _ = quantizer_bench.hessian(64)
    loss = quantize_linear(W, H, 2, 32, 8).loss.sum().item()
    assert quantizer_bench.solve_compiled(W, H, 2, 32)[1] == loss
    assert cpu_solver.library() is None or quantizer_bench.solve_in_torch(W, H, 2, 32)[1] != 0


@pytest.mark.parametrize("layer", ["96", "96x0", "axb", "1x2x3"])
def test_a_layer_that_is_no_shape_is_refused(layer, capsys):
    with pytest.raises(SystemExit) as stop:
        quantizer_bench.main(["--layers", layer])
    assert stop.value.code == 2
    assert "outputs x inputs" in capsys.readouterr().err
