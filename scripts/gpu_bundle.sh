#!/usr/bin/env bash
# Collects into .gpu-bundle/ what a GPU machine without a network lacks to run vLLM: an x86-64 Linux with Python 3.12,
# torch 2.11 for CUDA 13, Triton, transformers, accelerate, numba, pytest and matplotlib. There:
#     python -m pip install --no-index --no-deps --target SITE .gpu-bundle/*.whl
#     tar -xzf .gpu-bundle/vllm-python.tar.gz -C SITE
#     export PYTHONPATH=SITE:.:quantizer:kernels
# PYTHON names the interpreter that runs pip here (default .venv/bin/python). Downloads 370 MB, keeps about 55.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM=0.32.0 # of the releases that the plugin supports, the one whose torch is nearest to 2.11
TORCHVISION=0.26.0 # belongs to torch 2.11
MAX_MIB=60
bundle=.gpu-bundle
python=${PYTHON:-.venv/bin/python}

# What `from vllm import LLM` and a run import beyond that machine's packages; the bounds are vLLM's.
packages=(
    aiohappyeyeballs aiohttp aiosignal annotated-doc annotated-types apache-tvm-ffi attrs backports.tarfile cachetools
    cbor2 charset-normalizer cloudpickle compressed-tensors==0.17.0 dill einops email-validator
    'fastapi>=0.133,<0.137' frozenlist gguf googleapis-common-protos httpcore2 httpx2 jaraco.classes jaraco.context
    jaraco.functools 'llguidance>=1.7,<1.8' loguru more-itertools msgspec multidict openai opentelemetry-api
    opentelemetry-exporter-otlp opentelemetry-proto opentelemetry-sdk opentelemetry-semantic-conventions oss-harmony
    partial-json-parser prometheus-client propcache psutil py-cpuinfo pybase64 pydantic pydantic-extra-types
    python-multipart pyzmq requests setproctitle sniffio starlette truststore typing-inspection urllib3 uvloop
    xgrammar==0.2.8 yarl
)
pip=("$python" -m pip --quiet --disable-pip-version-check --no-input)
target=(--only-binary :all: --implementation cp --python-version 3.12)
for tag in manylinux1 manylinux2014 manylinux_2_5 manylinux_2_17 manylinux_2_24 manylinux_2_26 manylinux_2_27 \
    manylinux_2_28 manylinux_2_31; do
    target+=(--platform "${tag}_x86_64")
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$bundle"
mkdir "$bundle"
echo "Downloading ${#packages[@]} packages, vLLM $VLLM and torchvision $TORCHVISION" >&2
"${pip[@]}" download "${target[@]}" --no-deps --dest "$work" "vllm==$VLLM" "torchvision==$TORCHVISION"
"${pip[@]}" download "${target[@]}" --no-deps --dest "$bundle" "${packages[@]}"
# the one version of the compiled half that pydantic accepts
core=$(unzip -p "$bundle"/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==/pydantic-core==/p')
"${pip[@]}" download "${target[@]}" --no-deps --dest "$bundle" "$core"
"$python" -m scripts.gpu_bundle "$bundle/vllm-python.tar.gz" "$work"/vllm-*.whl "$work"/torchvision-*.whl

bytes=$(du --bytes --summarize "$bundle" | cut -f 1)
echo "$bundle: $((bytes >> 20)) MiB in $(find "$bundle" -type f | wc -l) files"
if ((bytes > MAX_MIB << 20)); then
    echo "gpu_bundle.sh: error: more than $MAX_MIB MiB, which is too large to bring along" >&2
    exit 1
fi
