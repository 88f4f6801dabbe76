"""Cut the CUDA wheels of vLLM and torchvision down to what fits a small bundle.

    python -m scripts.gpu_bundle ARCHIVE VLLM_WHEEL TORCHVISION_WHEEL

writes ARCHIVE (.tar.gz) with both Python trees and three of their compiled libraries: vLLM's ops and FlashAttention 3,
which use torch's stable ABI and so load in other torch versions than the one vLLM asks for, and torchvision's ops,
without which some of vLLM's models cannot be imported. A library's kernels lie in fatbins, one binary for each
architecture; all but those that a card of sm_90 runs with bf16 activations and heads of 128 are blanked. Of vLLM's
metadata only its version remains, from which it takes its platform: CUDA, as there is no `+cpu`.
"""

import io
import re
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

ARCH = 90
LIBRARIES = {
    "vllm/_C_stable_libtorch.abi3.so",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "torchvision/_C.so",
}
LEFT_OUT = (  # servers, and the generators of other kernels
    "vllm/vllm-rs/",
    "vllm/benchmarks/",
    "vllm/vllm_flash_attn/cute/",
    *(f"vllm/third_party/{name}/" for name in ("deep_gemm", "fmha_sm100", "tml_fa4", "triton_kernels")),
)
SUFFIXES = (".py", ".json", ".jinja")
ALSO = re.compile(r"torchvision\.libs/libcudart|torchvision-[^/]*/")

# fatbinary.h: {magic, version, header size, size}, then entries {kind, -, header size, size, ..., architecture at 28}
FATBIN = struct.Struct("<IHHQ")
ENTRY = struct.Struct("<HHIQ")
MAGIC, VERSION = 0xBA55ED50, 1
CUBIN, ARCH_OFFSET = 2, 28
UNUSED_ATTENTION = re.compile(rb"flash_fwd_hdim(?!128_bf16)|_softcap_")


def strip(library: bytes) -> bytes:
    """`library` of the same size, with zeros for kernels that are not for ARCH or are of attention never run here."""
    data = bytearray(library)
    start = data.find(struct.pack("<I", MAGIC))
    while start >= 0:
        _, version, header, size = FATBIN.unpack_from(data, start)
        if version == VERSION and header == FATBIN.size and start + header + size <= len(data):
            _strip_fatbin(data, start + header, start + header + size)
            start += header + size - 1
        start = data.find(struct.pack("<I", MAGIC), start + 1)
    return bytes(data)


def _strip_fatbin(data: bytearray, position: int, end: int) -> None:
    while position < end:
        kind, _, header, size = ENTRY.unpack_from(data, position)
        (arch,) = struct.unpack_from("<I", data, position + ARCH_OFFSET)
        body, position = position + header, position + header + size
        if (kind, arch) != (CUBIN, ARCH) or UNUSED_ATTENTION.search(data, body, position):
            data[body:position] = bytes(size)
            # an older architecture than the card's, which the driver passes over as in any library
            struct.pack_into("<I", data, body - header + ARCH_OFFSET, min(arch, ARCH - 1))


def wanted(name: str) -> bool:
    if name.startswith(("vllm/", "torchvision/")):
        return name in LIBRARIES or (name.endswith(SUFFIXES) and not name.startswith(LEFT_OUT))
    return bool(ALSO.match(name))


def write_archive(archive: str, vllm: str, torchvision: str) -> None:
    files = {}
    for wheel in (vllm, torchvision):
        with zipfile.ZipFile(wheel) as source:
            files |= {name: source.read(name) for name in source.namelist() if wanted(name)}
    if missing := LIBRARIES - set(files):
        raise SystemExit(f"gpu_bundle: error: the wheels have no {', '.join(sorted(missing))}")
    version = Path(vllm).name.split("-")[1]
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    files[f"vllm-{version}.dist-info/METADATA"] = metadata.encode()
    with tarfile.open(archive, "w:gz") as target:
        for name, content in files.items():
            content = strip(content) if name in LIBRARIES else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            target.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        print("usage: python -m scripts.gpu_bundle ARCHIVE VLLM_WHEEL TORCHVISION_WHEEL", file=sys.stderr)
        sys.exit(2)
    write_archive(*sys.argv[1:])
