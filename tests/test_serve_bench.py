"""The serving benchmark reports only runs in which every request was answered, and leaves no server behind."""

import json
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import torch

from benchmarks import serve_bench, serve_report, server
from tiny import bpdq_checkpoint, tiny_model

# A result of `vllm bench serve` 0.32 without its per-request lists, as `summed` leaves it.
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
    "std_tpot_ms": 0.4,
    "p99_tpot_ms": 7.75,
    "chunks": 512,
}


def run(model: str, concurrency: int, **changes: float) -> dict:
    return RESULT | {"model": model, "concurrency": concurrency, "doubts": []} | changes


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
        serve_bench.check(run("tiny", 4, completed=completed, failed=failed), 16, 32)


def test_a_run_with_all_requests_answered_is_accepted():
    serve_bench.check(run("tiny", 4), 16, 32)


@pytest.mark.parametrize("tokens", [0, 511, 513])
def test_answers_cut_short_are_refused(tokens):
    """vLLM's client counts a stream that ends early, or with an error, as completed."""
    with pytest.raises(serve_bench.BenchError, match=f"tiny at concurrency 4: {tokens} tokens came, not the 512 of 16"):
        serve_bench.check(run("tiny", 4, total_output_tokens=tokens), 16, 32)


def test_table_sets_models_side_by_side_with_ratios_to_the_first():
    runs = [run("base", 1, output_throughput=100.0), run("base", 8, output_throughput=200.0)]
    runs += [run("quantized", 1, output_throughput=150.0), run("quantized", 8, output_throughput=100.0)]
    rows = [line.split() for line in serve_report.table(runs).splitlines()[2:]]
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
    figure = serve_report.plot(report(runs))
    throughput, tpot = ([(list(line.get_xdata()), list(line.get_ydata())) for line in a.lines] for a in figure.axes)
    assert throughput == [([1, 4, 8], [10, 40, 80]), ([1, 4, 8], [20, 80, 160])]
    assert tpot[:2] == [([1, 4, 8], [1, 4, 8]), ([1, 4, 8], [2, 8, 16])]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("goodput", [None, ["ttft:500", "tpot:50"]])
@pytest.mark.parametrize("models", [1, 2, 6])
def test_legend_and_caption_stay_beside_the_axes_and_in_the_picture(tmp_path, models, goodput):
    names = [f"Qwen2.5-72B-Instruct-{i}-bits-of-some-other-method" for i in range(models)]
    shown = report([run(name, c, request_goodput=0.1 * c) for name in names for c in (1, 4, 8)])
    shown["settings"]["goodput"] = goodput
    figure = serve_report.plot(shown)
    figure.savefig(tmp_path / "plot.png")
    (legend,) = figure.legends
    frame = legend.get_window_extent()
    assert [text.get_text() for text in legend.get_texts()] == names
    assert 0 <= frame.x0 < frame.x1 <= figure.bbox.x1
    assert 0 <= frame.y0 < frame.y1 <= figure.bbox.y1
    assert len(figure.axes) == (3 if goodput else 2)
    assert all(not frame.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_sound_runs_are_not_doubted():
    runs = [run("base", c, median_tpot_ms=t) for c, t in ((1, 4.3), (4, 4.1), (8, 6.0))]  # 0.2 ms is noise
    assert [r["doubts"] for r in serve_report.judged(runs)] == [[], [], []]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"median_tpot_ms": 0.0, "std_tpot_ms": 0.0, "chunks": 16}, "TPOT is 0: whole answers arrived at once"),
        ({"chunks": 400}, "512 tokens arrived in 400 chunks"),
        ({"median_tpot_ms": 2.0}, "TPOT is lower than at concurrency 1 (2.0 and 4.2 ms)"),
    ],
)
def test_what_cannot_be_is_marked_and_said(changes, reason):
    runs = serve_report.judged([run("base", 4, **changes), run("base", 1), run("quantized", 4)])
    assert [len(r["doubts"]) for r in runs][1:] == [0, 0]
    assert reason in runs[0]["doubts"][0]
    lines = serve_report.table(runs).splitlines()
    (marked,) = [line for line in lines[2:5] if "!" in line]
    assert marked.split()[:2] == ["base", "4"]
    assert lines[5].startswith("! base at concurrency 4: ")
    assert reason in lines[5]


def test_a_lower_tpot_within_the_spread_of_requests_is_noise():
    runs = [run("base", 1, median_tpot_ms=4.25, std_tpot_ms=3.0), run("base", 4, median_tpot_ms=2.0, std_tpot_ms=3.0)]
    assert [r["doubts"] for r in serve_report.judged(runs)] == [[], []]


def test_the_chunks_of_answered_requests_are_counted():
    found = serve_bench.summed(
        {"itls": [[0.1, 0.1], [], []], "ttfts": [0.1, 0.1, 0.0], "errors": ["", "", "x"], "a": 1}
    )
    assert found == {"a": 1, "chunks": 4}


def test_goodput_has_a_column():
    runs = [run("base", 4, request_goodput=1.5), run("quantized", 4, request_goodput=2.25)]
    rows = [line.split() for line in serve_report.table(runs).splitlines()]
    assert rows[1][-1] == "requests/s"
    assert [row[-1] for row in rows[2:]] == ["1.500", "2.250"]


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--models", "a/m", "b/m"], "two folders have the same name"),
        (["--models", "m", "--concurrency", "0"], "must be at least 1"),
        (["--models", "m", "--requests", "0"], "must be at least 1"),
        (["--models", "m", "--requests", "4"], "--requests 4: fewer than --concurrency 8; ask for as many"),
        (["--models", "m", "--goodput", "ttft=5"], "--goodput ttft=5: expected ttft:MS, tpot:MS or e2el:MS"),
        (["--models", "m", "--goodput", "tpot:50", "itl:5"], "--goodput itl:5: expected"),
        (["--base-url", "http://x", "--server-args=--enforce-eager"], "already run"),
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
    assert f"server1 at concurrency 2: vllm bench serve failed; its log is {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "serve.png").exists()


class Streams(BaseHTTPRequestHandler):
    """An OpenAI server whose answers come `size` tokens a chunk, as many as are asked for."""

    model, size = "", 1

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": self.model, "root": self.model}]}).encode())

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = asked["max_tokens"]
        self.send_response(200)
        self.end_headers()
        for _ in range(0, tokens, self.size):
            time.sleep(0.002)
            self.event({"choices": [{"text": "a"}]})
        self.event({"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": 8}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, value):
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def streaming(model, size):
    handler = type("Handler", (Streams,), {"model": str(model), "size": size})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.slow
def test_servers_are_compared_and_merged_chunks_found(tmp_path, capsys):
    """vLLM's own client against three servers: a token a chunk, four, and all at once."""
    models = {name: tiny_model(tmp_path / name) for name in ("sound", "merged", "at-once")}
    with ExitStack() as stack:
        urls = [stack.enter_context(streaming(models[n], size)) for n, size in zip(models, (1, 4, 16), strict=True)]
        argv = ["--base-url", *urls, "--concurrency", "2", "--requests", "4", "--input-len", "8", "--output-len", "16"]
        argv += ["--goodput", "ttft:10000", "tpot:10000", "--output", str(tmp_path / "out")]
        assert serve_bench.main(argv) == 0, capsys.readouterr().err
    runs = json.loads((tmp_path / "out" / "serve.json").read_text())["runs"]
    assert [(r["model"], r["chunks"], len(r["doubts"])) for r in runs] == [
        ("sound", 64, 0),
        ("merged", 16, 1),
        ("at-once", 4, 1),
    ]
    assert all(r["request_goodput"] == pytest.approx(r["request_throughput"]) for r in runs)
    shown = capsys.readouterr().out
    assert "! merged at concurrency 2: 64 tokens arrived in 16 chunks" in shown
    assert "! at-once at concurrency 2: TPOT is 0" in shown


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


def test_of_a_log_the_first_error_is_named(tmp_path):
    log = tmp_path / "server.log"
    lines = [
        "WARNING: hit the limit, such as `OSError: too many`",
        "(EngineCore pid=7) ERROR 11-28 13:02:01 [core.py:99] ValueError: Available memory (1 GiB) is too small.",
        *["(APIServer pid=5)   File"] * server.LOG_TAIL_LINES,
        "(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    log.write_text("\n".join(lines))
    assert ", says ValueError: Available memory (1 GiB) is too small.\nand ends with:" in server.log_tail(log)


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
