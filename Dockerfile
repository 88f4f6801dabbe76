# An image that serves BPDQ checkpoints on an NVIDIA GPU: vLLM's own image and this project's plugin in it. It has not
# been built yet: written on a machine without Docker.
#
#     docker build -t vllm-bpdq .
#     docker run --gpus all --ipc=host -p 8000:8000 -v ./model-bpdq:/model vllm-bpdq /model
FROM vllm/vllm-openai:v0.32.0

COPY pyproject.toml README.md LICENSE /src/
COPY kernels /src/kernels
COPY quantizer /src/quantizer
COPY vllm_bpdq /src/vllm_bpdq
# torch and transformers are those of the image, which satisfy pyproject.toml
RUN uv pip install --system --no-cache /src

ENTRYPOINT ["vllm", "serve"]
