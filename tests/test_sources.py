"""Source models that can't be used: one sentence each, which names the file or tensor, and nothing is left behind."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import bpdq_quantizer
from architectures import model_folder
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.sources import gguf_arguments
from bpdq_quantizer.model.stream import from_memory, load_block, open_model
from bpdq_quantizer.model.support import check_blocks
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.run import pipeline, prepare
from bpdq_quantizer.run.block_files import BlockFiles
from gguf_files import gguf_file
from tiny import TEXT, tiny_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BERT = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYER = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("sources") / "model")


def cut(name, keep):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def pointer(name):
    return lambda folder: (folder / name).write_text(POINTER)


def tensor(name, change):
    def do(folder):
        tensors = load_file(folder / WEIGHTS)
        tensors[name] = change(tensors[name]).clone()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return do


def without(name):
    def do(folder):
        tensors = {other: value for other, value in load_file(folder / WEIGHTS).items() if other != name}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return do


def more(*names):
    """Tensors that config.json knows nothing of."""

    def do(folder):
        tensors = load_file(folder / WEIGHTS) | {name: torch.ones(8) for name in names}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return do


def config(**changes):
    def do(folder):
        found = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(found | changes))

    return do


def other_config(content):
    return lambda folder: (folder / "config.json").write_text(json.dumps(content))


def index(content):
    def do(folder):
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(content)

    return do


def pickled(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def shards(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")


def two_shards(change):
    """The model in two files; `change` is given the tensors of each, and the index."""

    def do(folder):
        tensors = load_file(folder / WEIGHTS)
        parts = {name: {} for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")}
        for i, name in enumerate(sorted(tensors)):
            parts[list(parts)[i % 2]][name] = tensors[name]
        places = {name: file for file, held in parts.items() for name in held}
        change(*parts.values(), places)
        (folder / WEIGHTS).unlink()
        for file, held in parts.items():
            save_file(held, folder / file, metadata={"format": "pt"})
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return do


def in_both(first, second, places):
    name = next(name for name in first if name.endswith("up_proj.weight"))
    second[name] = 2 * first[name]


def elsewhere(first, second, places):
    name = next(name for name in first if name.endswith("up_proj.weight"))
    places[name] = places[next(iter(second))]


def two_kinds(folder):
    (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')


def gguf(content):
    return lambda folder: (folder / "m.gguf").write_bytes(content)


FILES = {
    "truncated weights": (cut(WEIGHTS, 50_000), "/model.safetensors: not a complete safetensors file"),
    "empty weights": (cut(WEIGHTS, 0), "/model.safetensors is empty: download it again"),
    "pointer to weights": (pointer(WEIGHTS), "/model.safetensors is a git-lfs pointer, not the file itself: run `git"),
    "pointer to a tokenizer": (pointer("tokenizer.json"), "/tokenizer.json is a git-lfs pointer"),
    "a missing part": (index('{"weight_map": {"a": "b.safetensors"}}'), "/b.safetensors is missing, though model.safe"),
    "an empty index": (index('{"weight_map": {}}'), "/model.safetensors.index.json: not an index of safetensors files"),
    "an index of numbers": (index('{"weight_map": {"a": 3}}'), "/model.safetensors.index.json: not an index of safete"),
    "an index of lists": (index('{"weight_map": {"a": []}}'), "/model.safetensors.index.json: not an index of safete"),
    "pickled weights": (
        pickled,
        ": holds pytorch_model.bin, but no model.safetensors and no model.safetensors.inde",
    ),
    "shards alone": (shards, ": holds model-00001-of-00001.safetensors, but no model.safetensors and no model.safeten"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ": holds no weights, neither model.safetensors nor mod"),
    "weights twice": (two_kinds, "/model.safetensors: model.safetensors.index.json beside it names other files: remov"),
    "a tensor twice": (two_shards(in_both), "up_proj.weight is in model-00001-of-00002.safetensors too: download"),
    "an index that errs": (
        two_shards(elsewhere),
        "up_proj.weight is in model-00002-of-00002.safetensors, but it is in model-00001-of-00002.safetensors: downl",
    ),
    "no index": (index("[]"), "/model.safetensors.index.json: not an index of safetensors files"),
    "shape in a block": (tensor(LAYER, lambda t: t[1:]), f"{LAYER} is (351, 128) in its files, but (352, 128) by its"),
    "shape elsewhere": (tensor("model.norm.weight", lambda t: t[:7]), "model.norm.weight is (7,) in its files, but (1"),
    "no LM head": (
        without("lm_head.weight"),
        "lm_head.weight is not in its files: download the model again, or where it is an embedding model, which has",
    ),
    "no norm": (without("model.norm.weight"), "model.norm.weight is not in its files: download the model again"),
    "a layer too many": (
        config(num_hidden_layers=1),
        "/model.safetensors: model.layers.1.input_layernorm.weight has no place in the model of config.json, a LlamaFor"
        "CausalLM, nor have 8 more, and would be lost: correct config.json",
    ),
    "biases": (more("model.layers.0.self_attn.q_proj.bias"), "/model.safetensors: model.layers.0.self_attn.q_pr"),
    "an adapter": (more("model.layers.0.self_attn.q_proj.lora_A.weight"), "q_proj.lora_A.weight has no place in "),
    "a bias of the LM head": (more("lm_head.bias"), "lm_head.bias has no place in the model of config.json"),
    "vocabulary": (config(vocab_size=400), ".weight is (384, 128) in its files, but (400, 128) by its config.json"),
    "damaged GGUF": (gguf(b"GGUF\x03\0\0\0" + b"\xff" * 300), "/m.gguf: not a complete GGUF file"),
    "empty GGUF": (gguf(b""), "/m.gguf is empty"),
    "pointer to a GGUF": (gguf(POINTER.encode()), "/m.gguf is a git-lfs pointer"),
}
CONFIGS = {
    "pointer": (pointer("config.json"), "/config.json is a git-lfs pointer"),
    "list": (other_config([]), "its config.json does not hold a JSON object"),
    "padding": (config(pad_token_id=384), "its config.json says pad_token_id 384, but the vocabulary ends at 383: set"),
    "code": (
        config(model_type="evil", auto_map={"AutoConfig": "evil.Config"}),
        "does not know the model_type 'evil' of its config.json; the code that comes with the model is never run: ins",
    ),
    "unknown": (config(model_type="evil"), "does not know the model_type 'evil' of its config.json: install a release"),
    "no language model": (
        other_config({"model_type": "clip", "architectures": ["CLIPModel"]}),
        "CLIPModel is not a causal language model of transformers: choose a dense decoder-only",
    ),
    "an encoder": (
        other_config({"model_type": "bert", **BERT}),
        "is an encoder, whose attention sees later tokens, as its config.json does not set is_decoder: choose a dense",
    ),
    "a classifier": (
        config(architectures=["LlamaForSequenceClassification"]),
        ": LlamaForSequenceClassification ends in the head of a task, which would be lost, not in an LM head: start",
    ),
    "architectures": (config(architectures=2), "its config.json says architectures = 2, which is no list of names: d"),
    "no heads": (config(num_attention_heads=0), "integer modulo by zero"),
    "a size that is no number": (config(hidden_size="big"), "'hidden_size' expected int, got str"),
}
COMMANDS = [(name, command) for name in FILES for command in ("quantize", "eval")]
COMMANDS += [(name, command) for name in CONFIGS for command in ("quantize", "eval", "plan")]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_what_is_wrong_with_a_source_is_said_in_one_line(model, tmp_path, text, capsys, name, command):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    damage, message = (FILES | CONFIGS)[name]
    damage(folder)
    source = next(folder.glob("*.gguf"), folder)
    options = {
        "quantize": ["--output", tmp_path / "out", "--calibration", text, "--samples", "2"],
        "eval": ["--text", text, "--windows", "1"],
        "plan": [],
    }[command]
    length = [] if command == "plan" else ["--seq-len", "16"]
    assert main([str(a) for a in (command, source, *options, *length)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bpdq: error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert str(folder) in errors[0]
    assert "trust_remote_code" not in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def nan(folder, name):
    tensor(name, lambda t: t.index_fill(0, torch.tensor([3]), torch.nan))(folder)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("model.embed_tokens.weight", []),
        ("lm_head.weight", []),
        ("lm_head.weight", ["--output-tokens", "0", "--evaluate", "1"]),
        ("model.norm.weight", ["--target-bpw", "3"]),
        ("model.norm.weight", ["--calibration", "self"]),
        ("model.layers.1.input_layernorm.weight", []),
        ("model.layers.1.self_attn.q_proj.weight", ["--ignore", "re:.*q_proj"]),
    ],
)
def test_what_stays_in_16_bits_holds_numbers_before_any_work(model, tmp_path, text, capsys, monkeypatch, name, options):
    monkeypatch.setattr(pipeline, "follow", lambda *_: pytest.fail("work has begun"))
    shutil.copytree(model, tmp_path / "model")
    nan(tmp_path / "model", name)
    argv = ["quantize", tmp_path / "model", "--output", tmp_path / "out", "--calibration", text, "--seq-len", "16"]
    assert main([str(a) for a in [*argv, *options]]) == 2
    assert f"{name} holds NaN or infinity: the model is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_number_that_is_none_in_float16_is_named_with_its_remedy(model, tmp_path, text, capsys):
    shutil.copytree(model, tmp_path / "model")
    tensor("lm_head.weight", lambda t: t.index_fill(0, torch.tensor([3]), 1e5))(tmp_path / "model")
    config(dtype="float16")(tmp_path / "model")
    argv = ["quantize", tmp_path / "model", "--output", tmp_path / "out", "--calibration", text, "--seq-len", "16"]
    assert main([str(a) for a in argv]) == 2
    assert "lm_head.weight holds NaN or infinity in float16: convert the model to bfl" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_float64_is_refused_before_any_work(model, tmp_path, text, capsys, command):
    shutil.copytree(model, tmp_path / "model")
    config(dtype="float64")(tmp_path / "model")
    options = ["--output", tmp_path / "out", "--calibration", text, "--output-tokens", "0"]
    assert main([str(a) for a in [command, tmp_path / "model", *(options if command == "quantize" else [])]]) == 2
    assert "is a model in float64, and checkpoints hold float16, bfloat16, float32: set d" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_mpts_biases_reach_as_far_as_its_config_says(tmp_path, capsys, command):
    folder = model_folder(tmp_path / "model", "mpt", max_seq_len=32)
    (tmp_path / "text.txt").write_text(TEXT * 4)
    text = ["--calibration", "--text"][command == "eval"], tmp_path / "text.txt"
    output = ["--output", tmp_path / "out"] if command == "quantize" else []
    assert main([str(a) for a in (command, folder, *output, *text, "--seq-len", "33")]) == 2
    assert "--seq-len 33: MptForCausalLM knows 32 positions: lower --seq-len" in capsys.readouterr().err


@pytest.mark.parametrize("ignore", [[], ["--ignore", "re:.*q_proj"]])
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_model_that_is_too_narrow_is_named(tmp_path, text, capsys, command, ignore):
    folder = tiny_model(tmp_path / "model", hidden=16, ffn=24, heads=2, kv_heads=1)
    options = ["--output", tmp_path / "out", "--calibration", text, "--seq-len", "16"] if command == "quantize" else []
    assert main([str(a) for a in (command, folder, *options, *ignore)]) == 2
    assert "LlamaForCausalLM: nothing can be quantized, all Linears of its blocks stay in 1" in capsys.readouterr().err


SPLIT = {
    "re:.*q_proj": (
        "model.layers.0.self_attn.q_proj in 16 bits, but not model.layers.0.self_attn.k_proj",
        "q_proj, k_",
    ),
    "model.layers.1.mlp.up_proj": (
        "model.layers.1.mlp.up_proj in 16 bits, but not model.layers.1.mlp.gate_proj",
        "gat",
    ),
}


@pytest.mark.parametrize("ignore", [*SPLIT, "re:.*[qkv]_proj", "re:.*(gate|up)_proj", "re:.*o_proj", "nothing"])
def test_what_vllm_fuses_is_said_to_be_parted_before_any_work(model, tmp_path, capsys, monkeypatch, ignore):
    def stop(*_):
        raise InputError("the text is read")

    monkeypatch.setattr(prepare, "calibration_windows", stop)
    options = ["--output", tmp_path / "out", "--calibration", "python", "--seq-len", "32", "--ignore", ignore]
    assert main([str(a) for a in ("quantize", model, *options)]) == 2
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("--ignore leaves ")]
    names, parts = SPLIT.get(ignore, ("", ""))
    assert [line.startswith(f"--ignore leaves {names}: vLLM fuses {parts}") for line in said] == [True] * bool(names)
    expected = "--ignore nothing: no Linear of the blocks" if ignore == "nothing" else "the text is read"
    assert f"bpdq: error: {expected}" in lines[-1]


@pytest.mark.parametrize("is_decoder", [True, False])
def test_a_block_that_sees_later_tokens_is_no_decoders(tmp_path, is_decoder):
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert-generation", **BERT, is_decoder=is_decoder)
    source = from_memory(AutoModelForCausalLM.from_config(config).eval())
    with nullcontext() if is_decoder else pytest.raises(InputError, match="its attention sees later tokens, it is no"):
        check_blocks(source, text_windows(torch.tensor([[1, 2, 3]])))


def test_nan_is_not_written_wherever_it_comes_from(model, tmp_path):
    source = open_model(str(model))
    block = load_block(source, 1, torch.device("cpu"))
    block.input_layernorm.weight[3] = torch.nan
    with pytest.raises(InputError, match=r"model\.layers\.1\.input_layernorm\.weight holds NaN"):
        BlockFiles(source, {}, tmp_path).write(1, block)
    assert not list(tmp_path.iterdir())


def test_held_out_text_without_a_perplexity_makes_no_checkpoint(model, tmp_path, text, capsys):
    shutil.copytree(model, tmp_path / "model")
    tensor("model.norm.weight", lambda t: t.fill_(3e38))(tmp_path / "model")
    argv = ["quantize", tmp_path / "model", "--output", tmp_path / "out", "--calibration", text, "--seq-len", "16"]
    assert main([str(a) for a in [*argv, "--samples", "2", "--output-tokens", "0", "--evaluate", "1"]]) == 2
    assert "--evaluate: perplexity of the held-out text is nan in torch.float32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_integers_are_no_16_bit_model(model, tmp_path, text, capsys):
    shutil.copytree(model, tmp_path / "model")
    tensor(LAYER, lambda t: t.to(torch.int8))(tmp_path / "model")
    argv = ["quantize", tmp_path / "model", "--output", tmp_path / "out", "--calibration", text, "--seq-len", "16"]
    assert main([str(a) for a in argv]) == 2
    assert f"{LAYER} holds integers: start from the 16-bit model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.attn.masked_bias",
        "model.layers.0.attention.bias",
        "model.position_ids",
        "model.layers.0.self_attn.k_scale",
        "mtp.fc.weight",
    ],
)
def test_what_a_model_computes_itself_needs_no_place(model, tmp_path, name):
    shutil.copytree(model, tmp_path / "model")
    more(name)(tmp_path / "model")
    open_model(str(tmp_path / "model"))
    load_model(str(tmp_path / "model"))


def test_what_transformers_knows_to_leave_out_needs_no_place(model, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    more("model.sight.weight")(tmp_path / "model")
    with pytest.raises(InputError, match=r"model\.sight\.weight has no place"):
        load_model(str(tmp_path / "model"))
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^model\.sight\."])
    open_model(str(tmp_path / "model"))
    load_model(str(tmp_path / "model"))


def test_two_shards_are_one_model(model, tmp_path):
    """And an index may speak of tensors that no file holds, as of an LM head that is tied."""
    shutil.copytree(model, tmp_path / "model")
    two_shards(lambda first, second, places: places.update({"lm_head.bias": places[next(iter(second))]}))(
        tmp_path / "model"
    )
    found = load_model(str(tmp_path / "model")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in load_model(str(model)).state_dict().items())
    open_model(str(tmp_path / "model"))


def test_the_case_of_gguf_does_not_matter(tmp_path):
    (tmp_path / "M.GGUF").write_bytes(b"GGUF")
    assert gguf_arguments(str(tmp_path / "M.GGUF"))["gguf_file"] == "M.GGUF"
    with pytest.raises(InputError, match=r"N\.GGUF: no such file"):
        gguf_arguments(str(tmp_path / "N.GGUF"))


def test_a_data_set_needs_a_name(model, tmp_path, capsys):
    argv = ["quantize", model, "--output", tmp_path / "out", "--seq-len", "32", "--calibration", "hf:"]
    assert main([str(a) for a in argv]) == 2
    assert "--calibration hf:: expected self, self:MODEL, FILE.txt, FILE.jsonl, hf:NAME" in capsys.readouterr().err


def test_a_gguf_file_in_capitals_is_quantized(tmp_path):
    model = gguf_file(tiny_model(tmp_path / "qwen2", "qwen2"), tmp_path / "TINY.GGUF")
    (tmp_path / "text.txt").write_text(TEXT)
    options = {"calibration": str(tmp_path / "text.txt"), "samples": 2, "seq_len": 32, "iterations": 1}
    bpdq_quantizer.quantize(model, tmp_path / "out", solver="paper", **options)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
