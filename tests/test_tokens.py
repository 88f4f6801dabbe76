"""Tokenizers: the ids of tokenizer.json, special tokens before each window, and tokens that a model does not have."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import bpdq_quantizer
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model import calibration
from bpdq_quantizer.model.calibration import calibration_windows, file_windows
from bpdq_quantizer.model.support import check_tokens, most_positions
from bpdq_quantizer.model.tokens import PROBES, leading_tokens, load_tokenizer
from bpdq_quantizer.model.windows import all_tokens, text_windows
from bpdq_quantizer.run import prepare
from tiny import TEXT, tiny_model, tiny_tokenizer

QUICK = ["--samples", "4", "--seq-len", "32", "--iterations", "1", "--group-size", "64", "--solver", "paper"]


def with_bos(count: int = 1) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with `count` tokens before every text and one after it; they are the first of the table."""
    tokenizer = tiny_tokenizer()
    names = [tokenizer.convert_ids_to_tokens(i) for i in range(5, 5 + count)]
    template = processors.TemplateProcessing(
        single=" ".join([*names, "$A", "</s>"]),
        special_tokens=[*zip(names, range(5, 5 + count), strict=True), ("</s>", 0)],
    )
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer adds a token, and a text."""
    root = tmp_path_factory.mktemp("tokens")
    tiny_model(root / "model")
    with_bos().save_pretrained(root / "model")
    (root / "text.txt").write_text(TEXT * 4)
    return root


@pytest.mark.parametrize("count", [0, 1, 2])
def test_what_a_tokenizer_puts_before_a_text_is_found(count):
    assert leading_tokens(with_bos(count), "auto") == [5, 6][:count]
    assert leading_tokens(with_bos(count), "none") == []


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize("lead", [[], [5], [5, 6]])
def test_each_window_begins_with_it_and_holds_the_text_in_order(tmp_path, suffix, lead):
    path, tokenizer = tmp_path / f"a.{suffix}", tiny_tokenizer()
    path.write_text(TEXT if suffix == "txt" else json.dumps({"text": TEXT}))
    found = all_tokens(calibration_windows(str(path), tokenizer, 3, 16, 0, lead))
    assert found.shape == (3, 16)
    assert found[:, : len(lead)].tolist() == [lead] * 3
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert found[:, len(lead) :].flatten().tolist() == ids[: 3 * (16 - len(lead))]


def test_a_window_without_room_for_text_is_refused(folder):
    with pytest.raises(InputError, match="--seq-len 2: 2 of it are what the tokenizer puts before a text"):
        file_windows(str(folder / "text.txt"), tiny_tokenizer(), 2, 3, [5, 6])


@pytest.mark.parametrize("option", ["auto", "none"])
def test_eval_predicts_all_of_the_text_after_the_special_token(folder, capsys, option):
    argv = ["eval", folder / "model", "--text", folder / "text.txt", "--seq-len", "20", "--windows", "3", "--json"]
    assert main([str(a) for a in (*argv, "--special-tokens", option)]) == 0
    line, found = capsys.readouterr().out.splitlines()[-2:]
    found = json.loads(found)
    lead = [5] if option == "auto" else []
    ids = tiny_tokenizer()(TEXT, add_special_tokens=False)["input_ids"]
    model, nll = AutoModelForCausalLM.from_pretrained(folder / "model"), []
    for i in range(3):
        window = torch.tensor([lead + ids[i * (20 - len(lead)) : (i + 1) * (20 - len(lead))]])
        with torch.inference_mode():
            log_p = model(window).logits[0].log_softmax(-1)
        nll += [-log_p[t, window[0, t + 1]].item() for t in range(19)]
    assert found["perplexity"] == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    names = tiny_tokenizer().convert_ids_to_tokens(lead)
    assert found["special_tokens"] == names
    assert (f"begins with {names[0]}" if lead else "no special tokens") in line


def test_several_special_tokens_are_not_predicted(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    window = torch.tensor([[5, 6, 40, 41, 42]])
    with torch.inference_mode():
        log_p = model(window).logits[0].log_softmax(-1)
    nll = [-log_p[t, window[0, t + 1]].item() for t in (1, 2, 3)]
    assert bpdq_quantizer.perplexity(model, window, 2) == pytest.approx(math.exp(sum(nll) / 3), rel=1e-4)


def test_a_report_says_what_its_windows_begin_with(folder, tmp_path, capsys):
    argv = ["quantize", folder / "model", "--calibration", folder / "text.txt", *QUICK]
    for option, names in (("auto", tiny_tokenizer().convert_ids_to_tokens([5])), ("none", [])):
        assert main([str(a) for a in (*argv, "--output", tmp_path / option, "--special-tokens", option)]) == 0
        report = json.loads((tmp_path / option / "quantization_report.json").read_text())
        assert (report["special_tokens"], report["options"]["special_tokens"]) == (names, option)


def test_tokenizer_json_decides_where_transformers_class_changes_it(tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(str(tmp_path))
    for text in (*PROBES, TEXT):
        assert found(text, add_special_tokens=False)["input_ids"] == own.encode(text, add_special_tokens=False).ids
    assert "LlamaTokenizer changes the token ids of tokenizer.json" in capsys.readouterr().err
    assert found.chat_template == tiny_tokenizer().chat_template
    found.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(TEXT)["input_ids"] == own.encode(TEXT).ids


def test_nothing_is_said_where_they_agree(folder, capsys):
    load_tokenizer(str(folder / "model"))
    assert capsys.readouterr().err == ""


def test_a_whole_text_beyond_memory_is_refused(folder, monkeypatch):
    path, tokenizer = str(folder / "text.txt"), tiny_tokenizer()
    monkeypatch.setattr(calibration, "WHOLE", len(TEXT * 4))
    assert len(file_windows(path, tokenizer, 16, None)) > 3
    monkeypatch.setattr(calibration, "WHOLE", len(TEXT * 4) - 1)
    with pytest.raises(InputError, match=r"text\.txt: more than .* characters: say how much of it with --windows"):
        file_windows(path, tokenizer, 16, None)
    assert len(file_windows(path, tokenizer, 16, 3)) == 3


@pytest.mark.parametrize("command", ["quantize", "eval"])
def test_tokens_and_positions_that_the_model_does_not_have_are_named(tmp_path, text, capsys, command):
    config = AutoConfig.for_model(
        "opt", hidden_size=64, ffn_dim=96, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=64,
        vocab_size=300, max_position_embeddings=32, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = {"quantize": ["--output", tmp_path / "out", "--calibration", text], "eval": ["--text", text]}[command]
    for rows, length, message in (
        (300, 16, r"but the model's embedding has 300 rows: the tokenizer is another model's"),
        (384, 33, "--seq-len 33: OPTForCausalLM knows 32 positions: lower --seq-len"),
    ):
        model.resize_token_embeddings(rows)
        model.save_pretrained(tmp_path / "model")
        assert main([str(a) for a in (command, tmp_path / "model", *options, "--seq-len", length)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "eval", "reference"])
@pytest.mark.parametrize("length", [["--seq-len", "513"], []])
def test_a_window_is_not_longer_than_rotary_positions_reach(tmp_path, capsys, monkeypatch, command, length):
    monkeypatch.setattr(prepare, "_read", lambda *_: pytest.fail("work has begun"))
    (tmp_path / "long.txt").write_text(TEXT * 80)
    model = tiny_model(tmp_path / "model")
    argv = {
        "quantize": ["quantize", model, "--output", tmp_path / "out", "--calibration", tmp_path / "long.txt"],
        "eval": ["eval", model, "--text", tmp_path / "long.txt", "--windows", "1"],
        "reference": ["eval", model, "--reference", model, "--text", tmp_path / "long.txt", "--windows", "1"],
    }[command]
    assert main([str(a) for a in [*argv, *length]]) == 2
    given = length[1] if length else 2048
    assert f"--seq-len {given}: LlamaForCausalLM knows 512 positions: lower --seq-len to 512" in capsys.readouterr().err


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("arch", "config", "positions"),
    [
        ("llama", {}, 512),
        ("llama", {"rope_parameters": YARN}, 1024),
        ("llama", {"rope_parameters": YARN | {"original_max_position_embeddings": 128}}, 512),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 1024),
        ("llama", {"rope_parameters": LLAMA3}, 512),
        ("gemma3_text", {}, 512),
        ("falcon", {"alibi": True}, None),
        ("bloom", {}, None),
    ],
)
def test_positions_reach_as_far_as_rope_is_stretched(arch, config, positions):
    config = AutoConfig.for_model(arch, num_hidden_layers=1, max_position_embeddings=512, **config)
    with torch.device("meta"):
        assert most_positions(AutoModelForCausalLM.from_config(config)) == positions


def test_a_model_that_does_not_say_what_its_embedding_is_is_refused_by_name(tmp_path):
    """As PP-FormulaNet's of transformers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "model"))

    class Silent(type(model)):
        def get_input_embeddings(self):
            raise NotImplementedError

    model.__class__ = Silent
    with pytest.raises(InputError, match="Silent does not say what its embedding is: not supported"):
        check_tokens(model, text_windows(torch.tensor([[0, 1]])), "text.txt")
