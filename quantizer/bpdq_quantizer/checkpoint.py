"""Writing a BPDQ checkpoint folder, and reading what one holds."""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from bpdq_kernels import format as bpdq_format
from bpdq_kernels.format import FORMAT_VERSION, Scheme
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.loader import quantized_layers, read_headers, stored_layer

SHARD_SIZE = "5GB"


def quantization_config(
    scheme: Scheme, iterations: int, alpha: float, ignore: list[str], layers: Mapping[str, Scheme] | None = None
) -> dict[str, Any]:
    """The `quantization_config` of config.json. `checkpoint_format` and `meta` are what the authors' loader reads.

    layers: schemes of the layers that differ from `scheme`, and of the embedding and LM head, by name.
    """
    overrides = {"layers": {name: dataclasses.asdict(s) for name, s in layers.items()}} if layers else {}
    return {
        "quant_method": "bpdq",
        "checkpoint_format": "bpdq",
        "format_version": FORMAT_VERSION,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "ignore": ignore,
        **overrides,
        "meta": {"bpdq": {"msbits": scheme.bits, "n_iters": iterations, "alpha": alpha}},
    }


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` if the body succeeds and is removed if it raises."""
    if output.exists():
        raise InputError(f"--output {output} exists already: remove it or name another folder")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=output.parent))
    except OSError as e:
        raise InputError(f"--output {output} can't be written: {e}") from None
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: dict[str, Any],
    report: dict[str, Any],
) -> None:
    """Write the quantized model; config.json comes last, as neither transformers nor vLLM loads a folder without."""
    tied = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    save_torch_state_dict(state, folder, max_shard_size=SHARD_SIZE, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    (folder / "quantization_report.json").write_text(json.dumps(report, indent=2) + "\n")
    model.config.quantization_config = config
    model.config.architectures = [type(model).__name__]
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)


def inspect(checkpoint: str | Path) -> dict[str, Any]:
    """Layers, bits per weight and bytes of a checkpoint folder, from config.json and safetensors headers alone."""
    folder = Path(checkpoint)
    if not (folder / "config.json").is_file():
        raise InputError(f"{checkpoint}: not a checkpoint folder (config.json is missing)")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        settings = bpdq_format.parse(getattr(config, "quantization_config", None) or {})
    except ValueError as e:
        raise InputError(f"{folder / 'config.json'}: {e}") from None
    files = sorted(folder.glob("*.safetensors"))
    stored = read_headers(files)
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    layers = []
    for name, (module, scheme) in quantized_layers(skeleton, settings).items():
        out_features, in_features = module.weight.shape
        size = sum(t.nbytes for t in stored_layer(name, stored, module, scheme))
        layers.append(
            {
                "name": name,
                "in_features": in_features,
                "out_features": out_features,
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "bytes": size,
                "bits_per_weight": 8 * size / module.weight.numel(),
            }
        )
    weights = sum(layer["in_features"] * layer["out_features"] for layer in layers)
    quantized = sum(layer["bytes"] for layer in layers)
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored.values())
    return {
        "checkpoint": str(checkpoint),
        "architecture": type(skeleton).__name__,
        "layers": layers,
        "quantized_weights": weights,
        "bits_per_weight": 8 * quantized / weights if weights else 0.0,
        "quantized_bytes": quantized,
        "other_bytes": total - quantized,
        "file_bytes": sum(file.stat().st_size for file in files),
    }
