"""The GPU check's parts for models and the quantizer: they run here on small shapes, and their arithmetic is right."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu_model, gpu_quantize, gpu_solver
from benchmarks.random_models import write_config
from benchmarks.shapes import Layer, Model
from bpdq_quantizer.fit.plan import GIB

CPU = ["--tiny", "--device", "cpu"]


def test_the_model_part_runs_and_keeps_its_figures(tmp_path, capsys):
    assert gpu_model.main([*CPU, "--json", str(tmp_path / "model.json")]) == 0
    report = json.loads((tmp_path / "model.json").read_text())
    (rows,) = report["models"].values()
    assert [row["way"] for row in rows] == ["stored", "tiled", "16 bits"]
    for row in rows:
        assert row["batches"].keys() == {"1", "8"}
        assert all(at["tokens_per_s"] > 0 for at in row["batches"].values())
    errors = [at["logits_error"] for row in rows[1:] for at in row["batches"].values()]
    assert 0 < max(errors) < gpu_model.LOGITS_TOLERANCE, "the ways to multiply differ, by rounding"
    assert "they need a GPU" in report["cuda_graphs"]
    assert report["failures"] == []
    assert "| tiny, 1 blocks | 16 bits |" in capsys.readouterr().out


def test_the_quantizer_part_runs_and_keeps_its_figures(tmp_path, capsys):
    assert gpu_quantize.main([*CPU, "--json", str(tmp_path / "quantize.json")]) == 0
    report = json.loads((tmp_path / "quantize.json").read_text())
    assert report["agreement"]["mean_ratio"] == 1
    assert len(report["agreement"]["ratios"]) == 7
    assert report["blocks"]["seconds_by_stage"].keys() == {"qkv", "o", "gate_up", "down"}
    assert [stage["shape"] for stage in report["stages"]] == [[128, 160]]
    assert {stage["source"] for m in report["models"].values() for stage in m["stages"].values()} == {"measured"}
    assert report["smollm2"] == "skipped: no --smollm2"
    assert "| tiny, wider down | 128 x 160 |" in capsys.readouterr().out


def test_without_time_everything_is_extrapolated_and_said_to_be(tmp_path, capsys):
    assert gpu_quantize.main([*CPU, "--seconds", "0", "--json", str(tmp_path / "quantize.json")]) == 0
    report = json.loads((tmp_path / "quantize.json").read_text())
    assert report["blocks"].startswith("skipped")
    assert report["stages"] == []
    assert {stage["source"] for m in report["models"].values() for stage in m["stages"].values()} == {"extrapolated"}
    assert capsys.readouterr().out.count("extrapolated") == 3


@pytest.mark.parametrize("part", [gpu_model, gpu_quantize])
def test_a_part_without_its_gpu_says_so_in_one_line(part, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        part.main([])
    assert error.value.code == 3
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("part", "argv"),
    [
        (gpu_model, ["--device", "tpu"]),
        (gpu_model, [*CPU, "--json", "no/such/folder/x.json"]),
        (gpu_quantize, [*CPU, "--smollm2", "folder"]),
        (gpu_quantize, [*CPU, "--smollm2", "none", "--calibration", "a.txt", "--text", "b.txt"]),
        (gpu_quantize, [*CPU, "--seconds", "soon"]),
    ],
)
def test_wrong_options_are_one_line_and_exit_status_2(part, argv, capsys):
    with pytest.raises(SystemExit) as error:
        part.main(argv)
    assert error.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


class Waits(TorchDispatchMode):
    """Counts what a CUDA graph can't capture: values read from the device, and tensors made of Python's."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(name in str(op) for name in ("_local_scalar_dense", "nonzero", "lift_fresh", "is_same_size")):
            self.found.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("way", gpu_model.WAYS)
def test_a_decoding_step_can_be_captured(way, tmp_path):
    decoder = gpu_model.Decoder(gpu_model.build(write_config(tmp_path, "tiny"), way, "cpu"), 2)
    decoder.step()
    with Waits() as waits:
        decoder.step()
        assert waits.found == []
        decoder.tokens[0].item()
        assert waits.found, "the test sees a read"


def test_decoding_from_the_start_again_repeats_itself(tmp_path):
    decoder = gpu_model.Decoder(gpu_model.build(write_config(tmp_path, "tiny"), "16 bits", "cpu"), 2)
    first = [decoder.step().clone() for _ in range(3)]
    decoder.restart()
    assert all(torch.equal(decoder.step(), logits) for logits in first)
    assert not torch.equal(first[0], first[1])


def test_plan_of_a_model_by_hand(tmp_path):
    plans = gpu_model.planned(write_config(tmp_path, "tiny"))
    weights = 128 * 64 + 64 * 64 + 2 * 160 * 64 + 64 * 160  # q/k/v, o, gate/up, down
    rest = 2 * (2048 * 64 * 2 + 3 * 64 + 128)  # tables, norms, biases
    assert plans.weights["16 bits"] == 2 * weights + rest
    coefficients = 2 * 3 * (128 + 64 + 320 + 2 * 64)  # two groups of 160 inputs, one of 64
    assert plans.weights["stored"] == weights // 4 + coefficients + rest
    assert plans.kv_per_token == 2 * 1 * 32 * 2  # keys and values, one head, bf16


def row(**batch):
    at = {"logits_error": 0.01, "graph_error": 0.0, "kv_bytes": 64, "planned_kv_bytes": 64}
    at |= {"beside_bytes": 10, "planned_beside_bytes": 20}
    return {"way": "tiled", "weight_bytes": 1000, "planned_weight_bytes": 1000, "batches": {1: at | batch}}


def test_a_good_row_has_no_failures():
    assert gpu_model.failures("7b", row(), "cuda") == []


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"logits_error": 0.2}, "logits are off by 0.2"),
        ({"logits_error": float("nan")}, "logits are off by nan"),
        ({"graph_error": 0.1}, "a CUDA graph differs from eager steps by 0.1"),
        ({"kv_bytes": 65}, "the cache has 65 bytes, not 64"),
        ({"beside_bytes": 21}, "21 bytes beside weights and cache, plan allows 20"),
    ],
)
def test_what_is_wrong_with_a_model_is_named(batch, message):
    (line,) = gpu_model.failures("7b", row(**batch), "cuda")
    assert line == f"7b, tiled, batch 1: {message}" or message in line


def test_weights_that_plan_does_not_expect_are_named():
    (line,) = gpu_model.failures("7b", row() | {"weight_bytes": 1011}, "cuda")
    assert "weights take 1011 bytes, plan says 1000" in line


def test_relative_error_of_nan_is_no_success():
    y = torch.tensor([1.0, float("nan")])
    assert gpu_model.relative_error(y, torch.ones(2)) == 1
    assert gpu_model.relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0])) == pytest.approx(0.08)


PIECES = gpu_solver.Pieces(
    factor={256: 1.0, 300: 2.0}, refine={256: 0.1, 300: 0.2}, token={256: 1e-5, 300: 2e-5}, group={10: 0.5, 99: 0.7}
)


def test_a_stage_is_its_factors_groups_and_refined_chunks(monkeypatch):
    assert gpu_solver.stage_seconds(10, 256, PIECES) == pytest.approx(1 + 2 * 0.5 + 1 * 0.1)
    monkeypatch.setattr("bpdq_quantizer.algorithm.refine.CHUNK_ELEMENTS", 300 * 3 * 40)  # 40 rows at once
    assert gpu_solver.stage_seconds(99, 300, PIECES) == pytest.approx(2 + 3 * 2 * 0.7 + 3 * 0.2)  # 64 rows, and 35


MODEL = Model(5, (Layer("qkv", 10, 256), Layer("down", 99, 300)), Layer("head", 1, 1))


def test_hours_prefer_what_was_measured_and_say_which():
    found = gpu_quantize.model_hours(MODEL, PIECES, {(10, 256): 7.0})
    assert found["stages"]["qkv"] == {"shape": (10, 256), "seconds": 7.0, "source": "measured"}
    assert found["stages"]["down"]["source"] == "extrapolated"
    assert found["stages"]["down"]["seconds"] == pytest.approx(2 + 3 * 2 * 0.7 + 0.2)
    calibration = 128 * 2048 * 3e-5
    assert found["calibration_seconds_per_block"] == pytest.approx(calibration)
    assert found["hours"] == pytest.approx(5 * (calibration + 7.0 + 6.4) / 3600)


def test_stages_are_measured_from_short_to_long_while_they_fit():
    left = iter([100.0, 6.4])
    assert list(gpu_quantize.affordable_stages({"m": MODEL}, PIECES, lambda: next(left))) == [(10, 256)]
    left = iter([100.0, 100.0])
    assert list(gpu_quantize.affordable_stages({"m": MODEL}, PIECES, lambda: next(left))) == [(10, 256), (99, 300)]


def test_losses_of_another_device_are_compared_in_the_mean_and_one_by_one():
    def layers(*losses):
        return [{"name": f"layer {i}", "loss": loss} for i, loss in enumerate(losses)]

    found = gpu_quantize.compare_losses(layers(1.0, 2.0), layers(1.04, 2.0 / 1.04))
    assert found["mean_ratio"] == pytest.approx(1)
    assert gpu_quantize.disagreement(found, "cuda") == []
    found = gpu_quantize.compare_losses(layers(1.0, 2.0), layers(1.2, 2.0 / 1.2))
    (line,) = gpu_quantize.disagreement(found, "cuda")
    assert "layer 0: its loss on cuda is 1.200" in line or "layer 1: its loss on cuda is 0.833" in line
    found = gpu_quantize.compare_losses(layers(1.0, 2.0), layers(1.03, 2.03))
    assert gpu_quantize.disagreement(found, "cuda") == ["losses on cuda are 1.0225 of the CPU's in the geometric mean"]
    found = gpu_quantize.compare_losses(layers(1.0, 2.0), layers(float("nan"), 2.0))
    assert gpu_quantize.disagreement(found, "cuda"), "NaN is not agreement"


def test_seconds_of_layers_add_up_by_stage_and_block():
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = [{"name": f"model.layers.{b}.x.{n}", "seconds": i + 1.0} for b in range(2) for i, n in enumerate(names)]
    assert gpu_quantize.seconds_by_stage(layers, 2) == {"qkv": 6, "o": 4, "gate_up": 11, "down": 7}


def test_random_inputs_have_a_few_strong_directions_and_still_use_all_channels():
    H, seconds = gpu_solver.random_hessian(64, "cpu", 4, 256)
    eigenvalues = torch.linalg.eigvalsh(H)
    assert eigenvalues[-1] > 20 * eigenvalues.median()
    assert eigenvalues[0] > 0
    assert seconds > 0


def test_planned_bytes_of_a_stage_are_part_of_what_plan_says():
    from bpdq_quantizer.fit.memory import stage_bytes

    largest, turn = 16 * 29568**2 + 12 * 8192 * 29568, 8192 // 16 * 29568
    assert stage_bytes(8192, 29568) == pytest.approx(largest + 16 * turn + 16 * 3 * turn, rel=1e-6)
    assert 16 < stage_bytes(8192, 29568) / GIB < 18
