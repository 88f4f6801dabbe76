"""From a model folder to a BPDQ checkpoint: load, calibrate, quantize block by block, save."""

import dataclasses
import resource
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bpdq_kernels.format import Scheme
from bpdq_quantizer import checkpoint
from bpdq_quantizer.blocks import decoder_blocks, linear_layers, quantize_blocks
from bpdq_quantizer.calibration import calibration_windows
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.loader import load_model, load_tokenizer

ALPHA = 1e-6  # ridge, relative to the mean diagonal of a row's normal equations
REFINEMENTS = 2  # rounds of `refine` after the paper's pass
DAMPING = 0.05  # of the mean of diag(H)


def quantize(
    model: str,
    output: str | Path,
    *,
    bits: int = 2,
    group_size: int = 128,
    calibration: str = "default",
    samples: int = 128,
    seq_len: int = 2048,
    iterations: int = 10,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Quantize a Hugging Face folder, hub id or `.gguf` file to a BPDQ checkpoint folder `output`.

    calibration: `default`, FILE.txt, FILE.jsonl or hf:NAME, cut into `samples` windows of `seq_len` tokens;
    device: `auto`, `cpu` or `cuda`. Embeddings, norms, biases and the LM head stay in 16 bits. Returns the report
    that is also saved as quantization_report.json. Raises InputError for input that can't be used; the folder
    `output` appears only when everything is written.
    """
    options = {k: v for k, v in locals().items() if k not in ("model", "output")}
    scheme = _scheme(bits, group_size)
    if min(samples, seq_len, iterations) < 1:
        raise InputError("--samples, --seq-len and --iterations must be at least 1")
    target = _device(device)
    torch.manual_seed(seed)
    started, cpu_started = time.perf_counter(), time.process_time()
    with checkpoint.new_folder(Path(output)) as folder:
        tokenizer = load_tokenizer(model)
        tokens = calibration_windows(calibration, tokenizer, samples, seq_len, seed)
        if len(tokens) < samples:
            tqdm.write(f"{calibration}: holds {len(tokens)} windows of {seq_len} tokens, --samples asked for {samples}")
        lm = _load_plain(model)
        _, blocks = decoder_blocks(lm)
        weights = sum(m.weight.numel() for m in linear_layers(blocks).values())
        layers = []
        with tqdm(total=weights, unit="weight", unit_scale=True, desc="quantizing") as bar:
            solver = {"iterations": iterations, "refinements": REFINEMENTS, "alpha": ALPHA, "damping": DAMPING}
            for layer in quantize_blocks(lm, tokens, scheme, target, **solver):
                layers.append(layer)
                bar.update(layer.in_features * layer.out_features)
                bar.set_postfix_str(f"{layer.name} loss {layer.loss:.3g} ({layer.relative_error:.2%})")
        report = {
            "model": model,
            "options": options,
            "calibration_tokens": tokens.numel(),
            "bits_per_weight": scheme.bits_per_weight,
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "layers": [dataclasses.asdict(layer) for layer in layers],
        }
        quantized = {layer.name for layer in layers}
        ignore = [name for name in linear_layers(lm) if name not in quantized]
        checkpoint.save(
            folder, lm, tokenizer, checkpoint.quantization_config(scheme, iterations, ALPHA, ignore), report
        )
    return report


def _scheme(bits: int, group_size: int) -> Scheme:
    try:
        return Scheme(bits, group_size)
    except ValueError as e:
        raise InputError(f"--bits / --group-size: {e}") from None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device, use --device cpu")
    return torch.device(name)


def _load_plain(model: str) -> Any:
    is_gguf = model.endswith(".gguf")
    lm = load_model(model, torch.bfloat16 if is_gguf else "auto")  # a GGUF file does not say which float was its own
    if getattr(lm, "is_quantized", False) and not is_gguf:
        raise InputError(f"{model} is quantized already: start from the 16-bit model")
    return lm
