"""What README.md and the pages of docs/ hold: fenced blocks, the commands in them, and code within lines."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


class Block(NamedTuple):
    """A fenced block: where it begins, its language and its text."""

    place: str
    language: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for fence in FENCE.finditer(text):
        indent, language, body = fence.groups()
        line = text[: fence.start()].count("\n") + 1
        yield Block(f"{page.name}:{line}", language, re.sub(f"^{indent}", "", body, flags=re.MULTILINE))


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block, comments and variables before it left out: every line of bash, and of
    console those behind a `$`."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for words in map(words_of, lines) if words]


def words_of(line: str) -> list[str]:
    """A shell command's words, without variables before it."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return words


def code_in_lines(page: Path) -> list[str]:
    """What stands between single backquotes, line breaks as spaces."""
    text = COMMENT.sub("", FENCE.sub("", page.read_text()))
    return [" ".join(code.split()) for code in CODE.findall(text)]
