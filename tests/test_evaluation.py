"""KL, top tokens and perplexity against a reference: by other arithmetic, and what `bpdq eval` prints of them."""

import errno
import json
import math
import shutil
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from architectures import model_folder
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.cli import main
from bpdq_quantizer.evaluation import logits, tasks
from bpdq_quantizer.evaluation.compare import interval, token_scores
from bpdq_quantizer.evaluation.logits import CHUNK, opened
from gguf_files import gguf_file
from mixtures import EXPERTS
from tiny import TEXT, bpdq_checkpoint, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
SEQ_LEN = CHUNK + 22  # two parts of logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    bpdq_checkpoint(tiny_model(root / "model"), root / "two")
    bpdq_checkpoint(root / "model", root / "four", bits=4)
    gguf_file(tiny_model(root / "qwen2", "qwen2"), root / "qwen2.gguf")
    (root / "text.txt").write_text(TEXT * 4)
    return root


def evaluated(capsys, folder, models, reference="model", *more):
    """What `bpdq eval` prints, and its JSON."""
    argv = ["eval", *(folder / name for name in models), "--reference", folder / reference, "--text"]
    argv += [folder / "text.txt", "--seq-len", SEQ_LEN, "--windows", "3", "--json", *more]
    assert main([str(a) for a in argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines[:-1], json.loads(lines[-1])


def refused(capsys, *argv):
    assert main(["eval", *(str(a) for a in argv)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bpdq: error: ")]
    return line


@pytest.fixture(scope="module")
def windows(folder):
    ids = tiny_tokenizer()(TEXT * 4, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 3 * SEQ_LEN]).view(3, SEQ_LEN)


def test_the_figures_are_those_of_whole_models_in_transformers(folder, windows, capsys):
    lines, found = evaluated(capsys, folder, ["two", "four"])
    p, *others = (
        AutoModelForCausalLM.from_pretrained(folder / name)(windows).logits[:, :-1].double().log_softmax(-1).detach()
        for name in ("model", "two-dequantized", "four-dequantized")
    )
    nll = -p.gather(2, windows[:, 1:, None]).mean().item()
    assert found["reference"]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert found["reference"]["bytes"] == (folder / "model" / "model.safetensors").stat().st_size
    assert [row["model"] for row in found["models"]] == [str(folder / name) for name in ("two", "four")]
    for row, q, name, bits in zip(found["models"], others, ("two", "four"), (2.75, 5.25), strict=True):
        kl = kl_div(q, p, reduction="none", log_target=True).sum(-1)
        assert row["perplexity"] == pytest.approx(math.exp(-q.gather(2, windows[:, 1:, None]).mean().item()), rel=1e-4)
        assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-3)
        assert row["kl_p99"] == pytest.approx(kl.flatten().quantile(0.99).item(), rel=0.05)
        assert row["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=0.005)
        assert row["kl_interval"][0] < row["kl"] < row["kl_interval"][1]
        assert row["bits_per_weight"] == pytest.approx(bits, abs=0.05)
        assert row["bytes"] == (folder / name / "model.safetensors").stat().st_size
    assert [line.split()[0] for line in lines[1:4]] == [str(folder / name) for name in ("model", "two", "four")]


def test_one_checkpoint_alone_prints_what_it_did(folder, capsys):
    argv = ["eval", folder / "two", "--text", folder / "text.txt", "--seq-len", SEQ_LEN, "--windows", "3", "--json"]
    assert main([str(a) for a in argv]) == 0
    line, found = capsys.readouterr().out.splitlines()
    found = json.loads(found)
    assert line == f"perplexity {found['perplexity']:.4f} (3 windows of {SEQ_LEN} tokens, no special tokens)"
    assert set(found) == {"model", "text", "perplexity", "windows", "seq_len", "special_tokens", "dtype"}
    _, compared = evaluated(capsys, folder, ["two"])
    assert compared["models"][0]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)


@pytest.mark.parametrize("name", ["model", "two", "qwen2.gguf"])
def test_a_model_is_as_its_reference(folder, capsys, name):
    _, found = evaluated(capsys, folder, [name], name)
    (row,) = found["models"]
    assert (row["kl"], row["kl_p99"], row["kl_interval"], row["top1_agreement"]) == (0, 0, [0, 0], 1)
    assert row["perplexity"] == found["reference"]["perplexity"]
    assert row["bytes"] == found["reference"]["bytes"]


@pytest.mark.parametrize("name", ["model", "qwen2.gguf"])
def test_a_model_alone_has_the_perplexity_that_it_has_as_reference(folder, capsys, name):
    _, found = evaluated(capsys, folder, [name], name)
    argv = ["eval", folder / name, "--text", folder / "text.txt", "--seq-len", SEQ_LEN, "--windows", "3", "--json"]
    assert main([str(a) for a in argv]) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])["perplexity"]
    assert alone == pytest.approx(found["reference"]["perplexity"], rel=1e-6)


def test_a_gguf_file_is_compared_with_the_folder_that_it_was_made_of(folder, capsys):
    _, found = evaluated(capsys, folder, ["qwen2.gguf"], "qwen2")
    (row,) = found["models"]
    assert 0 < row["kl"] < 0.2  # 8 bits
    assert row["bits_per_weight"] is None
    assert row["bytes"] == (folder / "qwen2.gguf").stat().st_size


@pytest.mark.parametrize(
    "arch",
    # of which logits are scaled or capped, blocks called by window, keys shared, states kept, experts routed
    ["granite", "cohere", "gemma2", "bloom", "gemma4_text", "qwen3_5", "qwen3_next", f"mixtral{EXPERTS}"],
)
def test_logits_block_by_block_are_those_of_the_whole_model(tmp_path, arch):
    path = str(model_folder(tmp_path / "model", arch))
    windows = torch.randint(3, 380, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), opened(path, windows, CPU, "text") as found:
        whole = load_model(path, torch.float32)(windows).logits
        for i, expected in enumerate(whole):
            parts = list(found(i))
            assert [len(part) for part in parts] == [CHUNK, SEQ_LEN - CHUNK]
            torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4 * whole.abs().max().item())


def test_no_two_blocks_of_the_reference_are_in_memory(folder, capsys, monkeypatch):
    load, loaded = logits.load_block, []

    def counted(source, *args):
        block = load(source, *args)
        loaded.append(sum(not p.is_meta for p in source.blocks.parameters()) - sum(1 for _ in block.parameters()))
        return block

    monkeypatch.setattr(logits, "load_block", counted)
    evaluated(capsys, folder, ["two"])
    assert loaded == [0, 0]


def test_special_tokens_are_read_and_not_predicted():
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(9, (3, 11), generator=generator)
    a, b = torch.randn(2, 3, 11, 9, generator=generator)
    found = token_scores(lambda i: iter([a[i]]), lambda i: iter([b[i]]), windows, lead=3)
    p, q = (x[:, 2:-1].log_softmax(-1) for x in (a, b))
    torch.testing.assert_close(found.kl, kl_div(q, p, reduction="none", log_target=True).sum(-1))
    torch.testing.assert_close(found.nll, -q.gather(2, windows[:, 3:, None])[..., 0])
    torch.testing.assert_close(found.reference_nll, -p.gather(2, windows[:, 3:, None])[..., 0])
    assert torch.equal(found.same, (p.argmax(-1) == q.argmax(-1)).float())


@given(st.lists(st.floats(0, 10), min_size=2, max_size=40), st.integers(0, 9))
def test_an_interval_is_around_the_mean_and_within_the_values(values, seed):
    values = torch.tensor(values, dtype=torch.float64)
    low, high = interval(values, seed)
    assert values.min() - 1e-9 <= low <= values.mean() + 1e-9
    assert values.mean() - 1e-9 <= high <= values.max() + 1e-9
    assert [low, high] == interval(values, seed)


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    samples = torch.randn(300, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 5
    covered = sum(low <= 5 <= high for low, high in (interval(values, 0) for values in samples))
    assert 0.9 < covered / len(samples) < 0.98


def test_a_single_window_has_no_interval(folder, capsys):
    _, found = evaluated(capsys, folder, ["two"], "model", "--windows", "1")
    assert found["models"][0]["kl_interval"] is None


@pytest.mark.parametrize(("other", "axis"), [("four", "bits per quantized weight"), ("model", "GB of weights")])
def test_a_plot_has_a_point_for_each(folder, tmp_path, capsys, other, axis):
    evaluated(capsys, folder, ["two", other], "model", "--plot", tmp_path / "kl.svg")
    text = (tmp_path / "kl.svg").read_text()
    assert all(f"<!-- {label} -->" in text for label in ("two", other, axis))


@pytest.mark.parametrize(
    ("name", "message"),
    [("none/kl.png", "can't be written: name a file in a fol"), ("kl.docx", "expected a name that")],
)
def test_a_plot_that_cannot_be_written_is_named_before_the_work(folder, tmp_path, capsys, monkeypatch, name, message):
    monkeypatch.setattr("bpdq_quantizer.cli.compare_models", lambda *_: pytest.fail("work has begun"))
    argv = [folder / "two", "--reference", folder / "model", "--text", folder / "text.txt", "--seq-len", "32"]
    assert f"--plot {tmp_path / name}: {message}" in refused(capsys, *argv, "--plot", tmp_path / name)


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_a_plot_that_fails_loses_no_figures(folder, tmp_path, capsys, monkeypatch, command):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    argv = [command, folder / "two", "--plot", tmp_path / "p.png", "--json"]
    if command == "eval":
        argv += ["--reference", folder / "model", "--text", folder / "text.txt", "--seq-len", "32", "--windows", "2"]
    assert main([str(a) for a in argv]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])
    assert printed.err.endswith(f"bpdq: error: --plot {tmp_path / 'p.png'}: [Errno 28] No space left on device\n")


def test_another_vocabulary_is_refused(folder, tmp_path, capsys):
    text = ["--text", folder / "text.txt", "--seq-len", "32"]
    other = tiny_model(tmp_path / "other")
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["b"], vocabulary["p"] = vocabulary["p"], vocabulary["b"]
    file.write_text(json.dumps(tokenizer))
    line = refused(capsys, other, "--reference", folder / "model", *text)
    assert f"{other}: its vocabulary is not that of --reference {folder / 'model'}, token " in line
    wide = tiny_model(tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    assert "400 tokens here and 384 there" in refused(capsys, wide, "--reference", folder / "model", *text)


def test_other_tokens_of_the_same_vocabulary_are_refused(folder, tmp_path, capsys):
    other = tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:9]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    argv = [other, "--reference", folder / "model", "--text", folder / "text.txt", "--seq-len", "32"]
    assert f"{other}: its tokenizer gives {folder / 'text.txt'} other tokens" in refused(capsys, *argv)


def test_what_a_comparison_needs_is_said(folder, capsys, monkeypatch):
    text = ["--text", folder / "text.txt", "--seq-len", "32"]
    assert "need --reference" in refused(capsys, folder / "two", folder / "four", *text)
    assert "need --reference" in refused(capsys, folder / "two", "--plot", "kl.png", *text)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    argv = [folder / "two", "--reference", folder / "model", "--plot", "kl.png"]
    assert "--plot needs matplotlib" in refused(capsys, *argv, *text)


def test_models_that_give_no_numbers_are_named(folder, tmp_path, capsys):
    broken = shutil.copytree(folder / "model", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    text = ["--text", folder / "text.txt", "--seq-len", "32"]
    for argv in ([folder / "two", "--reference", broken], [broken, "--reference", folder / "model"]):
        assert f"{broken}: its perplexity is nan" in refused(capsys, *argv, *text)


def test_lm_eval_is_asked_for_where_it_is_missing(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    tasks._task_manager.cache_clear()
    argv = [folder / "two", "--text", folder / "text.txt", "--tasks", "hellaswag"]
    assert refused(capsys, *argv).endswith("--tasks needs lm-eval: pip install 'vllm-bpdq[eval]'")


@pytest.mark.parametrize("option", [("--tasks-limit", 5), ("--task-folder", "tasks")])
def test_what_is_said_of_tasks_needs_tasks(capsys, folder, option):
    message = refused(capsys, folder / "two", "--text", folder / "text.txt", *option)
    assert message.endswith("are of --tasks: name the tasks, or leave them out")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--seed", 2**64), f"--seed {2**64}: expected 0 to {2**63 - 1}"),
        (("--seed", -1), "--seed -1: expected 0 to"),
        (("--tasks", "hellaswag", "--tasks-limit", 0), "--tasks-limit 0: expected at least 1"),
        (("--tasks", "hellaswag", "--tasks-limit", -3), "--tasks-limit -3: expected at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_before_the_work(folder, capsys, monkeypatch, option, message):
    monkeypatch.setattr("bpdq_quantizer.cli.compare_models", lambda *_: pytest.fail("work has begun"))
    monkeypatch.setattr("bpdq_quantizer.cli.check_tasks", lambda *_: None)
    argv = [folder / "two", "--reference", folder / "model", "--text", folder / "text.txt", "--seq-len", "32"]
    assert message in refused(capsys, *argv, *option)
