"""The bundle that brings vLLM to a GPU machine without a network: what is cut out of its libraries, and what is not."""

import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest

from scripts.gpu_bundle import ENTRY, FATBIN, LIBRARIES, MAGIC, VERSION, strip, write_archive

HEADER = 64


def entry(kind: int, arch: int, body: bytes) -> bytes:
    header = ENTRY.pack(kind, 0x101, HEADER, len(body)) + bytes(12) + struct.pack("<I", arch)
    return header.ljust(HEADER, b"\0") + body


def fatbin(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return FATBIN.pack(MAGIC, VERSION, FATBIN.size, len(body)) + body


@pytest.mark.parametrize(
    ("kind", "arch", "body", "kept"),
    [
        (2, 90, b"norm", True),
        (2, 90, b"..flash_fwd_hdim128_bf16_paged_sm90", True),
        (2, 90, b"..flash_fwd_hdim64_bf16_paged_sm90", False),
        (2, 90, b"..flash_fwd_hdim128_e4m3_sm90", False),
        (2, 90, b"..flash_fwd_hdim128_bf16_softcap_sm90", False),
        (2, 80, b"norm", False),
        (2, 120, b"norm", False),
        (1, 90, b".ptx", False),
    ],
)
def test_a_card_of_sm_90_finds_its_kernels_and_passes_over_the_blanked_ones(kind, arch, body, kept):
    before, after = b"code" * 5, b"more code"
    library = before + fatbin(entry(2, 90, b"first"), entry(kind, arch, body)) + after + fatbin(entry(2, 90, b"last"))
    stripped = strip(library)
    assert len(stripped) == len(library), "addresses in the library must not move"
    if kept:
        assert stripped == library
    else:
        blanked = entry(kind, min(arch, 89), bytes(len(body)))
        assert stripped == library.replace(entry(kind, arch, body), blanked)


def test_code_that_only_looks_like_a_fatbin_is_left_alone():
    library = struct.pack("<I", MAGIC) + b"\xff" * 40
    assert strip(library) == library


def wheels(folder, libraries) -> list[str]:
    files = {
        "vllm/__init__.py": "",
        "vllm/_moe_C_stable_libtorch.abi3.so": "another library",
        "vllm/vllm-rs/server": "a binary",
        "vllm-9.1.dist-info/METADATA": "Requires-Dist: torch==9",
        **dict.fromkeys(libraries, "library"),
    }
    paths = {"vllm": folder / "vllm-9.1-cp38-abi3-linux.whl", "torchvision": folder / "torchvision-1.0-cp312-linux.whl"}
    for package, path in paths.items():
        with zipfile.ZipFile(path, "w") as wheel:
            for name, content in files.items():
                if name.startswith(package):
                    wheel.writestr(name, content)
    return [str(path) for path in paths.values()]


def test_the_archive_has_vllms_version_without_its_requirements(tmp_path):
    archive = tmp_path / "vllm-python.tar.gz"
    write_archive(str(archive), *wheels(tmp_path, LIBRARIES))
    with tarfile.open(archive) as opened:
        assert set(opened.getnames()) == {"vllm/__init__.py", "vllm-9.1.dist-info/METADATA", *LIBRARIES}
        metadata = opened.extractfile("vllm-9.1.dist-info/METADATA").read().decode()
    assert "Version: 9.1\n" in metadata
    assert "Requires-Dist" not in metadata


def test_a_wheel_without_a_library_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="have no vllm/_C_stable_libtorch"):
        write_archive(str(tmp_path / "a.tar.gz"), *wheels(tmp_path, LIBRARIES - {"vllm/_C_stable_libtorch.abi3.so"}))


def test_bad_usage_is_one_line_and_status_2():
    run = subprocess.run([sys.executable, "-m", "scripts.gpu_bundle", "one"], capture_output=True, text=True)
    assert run.returncode == 2
    assert len(run.stderr.splitlines()) == 1
