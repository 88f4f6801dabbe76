#!/usr/bin/env bash
# Checks everything that needs an NVIDIA GPU (benchmarks/gpu_check.py, whose options it takes): 8 minutes at most.
# With what scripts/gpu_bundle.sh collected in .gpu-bundle it needs no network and takes PYTHON (default python3), which
# must have torch and Triton; otherwise .venv, installed first. Exit status 3: there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
if [[ " $* " == *" --dry-run "* ]]; then
    [[ -x $python ]] || python=${PYTHON:-python3}
    PYTHONPATH=.:quantizer:kernels exec "$python" -m benchmarks.gpu_check "$@"
fi
if ! nvidia-smi >/dev/null 2>&1; then
    echo "gpu-check: no NVIDIA GPU here (nvidia-smi does not answer), so there is nothing to check" >&2
    exit 3
fi
if [[ -d .gpu-bundle ]]; then
    python=${PYTHON:-python3}
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" .gpu-bundle/*.whl
    [[ ! -f .gpu-bundle/vllm-python.tar.gz ]] || tar -xzf .gpu-bundle/vllm-python.tar.gz -C "$site"
    "$python" -m compileall -q -j 0 "$site" >/dev/null || true # by all cores, not by the first engine alone
    # vLLM finds its plugin by the metadata of an installed distribution
    mkdir "$site/vllm_bpdq-0.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm-bpdq\nVersion: 0\n' >"$site/vllm_bpdq-0.dist-info/METADATA"
    printf '[vllm.general_plugins]\nbpdq = vllm_bpdq:register\n' >"$site/vllm_bpdq-0.dist-info/entry_points.txt"
    export PYTHONPATH=$site:.:quantizer:kernels
else
    scripts/install.sh
fi
"$python" -m benchmarks.gpu_check "$@"
