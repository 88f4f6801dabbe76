"""What is built to be installed elsewhere: every file of the packages, and commands without compiler and vLLM."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from tiny import bpdq_checkpoint, tiny_model

ROOT = Path(__file__).parent.parent
PACKAGES = {"vllm_bpdq": ROOT, "bpdq_kernels": ROOT / "kernels", "bpdq_quantizer": ROOT / "quantizer"}
SOURCES = (".py", ".cpp", ".h", ".typed")
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, 'build_' + sys.argv[1])(sys.argv[2]))"


def copied() -> list[str]:
    """What the Dockerfile copies, which is what a wheel is built of."""
    lines = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return [name for line in lines for name in line.split()]


def test_the_image_is_of_a_vllm_that_the_plugin_promises():
    (version,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    (promised,) = re.findall(r'^cuda = \["vllm(.+)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version in SpecifierSet(promised)
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert allowed == set(copied())


def built(kind: str, source: Path, to: Path) -> Path:
    """Build `sdist` or `wheel` as pip and `python -m build` do, with the build backend that is installed."""
    to.mkdir()
    done = subprocess.run([sys.executable, "-c", BUILD, kind, str(to)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to / done.stdout.splitlines()[-1]


def without_caches(folder: Path) -> Path:
    for cache in [*folder.rglob("__pycache__"), *folder.rglob("*.egg-info")]:
        shutil.rmtree(cache)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of what the Dockerfile copies, so that no build folder comes into the working tree."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    source.mkdir()
    for name in copied():
        path = ROOT / name
        shutil.copytree(path, source / name) if path.is_dir() else shutil.copy(path, source / name)
    return built("wheel", without_caches(source), source.parent / "dist")


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(root).as_posix()
        for package, root in PACKAGES.items()
        for path in (root / package).rglob("*")
        if path.suffix in SOURCES
    }
    assert {name for name in names if ".dist-info" not in name} == expected
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel_and_holds_the_tests(wheel, tmp_path):
    leave = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "__pycache__", ".*_cache", "build", "dist")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=leave)
    with tarfile.open(built("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("vllm_bpdq-*")
    for name in ("CHANGELOG.md", "docs/models.md", "tests/tiny.py", "tests/ptx/parse.py", "benchmarks/serve_bench.py"):
        assert (unpacked / name).is_file(), name
    again = built("wheel", unpacked, tmp_path / "wheel")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_an_installed_wheel_runs_without_compiler_and_vllm(wheel, tmp_path):
    """Before all others on Python's path, with the dependencies of this environment but for vLLM, which can't be
    imported."""
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([str(part) for part in pip], check=True)
    (site / "vllm.py").write_text("raise ImportError('vLLM is not installed')\n")
    model = tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    checkpoint = bpdq_checkpoint(model, tmp_path / "checkpoint")
    env = {name: value for name, value in os.environ.items() if name not in ("PATH", "CC", "CXX", "PYTHONPATH")}
    env |= {"PYTHONPATH": str(site), "PATH": str(tmp_path / "none"), "HOME": str(tmp_path)}

    def run(*argv: str) -> str:
        done = subprocess.run([sys.executable, *argv], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (command,) = (site / "bin").iterdir()
    assert command.name == "bpdq"
    assert "quantize" in run(str(command), "--help")
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert run(str(command), "--version") == f"bpdq {version}\n"
    assert "to quantize: " in run(str(command), "plan", str(model))
    assert "LlamaForCausalLM" in run(str(command), "inspect", str(checkpoint))
    code = (
        "from importlib.metadata import entry_points; import bpdq_quantizer; print(bpdq_quantizer.__file__);"
        "print({e.load().__module__ for e in entry_points(group='vllm.general_plugins') if e.name == 'bpdq'})"
    )
    file, plugin = run("-c", code).splitlines()
    assert Path(file).is_relative_to(site)
    assert plugin == "{'vllm_bpdq'}"
