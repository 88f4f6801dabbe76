"""Every command of README.md and docs/ is one that its program takes, and every option one that it has."""

import ast
import contextlib
import functools
import importlib
import io
import json
import re
import shlex
from collections.abc import Callable

import pytest
import tomllib
from lm_eval._cli import HarnessCLI
from torch.distributed.run import get_args_parser
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from bpdq_quantizer.cli import _parser
from bpdq_quantizer.run.options import FIELDS
from bpdq_quantizer.run.statistics import OFFERED
from doc_pages import PAGES, ROOT, Block, blocks, code_in_lines, commands, words_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
PATH = re.compile(r"\b(?:tests|benchmarks|scripts|docs|results|quantizer|kernels|vllm_bpdq)/[\w./-]*\w\b")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
PROGRAMS = [f"bpdq {name}" for name in ("quantize", "requantize", "eval", "inspect", "plan", "push")]
TAKEN = {"bpdq_quantizer.quantize": {*FIELDS}, "bpdq_quantizer.requantize": {*OFFERED}}  # keywords
BENCHMARKS = [
    "quality_bench",
    "cpu_bench",
    "kernel_bench",
    "decode_profile",
    "serve_bench",
    "train_mixture",
    "next_words",
    "rounding_peer",
    "gguf_peer",
    "autoround_peer",
    "gpu_vllm",
]
OTHERS = {  # whole commands of programs that are not at hand, read by eye
    "hf auth login",
    "python -m build",
    "twine check --strict 'dist/*'",
    "python -m venv bare",
    "pip install build twine",
    "pip install 'dist/*.whl'",
}


@functools.cache
def vllm_parser() -> FlexibleArgumentParser:
    return make_arg_parser(FlexibleArgumentParser())


def python(words: list[str]) -> None:
    if words[0] == "-c":
        ast.parse(words[1])
    elif words[1].startswith("scripts."):
        assert importlib.util.find_spec(words[1])
        assert not words[2:]
    else:
        importlib.import_module(words[1]).parse_args(words[2:])


def torchrun(words: list[str]) -> None:
    args = get_args_parser().parse_args(words)
    assert args.module
    assert args.training_script == "bpdq_quantizer"
    _parser().parse_args(args.training_script_args)


def make(words: list[str]) -> None:
    assert set(words) <= set(TARGETS)


def pip(words: list[str]) -> None:
    install, what = words
    assert install == "install"
    name, extras = re.fullmatch(r"([\w.-]+)(?:\[([a-z,]+)])?", what).groups()
    assert name in (".", PROJECT["name"])
    assert set((extras or "").split(",")) - {""} <= set(PROJECT["optional-dependencies"])


def docker(words: list[str]) -> None:
    """The image is built here, and what follows its name goes to `vllm serve`, its entry point."""
    assert (ROOT / "Dockerfile").read_text().rstrip().endswith('ENTRYPOINT ["vllm", "serve"]')
    if words[0] == "build":
        assert words == ["build", "-t", "vllm-bpdq", "."]
    else:
        vllm_parser().parse_args(words[words.index("vllm-bpdq") + 1 :])


def curl(words: list[str]) -> None:
    url, body = words[0], json.loads(words[words.index("-d") + 1])
    assert url in ("localhost:8000/v1/completions", "localhost:8000/v1/chat/completions")
    assert body["model"]


def script(words: list[str]) -> None:
    assert set(words) <= {"--dry-run"}


def source(words: list[str]) -> None:
    assert words == [".venv/bin/activate"]


CHECKS: dict[str, Callable[[list[str]], object]] = {
    "bpdq": lambda words: _parser().parse_args(words),
    "vllm": lambda words: vllm_parser().parse_args(words[1:]),
    "lm_eval": lambda words: HarnessCLI()._parser.parse_args(["run", *words]),
    "python": python,
    "torchrun": torchrun,
    "make": make,
    "pip": pip,
    "docker": docker,
    "curl": curl,
    "source": source,
    "scripts/gpu_check.sh": script,
}


def taken(words: list[str], place: str) -> None:
    """Raises AssertionError for a command that its program does not take, or that no check knows."""
    program, *rest = words[0].removeprefix("bare/bin/"), *words[1:]
    if shlex.join([program, *rest]) in OTHERS:
        return
    assert program in CHECKS, f"{place}: no check for {program}"
    try:
        CHECKS[program](rest)
    except SystemExit as e:
        if e.code:
            raise AssertionError(f"{place}: {shlex.join(words)}") from e


SHOWN = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in SHOWN if block.language in ("bash", "console")]


@pytest.mark.parametrize("block", RUN, ids=[block.place for block in RUN])
def test_every_command_is_taken(block):
    found = commands(block)
    assert found, "a block of bash without a command"
    for words in found:
        taken(words, block.place)


def parsed(block: Block) -> None:
    """What is no command: raises SyntaxError or ValueError for what is no Python or JSON."""
    if block.language == "python":
        for call in ast.walk(ast.parse(block.text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in TAKEN:
                assert {keyword.arg for keyword in call.keywords} <= TAKEN[ast.unparse(call.func)]
    elif block.text.startswith('"'):
        json.loads(f"{{{block.text}}}")
    else:
        for line in block.text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("block", SHOWN, ids=[block.place for block in SHOWN])
def test_every_block_says_what_it_is_and_is_it(block):
    assert block.language in ("bash", "console", "python", "json")
    if block not in RUN:
        parsed(block)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_no_block_is_overlooked(page):
    fences = re.findall(r"^ *(?:```|~~~)", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(list(blocks(page)))


@pytest.mark.parametrize("line", ["bpdq plan", "bpdq plan m --contexts 4", "make tests", "wget x", "python -c 'f('"])
def test_what_is_not_taken_is_found(line):
    with pytest.raises((AssertionError, SyntaxError)):
        taken(words_of(line), "here")


@functools.cache
def options_of(program: str) -> set[str]:
    """The options of `vllm serve`, of a command of `bpdq`, or of a benchmark."""
    if program == "vllm serve":
        return {option for action in vllm_parser()._actions for option in action.option_strings}
    words = program.split() if program in PROGRAMS else ["python", "-m", f"benchmarks.{program}"]
    with contextlib.redirect_stdout(io.StringIO()) as help_text, pytest.raises(SystemExit):
        CHECKS[words[0]]([*words[1:], "--help"])
    return set(OPTION.findall(help_text.getvalue()))


def program_of(code: str) -> str | None:
    """Which of those that `options_of` knows the code within a line calls."""
    called = code.replace("python -m benchmarks.", "").split(" ")
    names = [" ".join(called[:2]), called[0]]
    return next((name for name in names if name in [*PROGRAMS, "vllm serve", *BENCHMARKS]), None)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_options_and_files_within_lines_exist(page):
    every = {"--dry-run"}.union(*map(options_of, [*PROGRAMS, "vllm serve", *BENCHMARKS]))
    for code in code_in_lines(page):
        words = words_of(code) if code.startswith(("make ", "pip install")) else []
        if words:
            taken(words, page.name)
        known = options_of(program) if (program := program_of(code)) else every
        if program or code.startswith("--"):
            assert set(OPTION.findall(code)) <= known, f"{page.name}: {code}"
        assert all((ROOT / path).exists() for path in PATH.findall(code)), f"{page.name}: {code}"


def test_an_option_that_a_program_lacks_is_found():
    assert "--target-bpw" in options_of("bpdq quantize") - options_of("bpdq plan")
    assert program_of("python -m benchmarks.quality_bench --methods gptq") == program_of("quality_bench --methods gptq")
    assert program_of("vllm serve DIR") == "vllm serve"
