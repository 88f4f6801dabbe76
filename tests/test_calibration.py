"""Calibration and evaluation text: what is refused, and that reading less of it changes no token."""

import io
import json
import random
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model import calibration
from bpdq_quantizer.model.calibration import calibration_windows, file_windows, first_ids
from bpdq_quantizer.model.windows import all_tokens
from tests.tiny import TEXT, tiny_tokenizer

PIECES = [
    *"abcde\n\t ",
    "the ",
    "plane ",
    "\n\n",
    "  \n",
    " " * 9,
    "12345678",
    "e\u0301",
    "日本",
    "</s>",
    "🙂",
    "!?",
    "aaaa",
]


def split_by_regex() -> PreTrainedTokenizerFast:
    """Byte-level BPE behind the split that GPT-2 does, as most models have."""
    return tiny_tokenizer()


def not_split() -> PreTrainedTokenizerFast:
    """BPE over the whole text as one word, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.train_from_iterator(
        [TEXT.replace(".", "\n")], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def most_likely() -> PreTrainedTokenizerFast:
    """Unigram, which chooses the split that is most likely as a whole."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {make.__name__: make() for make in (split_by_regex, not_split, most_likely)}


def ids_of(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def jsonl(path, *lines: str) -> str:
    path.write_bytes("\n".join(lines).encode())
    return str(path)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), margin=st.sampled_from([32, 100, 1024]), limit=st.integers(1, 3000))
def test_reading_only_what_is_needed_gives_the_tokens_of_the_whole_text(kind, seed, margin, limit):
    draw, tokenizer = random.Random(seed), TOKENIZERS[kind]
    pieces = draw.sample(PIECES, draw.randint(2, len(PIECES)))
    text = "".join(draw.choices(pieces, k=draw.randint(10, 8000)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "MARGIN", margin)
        patch.setattr(calibration, "CHARACTERS", 1)  # so that no more than the margin is to spare
        assert first_ids(io.StringIO(text), tokenizer, limit) == ids_of(text, tokenizer)[:limit]


@pytest.mark.parametrize("limit", [1, 30])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_no_more_of_a_long_text_is_tokenized_than_the_windows_take(tmp_path, suffix, limit):
    tokenizer, lengths = tiny_tokenizer(), []
    text = TEXT * 500  # 900 000 characters

    def watched(part: str, **options: bool) -> dict[str, list[int]]:
        lengths.append(len(part))
        return tokenizer(part, **options)

    path = tmp_path / f"a.{suffix}"
    path.write_text(text if suffix == "txt" else "\n".join(json.dumps({"text": text}) for _ in range(3)))
    found = all_tokens(calibration_windows(str(path), watched, limit, 16, 0))
    assert found.flatten().tolist() == ids_of(text, tokenizer)[: limit * 16]
    assert sum(lengths) < 40_000


def test_evaluation_without_a_limit_takes_the_whole_text(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 20)
    tokenizer = tiny_tokenizer()
    whole = ids_of(TEXT * 20, tokenizer)
    found = file_windows(str(tmp_path / "a.txt"), tokenizer, 8, None)
    assert found.flatten().tolist() == whole[: len(whole) // 8 * 8]


def test_rows_are_packed_in_their_order_up_to_the_last_window(tmp_path):
    texts, tokenizer = ["one plane. ", "", "two planes. " * 5, "three " * 50], tiny_tokenizer()
    path = jsonl(tmp_path / "a.jsonl", *[json.dumps({"text": text}) for text in texts])
    whole = [i for text in texts for i in ids_of(text, tokenizer)]
    assert all_tokens(calibration_windows(path, tokenizer, 4, 8, 0)).flatten().tolist() == whole[:32]


def test_only_a_newline_ends_a_row(tmp_path):
    text, tokenizer = "one \u2028 plane, \u2029 two \u0085 planes", tiny_tokenizer()
    row = json.dumps({"text": text}, ensure_ascii=False)
    path = jsonl(tmp_path / "a.jsonl", row + "\r", "", row)
    assert all_tokens(calibration_windows(path, tokenizer, 1, 8, 0)).flatten().tolist() == ids_of(text, tokenizer)[:8]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, suffix):
    path, tokenizer = tmp_path / f"a.{suffix}", tiny_tokenizer()
    path.write_text(TEXT if suffix == "txt" else json.dumps({"text": TEXT}), encoding="utf-8-sig")
    assert (
        all_tokens(calibration_windows(str(path), tokenizer, 1, 8, 0)).flatten().tolist() == ids_of(TEXT, tokenizer)[:8]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": null}', "expected a `text` field that holds a string: give it one, or drop the row"),
        ('{"text": ["a", "b"]}', "expected a `text` field that holds a string"),
        ('{"text": 7}', "expected a `text` field that holds a string"),
        ('{"txt": "no"}', "expected a `text` field that holds a string"),
        ('["text"]', "not a JSON object"),
        ("None", "not a JSON object"),
        ('{"text": "ends', "not a JSON object"),
        ("[" * 200_000, "not a JSON object"),
        ('{"text": "half \\ud800 of a pair"}', "its text holds half of a surrogate pair, \\ud800"),
    ],
)
def test_a_row_without_usable_text_is_refused_with_its_line(tmp_path, row, message):
    path = jsonl(tmp_path / "a.jsonl", '{"text": "fine"}', "", row)
    with pytest.raises(InputError) as error:
        calibration_windows(path, tiny_tokenizer(), 4, 8, 0)
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_that_is_not_utf_8_is_refused_in_one_line(tmp_path):
    for suffix, place in (("txt", ""), ("jsonl", ", line 1")):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes('{"text": "café"}'.encode("latin-1"))
        with pytest.raises(InputError) as error:
            calibration_windows(str(path), tiny_tokenizer(), 4, 8, 0)
        assert str(error.value).startswith(f"{path}{place}: not UTF-8 text (byte 0xe9): convert")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_said_to_be_empty(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: holds no text"):
        calibration_windows(str(tmp_path / name), tiny_tokenizer(), 4, 8, 0)


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in (("no.jsonl", "no such file"), ("no.txt", "no such file"), ("folder.jsonl", "can't be read")):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            calibration_windows(str(tmp_path / name), tiny_tokenizer(), 4, 8, 0)


class Rows(list):
    """A streamed data set."""

    def shuffle(self, seed: int, buffer_size: int) -> "Rows":
        return self


@pytest.fixture
def hub(monkeypatch):
    """Data sets by name, configuration and split."""
    found: dict[tuple[str, str | None, str], Rows] = {}

    def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Rows:
        assert streaming
        return found[name, config, split]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return found


def conversation(*said: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), said, strict=True)]


def test_a_data_set_is_read_up_to_the_last_window_and_its_null_rows_are_refused(hub):
    hub["web", None, "train"] = Rows({"text": text} for text in (TEXT, TEXT, None))
    tokenizer = tiny_tokenizer()
    whole = ids_of(TEXT, tokenizer)
    found = all_tokens(calibration_windows("hf:web", tokenizer, 1, len(whole) + 16, 0))
    assert found.flatten().tolist() == whole + whole[:16]
    with pytest.raises(InputError) as error:
        calibration_windows("hf:web", tokenizer, 9999, 16, 0)
    assert str(error.value).startswith("hf:web, row 3 of the shuffled train split: expected a `text` field")


def test_the_messages_of_a_data_set_go_through_the_chat_template(hub):
    messages, tokenizer = conversation("How many planes?", "Two. " * 9), tiny_tokenizer()
    hub["chats", "small", "train"] = Rows([{"messages": messages}])
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    found = all_tokens(calibration_windows("hf:chats:small", tokenizer, 1, 32, 0))
    assert text.startswith("user: How many planes?\nassistant: Two.")
    assert found.flatten().tolist() == ids_of(text, tokenizer)[:32]


@settings(deadline=None)
@given(
    said=st.lists(st.text("abc .", max_size=30), min_size=3, max_size=8),
    seq_len=st.integers(2, 40),
    lead=st.lists(st.sampled_from([0, 5]), max_size=1),
)
def test_rows_of_a_data_set_are_windows_as_those_of_a_file(tmp_path_factory, said, seq_len, lead):
    """By a chat template that begins with what the windows begin with, which none then has twice."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ eos_token }}" + tokenizer.chat_template
    found_rows = [{"messages": [{"role": "user", "content": text}]} for text in said]
    path = jsonl(tmp_path_factory.mktemp("rows") / "a.jsonl", *map(json.dumps, found_rows))
    data = types.SimpleNamespace(load_dataset=lambda *_, **__: Rows(found_rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", data)
        found, expected = (
            all_tokens(calibration_windows(source, tokenizer, 9, seq_len, 0, lead)).tolist()
            for source in ("hf:chats", path)
        )
    assert found == expected
    if lead == [tokenizer.eos_token_id]:
        assert found[0][1] != lead[0]


@pytest.mark.parametrize("error", [RuntimeError("Dataset scripts are no longer supported"), KeyError("text")])
@pytest.mark.parametrize(("source", "name"), [("hf:web", "web"), ("preset:general", "allenai/c4")])
def test_a_data_set_that_can_not_be_read_is_named(monkeypatch, source, name, error):
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match=f"--calibration {source}: {name} can't be read as a data set"):
        calibration_windows(source, tiny_tokenizer(), 1, 16, 0)


def test_a_preset_takes_a_row_of_each_data_set_in_turn(hub):
    hub["allenai/c4", "en", "train"] = Rows([{"text": "a b c "}, {"text": "d e f "}])
    hub["HuggingFaceFW/fineweb-edu", "sample-10BT", "train"] = Rows([{"text": "1 2 3 "}, {"text": "4 5 6 "}])
    tokenizer = tiny_tokenizer()
    ids = ids_of("a b c 1 2 3 d e f 4 5 6 ", tokenizer)
    assert all_tokens(calibration_windows("preset:general", tokenizer, 1, len(ids), 0)).flatten().tolist() == ids


CODE = "m-a-p/CodeFeedback-Filtered-Instruction", None, "train"
CHAT = "HuggingFaceH4/ultrachat_200k", None, "train_sft"


@pytest.mark.parametrize("chat", [True, False])
def test_conversations_of_presets_are_as_the_model_reads_them(hub, chat):
    """By its chat template, or one turn below the other for a model without."""
    question, answer = "Sort a list of planes.", "planes.sort() " * 9
    hub[CODE] = Rows([{"query": question, "answer": answer, "lang": "python"}])
    hub[CHAT] = Rows([{"prompt": "?", "messages": conversation(question, answer)}])
    tokenizer = tiny_tokenizer()
    text = tokenizer.apply_chat_template(conversation(question, answer), tokenize=False)
    if not chat:
        tokenizer.chat_template, text = None, f"{question}\n\n{answer}"
    for preset in ("preset:code", "preset:chat"):
        found = all_tokens(calibration_windows(preset, tokenizer, 1, 48, 0))
        assert found.flatten().tolist() == ids_of(text, tokenizer)[:48]


@pytest.mark.parametrize("chat", [True, False])
def test_conversations_of_another_shape_are_refused_with_their_row(hub, chat):
    hub[CODE] = Rows([{"query": "Sort a list.", "answer": None}])
    hub["chats", None, "train"] = Rows([{"messages": [{"from": "human", "value": "a"}]}])
    tokenizer = tiny_tokenizer()
    if not chat:
        tokenizer.chat_template = None
    with pytest.raises(InputError, match=f"^hf:{CODE[0]}, row 1 of the shuffled train split: message 2 has no text"):
        calibration_windows("preset:code", tokenizer, 1, 16, 0)
    with pytest.raises(InputError, match=r"^hf:chats, row 1 of the shuffled train split: message 1 is no object"):
        calibration_windows("hf:chats", tokenizer, 1, 16, 0)


def test_a_preset_that_there_is_not_is_refused_with_those_there_are(hub):
    with pytest.raises(InputError, match="--calibration preset:maths: there are general, code, chat"):
        calibration_windows("preset:maths", tiny_tokenizer(), 1, 16, 0)
