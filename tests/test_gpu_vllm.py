"""The GPU check of vLLM reports engines that fail or answer wrongly, and goes on without them."""

import json
import time

import pytest

from benchmarks import gpu_vllm, vllm_models

SPEED = {"start_s": 1.0, "runs": [{"batch": 1, "ttft_ms": 9.0, "tpot_ms": 4.0, "output_throughput": 250.0}]}
FAST = SPEED | {"runs": [SPEED["runs"][0] | {"tpot_ms": 2.0, "output_throughput": 500.0}]}
RIGHT = {"start_s": 1.0, "tokens": 96, "equal": 95, "worst": 0.03}


@pytest.fixture
def check(monkeypatch, tmp_path):
    """`check(answers)` runs the check with engines that give `answers(mode, weights)`: (status, figures written)."""

    def run_with(answers, *options):
        def run(task, arguments, device, deadline):
            compiled = arguments.get("compilation_config", {})
            mode = "eager" if "enforce_eager" in arguments else "graphs" if "mode" in compiled else "compiled"
            weights = "tiny" if task["do"] == "tokens" else arguments["model"].rpartition("/")[2].partition("-")[0]
            answer = answers(mode, weights)
            if isinstance(answer, str):
                raise gpu_vllm.EngineError(answer)
            return answer or {"tiny": RIGHT, "bf16": SPEED, "bpdq": FAST}[weights]

        monkeypatch.setattr(gpu_vllm, "run", run)
        status = gpu_vllm.main(["--device", "cpu", "--json", str(tmp_path / "figures.json"), *options])
        return status, json.loads((tmp_path / "figures.json").read_text())

    return run_with


def test_the_first_mode_that_runs_is_timed_and_its_tokens_are_checked_too(check, capsys):
    status, figures = check(lambda mode, weights: None)
    assert status == 0
    assert [(run["weights"], run["mode"]) for run in figures["runs"]] == [("bf16", "compiled"), ("bpdq", "compiled")]
    assert list(figures["tokens"]) == ["eager, tiny", "compiled, tiny"]
    assert capsys.readouterr().out.splitlines()[-1].split() == ["1", "4.00", "2.00", "250.0", "500.0", "2.00"]


def test_experts_are_checked_alone(check):
    status, figures = check(lambda mode, weights: None, "--experts", "--modes", "graphs,eager")
    assert status == 0
    assert list(figures["tokens"]) == ["graphs, tiny experts"]
    assert not figures["runs"]
    status, figures = check(lambda mode, weights: "no such operator", "--experts", "--modes", "graphs")
    assert status == 1
    assert figures["problems"] == ["graphs, tiny experts: no such operator"]


def test_a_mode_that_runs_with_no_weights_is_skipped_and_named(check):
    status, figures = check(
        lambda mode, weights: "torch is too old" if (mode, weights) == ("compiled", "bf16") else None
    )
    assert status == 0
    assert figures["not_run"] == {"compiled bf16": "torch is too old"}
    assert {run["mode"] for run in figures["runs"]} == {"graphs"}


def test_a_mode_that_fails_only_in_bit_planes_fails_the_check(check):
    status, figures = check(lambda mode, weights: "failed" if mode != "eager" and weights == "bpdq" else None)
    assert status == 1
    assert figures["problems"] == ["compiled, bit-planes: failed", "graphs, bit-planes: failed"]
    assert {run["mode"] for run in figures["runs"]} == {"eager"}


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_wrong_tokens_fail_the_check(check, mode):
    status, figures = check(lambda m, weights: RIGHT | {"worst": 2.0} if (m, weights) == (mode, "tiny") else None)
    assert status == 1
    assert figures["problems"][0].startswith(f"wrong tokens: {mode}")


def test_nothing_timed_fails_the_check_and_says_so(check, capsys):
    status, figures = check(lambda mode, weights: "out of memory" if weights == "bf16" else None)
    assert status == 1
    assert figures["problems"] == ["no mode ran with both kinds of weights"]
    assert "nothing timed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "fast"], "--modes must be some of compiled, graphs, eager"),
        (["--batches", "1,0"], "--batches must be numbers of at least 1"),
        (["--json", "no/such/folder.json"], "--json: no such folder"),
    ],
)
def test_bad_options_are_one_line_and_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        gpu_vllm.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("device", "found", "why"), [("cuda", True, "no CUDA GPU"), ("cpu", False, "vLLM is not")])
def test_a_machine_that_can_not_run_it_is_status_3(monkeypatch, capsys, device, found, why):
    monkeypatch.setattr(gpu_vllm.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_vllm, "find_spec", lambda name: found or None)
    assert gpu_vllm.main(["--device", device]) == 3
    assert why in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", vllm_models.TINY)
def test_a_real_engine_gives_transformers_tokens(tmp_path, name):
    args = gpu_vllm.parse_args(["--device", "cpu"])
    vllm_models.write_tiny_checkpoint(tmp_path / name, name)
    figures = {"tokens": {}, "problems": []}
    gpu_vllm.compare(args, tmp_path / name, "eager", figures, time.monotonic() + 300)
    assert figures["problems"] == []
    assert figures["tokens"][f"eager, {name}"]["equal"] > 80


@pytest.mark.slow
def test_an_engine_that_ends_early_is_named_by_its_last_line(tmp_path):
    vllm_models.write_config(tmp_path / "model", {"model_type": "no such type"})
    task = {"do": "speed"}
    with pytest.raises(gpu_vllm.EngineError, match=r"ValidationError: .*no such type"):
        gpu_vllm.run(task, {"model": str(tmp_path / "model"), "enforce_eager": True}, "cpu", time.monotonic() + 300)


@pytest.mark.slow
def test_tiny_models_are_timed_on_a_cpu(tmp_path):
    command = ["--device", "cpu", "--tiny", "--modes", "eager", "--batches", "1,2", "--json", str(tmp_path / "f.json")]
    assert gpu_vllm.main(command) == 0
    runs = json.loads((tmp_path / "f.json").read_text())["runs"]
    assert [(run["weights"], run["batch"]) for run in runs] == [("bf16", 1), ("bf16", 2), ("bpdq", 1), ("bpdq", 2)]
    assert all(run["tpot_ms"] > 0 for run in runs)
