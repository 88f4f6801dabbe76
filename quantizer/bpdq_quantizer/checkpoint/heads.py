"""Heads for multi-token prediction: found in a model's files, and copied into its checkpoint as they are, in 16 bits
where they are quantized."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedModel

from bpdq_kernels.folder import FLOATS, INDEX, Entry, Headers, check_values, read_headers
from bpdq_kernels.mtp import head_layers, head_pattern
from bpdq_quantizer.checkpoint.carried import hub_commit
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.sources import is_gguf, weight_files
from bpdq_quantizer.model.stored_weights import StoredWeight
from bpdq_quantizer.storage.files import write_tensors

LARGEST = 1 << 31  # bytes of tensors in a file, all of which are in memory at once
SMALLEST_BLOCK = 4  # tensors
NOTHING: Mapping[str, StoredWeight] = MappingProxyType({})


def find_heads(model: str, lm: PreTrainedModel, quantized: Mapping[str, StoredWeight] = NOTHING) -> Headers:
    """The tensors of heads in the files of the folder or hub id that `lm` was opened from; none in a `.gguf` file.

    quantized: weights of the files, the heads' among them, that count as what they are in lm's dtype. One line says so
    where the files lack layers that config.json speaks of. Raises InputError for tensors that are no 16-bit or 32-bit
    floats, or hold NaN or infinity.
    """
    if is_gguf(model):
        return {}
    stored = in_16_bits(read_headers(weight_files(_folder(model))), quantized, lm.dtype)
    known = lm.state_dict().keys()
    heads = {name: e for name, e in stored.items() if name not in known and head_pattern(name, lm.config)}
    for name, entry in heads.items():
        if entry.dtype not in FLOATS:
            raise InputError(
                f"{entry.file}: {name} of a head for multi-token prediction is {entry.dtype}, and is copied only from "
                f"{', '.join(FLOATS)}: start from the 16-bit model"
            )
    check_values({name: entry for name, entry in heads.items() if name not in quantized})
    due, whole = head_layers(lm.config), _whole_layers(heads, stored)
    if whole < due:
        tqdm.write(
            f"{model}: its files hold {whole} whole layers for multi-token prediction, though its config.json speaks "
            f"of {due}: vLLM can't draft with what is missing"
        )
    return heads


def in_16_bits(stored: Headers, quantized: Mapping[str, StoredWeight], dtype: torch.dtype) -> Headers:
    """`stored`, with each of the weights `quantized` in place of its parts and of scales of activations."""
    if not quantized:
        return stored
    name = next(name for name, known in FLOATS.items() if known == dtype)
    parts = {weight.name + suffix for weight in quantized.values() for suffix in weight.parts}
    rest = {n: entry for n, entry in stored.items() if n not in parts and not n.endswith("_scale")}
    files = {weight.name: next(iter(weight.parts.values())).file for weight in quantized.values()}
    return rest | {w.name: Entry(files[w.name], name, w.layout.shape) for w in quantized.values()}


def _folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    patterns = ["*.safetensors", INDEX]
    return Path(snapshot_download(model, revision=hub_commit(model), allow_patterns=patterns, local_files_only=True))


def _whole_layers(heads: Headers, stored: Headers) -> int:
    """How many of the heads' layers have all that one of the model's blocks has."""
    inside = defaultdict(set)  # names of tensors, by that of what is numbered
    for name in stored:
        if numbered := re.match(r"(.*?\.\d+)\.(.+)", name):
            inside[numbered[1], name in heads].add(numbered[2])
    blocks = [names for (_, is_head), names in inside.items() if not is_head and len(names) >= SMALLEST_BLOCK]
    return sum(is_head and any(block <= names for block in blocks) for (_, is_head), names in inside.items())


def head_files(folder: Path, heads: Headers, largest: int = LARGEST) -> dict[Path, list[str]]:
    """The files of a checkpoint folder that heads are copied to, of `largest` bytes or of one tensor, and the names of
    what is in each: tensors of one file of the source."""
    parts: list[list[str]] = []
    size = 0
    for name, entry in sorted(heads.items(), key=lambda head: (head[1].file, head[0])):
        if not parts or heads[parts[-1][0]].file != entry.file or size + entry.nbytes > largest:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += entry.nbytes
    return {
        folder / f"model-mtp-{number:05d}-of-{len(parts):05d}.safetensors": names
        for number, names in enumerate(parts, 1)
    }


def copy_heads(folder: Path, heads: Headers, quantized: Mapping[str, StoredWeight] = NOTHING) -> dict[str, str]:
    """Write `head_files`, one after the other; returns the combined digest of each, by its name. Raises InputError.

    quantized: as for `find_heads`."""
    digests = {}
    for file, names in head_files(folder, heads).items():
        source = heads[names[0]].file
        try:
            with safe_open(source, framework="pt") as stored:
                tensors = {
                    name: quantized[name].read(FLOATS[heads[name].dtype])
                    if name in quantized
                    else stored.get_tensor(name)
                    for name in names
                }
        except (OSError, SafetensorError) as e:
            raise InputError(f"{source}: {names[0]} can't be read ({e}): download the model again") from e
        digests[file.name] = write_tensors(file, tensors)
    return digests


def head_patterns(heads: Headers, lm: PreTrainedModel) -> list[str]:
    """What `ignore` says of heads."""
    return sorted({head_pattern(name, lm.config) for name in heads})
