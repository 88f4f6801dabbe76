"""The serving benchmark reports only runs in which every request was answered, and leaves no server behind."""

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import torch

from benchmarks import serve_bench, server
from tiny import bpdq_checkpoint, tiny_model

# A result of `vllm bench serve` 0.32 without its per-request lists.
RESULT = {
    "backend": "openai",
    "label": None,
    "model_id": "/models/tiny",
    "num_prompts": 16,
    "max_concurrency": 4,
    "duration": 1.0157,
    "completed": 16,
    "failed": 0,
    "total_input_tokens": 1043,
    "total_output_tokens": 512,
    "request_throughput": 15.753,
    "output_throughput": 504.1,
    "mean_ttft_ms": 214.0,
    "median_ttft_ms": 173.9,
    "p99_ttft_ms": 473.2,
    "mean_tpot_ms": 5.16,
    "median_tpot_ms": 4.25,
    "p99_tpot_ms": 7.75,
}


def run(model: str, concurrency: int, **changes: float) -> dict:
    return RESULT | {"model": model, "concurrency": concurrency} | changes


def report(runs: list[dict]) -> dict:
    settings = {"requests": 16, "input_len": 64, "output_len": 32}
    return {
        "machine": {"cpu": "X", "cores": 2, "gpus": []},
        "versions": {"vllm": "9"},
        "settings": settings,
        "runs": runs,
    }


@pytest.mark.parametrize(("completed", "failed"), [(8, 8), (15, 1), (15, 0), (16, 1)])
def test_throughput_with_failed_or_lost_requests_is_refused(completed, failed):
    with pytest.raises(
        serve_bench.BenchError, match=f"tiny at concurrency 4: of 16 requests {completed} completed and"
    ):
        serve_bench.check(run("tiny", 4, completed=completed, failed=failed), 16)


def test_a_run_with_all_requests_answered_is_accepted():
    serve_bench.check(run("tiny", 4), 16)


def test_table_sets_models_side_by_side_with_ratios_to_the_first():
    runs = [run("base", 1, output_throughput=100.0), run("base", 8, output_throughput=200.0)]
    runs += [run("quantized", 1, output_throughput=150.0), run("quantized", 8, output_throughput=100.0)]
    rows = [line.split() for line in serve_bench.table(runs).splitlines()[2:]]
    assert [(row[0], row[1], row[-2], row[-1]) for row in rows] == [
        ("base", "1", "100.0", "1.00"),
        ("quantized", "1", "150.0", "1.50"),
        ("base", "8", "200.0", "1.00"),
        ("quantized", "8", "100.0", "0.50"),
    ]
    assert rows[0][2:6] == ["173.9", "473.2", "4.2", "7.8"]


def test_plot_draws_every_model_in_order_of_concurrency(tmp_path):
    runs = [run("base", c, output_throughput=10.0 * c, median_tpot_ms=c, p99_tpot_ms=2.0 * c) for c in (8, 1, 4)]
    runs += [run("quantized", c, output_throughput=20.0 * c) for c in (8, 1, 4)]
    figure = serve_bench.plot(report(runs))
    throughput, tpot = ({line.get_label(): line for line in axes.lines} for axes in figure.axes)
    assert list(throughput["base"].get_xdata()) == [1, 4, 8]
    assert list(throughput["base"].get_ydata()) == [10, 40, 80]
    assert list(throughput["quantized"].get_ydata()) == [20, 80, 160]
    assert list(tpot["base, median"].get_ydata()) == [1, 4, 8]
    assert list(tpot["base, p99"].get_ydata()) == [2, 8, 16]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--models", "a/m", "b/m"], "two folders have the same name"),
        (["--models", "m", "--concurrency", "0"], "must be at least 1"),
        (["--models", "m", "--requests", "0"], "must be at least 1"),
        (["--base-url", "http://x", "--server-args=--enforce-eager"], "already runs"),
        (["--base-url", "http://x", "--models", "m"], "not allowed with"),
        ([], "required"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(argv, reason, capsys):
    with pytest.raises(SystemExit) as exit_info:
        serve_bench.parse_args(argv)
    assert exit_info.value.code == 2
    assert reason in capsys.readouterr().err


def test_no_server_at_base_url_is_exit_status_1(tmp_path, capsys):
    url = f"http://127.0.0.1:{server.free_port()}"
    assert serve_bench.main(["--base-url", url, "--output", str(tmp_path)]) == 1
    assert f"no server answers at --base-url {url}" in capsys.readouterr().err


class OnlyHealthy(BaseHTTPRequestHandler):
    """Answers /health as vLLM does and every other request with an error."""

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 500)
        self.end_headers()


def test_benchmark_that_breaks_off_is_exit_status_1_and_names_the_log(tmp_path, capsys):
    with ThreadingHTTPServer(("127.0.0.1", 0), OnlyHealthy) as broken:
        threading.Thread(target=broken.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{broken.server_port}"
        assert serve_bench.main(["--base-url", url, "--concurrency", "2", "--output", str(tmp_path)]) == 1
        broken.shutdown()
    assert f"server at concurrency 2: vllm bench serve failed; its log is {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "serve.png").exists()


def as_vllm(script, folder, monkeypatch):
    """Put a shell script in place of the `vllm` command, which takes seconds to start."""
    command = folder / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command.with_name("python")))


def test_server_that_dies_at_start_says_why_and_names_its_log(tmp_path, monkeypatch):
    as_vllm('echo "starting"; echo "$2: no such model" >&2; exit 3', tmp_path, monkeypatch)
    log = tmp_path / "server.log"
    with pytest.raises(server.ServerError, match="vllm serve ended with status 3") as error:  # noqa: SIM117
        with server.serve(tmp_path / "no-such-model", [], log):
            pytest.fail("a server without a model must not start")
    assert str(log) in str(error.value)
    assert "no-such-model: no such model" in str(error.value)


def test_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    as_vllm("sleep 600", tmp_path, monkeypatch)
    started, before = time.monotonic(), psutil.Process().children()  # other tests' pools may have left a helper
    with pytest.raises(server.ServerError, match="did not answer within 1 s"):  # noqa: SIM117
        with server.serve(tmp_path, [], tmp_path / "server.log", timeout=1):
            pytest.fail("no server is up after a second")
    assert time.monotonic() - started < server.STOP_SECONDS + 20
    assert psutil.Process().children() == before


def test_stop_kills_workers_that_ignore_the_request_to_end(monkeypatch):
    monkeypatch.setattr(server, "STOP_SECONDS", 0.5)
    stubborn = "trap '' TERM; sleep 600 & echo started; wait"
    process = subprocess.Popen(["bash", "-c", stubborn], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"started\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 1
    server._stop(process)
    assert not psutil.wait_procs(workers, timeout=5)[1]


@pytest.mark.slow
def test_two_models_are_served_measured_and_stopped(tmp_path, capsys):
    before = psutil.Process().children()
    model = tiny_model(tmp_path / "tiny", dtype=torch.bfloat16)
    quantized = bpdq_checkpoint(model, tmp_path / "tiny-bpdq")
    server_args = "--max-model-len 128 --enforce-eager --kv-cache-memory-bytes 256M"
    argv = ["--models", str(model), str(quantized), "--concurrency", "1", "2", "--requests", "4"]
    argv += ["--input-len", "32", "--output-len", "8", "--server-args", server_args, "--output", str(tmp_path / "out")]
    assert serve_bench.main(argv) == 0
    assert psutil.Process().children() == before
    saved = json.loads((tmp_path / "out" / "serve.json").read_text())
    assert [(r["model"], r["concurrency"]) for r in saved["runs"]] == [
        ("tiny", 1),
        ("tiny", 2),
        ("tiny-bpdq", 1),
        ("tiny-bpdq", 2),
    ]
    assert all(r["total_output_tokens"] == 4 * 8 for r in saved["runs"])
    assert saved["machine"]["cores"] >= 1
    assert (tmp_path / "out" / "serve.png").stat().st_size > 10_000
    assert "tiny-bpdq" in capsys.readouterr().out
