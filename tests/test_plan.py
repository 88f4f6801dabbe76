"""`bpdq plan`: bytes against what is written, figures of known models by hand, and what is said when nothing fits."""

import json
import shlex
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import bpdq_quantizer
from bpdq_kernels.format import Scheme
from bpdq_kernels.layout import to_tiles
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit import memory
from bpdq_quantizer.fit.memory import quantize_host_bytes
from bpdq_quantizer.fit.parts import read_model
from bpdq_quantizer.fit.plan import MOST_BITS, Settings, budget, needed, plan
from tiny import TEXT, bpdq_checkpoint, load_tensors, round_to_planes, tiny_model

QWEN = {  # Qwen2.5: hidden, FFN, layers, heads, key/value heads
    "7B": (3584, 18944, 28, 28, 4),
    "32B": (5120, 27648, 64, 40, 8),
    "72B": (8192, 29568, 80, 64, 8),
}


def qwen(folder, size, **changes):
    """A folder with nothing but the config.json of a Qwen2.5."""
    hidden, ffn, layers, heads, kv_heads = QWEN[size]
    config = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 152064,
        "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 131072, **changes,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def model_7b(tmp_path_factory):
    return qwen(tmp_path_factory.mktemp("plan") / "m", "7B")


def written_bytes(folder):
    """Bytes of a checkpoint's tensors by part, and of all."""
    sizes = dict.fromkeys(("linear_bytes", "embedding_bytes", "head_bytes", "other_bytes"), 0)
    for name, tensor in load_tensors(folder).items():
        part = {"model.embed_tokens": "embedding_bytes", "lm_head": "head_bytes"}.get(name.rpartition(".")[0])
        sizes[part or ("linear_bytes" if name.endswith((".B", ".c", ".s")) else "other_bytes")] += tensor.nbytes
    return {**sizes, "checkpoint_bytes": sum(sizes.values())}


def parts_of(found):
    return {name: found[name] for name in ("linear_bytes", "embedding_bytes", "head_bytes", "other_bytes")} | {
        "checkpoint_bytes": found["checkpoint_bytes"]
    }


@pytest.mark.parametrize(
    ("arch", "tied", "dtype", "bits", "group_size", "width"),
    [
        ("llama", True, torch.bfloat16, 2, 256, 16),
        ("qwen2", False, torch.bfloat16, 1, 32, 8),
        ("qwen2", True, torch.float16, 4, 128, 8),
        ("qwen3", False, torch.float32, 3, 64, 16),
    ],
)
def test_bytes_are_those_that_quantize_writes(tmp_path, arch, tied, dtype, bits, group_size, width):
    (tmp_path / "text.txt").write_text(TEXT)
    tiny_model(tmp_path / "model", arch, dtype=dtype, tie_word_embeddings=tied)
    options = {"bits": bits, "group_size": group_size, "coefficient_bits": width}
    small = {"calibration": str(tmp_path / "text.txt"), "samples": 4, "seq_len": 32, "iterations": 1}
    bpdq_quantizer.quantize(str(tmp_path / "model"), tmp_path / "out", **small, **options)
    found = plan(str(tmp_path / "model"), **options)
    assert parts_of(found) == written_bytes(tmp_path / "out")
    assert (found["head_bytes"] == 0) == tied


@pytest.mark.parametrize(("tied", "options"), [(True, {"embed_bits": 4}), (True, {"head_bits": 4}), (False, {})])
def test_bytes_of_an_embedding_and_head_in_planes(tmp_path, tied, options):
    model = tiny_model(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=tied)
    options = options or {"embed_bits": 4, "head_bits": 3}
    tables = {"model.embed_tokens": {"bits": 4}} | ({} if tied else {"lm_head": {"bits": 3}})
    bpdq_checkpoint(model, tmp_path / "out", bits=2, group_size=64, layers=tables)
    found = plan(str(model), group_size=64, coefficient_bits=16, **options)
    assert parts_of(found) == written_bytes(tmp_path / "out")


@given(n=st.integers(1, 200), k=st.integers(1, 600), bits=st.integers(1, 4), group=st.sampled_from([32, 64, 128, 256]))
@settings(max_examples=40, deadline=None)
def test_bytes_of_a_layer(n, k, bits, group):
    scheme = Scheme(bits, group)
    B, c = round_to_planes(torch.randn(n, k), bits, group, torch.bfloat16)
    assert scheme.stored_bytes(n, k) == B.nbytes + c.nbytes
    tiles = to_tiles(B, c, group, torch.bfloat16)
    assert scheme.tiled_bytes(n, k) == sum(t.nbytes for t in tiles if t is not None)


def row_bytes(k, words, groups):
    """Bytes of an output's planes, coefficients and their scales at k = 2, G = 128."""
    assert 32 * words == k
    assert 128 * (groups - 1) < k <= 128 * groups
    return words * 2 * 4 + groups * 3 + 3 * 2


@pytest.mark.parametrize(
    ("size", "linear", "tables"),
    [
        ("7B", 28 * ((3584 + 2 * 512 + 3584 + 2 * 18944) * row_bytes(3584, 112, 28)
                     + 3584 * row_bytes(18944, 592, 148)), 2 * 152064 * 3584 * 2),
        ("32B", 64 * ((5120 + 2 * 1024 + 5120 + 2 * 27648) * row_bytes(5120, 160, 40)
                      + 5120 * row_bytes(27648, 864, 216)), 2 * 152064 * 5120 * 2),
        ("72B", 80 * ((8192 + 2 * 1024 + 8192 + 2 * 29568) * row_bytes(8192, 256, 64)
                      + 8192 * row_bytes(29568, 924, 231)), 2 * 152064 * 8192 * 2),
    ],
)  # fmt: skip
def test_totals_of_qwen(tmp_path, size, linear, tables):
    hidden, _, layers, _, kv_heads = QWEN[size]
    found = plan(qwen(tmp_path / size, size))
    assert found["linear_bytes"] == linear
    assert found["embedding_bytes"] == found["head_bytes"] == tables // 2
    biases, norms = layers * (hidden + 2 * 128 * kv_heads), (2 * layers + 1) * hidden
    assert found["other_bytes"] == 2 * (biases + norms)


def test_page_locked_states_take_powers_of_two(tmp_path, monkeypatch):
    for part in ("gradient_bytes", "fp32_head_bytes", "evaluation_bytes"):  # more than states of few windows
        monkeypatch.setattr(memory, part, lambda *_: 0)
    m = read_model(str(qwen(tmp_path / "32B", "32B")))
    # batches of 2 windows of 2048 x 5120 in 16 bits, 40 MiB: 64 for 128 windows, and the last one of 1 for 3
    assert (1 << 30) // (2 * 2048 * (4 * 5120 + 2 * 5120 + 2 * 1024 + 5120 + 2 * 27648)) == 2
    for windows, rounded in ((128, 64 * 64 << 20), (3, 64 + 32 << 20)):
        exact = 2 * 2 * windows * 2048 * 5120
        apart = quantize_host_bytes(m, (windows, 2048), page_locked=False) - exact
        assert quantize_host_bytes(m, (windows, 2048)) - apart == 2 * rounded
    assert quantize_host_bytes(m) == quantize_host_bytes(m, (128, 2048))


def test_the_72b_model_of_the_docs(tmp_path):
    model = qwen(tmp_path / "Qwen2.5-72B", "72B")
    found = plan(model)
    assert round(found["linear_bytes"] / 1e9, 2) == 19.24
    assert round((found["embedding_bytes"] + found["head_bytes"]) / 1e9, 2) == 4.98
    assert found["kv_bytes_per_token"]["auto"] == 320 * 1024
    assert found["tokens_that_fit"]["auto"] < 2048 < found["tokens_that_fit"]["int8_per_token_head"]
    assert "--kv-cache-dtype int8_per_token_head --enforce-eager" in found["serve_command"]
    small = plan(model + "/config.json", embed_bits=4, head_bits=4, context=8192)
    assert small["embedding_bytes"] == 152064 * (256 * 4 * 4 + 64 * 5 + 5 * 2)
    assert small["tokens_that_fit"]["auto"] > 8192
    assert "kv-cache-dtype" not in small["serve_command"]


def test_the_command_is_one_that_vllm_takes(tmp_path):
    found = plan(qwen(tmp_path / "m", "7B"), context=4096)
    program, serve, model, *flags = shlex.split(found["serve_command"])
    assert (program, serve, model) == ("vllm", "serve", "./m-bpdq")
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)
    assert args.max_model_len == 4096
    assert not args.enforce_eager
    per_sequence = 4096 * found["kv_bytes_per_token"]["auto"]
    assert 1 < args.max_num_seqs < found["free_bytes"] / per_sequence
    assert args.gpu_memory_utilization * found["card_bytes"] == pytest.approx(budget(24), abs=1)


@pytest.mark.parametrize("name", ["my model é", "it's [x]; $(ls)"])
def test_a_name_that_the_shell_would_part_is_quoted(tmp_path, name):
    command = plan(qwen(tmp_path / name, "7B"))["serve_command"]
    assert shlex.split(command)[:3] == ["vllm", "serve", f"./{name}-bpdq"]


@settings(deadline=None, max_examples=30)
@example(1e-320)
@example(1e308)
@given(st.floats())
def test_any_card_is_planned_for_or_refused(model_7b, gpu_memory):
    with suppress(InputError):
        assert plan(model_7b, gpu_memory=gpu_memory)["card_weight_bytes"] <= gpu_memory * 2**30


@pytest.mark.parametrize("embed", [4, None])
def test_json_and_table(tmp_path, capsys, embed):
    argv = ["plan", qwen(tmp_path / "m", "7B"), "--json", *(["--embed-bits", "4"] if embed else [])]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert (found["embedding_bytes"] < found["head_bytes"]) == bool(embed)
    assert found["serve_command"] in lines[-2]
    table = "\n".join(lines[:-1])
    assert all(name in table for name in found["tokens_that_fit"])
    assert all(assumption in table for assumption in found["assumptions"])


def test_the_output_in_the_docs(tmp_path, capsys):
    page = (Path(__file__).parent.parent / "docs" / "plan.md").read_text()
    model = qwen(tmp_path / "Qwen2.5-72B-Instruct", "72B")
    assert main(["plan", model]) == 0
    table, _, command = capsys.readouterr().out.partition("assumptions")
    assert table in page
    assert command[command.index("\nfor ") :] in page
    assert main(["plan", model, "--embed-bits", "4", "--head-bits", "4", "--context", "8192"]) == 0
    lines = capsys.readouterr().out.splitlines()
    kept = ("embedding", "head", "checkpoint", "weights", "left for", "auto", "int8", "fp8, ", "turboquant_3bit")
    assert "\n".join(line for line in lines if line.strip().startswith(kept)) in page
    assert "\n".join(lines[-3:]) in page


def refusal(capsys, *argv):
    assert main(["plan", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bpdq: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_would_fit_is_said_and_true(tmp_path, capsys):
    model = qwen(tmp_path / "m", "72B")
    line = refusal(capsys, model, "--context", "8192")
    assert "does not fit 24 GiB with 8192 tokens of context in any KV-cache type" in line
    assert "this would: --embed-bits 4 --head-bits 4, or --group-size 256, or --context 4640 (turboquant_3bit" in line
    assert plan(model, context=8192, group_size=256)
    assert plan(model, context=8192, embed_bits=4, head_bits=4)
    assert plan(model, context=4640)["kv_cache_dtype"] == "turboquant_3bit_nc"
    assert plan(model, context=8192, gpu_memory=25)
    line = refusal(capsys, model, "--bits", "3", "--group-size", "64")
    assert "this would: --embed-bits 4 --head-bits 4 --group-size 256 --bits 2, or --gpu-memory 35" in line
    tables = ["--embed-bits", "4", "--head-bits", "4"]
    assert "this would: --gpu-memory 21\n" in refusal(capsys, model, "--gpu-memory", "0.2", *tables)
    assert plan(model, gpu_memory=21, embed_bits=4, head_bits=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "32769"], "--context 32769: Qwen2ForCausalLM takes 1 to 32768 tokens"),
        (["--gpu-memory", "nan"], "--gpu-memory nan: expected a number of GiB"),
        (["--gpu-memory", "1e-320"], "--gpu-memory 1e-320: expected a number of GiB, from 0.001 to 1000000"),
        (["--gpu-memory", "-1"], "--gpu-memory -1.0: expected a number of GiB"),
        (["--embed-bits", "5"], "bits = 5 bit-planes are not supported"),
        (["--group-size", "48"], "group_size = 48 is not supported"),
    ],
)
def test_bad_options(tmp_path, capsys, options, message):
    assert message in refusal(capsys, qwen(tmp_path / "m", "7B"), *options)


def test_options_of_tied_tables_must_agree(tmp_path, capsys):
    model = qwen(tmp_path / "m", "7B", tie_word_embeddings=True)
    said = refusal(capsys, model, "--embed-bits", "4", "--head-bits", "3")
    assert "are tied, one table for both: give the same number" in said
    assert plan(model, head_bits=3)["embedding_bytes"] == plan(model, embed_bits=3, head_bits=3)["embedding_bytes"]


@pytest.mark.parametrize(
    ("arch", "config", "message"),
    [
        (
            "deepseek_v32",
            {"first_k_dense_replace": 9},
            "does not count sparse attention, indexed_attention, latent attention",
        ),
        ("bamba", {"attn_layer_indices": [0]}, "does not count the states of bamba"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 1},
            "windows in some layers only, which vLLM does not",
        ),
        ("bloom", {"n_layer": 2, "n_head": 2}, "says nothing of max_position_embeddings"),
        ("jetmoe", {"num_local_experts": 2}, "not supported"),  # experts that are fused in a way of their own
    ],
)
def test_other_models_are_refused_in_one_line(tmp_path, capsys, arch, config, message):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoConfig.for_model(arch, **sizes, vocab_size=384, **config).save_pretrained(tmp_path)
    assert message in refusal(capsys, str(tmp_path))


def test_a_checkpoint_and_a_missing_model_are_refused(tmp_path, capsys):
    bpdq_checkpoint(tiny_model(tmp_path / "model"), tmp_path / "out")
    capsys.readouterr()  # progress bars
    assert "is quantized already" in refusal(capsys, str(tmp_path / "out"))
    assert "/no/such/model: no such folder" in refusal(capsys, "/no/such/model")
    assert "/no/such/config.json" in refusal(capsys, "/no/such/config.json")


@pytest.mark.parametrize("group_size", [64, 256])
def test_the_bits_that_fill_a_card_fit_and_more_do_not(tmp_path, group_size):
    model = qwen(tmp_path / "32B", "32B")
    for gpu_memory in (16, 20, 24):
        found = plan(model, bits=2, group_size=group_size, gpu_memory=gpu_memory)
        for bits in (2, 3, 4):
            scheme = Scheme(bits, group_size, 8)
            settings = Settings(scheme, None, None, gpu_memory, found["context"])
            fits = needed(read_model(model), settings, found["kv_cache_dtype"], graphs=False) <= budget(gpu_memory)
            assert fits == (scheme.bits_per_weight <= found["fill_bpw"])


def test_a_small_model_does_not_fill_the_card(tmp_path):
    assert plan(qwen(tmp_path / "7B", "7B"))["fill_bpw"] == MOST_BITS


def test_a_trellis_is_planned_with_the_bytes_that_are_written(tmp_path, text):
    model = tiny_model(tmp_path / "model", ffn=340)  # no chains fit the last Linear's inputs
    options = {"bits": 2, "group_size": 64, "code": "trellis", "embed_bits": 3, "head_bits": 4}
    small = {"calibration": text, "samples": 2, "seq_len": 32, "iterations": 1, "output_tokens": 0}
    bpdq_quantizer.quantize(str(model), tmp_path / "out", **options, **small)
    found = plan(str(model), **options, context=64)
    assert parts_of(found) == written_bytes(tmp_path / "out")
    with pytest.raises(bpdq_quantizer.InputError, match="--code qtip: expected plain or trellis"):
        plan(str(model), code="qtip")
