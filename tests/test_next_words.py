"""A task made of any text, as lm-eval runs it."""

import json

import pytest

from benchmarks import next_words
from bpdq_quantizer.cli import main
from tiny import bpdq_checkpoint, tiny_model


def lines(count: int, words: int = 60) -> str:
    return "".join(" ".join(f"w{line}.{word}" for word in range(words)) + "\n" for line in range(count))


def test_one_of_four_choices_follows_and_the_others_are_of_other_lines(tmp_path):
    (tmp_path / "text.txt").write_text(lines(9) + "too short\n")
    assert next_words.main([str(tmp_path / "text.txt"), "--questions", "7", "--output", str(tmp_path / "tasks")]) == 0
    found = [json.loads(line) for line in (tmp_path / "tasks" / "next_words.jsonl").read_text().splitlines()]
    assert len(found) == 7
    for question in found:
        line = question["before"].split(".")[0]
        assert question["before"].split() == [f"{line}.{word}" for word in range(40)]
        assert question["choices"][question["answer"]].split() == [f"{line}.{word}" for word in range(40, 52)]
        assert len({choice.split(".")[0] for choice in question["choices"]}) == 4


@pytest.mark.parametrize("text", [None, lines(3), lines(9, words=51)])
def test_a_text_that_gives_no_question_is_one_line(tmp_path, capsys, text):
    file = tmp_path / "text.txt"
    if text is not None:
        file.write_text(text)
    assert next_words.main([str(file), "--output", str(tmp_path / "tasks")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"next_words: error: {file}: ")
    assert not (tmp_path / "tasks").exists()


def test_eval_takes_it(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(lines(6))
    next_words.main([str(tmp_path / "text.txt"), "--output", str(tmp_path / "tasks")])
    checkpoint = bpdq_checkpoint(tiny_model(tmp_path / "model"), tmp_path / "checkpoint")
    argv = ["eval", checkpoint, "--text", tmp_path / "text.txt", "--seq-len", "40", "--windows", "1"]
    argv += ["--tasks", "next_words", "--task-folder", tmp_path / "tasks", "--json"]
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tasks"]["next_words acc"] in [i / 6 for i in range(7)]
