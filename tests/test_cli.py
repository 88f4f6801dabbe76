"""The `bpdq` command: what it prints, its exit status, and its error messages."""

import json
import math
import os
import shutil
import signal
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, modeling_utils

from bpdq_quantizer import cost
from bpdq_quantizer.checkpoint.inspection import ranges
from bpdq_quantizer.cli import main
from bpdq_quantizer.run import steps
from bpdq_quantizer.storage import files
from tiny import TEXT, bpdq_checkpoint, load_tensors, tiny_model, tiny_tokenizer

QUICK = ["--samples", "4", "--seq-len", "32", "--iterations", "2", "--group-size", "64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    bpdq_checkpoint(tiny_model(root / "model"), root / "checkpoint")
    (root / "text.txt").write_text(TEXT * 2)
    return root


def fails_with(capsys, *argv):
    """Run, expect exit status 2 and one line on stderr; returns that line."""
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("bpdq: error: ")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_quantize_eval_inspect(folder, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["quantize", folder / "model", "--output", out, "--calibration", folder / "text.txt", *QUICK, "--json"]
    assert main([str(a) for a in argv]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["output"] == str(out)
    assert report["options"]["bits"] == 2
    assert any(line.startswith("down_proj") for line in lines), "summary table by kind of layer"

    assert main(["inspect", str(out), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    tensors = load_tensors(out)
    quantized = sum(t.nbytes for name, t in tensors.items() if name.endswith((".B", ".c", ".s")))
    assert found["quantized_bytes"] == quantized
    assert found["other_bytes"] == sum(t.nbytes for t in tensors.values()) - quantized
    assert len(found["layers"]) == 14

    assert main(["eval", str(out), "--text", str(folder / "text.txt"), "--seq-len", "32", "--windows", "2"]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.mark.parametrize("status", [None, "Name:\tpython\nVmRSS:\t10 kB\n"])
def test_a_system_that_does_not_tell_peak_memory_loses_no_run(folder, tmp_path, capsys, monkeypatch, status):
    """Some containers and kernels have no VmHWM; it is read when all the work is done."""
    monkeypatch.setattr(cost, "STATUS", tmp_path / "status")
    if status is not None:
        cost.STATUS.write_text(status)
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--calibration", folder / "text.txt", *QUICK]
    assert main([str(a) for a in (*argv, "--json")]) == 0
    summary, following, report = capsys.readouterr().out.splitlines()[-3:]
    assert summary.endswith("s CPU)")
    assert following == f"next: vllm serve {tmp_path}/out; bpdq eval {tmp_path}/out --reference MODEL --text FILE"
    assert json.loads(report)["peak_host_memory_bytes"] is None


def test_tables_appear_in_the_summary_and_in_inspect(folder, tmp_path, capsys):
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--calibration", folder / "text.txt", *QUICK]
    assert main([str(a) for a in (*argv, "--embed-bits", "4", "--head-bits", "3")]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert (lines["embed_tokens"][2], lines["lm_head"][2]) == ("5.250", "4.000")
    assert main(["inspect", str(tmp_path / "out")]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["model.embed_tokens"][1:9] == ["384", "x", "128", "4", "plain", "64", "8", "5.250"]
    assert lines["lm_head"][1:9] == ["384", "x", "128", "3", "plain", "64", "8", "4.000"]


def test_inspect_tells_the_width_of_coefficients(folder, tmp_path, capsys):
    layers = {f"model.layers.0.self_attn.{name}_proj": {"coefficient_bits": 16} for name in "qkv"}
    out = bpdq_checkpoint(folder / "model", tmp_path / "out", coefficient_bits=8, layers=layers)
    assert main(["inspect", str(out)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {row[-1]: row[4:10] for row in rows if row[0] == "model.layers.*.self_attn.q_proj"}
    assert rows == {"0": ["2", "plain", "64", "16", "2.750", "1"], "1": ["2", "plain", "64", "8", "2.750", "1"]}


def test_inspect_shows_layers_that_are_alike_as_one(folder, capsys):
    assert main(["inspect", str(folder / "checkpoint"), "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("model.layers.")]
    found = json.loads(last)
    assert len(rows) == 7
    assert {row[-1] for row in rows} == {"0-1"}
    assert sum(int(row[9]) for row in rows) == len(found["layers"])
    assert sum(float(row[10]) for row in rows) == pytest.approx(found["quantized_bytes"] / 1e6, abs=0.05)


@given(st.sets(st.integers(0, 30)))
def test_ranges_name_all_numbers(numbers):
    named = set()
    for part in ranges(numbers).split(", "):
        first, _, last = part.partition("-")
        named |= set(range(int(first), int(last or first) + 1)) if part else set()
    assert named == numbers
    assert ranges(range(4)) == "0-3"


def test_perplexity_is_exp_of_the_mean_nll_of_all_but_the_first_token(folder, capsys):
    argv = ["eval", folder / "checkpoint", "--text", folder / "text.txt", "--seq-len", "40", "--windows", "3", "--json"]
    assert main([str(a) for a in argv]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    ids = tiny_tokenizer()(TEXT * 4, add_special_tokens=False)["input_ids"][:120]
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-dequantized")
    nll = []
    with torch.inference_mode():
        for start in (0, 40, 80):
            window = torch.tensor([ids[start : start + 40]])
            log_p = model(window).logits[0].log_softmax(-1)
            nll += [-log_p[i, window[0, i + 1]].item() for i in range(39)]
    assert len(nll) == 117
    assert result["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    assert result["windows"] == 3


def test_jsonl_packs_the_text_fields(folder, tmp_path, capsys):
    rows = [{"text": TEXT, "id": i} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--calibration", tmp_path / "rows.jsonl"]
    assert main([str(a) for a in (*argv, *QUICK, "--json")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["calibration_tokens"] == 128


def test_pythons_reference_works_without_a_network(folder, tmp_path, capsys):
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--calibration", "python", *QUICK, "--json"]
    assert main([str(a) for a in argv]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["calibration_tokens"] == 128


def test_fewer_windows_than_asked_are_used_and_said(folder, tmp_path, capsys):
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--calibration", folder / "text.txt"]
    assert main([str(a) for a in (*argv, "--samples", "9999", *QUICK[2:], "--json")]) == 0
    captured = capsys.readouterr()
    tokens = json.loads(captured.out.splitlines()[-1])["calibration_tokens"]
    assert 0 < tokens < 9999 * 32
    assert f"holds {tokens // 32} windows of 32 tokens, --samples asked for 9999" in captured.out + captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "5", "--target-bpw", "3"], "--bits 5: expected 1 to 4"),
        (["--group-size", "48"], "group_size = 48 is not supported"),
        (["--embed-bits", "5"], "bits = 5 bit-planes are not supported: use 1 to 4"),
        (["--head-bits", "0"], "bits = 0 bit-planes are not supported: use 1 to 4"),
        (["--calibration", "missing.txt"], "missing.txt: no such file"),
        (["--calibration", "text.csv"], "expected self, self:MODEL, FILE.txt, FILE.jsonl, hf:NAME, preset:"),
        (["--seq-len", "100000000"], "lower --seq-len"),
        (["--samples", "0"], "must be at least 1"),
        (["--samples", "1" + 20 * "0"], "expected 0 to 2147483647"),
        (["--seed", "1" + 20 * "0"], "expected 0 to 9223372036854775807"),
        (["--seed", "-1"], "--seed -1: expected 0 to"),
        (["--target-bpw", "nan"], "--target-bpw nan: expected bits per weight"),
        (["--target-bpw", "0.5"], "the smallest schemes take"),
        (["--target-size", "1KB"], "the smallest schemes take"),
        (["--tune", "model", "--seq-len", "500"], "holds 1 of 500 tokens: bring more text or lower --seq-len"),
        (["--asymmetric", "1.5"], "--asymmetric 1.5: expected 0 (off) to 1"),
        (["--tune", "model", "--tune-steps", "0"], "must be at least 1"),
        (["--tune-loss", "mix"], "--tune-loss mix needs --tune model"),
        (["--tune", "model", "--samples", "1"], "--tune model needs two calibration windows or more"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_bad_options_get_one_line(folder, tmp_path, capsys, monkeypatch, options, message):
    if options[0] == "--device" and torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    for name in ("quantize_blocks", "sensitivities", "original_states"):
        monkeypatch.setattr(steps, name, lambda *args, **kwargs: pytest.fail("work has begun"))
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--calibration", folder / "text.txt", *QUICK]
    assert message in fails_with(capsys, *argv, *options)
    assert list(tmp_path.iterdir()) == []


def test_bad_jsonl_names_the_line(folder, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n{"txt": "no"}\n')
    line = fails_with(capsys, "quantize", folder / "model", "--output", tmp_path / "out", "--calibration", file, *QUICK)
    assert f"{file}, line 2: expected a `text` field that holds a string" in line


def test_an_existing_output_is_refused_before_the_model_is_opened(tmp_path, capsys):
    line = fails_with(capsys, "quantize", "/no/such/model", "--output", tmp_path, *QUICK)
    assert f"--output {tmp_path} exists already" in line


@pytest.mark.parametrize(
    ("number", "status", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")]
)
def test_a_run_that_is_told_to_stop_keeps_its_work_in_one_line(
    folder, tmp_path, capsys, monkeypatch, request, number, status, name
):
    handler = {signal.SIGINT: signal.default_int_handler}.get(number, signal.getsignal(number))
    before = signal.signal(number, handler)  # a shell's background jobs ignore Ctrl-C
    request.addfinalizer(lambda: signal.signal(number, before))
    original = steps.save_progress

    def save(*args):
        original(*args)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(steps, "save_progress", save)
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--calibration", folder / "text.txt", *QUICK]
    assert main([str(a) for a in argv]) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bpdq: ")]
    partial = tmp_path / "out.partial"
    kept = f"{partial} keeps what is finished: repeat the command with --resume to go on from there"
    assert lines == [f"bpdq: stopped: by {name}; {kept}"]
    assert signal.getsignal(number) == handler
    monkeypatch.undo()
    assert main([str(a) for a in (*argv, "--resume")]) == 0


def test_output_that_nobody_reads_is_no_error(folder, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main(["inspect", str(folder / "checkpoint")]) == 141
    assert capsys.readouterr().err == ""


def test_a_disk_that_is_full_before_the_first_block_promises_nothing(folder, tmp_path, capsys, monkeypatch):
    def save(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", save)
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--calibration", folder / "text.txt", *QUICK]
    line = fails_with(capsys, *argv)
    assert "can't be written ([Errno 28] No space left on device): make room" in line
    assert "--resume" not in line
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_refuses_to_save_is_found_before_the_first_block(folder, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no")

    monkeypatch.setattr(LlamaConfig, "save_pretrained", refuse)
    monkeypatch.setattr(steps, "quantize_blocks", lambda *args, **kwargs: pytest.fail("work has begun"))
    argv = ["quantize", folder / "model", "--output", tmp_path / "out", "--calibration", folder / "text.txt", *QUICK]
    assert "config.json of the checkpoint can't be written: no" in fails_with(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_never_touched(folder, tmp_path, capsys):
    (tmp_path / "precious").write_text("data")
    line = fails_with(capsys, "quantize", folder / "model", "--output", tmp_path, *QUICK)
    assert f"--output {tmp_path} exists already" in line
    assert (tmp_path / "precious").read_text() == "data"


@pytest.mark.parametrize("command", ["quantize", "eval", "inspect"])
def test_a_missing_model_is_named(folder, tmp_path, capsys, command):
    extra = {"quantize": ["--output", tmp_path / "out"], "eval": ["--text", folder / "text.txt"], "inspect": []}[
        command
    ]
    assert "/no/such/model" in fails_with(capsys, command, "/no/such/model", *extra)


def test_a_quantized_model_is_not_quantized_again(folder, tmp_path, capsys):
    line = fails_with(capsys, "quantize", folder / "checkpoint", "--output", tmp_path / "out", *QUICK)
    assert "is quantized already: start from the 16-bit model" in line


def test_nan_weights_are_named(folder, tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    text = folder / "text.txt"
    line = fails_with(capsys, "quantize", model, "--output", tmp_path / "out", "--calibration", text, *QUICK)
    assert "model.layers.1.self_attn.k_proj.weight holds NaN or infinity" in line
    assert not (tmp_path / "out").exists()


def test_pickled_weights_are_not_opened(folder, tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    line = fails_with(capsys, "eval", model, "--text", folder / "text.txt", "--seq-len", "32")
    assert "holds pytorch_model.bin, but no model.safetensors" in line
    assert "convert it to safetensors, as nothing is unpickled here" in line


def test_code_in_a_model_folder_is_not_run(folder, tmp_path, capsys):
    model = tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    fails_with(capsys, "eval", model, "--text", folder / "text.txt", "--seq-len", "32")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_kernel_of_the_hub_that_a_config_names_is_not_loaded(folder, tmp_path, capsys, monkeypatch, key):
    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", lambda *_, **__: pytest.fail("it is loaded"))
    for name in ("model", "checkpoint"):
        file = shutil.copytree(folder / name, tmp_path / name) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: "evil/kernel"}))
        argv = ["eval", tmp_path / name, "--text", folder / "text.txt", "--seq-len", "32"]
        assert main([str(a) for a in argv]) == 0
        assert AutoConfig.from_pretrained(tmp_path / name)._attn_implementation == "evil/kernel"
    argv = ["quantize", tmp_path / "model", "--output", tmp_path / "out", "--calibration", folder / "text.txt", *QUICK]
    assert main([str(a) for a in argv]) == 0
    assert "evil" not in (tmp_path / "out" / "config.json").read_text()


def test_products_in_fp32_are_not_rounded_to_tf32_where_the_environment_allows_it(tmp_path, capsys):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")  # as NVIDIA's containers do
        main(["quantize", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_perplexity_that_is_no_number_is_an_error_and_no_json(folder, tmp_path, capsys):
    damaged = shutil.copytree(folder / "checkpoint", tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # a number, but the logits are none
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    line = fails_with(capsys, "eval", damaged, "--text", folder / "text.txt", "--seq-len", "32", "--json")
    assert "its perplexity in torch.float32 is " in line


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_a_damaged_checkpoint_gets_one_line(folder, tmp_path, capsys, command):
    damaged = shutil.copytree(folder / "checkpoint", tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    text = ["--text", folder / "text.txt", "--seq-len", "32"] if command == "eval" else []
    assert "model.safetensors: not a complete safetensors file" in fails_with(capsys, command, damaged, *text)


def test_a_model_that_cannot_be_run_gets_one_line(folder, tmp_path, capsys):
    odd = shutil.copytree(folder / "checkpoint", tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    line = fails_with(capsys, "eval", odd, "--text", folder / "text.txt", "--seq-len", "32")
    assert "the model that its config.json describes can't be run" in line
