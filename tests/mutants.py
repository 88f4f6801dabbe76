"""Checkpoints that are not whole or not right, made from sound ones by one change each; the same for the same seed."""

import random
from collections.abc import Iterator
from pathlib import Path

import torch

from mutant_configs import bad_patterns, broken_config, broken_index, broken_quantization, json_edited, quantization
from mutant_files import (
    Mutant,
    broken_files,
    doubled,
    flipped_headers,
    misshapen,
    missing,
    mistyped,
    not_numbers,
    replaced,
    rewrite,
    split,
)


def all_mutants(folders: dict[str, Path], seed: int = 0) -> list[Mutant]:
    rng = random.Random(seed)
    families = (missing, misshapen, mistyped, not_numbers, doubled, broken_files, flipped_headers, broken_index)
    families += (broken_config, broken_quantization, bad_patterns, harmless)
    return [mutant for family in families for mutant in family(folders, rng)]


def harmless(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    """Changes after which the checkpoint is still whole and right, and must load."""

    def link(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            place = folder.parent / f"{folder.name}-blob-{file.name}"
            file.rename(place)
            file.symlink_to(place)

    pattern = r"re:.*layers\.\d{1,2}\.x"
    reordered = rewrite(lambda t: t.update({n: t.pop(n) for n in sorted(t, reverse=True)}))
    halves = rewrite(lambda t: t.update({n: x.half() for n, x in t.items() if n.endswith(".s")}))
    changes = {
        "scales in fp16": ("narrow", halves),
        "shards of coefficients in 8 bits": ("narrow", split),
        "links to files elsewhere": ("sharded", link),
        "a link to a file elsewhere": ("plain", link),
        "tensors in another order": ("plain", reordered),
        "shards of a single file": ("plain", split),
        "another file beside the shards": ("sharded", lambda f: (f / "other.safetensors").write_bytes(b"")),
        "pickles beside": ("plain", lambda f: (f / "pytorch_model.bin").write_bytes(b"not read")),
        "rotary frequencies": (
            "plain",
            rewrite(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)})),
        ),
        "a pattern that matches nothing": (
            "plain",
            quantization(lambda q: q["ignore"].append(pattern)),
        ),
        "a layer that is not there": ("plain", quantization(lambda q: q.update(layers={"model.x": {"bits": 3}}))),
        "unknown fields": ("plain", json_edited("config.json", lambda c: c.update(some_field=[1, 2]))),
        "scales as scalars": ("scales", replaced("model.layers.0.self_attn.k_scale", lambda t: t.reshape(()))),
    }
    for name, (base, change) in changes.items():
        yield Mutant(base, f"fine: {name}", change, right=True)
