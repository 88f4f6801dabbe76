"""From a model folder to a checkpoint that transformers loads, on tiny models."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import bpdq_quantizer
from bpdq_kernels import dequantize
from bpdq_kernels.format import Scheme
from bpdq_quantizer.algorithm.hessian import corrected
from bpdq_quantizer.algorithm.solver import quantize_linear
from bpdq_quantizer.checkpoint import manifest, writer
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.model import activations
from bpdq_quantizer.model.activations import Original, capture, find_stages, input_statistics
from bpdq_quantizer.model.calls import block_inputs, block_runs
from bpdq_quantizer.model.modules import BPDQLinear
from bpdq_quantizer.model.residual import Reader, Stream, find_streams
from bpdq_quantizer.model.stream import decoder_blocks, from_memory
from bpdq_quantizer.model.weights import weights_in
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.passes.allocate import uniform
from bpdq_quantizer.passes.blocks import quantize_blocks
from bpdq_quantizer.passes.tune import final_states
from bpdq_quantizer.run import block_files, progress
from bpdq_quantizer.run.options import ASYMMETRIC, SOLVERS
from bpdq_quantizer.storage import files as storage_files
from tiny import TEXT, load_tensors, tiny_model, tiny_tokenizer

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"]
IDS = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"][40:60]])


def files(folder):
    """Contents of a folder's tensor files, and of their index."""
    return {file.name: file.read_bytes() for file in folder.glob("model*")}


def small(text, **options):
    return {
        "bits": 2,
        "group_size": 64,
        "calibration": text,
        "samples": 6,
        "seq_len": 32,
        "iterations": 3,
        "output_tokens": 0,
        **options,
    }


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, text):
    """A llama with tied embeddings in bf16, quantized."""
    folder = tmp_path_factory.mktemp("quantized")
    tiny_model(folder / "model", dtype=torch.bfloat16, tie_word_embeddings=True)
    report = bpdq_quantizer.quantize(str(folder / "model"), folder / "out", **small(text))
    return folder / "model", folder / "out", report


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_quantized_and_reloads(arch, tmp_path, text):
    tiny_model(tmp_path / "model", arch)
    bpdq_quantizer.quantize(str(tmp_path / "model"), tmp_path / "out", **small(text, bits=4, group_size=128))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    planes = {name for name, m in model.named_modules() if isinstance(m, BPDQLinear)}
    assert len(planes) == 2 * 7
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        error = (model(IDS).logits - original(IDS).logits).std() / original(IDS).logits.std()
    assert error < 0.5  # unrelated logits would give 1.4
    for name, m in original.named_modules():
        if name in planes and m.bias is not None:
            assert torch.equal(m.bias, model.get_submodule(name).bias)


def test_checkpoint_says_what_it_is(quantized):
    _, out, _ = quantized
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == config["checkpoint_format"] == "bpdq"
    assert config["bits"] == config["meta"]["bpdq"]["msbits"] == 2
    assert config["ignore"] == ["lm_head"]
    tensors = load_tensors(out)
    assert tensors["model.layers.0.mlp.down_proj.B"].shape == (11, 2, 128)
    assert tensors["model.layers.0.mlp.down_proj.c"].shape == (6, 3, 128)
    assert tensors["model.layers.0.mlp.down_proj.c"].dtype == torch.int8
    assert tensors["model.layers.0.mlp.down_proj.s"].shape == (3, 128)
    assert tensors["model.layers.0.mlp.down_proj.s"].dtype == torch.bfloat16
    assert (config["format_version"], config["coefficient_bits"]) == (2, 8)
    assert "lm_head.weight" not in tensors, "tied weights are stored once"
    assert {p.name for p in out.iterdir()} >= {"tokenizer.json", "generation_config.json", "quantization_report.json"}
    assert "user: hi" in AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )


def test_report_has_loss_error_bits_and_time_of_every_layer(quantized):
    _, out, report = quantized
    saved = json.loads((out / "quantization_report.json").read_text())
    assert saved == json.loads(json.dumps(report))
    assert len(saved["layers"]) == 14
    for layer in saved["layers"]:
        assert layer["loss"] > 0
        assert 0 < layer["relative_error"] < 1
        assert layer["seconds"] > 0
        groups = -(-layer["in_features"] // 64)
        assert layer["bits_per_weight"] == pytest.approx(2 + 3 * (8 * groups + 16) / layer["in_features"])
    assert sum(report["seconds_by_part"].values()) == pytest.approx(report["seconds"])
    assert min(report["seconds_by_part"].values()) >= 0


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_is_tied_only_if_it_is_the_embedding(quantized, tmp_path, text, equal):
    shutil.copytree(quantized[0], tmp_path / "model")
    tensors = load_tensors(tmp_path / "model")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if equal else embedding.flip(0)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    bpdq_quantizer.quantize(str(tmp_path / "model"), tmp_path / "out", **small(text, bits=4))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == equal
    model = load_model(str(tmp_path / "out"))
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_same_seed_gives_identical_tensors(quantized, tmp_path, text):
    model, out, _ = quantized
    bpdq_quantizer.quantize(str(model), tmp_path / "again", **small(text))
    assert files(tmp_path / "again") == files(out)


def test_linears_that_share_an_input_are_one_stage():
    config = AutoConfig.for_model(
        "gemma2", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, vocab_size=50, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    prefix, decoder = decoder_blocks(model)
    hidden, calls = block_inputs(model, decoder, text_windows(torch.arange(20).view(2, 10)))
    run = block_runs(decoder[1], calls[1], torch.device("cpu"), 1)[0]
    stages = find_stages(weights_in(decoder[1]).values(), run, hidden[0])
    assert prefix == "model.layers"
    assert [[weight.name for weight in stage] for stage in stages] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


@torch.no_grad()
def test_the_16_bit_block_runs_to_its_end_once_for_each_batch(quantized):
    """And gives what one forward pass without interruptions gives."""
    model = AutoModelForCausalLM.from_pretrained(quantized[0])
    _, decoder = decoder_blocks(model)
    hidden, calls = block_inputs(model, decoder, text_windows(torch.arange(30).view(3, 10)))
    run = block_runs(decoder[0], calls[0], torch.device("cpu"), 1)[0]
    firsts = [stage[0] for stage in find_stages(weights_in(decoder[0]).values(), run, hidden[0])]
    streams = find_streams(decoder[0], firsts, run, hidden[0])
    readers = [Reader(weight, decoder[0], streams.get(weight.name)) for weight in firsts]
    expected = [capture(readers, run, batch) for batch in hidden]
    original = Original(decoder[0], "", firsts, streams, calls[0], torch.device("cpu"), list(hidden))
    ends = []
    original.block.register_forward_hook(lambda *_: ends.append(True))
    for weight in firsts:
        for i, (reads, _) in enumerate(expected):
            found, of_weight = original.read(weight.name, i), reads[weight.name]
            assert torch.equal(found.x, of_weight.x)
            assert (found.stream is None) == (of_weight.stream is None) == (weight.name not in streams)
            assert found.stream is None or torch.equal(found.stream, of_weight.stream)
    for found, (_, output) in zip(original.outputs(), expected, strict=True):
        assert torch.equal(found, output)
    assert len(ends) == 3


def test_each_layer_is_calibrated_on_the_quantized_prefix(quantized, text):
    """Solve two layers again, on the Hessian that the finished checkpoint itself produces."""
    model_folder, out, _ = quantized
    original = AutoModelForCausalLM.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(out)
    planes = {name: m for name, m in model.named_modules() if isinstance(m, BPDQLinear)}
    for name, m in planes.items():
        plain = torch.nn.Linear(m.in_features, m.out_features, bias=False, dtype=torch.bfloat16)
        plain.weight.data.copy_(dequantize(m.B, m.c, 64, m.in_features, m.s))
        model.set_submodule(name, plain)
    ids = AutoTokenizer.from_pretrained(out)(TEXT * 4, add_special_tokens=False)["input_ids"][: 6 * 32]
    tokens = torch.tensor(ids).view(6, 32)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        stored, weight = weights_in(model)[name], weights_in(original)[name]
        stream = Stream(f"{name.partition('.mlp')[0]}.post_attention_layernorm", 1.0) if "down" in name else None
        before, now = (
            capture([Reader(w, m, stream)], partial(m.base_model, use_cache=False), tokens)[0][name]
            for m, w in ((original, weight), (model, stored))
        )
        H, C, P = input_statistics(stored, [now], [tokens.numel()], lambda _, read=before: read)
        assert (P is None) == (stream is None)
        target = corrected(weight.matrix.detach(), H, C, ASYMMETRIC["refined"], P)
        solved = quantize_linear(target, H, 2, 64, 8, iterations=3, **SOLVERS["refined"])
        D = target - stored.matrix.detach().float()
        assert ((D @ H) * D).sum().item() == pytest.approx(solved.loss.sum().item(), rel=0.02)
        original_H = input_statistics(weight, [before], [tokens.numel()], None).H
        assert (original_H - H).norm() > 0.05 * H.norm(), "the prefix makes a difference that the test can see"


def test_one_pass_and_a_pass_per_stage_agree(quantized, tmp_path, text, monkeypatch):
    """A calibration set that fits one batch takes a shortcut, which must not change what is solved."""
    model, _, report = quantized
    monkeypatch.setattr(activations, "ACTIVATION_BYTES", 1)
    again = bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text))
    for a, b in zip(report["layers"][:7], again["layers"][:7], strict=True):  # later blocks drift by bf16 rounding
        assert a["name"] == b["name"]
        assert a["loss"] == pytest.approx(b["loss"], rel=0.03)


def test_asymmetric_calibration_brings_the_model_closer_to_the_16_bit_one(quantized, tmp_path, text):
    model_folder, out, _ = quantized
    bpdq_quantizer.quantize(str(model_folder), tmp_path / "plain", **small(text, asymmetric=0.0))
    original = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = AutoTokenizer.from_pretrained(out)(TEXT * 4, add_special_tokens=False)["input_ids"][: 6 * 32]
    tokens = torch.tensor(ids).view(6, 32)
    errors = []
    for folder in (out, tmp_path / "plain"):
        states = final_states(AutoModelForCausalLM.from_pretrained(folder), tokens)
        errors.append((states - final_states(original, tokens)).float().square().mean().item())
    assert errors[0] < 0.95 * errors[1]


def test_fp16_models_get_fp16_coefficients(tmp_path, text):
    tiny_model(tmp_path / "model", dtype=torch.float16)
    bpdq_quantizer.quantize(str(tmp_path / "model"), tmp_path / "out", **small(text, bits=1, coefficient_bits=16))
    tensors = load_tensors(tmp_path / "out")
    assert tensors["model.layers.1.mlp.up_proj.c"].dtype == torch.float16
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    assert "coefficient_bits" not in config, "a release that knows version 1 alone reads it"


SOMETIME = [random.Random(number).random() for number in range(20)]


@pytest.mark.parametrize("moment", [0.2, 0.6, 1.0, *(pytest.param(m, marks=pytest.mark.slow) for m in SOMETIME)])
def test_a_killed_run_leaves_nothing_that_loads_and_goes_on(moment, quantized, tmp_path, text):
    model, finished, report = quantized
    code = (
        "import sys, bpdq_quantizer; print('ready', flush=True); "
        f"bpdq_quantizer.quantize({str(model)!r}, {str(tmp_path / 'out')!r}, **{small(text)!r})"
    )
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # which sums depend on
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    run.stdout.readline()
    time.sleep(moment * report["seconds"])
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert {folder.name for folder in tmp_path.iterdir()} <= {"out", "out.partial"}
    if (tmp_path / "out.partial").exists():
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out.partial")
    if not (tmp_path / "out").exists():
        bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text), resume=True)
    assert files(tmp_path / "out") == files(finished)
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / "resume").exists()


class Stop(Exception):  # noqa: N818, stands for a crash
    pass


def stop_at(number, monkeypatch):
    """Let the next run crash instead of writing tensors for the `number`th time."""
    original, writes = progress.write_tensors, itertools.count()

    def write(*args):
        if next(writes) == number:
            raise Stop
        return original(*args)

    for module in (progress, block_files, writer):
        monkeypatch.setattr(module, "write_tensors", write)


@pytest.mark.parametrize("number", range(5))  # block 0, states, block 1, states, the rest of the model
def test_a_run_that_stops_anywhere_goes_on_to_the_same_tensors(number, quantized, tmp_path, text, monkeypatch):
    model, finished, report = quantized
    with monkeypatch.context() as patch:
        stop_at(number, patch)
        with pytest.raises(Stop):
            bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text))
    assert (tmp_path / "out.partial").exists() == (number >= 2), "a folder without a finished block is worth nothing"
    again = bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text), resume=True)
    assert files(tmp_path / "out") == files(finished)
    assert [layer["loss"] for layer in again["layers"]] == [layer["loss"] for layer in report["layers"]]


def test_a_stopped_run_goes_on_with_nothing_but_its_own_options_model_and_text(quantized, tmp_path, text, monkeypatch):
    model, _, _ = quantized
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1] * 4)
    copy = shutil.copytree(model, tmp_path / "model")
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Stop) as stopped:
            bpdq_quantizer.quantize(str(copy), tmp_path / "out", **small(text))
    assert "repeat the command with --resume" in stopped.value.__notes__[0]

    def message(resume=True, **changes):
        with pytest.raises(bpdq_quantizer.InputError) as error:
            bpdq_quantizer.quantize(str(copy), tmp_path / "out", **small(text, **changes), resume=resume)
        return str(error.value)

    assert "add --resume, or remove the folder" in message(resume=False)
    assert "other options, bits = 2 (now 3)" in message(bits=3)
    assert "iterations = 3 (now 4), seed = 0 (now 1)" in message(iterations=4, seed=1)
    assert "calibration tokens = " in message(calibration=str(other))
    os.utime(copy / "model.safetensors", (0, 0))
    assert "model files = " in message()


def test_a_full_disk_stops_the_run_with_its_work_kept(quantized, tmp_path, text, monkeypatch):
    model, _, _ = quantized
    original, writes = storage_files.save_file, itertools.count()

    def save(tensors, file, **kwargs):
        if next(writes) == 3:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, file, **kwargs)

    monkeypatch.setattr(storage_files, "save_file", save)
    with pytest.raises(bpdq_quantizer.InputError, match=r"No space left on device.*make room") as stopped:
        bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text))
    assert "repeat the command with --resume" in stopped.value.__notes__[0]
    kept = {file.name for file in (tmp_path / "out.partial").rglob("*.safetensors*")}
    assert kept == {"model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", "states.safetensors"}


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_the_files_lack_is_named(name, quantized, tmp_path, text):
    model, _, _ = quantized
    copy = shutil.copytree(model, tmp_path / "model")
    tensors = load_file(copy / "model.safetensors")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(bpdq_quantizer.InputError, match=re.escape(f"{name} is not in its files")):
        bpdq_quantizer.quantize(str(copy), tmp_path / "out", **small(text))


def test_a_model_in_memory_gives_the_tensors_of_its_files(quantized, text):
    """As GGUF files are read."""
    model, out, _ = quantized
    source = from_memory(AutoModelForCausalLM.from_pretrained(model))
    ids = AutoTokenizer.from_pretrained(out)(TEXT * 4, add_special_tokens=False)["input_ids"][: 6 * 32]
    solve = partial(quantize_linear, iterations=3, **SOLVERS["refined"])
    options = {"solve": solve, "asymmetric": ASYMMETRIC["refined"]}
    stored = load_tensors(out)
    windows = text_windows(torch.tensor(ids).view(6, 32))
    done = quantize_blocks(source, windows, uniform(source, Scheme(2, 64, 8)), torch.device("cpu"), **options)
    for index, (block, _, states) in enumerate(done):
        assert states.block == index + 1
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, stored[f"model.layers.{index}.{name}"])
    assert all(p.is_meta for p in source.blocks.parameters()), "a block that was passed takes no memory"


def test_config_is_the_last_file_written(quantized, tmp_path, text, monkeypatch):
    """Whatever is interrupted before config.json leaves a folder that no loader takes for a model."""
    model, out, _ = quantized
    seen, original = {}, storage_files.save

    def record(file, write):
        original(file, write)
        if file.parent.name == "out.partial":
            seen[file.name] = {path.name for path in file.parent.iterdir()}

    for module in (storage_files, writer, manifest):
        monkeypatch.setattr(module, "save", record)
    bpdq_quantizer.quantize(str(model), tmp_path / "out", **small(text))
    assert list(seen)[-1] == "config.json"
    assert all("config.json" not in present for present in list(seen.values())[:-1])
    assert seen["config.json"] - {"resume"} == {path.name for path in out.iterdir()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_peak_memory_does_not_grow_with_depth(tmp_path, text, arch):
    """The deep model alone has 0.6 GB of 16-bit weights, about as much as the process needs without any."""
    peaks = []
    for layers in (12, 96):
        model, out = tmp_path / f"model-{layers}", tmp_path / f"out-{layers}"
        tiny_model(model, arch, hidden=512, ffn=1408, layers=layers, heads=8, kv_heads=8, dtype=torch.bfloat16)
        options = ["--samples", "4", "--seq-len", "64", "--iterations", "1", "--solver", "paper", "--json"]
        command = [sys.executable, "-m", "bpdq_quantizer", "quantize", model, "--output", out, "--calibration", text]
        done = subprocess.run([*map(str, command), *options], stdout=subprocess.PIPE, check=True)
        peaks.append(json.loads(done.stdout.splitlines()[-1])["peak_host_memory_bytes"])
    assert peaks[1] < 1.1 * peaks[0]
