"""The quality benchmark: what it measures, and that a matrix of runs ends in a table that can be read."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import quality_bench
from bpdq_quantizer.cli import main
from tiny import TEXT, bpdq_checkpoint, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("quality")
    bpdq_checkpoint(tiny_model(root / "model"), root / "checkpoint")
    (root / "text.txt").write_text(TEXT * 4)
    return root


def arguments(folder, output, *more):
    text = str(folder / "text.txt")
    fixed = ["--models", str(folder / "model"), "--calibration", text, "--text", text, "--output", str(output)]
    return [*fixed, "--samples", "4", "--seq-len", "32", "--eval-seq-len", "40", "--windows", "2", *more]


def test_a_matrix_gives_json_table_and_plot(folder, tmp_path, capsys):
    assert quality_bench.main(arguments(folder, tmp_path, "--methods", "paper")) == 0
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["16-bit", "paper"]
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["top1_agreement"] == 1
    for row in rows[1:]:
        assert row["kl"] > 0.01
        assert row["bits_per_weight"] == pytest.approx(2 + 16 * 3 / 64, rel=0.01)  # the last group of 352 is short
        assert row["seconds"] > 0
        assert row["cpu_seconds"] > 0
        assert row["peak_memory_bytes"] > 1e6
    table = (tmp_path / "quality.md").read_text()
    assert table.count("\n") == 2 + len(rows)
    assert table.strip() in capsys.readouterr().out
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def finish(folder, output, peak):
    """The checkpoint of method bpdq as a run before would have left it in `output`."""
    report = {"bits_per_weight": 2.75, "seconds": 1.0, "cpu_seconds": 1.0, "peak_host_memory_bytes": peak}
    checkpoint = output / "checkpoints" / "model-bpdq-k2-g64-c8"
    checkpoint.parent.mkdir()
    checkpoint.symlink_to(folder / "checkpoint")
    (checkpoint / "quantization_report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("peak", [2, None])
def test_a_finished_checkpoint_is_not_made_again(folder, tmp_path, monkeypatch, peak):
    finish(folder, tmp_path, peak)
    monkeypatch.setattr(quality_bench.subprocess, "run", lambda *_: pytest.fail("quantized again"))
    assert quality_bench.main(arguments(folder, tmp_path, "--methods", "bpdq")) == 0


def test_gptq_without_its_environment_is_explained(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        quality_bench.main(arguments(folder, tmp_path, "--methods", "gptq"))
    assert stop.value.code == 2
    assert "gptq-env/bin/pip install llmcompressor" in capsys.readouterr().err


def test_a_failing_method_is_named(folder, tmp_path, capsys):
    argv = arguments(folder, tmp_path, "--methods", "gptq", "--gptq-python", sys.executable)
    assert quality_bench.main(argv) == 1
    assert "model-gptq-k2-g64-c16: quantizing failed" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints" / "model-gptq-k2-g64-c16").exists()


def test_a_missing_text_is_one_line(folder, tmp_path, capsys):
    argv = arguments(folder, tmp_path)
    argv[argv.index("--text") + 1] = "missing.txt"
    assert quality_bench.main(argv) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "quality_bench: error: missing.txt: no such file"


YAML = """task: planes
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def questions(folder):
    """A task of four questions, and its folder."""
    tasks = folder / "tasks"
    tasks.mkdir()
    words = ["one bit", "two planes", "four levels", "three coefficients"]
    docs = [
        {"question": f"A {word} of the", "choices": [" weight", " level" * 3], "answer": i % 2}
        for i, word in enumerate(words)
    ]
    (tasks / "questions.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tasks / "planes.yaml").write_text(YAML.replace("FOLDER", str(tasks)))
    return tasks, docs


def accuracy(checkpoint, docs):
    """Share of questions whose right choice has the higher log-likelihood."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32), tiny_tokenizer()
    right = 0
    for doc in docs:
        start = len(tokenizer(doc["question"])["input_ids"])
        scores = []
        for choice in doc["choices"]:
            ids = torch.tensor([tokenizer(doc["question"] + choice)["input_ids"]])
            with torch.no_grad():
                log_p = model(ids).logits[0, :-1].log_softmax(-1)
            scores.append(log_p.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
        right += scores[doc["answer"]] > scores[1 - doc["answer"]]
    return right / len(docs)


def test_tasks_from_local_files_are_scored(folder, questions, tmp_path):
    tasks, docs = questions
    finish(folder, tmp_path, None)
    argv = arguments(folder, tmp_path, "--methods", "bpdq", "--tasks", "planes", "--task-folder", str(tasks))
    assert quality_bench.main(argv) == 0
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert rows[0]["tasks"] == {"planes acc": accuracy(folder / "model", docs)}
    assert rows[1]["tasks"] == {"planes acc": accuracy(folder / "checkpoint", docs)}
    assert "| planes acc |" in (tmp_path / "quality.md").read_text()


@pytest.mark.parametrize("reference", [True, False])
def test_eval_scores_them_too(folder, questions, capsys, reference):
    tasks, docs = questions
    argv = ["eval", folder / "checkpoint", "--text", folder / "text.txt", "--seq-len", "40", "--windows", "2", "--json"]
    argv += ["--tasks", "planes", "--task-folder", tasks]
    argv += ["--reference", folder / "model"] if reference else []
    assert main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    scored = found["models"][0] if reference else found
    assert scored["tasks"] == {"planes acc": accuracy(folder / "checkpoint", docs)}
    assert "planes acc" in out.partition("{")[0]


def test_an_unknown_task_is_named(folder, questions, tmp_path, capsys):
    argv = arguments(folder, tmp_path, "--tasks", "plains", "--task-folder", str(questions[0]))
    assert quality_bench.main(argv) == 2
    assert "--tasks plains: lm-eval knows no such task" in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_through_a_vllm_server_score_the_same(folder, questions, tmp_path):
    tasks, docs = questions
    argv = arguments(folder, tmp_path, "--methods", "paper", "--tasks", "planes", "--task-folder", str(tasks))
    argv += ["--tasks-through", "vllm", "--serve-args"]
    argv += ["--dtype float32 --enforce-eager --max-model-len 128 --kv-cache-memory-bytes 100M"]
    assert quality_bench.main(argv) == 0
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    assert rows[0]["tasks"] == {"planes acc": accuracy(folder / "model", docs)}
    assert rows[1]["tasks"] == {"planes acc": accuracy(tmp_path / "checkpoints" / "model-paper-k2-g64-c16", docs)}
