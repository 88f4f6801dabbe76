"""A task for lm-eval from any text, without a network: which of four ways a line goes on.

    python -m benchmarks.next_words wikitext2-test.txt --output tasks
    bpdq eval CHECKPOINT --reference MODEL --text wikitext2-test.txt --tasks next_words --task-folder tasks

Of a long line a question has the first words; the choices are those that follow, and those that follow as many in three
other lines.
"""

import argparse
import json
import random
import sys
from pathlib import Path

BEFORE, AFTER, CHOICES = 40, 12, 4  # words, and continuations to choose from
TASK = """task: next_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


def main(argv: list[str] | None = None) -> int:
    """Write the task; returns the exit status: 0 done, 2 bad input."""
    args = parse_args(argv)
    try:
        found = questions(args.text.read_text(), args.questions)
    except (OSError, ValueError) as e:
        print(f"next_words: error: {args.text}: {e}", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output.absolute() / "next_words.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in found))
    (args.output / "next_words.yaml").write_text(TASK.format(file=file))
    print(f"{args.output}: {len(found)} questions")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.next_words", description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, metavar="FILE")
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="at most (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("tasks"), metavar="DIR", help="(%(default)s)")
    return parser.parse_args(argv)


def questions(text: str, count: int) -> list[dict[str, str | int | list[str]]]:
    """At most `count` questions: `before`, `choices` and the number `answer` of the right one; the same each time."""
    lines = [words for line in text.splitlines() if len(words := line.split()) >= BEFORE + AFTER]
    if len(lines) < CHOICES:
        raise ValueError(f"fewer than {CHOICES} lines of {BEFORE + AFTER} words: name a longer text")
    chance, found = random.Random(0), []
    after = [" ".join(words[BEFORE : BEFORE + AFTER]) for words in lines]
    for i in sorted(chance.sample(range(len(lines)), min(count, len(lines)))):
        choices = [after[j] for j in chance.sample([j for j in range(len(lines)) if j != i], CHOICES - 1)]
        answer = chance.randrange(CHOICES)
        choices.insert(answer, after[i])
        found.append({"before": " ".join(lines[i][:BEFORE]), "choices": choices, "answer": answer})
    return found


if __name__ == "__main__":
    sys.exit(main())
