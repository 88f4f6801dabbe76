"""The fast kernels under the other versions of Triton that pyproject.toml allows: compiled, executed on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("version", ["3.6.0", "3.8.0"])
def test_kernels_neither_spill_nor_emulate_and_agree_with_the_oracle_under_triton(version: str, tmp_path: Path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, f"triton=={version}"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    used = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.run(used, env=environment, capture_output=True, text=True).stdout.strip() == version
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = ["tests/test_tiled_linear.py", "tests/test_tiled_moe.py"]
    ptx = subprocess.run([*tests, *files, "-k", "ptx_for_rtx_3090"], env=environment)
    architectures = subprocess.run([*tests, "-m", "slow or not slow", "tests/test_architectures.py"], env=environment)
    assert (ptx.returncode, architectures.returncode) == (0, 0)
