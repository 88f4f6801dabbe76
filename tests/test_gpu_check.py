"""`make gpu-check`: it says what it would do, stops without a GPU, and no part can cost the others their time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_check, gpu_summary
from benchmarks.gpu_check import Part, main, parts, run_part, summarize

ROOT = Path(__file__).parent.parent
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "commit": "abc", "torch": "2", "triton": "3"}


def python(code: str, name: str = "x", seconds: int = 20, figures: bool = False) -> Part:
    return Part(name, seconds, (sys.executable, "-u", "-c", code), figures)


def test_dry_run_lists_every_part_with_its_command(capsys):
    assert main(["--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [part.name for part in parts(16)]
    for line in lines:
        module = line.split("-m ")[1].split()[0]
        assert module == "pytest" or (ROOT / f"{module.replace('.', '/')}.py").exists()


def test_the_tests_that_the_first_part_runs_exist():
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in gpu_check.KERNEL_TESTS)


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU here")
@pytest.mark.parametrize("command", [[sys.executable, "-m", "benchmarks.gpu_check"], ["scripts/gpu_check.sh"]], ids=str)
def test_without_a_gpu_there_is_one_line_and_exit_status_3(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert "no NVIDIA GPU here" in done.stderr
    assert not done.stdout


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--parts", "fast,faster"])
    assert "unknown 'faster'" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "status"), [(0, "passed"), (1, "failed"), (3, "cannot run here"), (-6, "failed")])
def test_a_part_is_what_its_exit_status_says(code, status):
    ending = "os.abort()" if code < 0 else f"sys.exit({code})"
    row = run_part(python(f"import os, sys; print('done'); sys.stdout.flush(); {ending}"), 20)
    assert (row["status"], row["exit_status"], row["output"]) == (status, code, ["done"])


def test_a_part_that_hangs_is_stopped_with_its_children_and_keeps_what_it_wrote(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time\nfor i in range(100): open({str(alive)!r}, 'w').write(str(i)); time.sleep(0.05)"
    code = (
        "import sys, time, subprocess, json, os\n"
        "json.dump({'rows': [1]}, open(sys.argv[1], 'w'))\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not os.path.exists({str(alive)!r}): time.sleep(0.01)\n"
        "print('so far'); time.sleep(60)"
    )
    row = run_part(python(code, figures=True), 3)
    assert row["status"] == "timed out"
    assert row["output"] == ["so far"]
    assert row["figures"] == {"rows": [1]}
    before = alive.read_text()
    time.sleep(0.3)
    assert alive.read_text() == before, "a child still runs"


def check(monkeypatch, tmp_path, capsys, chosen: list[Part], *options: str) -> tuple[int, dict, str]:
    monkeypatch.setattr(gpu_check, "parts", lambda cores: chosen)
    monkeypatch.setattr(gpu_check, "describe_machine", lambda commit: MACHINE)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))
    file = tmp_path / "results.json"
    status = main(["--results", str(file), *options])
    return status, json.loads(file.read_text()), capsys.readouterr().out


def test_a_failing_part_does_not_cost_the_next_and_the_last_line_names_it(monkeypatch, tmp_path, capsys):
    chosen = [python("1 / 0", "bad"), python("print('fine')", "good"), python("import sys; sys.exit(3)", "other")]
    status, report, out = check(monkeypatch, tmp_path, capsys, chosen)
    assert status == 1
    assert {name: row["status"] for name, row in report["parts"].items()} == {
        "bad": "failed",
        "good": "passed",
        "other": "cannot run here",
    }
    assert "| bad | failed |" in out
    last = out.splitlines()[-1]
    assert last.startswith("gpu-check: failed: bad; passed: good; cannot run here: other. Figures: ")


def test_parts_share_the_time_and_later_runs_keep_what_they_do_not_repeat(monkeypatch, tmp_path, capsys):
    slow = python("import time; time.sleep(30)", "slow")
    chosen = [python("print(1)", "first"), slow, python("print(2)", "late")]
    status, report, _ = check(monkeypatch, tmp_path, capsys, chosen, "--seconds", "3")
    assert status == 1
    assert [row["status"] for row in report["parts"].values()] == ["passed", "timed out", "no time left"]
    status, again, _ = check(monkeypatch, tmp_path, capsys, chosen, "--parts", "late")
    assert status == 0
    assert [row["status"] for row in again["parts"].values()] == ["passed", "timed out", "passed"]
    assert again["parts"]["first"] == report["parts"]["first"]
    assert again["parts"]["late"]["commit"] == "abc"


def timing(tokens: int, us: float, matmul: float, share: float, **more: object) -> dict:
    row = {"model": "qwen2.5-72b", "layer": {"name": "o"}, "tokens": tokens, "us": us, "matmul_us": matmul}
    return row | {"of_copy_bandwidth": share, "alternatives_us": {}} | more


def test_summary_names_the_bars_that_are_missed():
    rows = [timing(1, 10, 40, 0.9, alternatives_us={"gemm": 15.0}), timing(8, 10, 40, 0.7)]
    rows += [timing(64, 50, 40, 0.1), timing(4096, 200, 100, 0)]
    found = gpu_summary.fast({"rows": rows})
    assert "M = 1: 0.90 to 0.90 of the copy's bandwidth" in found
    assert "0 of 1 at 80% or more" in found
    assert "M = 4096: 0.50 to 0.50 of torch.matmul's FLOP/s (not all at 60% or more)" in found
    assert "slower than 16 bits up to M = 64: qwen2.5-72b o M = 64 (0.80 x)" in found
    assert "M = 1 by gemm: 1.50 x the time" in found


def test_a_part_that_was_stopped_before_its_figures_shows_its_last_line():
    row = {"figures": {"rows": [], "models": {}}, "output": ["compiling", "o, 8 tokens: 1 us", ""]}
    assert summarize("quantizer", row) == "o, 8 tokens: 1 us"
    assert summarize("correct", {"figures": None, "output": ["== 3 passed in 1s =="]}) == "3 passed in 1s"


@pytest.mark.parametrize("file", sorted((gpu_check.ROOT / "results").glob("*.json")), ids=lambda file: file.name)
def test_figures_of_real_runs_are_summarized(file):
    parts = json.loads(file.read_text())["parts"]
    found = {name: summary(parts[name]["figures"]) for name, summary in gpu_summary.SUMMARIES.items() if name in parts}
    assert len(found) > 2
    assert all(found.values())
