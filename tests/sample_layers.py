"""Parts of two layers of a real model, for test_quality.py. As a script, makes their file from what `make demo` left:

    .venv/bin/python tests/sample_layers.py demo-output/SmolLM2-135M-Instruct demo-output/calibration.txt

A part of a layer is a layer of its own: some rows W [ROWS, INPUTS] (bf16) and the Hessian of some inputs. Of that,
the lower triangle of its Cholesky factor is kept, row by row, in fp16: its product is positive definite as it comes.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bpdq_quantizer.algorithm.hessian import accumulate, symmetrize
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.model.calibration import file_windows
from bpdq_quantizer.model.tokens import load_tokenizer

FILE = Path(__file__).parent / "data" / "layers.safetensors"
BLOCK = 15
LAYERS = tuple(f"model.layers.{BLOCK}.{name}" for name in ("self_attn.q_proj", "mlp.down_proj"))
ROWS, INPUTS = 64, 256
SOURCE = "SmolLM2-135M-Instruct (Apache-2.0), its 4-bit GGUF file dequantized, 8192 tokens of Wikipedia"


def sample_layers() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """W [ROWS, INPUTS] and H [INPUTS, INPUTS], both fp32, of each of LAYERS."""
    stored = load_file(FILE)
    triangle = torch.tril_indices(INPUTS, INPUTS).unbind()
    layers = {}
    for name in LAYERS:
        L = torch.zeros(INPUTS, INPUTS)
        L[triangle] = stored[f"{name}.factor"].float()
        layers[name] = stored[f"{name}.weight"].float(), L @ L.T
    return layers


@torch.no_grad()
def main(model_folder: str, text: str) -> None:
    tokens = file_windows(text, load_tokenizer(model_folder), 512, 16)
    model = load_model(model_folder, torch.float32)
    del model.base_model.layers[BLOCK + 1 :]
    hessians = {name: torch.zeros(INPUTS, INPUTS) for name in LAYERS}
    for name, H in hessians.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, H=H: accumulate(H, args[0][..., :INPUTS], tokens.numel())
        )
    for window in tokens:
        model.base_model(input_ids=window[None], use_cache=False)
    tensors = {}
    for name, H in hessians.items():
        L = torch.linalg.cholesky(symmetrize(H))
        tensors[f"{name}.factor"] = L[torch.tril_indices(INPUTS, INPUTS).unbind()].half()
        tensors[f"{name}.weight"] = model.get_submodule(name).weight[:ROWS, :INPUTS].bfloat16().contiguous()
    save_file(tensors, FILE, metadata={"source": SOURCE})


if __name__ == "__main__":
    main(*sys.argv[1:])
