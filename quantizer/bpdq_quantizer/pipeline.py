"""From a model folder to a BPDQ checkpoint: load, calibrate, quantize block by block, save."""

import dataclasses
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bpdq_kernels.format import Scheme
from bpdq_quantizer import checkpoint
from bpdq_quantizer.blocks import decoder_blocks, linear_layers, quantize_blocks
from bpdq_quantizer.calibration import calibration_windows
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.loader import BPDQLinear, load_model, load_tokenizer
from bpdq_quantizer.tables import quantize_tables, table_schemes
from bpdq_quantizer.tune import final_states, save_atomically, tune_model

SOLVERS = {  # options of `quantize_linear`
    "refined": {"refinements": 2, "alpha": 1e-6, "damping": 0.01},
    "paper": {"refinements": 0, "alpha": 1e-4, "damping": 0.05, "spread": 1.0},
}
ASYMMETRIC = {"refined": 0.5, "paper": 0.0}  # share of the shift of its inputs that a weight is corrected for
TUNE_STEPS = {"none": 0, "block": 30, "model": 200}  # for each block, or for the model


def quantize(
    model: str,
    output: str | Path,
    *,
    bits: int = 2,
    group_size: int = 128,
    embed_bits: int | None = None,
    head_bits: int | None = None,
    calibration: str = "default",
    samples: int = 128,
    seq_len: int = 2048,
    iterations: int = 10,
    solver: str = "refined",
    asymmetric: float | None = None,
    tune: str = "none",
    tune_steps: int | None = None,
    tune_samples: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
) -> dict[str, Any]:
    """Quantize a Hugging Face folder, hub id or `.gguf` file to a BPDQ checkpoint folder `output`.

    embed_bits, head_bits: bit-planes of the input embedding and the LM head (`bpdq_quantizer.tables`), by default left
    in 16 bits, as norms and biases always are; calibration: `default`, FILE.txt, FILE.jsonl or hf:NAME, cut into
    `samples` windows of `seq_len` tokens; solver: a key of SOLVERS; asymmetric: 0 to 1, by default as in ASYMMETRIC;
    tune: a key of TUNE_STEPS (`bpdq_quantizer.tune`), whose value is the default of tune_steps; tune_samples: windows
    to tune the model on, by default `samples`; device: `auto`, `cpu` or `cuda`.
    Returns the report that is also saved as quantization_report.json. Raises InputError for input that can't be used;
    the folder `output` appears only when everything is written. While the model is tuned, the folder `output`.tuning
    holds what `resume` goes on from.
    """
    tune_steps = TUNE_STEPS[tune] if tune_steps is None else tune_steps
    asymmetric = ASYMMETRIC[solver] if asymmetric is None else asymmetric
    tune_samples = samples if tune_samples is None else tune_samples
    options = {k: v for k, v in locals().items() if k not in ("output", "resume")}
    scheme, *_ = [_scheme(k, group_size) for k in (bits, embed_bits, head_bits) if k is not None]
    if min(samples, seq_len, iterations) < 1 or tune_steps < (tune != "none"):
        raise InputError("--samples, --seq-len, --iterations and --tune-steps must be at least 1")
    if not 0 <= asymmetric <= 1:
        raise InputError(f"--asymmetric {asymmetric}: expected 0 (off) to 1")
    target = _device(device)
    if min(samples, tune_samples) < 1 + (tune != "none"):
        raise InputError(f"--tune {tune} needs two calibration windows or more: raise --samples and --tune-samples")
    tuning = Path(f"{output}.tuning")
    solved = _stopped_run(tuning, options, resume)
    torch.manual_seed(seed)
    started, cpu_started = time.perf_counter(), time.process_time()
    with checkpoint.new_folder(Path(output)) as folder:
        tokenizer = load_tokenizer(model)
        wanted = max(samples, tune_samples) if tune == "model" else samples
        tokens = calibration_windows(calibration, tokenizer, wanted, seq_len, seed)
        if len(tokens) < wanted:
            tqdm.write(f"{calibration}: holds {len(tokens)} windows of {seq_len} tokens, --samples asked for {wanted}")
        lm = _load_plain(model)
        tables = table_schemes(lm, embed_bits, head_bits, group_size)
        if solved is None:
            teacher = final_states(lm.to(target), tokens[:tune_samples]) if tune == "model" else None
            lm.to("cpu")
            settings = {"iterations": iterations, "asymmetric": asymmetric, **SOLVERS[solver]}
            if tune == "block":
                settings |= {"tune_steps": tune_steps, "seed": seed}
            layers = _solve(lm, tokens[:samples], scheme, target, **settings)
        else:
            layers, teacher = solved["layers"], solved["teacher"]
            _restore_planes(lm, solved["planes"], scheme)
        report = {"model": model, "options": {k: v for k, v in options.items() if k != "model"}}
        if teacher is not None:
            if solved is None:
                tuning.mkdir(parents=True, exist_ok=True)
                planes = {n: (m.B, m.c) for n, m in lm.named_modules() if isinstance(m, BPDQLinear)}
                solved = {"options": options, "layers": layers, "planes": planes, "teacher": teacher}
                save_atomically(solved, tuning / "solved.pt")
            state = tuning / "state.pt"
            report["tuning"] = tune_model(
                lm.to(target), tokens[:tune_samples], teacher, steps=tune_steps, seed=seed, state=state
            )
            lm.to("cpu")
        found = quantize_tables(lm, tokens[:samples], tables, target, iterations=iterations, **SOLVERS[solver])
        layers = layers + [dataclasses.asdict(table) for table in found]
        report |= {
            "calibration_tokens": tokens[:samples].numel(),
            "bits_per_weight": _mean_bits(layers),
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "layers": layers,
        }
        ignore = [name for name in linear_layers(lm) if name not in {layer["name"] for layer in layers}]
        config = checkpoint.quantization_config(scheme, iterations, SOLVERS[solver]["alpha"], ignore, tables)
        checkpoint.save(folder, lm, tokenizer, config, report)
    shutil.rmtree(tuning, ignore_errors=True)
    return report


def _solve(
    lm: PreTrainedModel, tokens: Tensor, scheme: Scheme, device: torch.device, **solver: Any
) -> list[dict[str, Any]]:
    """Quantize the model's blocks in place with a progress bar; returns the layers' reports."""
    layers = []
    weights = sum(m.weight.numel() for m in linear_layers(decoder_blocks(lm)[1]).values())
    with tqdm(total=weights, unit="weight", unit_scale=True, desc="quantizing") as bar:
        for layer in quantize_blocks(lm, tokens, scheme, device, **solver):
            layers.append(dataclasses.asdict(layer))
            bar.update(layer.in_features * layer.out_features)
            bar.set_postfix_str(f"{layer.name} loss {layer.loss:.3g} ({layer.relative_error:.2%})")
    return layers


def _mean_bits(layers: list[dict[str, Any]]) -> float:
    weights = [layer["in_features"] * layer["out_features"] for layer in layers]
    return sum(n * layer["bits_per_weight"] for n, layer in zip(weights, layers, strict=True)) / sum(weights)


def _stopped_run(tuning: Path, options: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """What a run with the same options left in its `.tuning` folder, or None; raises InputError if that is unclear."""
    if not (tuning / "solved.pt").is_file():
        return None
    if not resume:
        raise InputError(f"{tuning} is from a run that was stopped while tuning: add --resume, or remove the folder")
    solved = torch.load(tuning / "solved.pt", map_location="cpu", weights_only=True)
    changed = [f"{k} = {v!r} (now {options.get(k)!r})" for k, v in solved["options"].items() if v != options.get(k)]
    if changed:
        raise InputError(f"{tuning} is from a run with other options, {', '.join(changed)}: repeat them or remove it")
    return solved


def _restore_planes(lm: PreTrainedModel, planes: dict[str, tuple[Tensor, Tensor]], scheme: Scheme) -> None:
    for name, (B, c) in planes.items():
        linear = lm.get_submodule(name)
        lm.set_submodule(name, BPDQLinear(B, c, scheme.group_size, linear.in_features, linear.bias))


def _scheme(bits: int, group_size: int) -> Scheme:
    try:
        return Scheme(bits, group_size)
    except ValueError as e:
        raise InputError(f"--bits / --embed-bits / --head-bits / --group-size: {e}") from None


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
