"""Writing a BPDQ checkpoint folder, and reading what one holds."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from bpdq_kernels.folder import Headers, read_headers
from bpdq_kernels.format import CODES, KV_CACHE_SCHEME, WIDTHS, Scheme
from bpdq_quantizer.checkpoint import manifest
from bpdq_quantizer.checkpoint.card import CARD, PICTURE, Made, write_card
from bpdq_quantizer.checkpoint.carried import carried
from bpdq_quantizer.checkpoint.heads import copy_heads, head_files
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.stream import Streamed
from bpdq_quantizer.model.weights import check_numbers
from bpdq_quantizer.storage.files import check_intact, save, write_tensors

INDEX, REPORT = "model.safetensors.index.json", "quantization_report.json"
CARRIED = Path("resume", "carried")  # in a run's folder, until the end


def quantization_config(
    scheme: Scheme,
    iterations: int,
    alpha: float,
    ignore: list[str],
    layers: Mapping[str, Scheme] | None = None,
    kv_cache_scales: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of config.json. `checkpoint_format` and `meta` are what the authors' loader reads.

    layers: schemes of the layers that differ from `scheme`, and of the embedding and LM head, by name; kv_cache_scales:
    whether the checkpoint holds them.
    """
    version = max(_version(s) for s in (scheme, *(layers or {}).values()))
    overrides = {"layers": {name: _settings(s, version) for name, s in layers.items()}} if layers else {}
    if kv_cache_scales:
        overrides["kv_cache_scheme"] = KV_CACHE_SCHEME
    return {
        "quant_method": "bpdq",
        "checkpoint_format": "bpdq",
        "format_version": version,
        **_settings(scheme, version),
        "ignore": ignore,
        **overrides,
        "meta": {"bpdq": {"msbits": scheme.bits, "n_iters": iterations, "alpha": alpha}},
    }


def _version(scheme: Scheme) -> int:
    """The first format version that has it."""
    return next(v for v, codes in CODES.items() if scheme.code in codes and scheme.coefficient_bits in WIDTHS[v])


def _settings(scheme: Scheme, version: int) -> dict[str, Any]:
    """A scheme in config.json: 1 has no word for the width of coefficients, 2 none for the code."""
    settings = dataclasses.asdict(scheme)
    for key in ("code", "coefficient_bits")[: 3 - version]:
        del settings[key]
    return settings


def shard(folder: Path, number: int, of: int) -> Path:
    """The file of part `number`, from 1, of `of`."""
    return folder / f"model-{number:05d}-of-{of:05d}.safetensors"


def contents(folder: Path, blocks: int, heads: Headers) -> list[str]:
    """Names of all that the folder of a finished run holds at its top, of a model of so many blocks and with `heads`
    for multi-token prediction."""
    shards = [shard(folder, number, blocks + 1).name for number in range(1, blocks + 2)]
    shards += [file.name for file in head_files(folder, heads)]
    taken = {path.parts[0] for path in carried(folder / CARRIED)}
    return [*shards, INDEX, REPORT, CARD, PICTURE, manifest.NAME, "config.json", *sorted(taken)]


def write_config(source: Streamed, config: dict[str, Any], to: Path) -> None:
    """Write the config.json of a checkpoint into the folder `to`; raises InputError if transformers refuses."""
    model = source.model
    settings = copy.deepcopy(model.config)
    settings.quantization_config = config
    settings.architectures = [type(model).__name__]
    settings.dtype = model.dtype
    try:
        settings.save_pretrained(to)
    except (OSError, ValueError) as e:
        raise InputError(f"config.json of the checkpoint can't be written: {e}") from e


def check_only(folder: Path, files: Collection[str]) -> None:
    """Raise InputError unless a run's folder holds nothing but `files`, finished or not, and hidden files."""
    known = {"resume", *files, *(f"{name}.partial" for name in files)}
    odd = sorted(path for path in folder.iterdir() if path.name not in known and not path.name.startswith("."))
    if odd:
        raise InputError(f"{odd[0]} is not of this run: move it away, then go on with --resume")


def finish(
    folder: Path,
    source: Streamed,
    config: dict[str, Any],
    report: dict[str, Any],
    blocks: Mapping[str, str],
    scales: Mapping[str, Tensor],
    heads: Headers,
    made: Made,
) -> None:
    """Write what a folder with the blocks' files lacks; config.json, without which no loader takes it, comes last.

    blocks: the combined digests of the blocks' files, by name; scales: those of the KV cache, by name; heads: for
    multi-token prediction, in the source's files; made: for the model card. Raises InputError for a file that has
    changed, is missing or of something else, and for NaN or infinity.
    """
    model, prefix, decoder = source.model, source.prefix, source.blocks
    rest = {
        source.names.tensor(name): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{prefix}.") and name not in model.all_tied_weights_keys
    }
    first = shard(folder, 1, len(decoder) + 1)
    copied = copy_heads(folder, heads, source.quantized)
    check_numbers(rest)
    written = {first.name: write_tensors(first, {**rest, **scales}), **blocks, **copied}
    tensors = {name: check_intact(folder / name, {digest}) for name, digest in written.items()}
    size = sum(stored_bytes(read_headers([folder / name])) for name in tensors)
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, names in tensors.items() for name in names},
    }
    for name, value in ((INDEX, index), (REPORT, report)):
        _write(folder / name, _json(name, value))
    names = [path.as_posix() for path in carried(folder / CARRIED)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save(folder / name, partial(shutil.copyfile, folder / CARRIED / name))
    write_card(folder, made, model, report, size)
    pictures = [PICTURE] if (folder / PICTURE).is_file() else []
    write_config(source, config, folder / CARRIED.parent)
    settings = folder / CARRIED.parent / "config.json"
    others = {name: folder / name for name in (INDEX, REPORT, *pictures, *names)}
    manifest.write_manifest(folder, tensors, {**others, "config.json": settings})
    check_only(folder, contents(folder, len(decoder), heads))
    save(folder / "config.json", partial(shutil.copyfile, settings))


def _json(name: str, value: dict[str, Any]) -> str:
    """The text of a JSON file; raises InputError for NaN and infinity, which JSON does not have."""
    try:
        return json.dumps(value, indent=2, allow_nan=False) + "\n"
    except ValueError as e:
        raise InputError(f"{name}: a figure is NaN or infinite ({e}): check the model and its dtype") from e


def _write(file: Path, text: str) -> None:
    save(file, lambda partial: partial.write_text(text))


def stored_bytes(stored: Headers) -> int:
    """Bytes of the tensors that headers describe."""
    return sum(entry.nbytes for entry in stored.values())
