"""Changes to the tensors and files of a checkpoint, and the sound checkpoints; see `mutants`.

A mutant is `(base, name, change, right)`: the sound checkpoint, what is wrong, a function that changes a copy of the
folder, and whether it may still give the logits of the sound one; it must where the name begins with "fine".
"""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from tiny import bpdq_checkpoint, tiny_model, with_kv_scales

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
TABLE = {"bits": 4, "group_size": 32}
DOWN = "model.layers.0.mlp.down_proj"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


class Mutant(NamedTuple):
    base: str
    name: str
    change: Callable[[Path], None]
    right: bool = False

    def __str__(self) -> str:
        return f"{self.base}: {self.name}"


def bases(folder: Path) -> dict[str, Path]:
    """Sound checkpoints of one block: `plain`, `authors`, `sharded`, `tied` tables in bit-planes, `scales`, and
    `narrow`, with coefficients in 8 bits, but for one layer, and the LM head in planes."""
    sizes = {"hidden": 64, "ffn": 96, "layers": 1, "heads": 2, "kv_heads": 1}
    model = tiny_model(folder / "model", "qwen2", **sizes)
    tied = tiny_model(folder / "tied-model", "llama", tie_word_embeddings=True, **sizes)
    made = {
        "plain": bpdq_checkpoint(model, folder / "plain", group_size=32),
        "authors": bpdq_checkpoint(model, folder / "authors", group_size=32, dialect="authors"),
        "sharded": bpdq_checkpoint(model, folder / "sharded", group_size=32),
        "tied": bpdq_checkpoint(
            tied, folder / "tied", group_size=32, layers=dict.fromkeys(("model.embed_tokens", "lm_head"), TABLE)
        ),
    }
    layers = {"lm_head": TABLE, DOWN: {"coefficient_bits": 16}}
    made["narrow"] = bpdq_checkpoint(model, folder / "narrow", group_size=32, coefficient_bits=8, layers=layers)
    scales = {f"model.layers.0.self_attn.{kind}_scale": 0.5 for kind in "kv"}
    made["scales"] = with_kv_scales(made["plain"], folder / "scales", scales)
    split(made["sharded"])
    return made


def split(folder: Path) -> None:
    """In two shards, by turns."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(sorted(tensors))}
    for shard in SHARDS:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def narrow_tensors(folders: dict[str, Path]) -> list[str]:
    """Names of the c and s of the layers with coefficients in 8 bits."""
    scales = [name for name in sorted(tensors_of(folders["narrow"])) if name.endswith(".s")]
    return [*scales, *(f"{name.removesuffix('.s')}.c" for name in scales)]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A change to the tensors of whichever file holds them; the index follows."""

    def apply(folder: Path) -> None:
        weight_map = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file)
            change(tensors)
            save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
        if (folder / INDEX).exists():
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return apply


def replaced(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return rewrite(lambda tensors: tensors.update({name: function(tensors[name])}) if name in tensors else None)


def missing(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    for base, count in (("plain", 99), ("sharded", 8), ("tied", 8), ("authors", 4), ("scales", 4)):
        names = sorted(tensors_of(folders[base]))
        chosen = [name for name in names if "_scale" in name] if base == "scales" else names
        for name in rng.sample(chosen, min(count, len(chosen))):
            yield Mutant(base, f"without {name}", rewrite(lambda t, n=name: t.pop(n, None)))
    for name in narrow_tensors(folders):
        yield Mutant("narrow", f"without {name}", rewrite(lambda t, n=name: t.pop(n)))
    for kind in ("bias", "norm", ".B", ".c", ".s"):
        change = rewrite(lambda t, k=kind: [t.pop(n) for n in [*t] if (n.endswith(k) if k == ".s" else k in n)])
        yield Mutant("narrow" if kind == ".s" else "plain", f"without any {kind}", change)


SHAPES = {
    "[1]": lambda t: t.flatten()[:1].clone(),
    "a scalar": lambda t: t.flatten()[0].clone(),
    "a row less": lambda t: t[:-1].clone(),
    "a row more": lambda t: torch.cat([t, t[:1]]),
    "twice the rows": lambda t: torch.cat([t, t]),
    "one dimension more": lambda t: t[None],
    "empty": lambda t: t[:0].clone(),
    "flat": lambda t: t.flatten().clone() if t.ndim > 1 else t[:, None],
    "the last dimension less": lambda t: t[..., :-1].clone(),
}


def misshapen(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    for name in sorted(tensors_of(folders["plain"])):
        count = 3 if name.endswith((".B", ".c")) else 6
        for shape in rng.sample(sorted(SHAPES), count):
            yield Mutant("plain", f"{name} {shape}", replaced(name, SHAPES[shape]))
    for name in narrow_tensors(folders):
        for shape in rng.sample(sorted(SHAPES), 3):
            yield Mutant("narrow", f"{name} {shape}", replaced(name, SHAPES[shape]))
    for name, shape in (("model.embed_tokens.B", "the last dimension less"), ("model.embed_tokens.c", "[1]")):
        yield Mutant("tied", f"{name} {shape}", replaced(name, SHAPES[shape]))


def mistyped(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    wrong = [torch.int32, torch.bool, torch.int8, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.int64]
    for name in sorted(tensors_of(folders["plain"])):
        choice = [d for d in wrong if not (name.endswith(".B") and d == torch.int32)]
        for dtype in rng.sample(choice, 2):
            yield Mutant("plain", f"{name} in {dtype}", replaced(name, lambda t, d=dtype: t.float().to(d)))
    for name in narrow_tensors(folders):
        others = [torch.float32, torch.float8_e4m3fn]
        others += [torch.int8, torch.int32] if name.endswith(".s") else [torch.uint8, torch.bfloat16, torch.float16]
        for dtype in rng.sample(others, 2):
            yield Mutant("narrow", f"{name} in {dtype}", replaced(name, lambda t, d=dtype: t.float().to(d)))
    yield Mutant("narrow", "16-bit c in 8", replaced(f"{DOWN}.c", lambda t: t.to(torch.int8)))


def not_numbers(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    def spoiled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(t: torch.Tensor) -> torch.Tensor:
            t = t.clone()
            t.view(-1)[rng.randrange(t.numel())] = value
            return t

        return change

    for base in ("plain", "narrow"):
        for name, tensor in sorted(tensors_of(folders[base]).items()):
            if tensor.is_floating_point() and (base == "plain" or name.endswith(".s")):
                for value in rng.sample([torch.nan, torch.inf, -torch.inf], 2):
                    yield Mutant(base, f"{name} with {value}", replaced(name, spoiled(value)))
    for value in (torch.nan, torch.inf, 3e38, 0.0, -1.0, 1e-30):
        name = f"model.layers.0.self_attn.{rng.choice('kv')}_scale"
        yield Mutant("scales", f"{name} = {value}", replaced(name, spoiled(value)))


def doubled(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    names = sorted(tensors_of(folders["sharded"]))

    def in_both(name: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            other = {name: tensors_of(folder)[name] * 2}
            for shard in SHARDS:
                tensors = load_file(folder / shard)
                if name not in tensors:
                    save_file(tensors | other, folder / shard, {"format": "pt"})

        return change

    for name in rng.sample(names, 8):
        yield Mutant("sharded", f"{name} in both shards", in_both(name))

    def stray(file: str, factor: int = 2) -> Callable[[Path], None]:
        return lambda folder: save_file(
            {n: t * factor for n, t in tensors_of(folder).items()}, folder / file, {"format": "pt"}
        )

    yield Mutant("sharded", "model.safetensors beside the shards", stray("model.safetensors"))
    yield Mutant("sharded", "consolidated.safetensors beside the shards", stray("consolidated.safetensors"))
    yield Mutant("plain", "another file beside model.safetensors", stray("other.safetensors"))
    yield Mutant("plain", "consolidated.safetensors", stray("consolidated.safetensors"))
    strays = {
        "model.layers.0.self_attn.o_proj.bias": torch.ones(64),
        "model.layers.0.mlp.down_proj.weight": torch.ones(64, 96),
        "model.layers.1.input_layernorm.weight": torch.ones(64),
        "lm_head.bias": torch.ones(384),
        "lm_head.B": torch.ones(2, 2, 384, dtype=torch.int32),
        "nonsense": torch.ones(3),
    }
    for name, tensor in strays.items():
        yield Mutant("plain", f"with {name}", rewrite(lambda t, n=name, x=tensor: t.update({n: x})))
    scales = torch.ones(3, 64).bfloat16()
    for base in ("plain", "narrow"):
        yield Mutant(base, "with scales of 16-bit c", rewrite(lambda t: t.update({f"{DOWN}.s": scales})))
    head = torch.ones(384, 64)
    yield Mutant("tied", "with lm_head.weight", rewrite(lambda t: t.update({"lm_head.weight": head})))
    swaps = rng.sample([n for n in names if n.endswith(".B")], 3)
    for name in swaps:
        renamed = name.replace("layers.0", "layers.00")
        yield Mutant("plain", f"{name} renamed", rewrite(lambda t, a=name, b=renamed: t.update({b: t.pop(a)})))


# --- files


def edited(file: str, function: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(function((folder / file).read_bytes())) and None


def instead(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        make(folder / file)

    return change


def header(function: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        (size,) = struct.unpack("<Q", content[:8])
        parsed = json.loads(content[8 : 8 + size])
        function(parsed)
        text = json.dumps(parsed).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + size :]

    return change


def broken_files(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    size = (folders["plain"] / "model.safetensors").stat().st_size
    lengths = [0, 1, 7, 8, 9, 50, size // 2, size - 1, size - 100, *(rng.randrange(size) for _ in range(6))]
    norm = "model.norm.weight"
    contents = {
        **{f"of {n} bytes": (lambda content, n=n: content[:n]) for n in lengths},
        "of zeros": lambda content: bytes(len(content)),
        "of noise": lambda content: rng.randbytes(len(content)),
        "as a pointer of git-lfs": lambda content: LFS.encode(),
        "as a page of HTML": lambda content: b"<!DOCTYPE html><html>404</html>",
        "with bytes at the end": lambda content: content + b"more",
        "with an endless header": lambda content: struct.pack("<Q", 1 << 62) + content[8:],
        "with a longer header": lambda content: (
            struct.pack("<Q", struct.unpack("<Q", content[:8])[0] + 3) + content[8:]
        ),
        "with an unknown dtype": header(lambda h: h[norm].update(dtype="F17")),
        "with a negative shape": header(lambda h: h[norm].update(shape=[-64])),
        "with offsets that overlap": header(lambda h: h[norm].update(data_offsets=[0, 256])),
        "with offsets beyond": header(lambda h: h[norm].update(data_offsets=[1 << 40, (1 << 40) + 256])),
        "without a tensor's offsets": header(lambda h: h[norm].pop("data_offsets")),
        "with a list as header": lambda content: struct.pack("<Q", 8) + b"[1,2,3] ",
    }
    for name, function in contents.items():
        yield Mutant("plain", f"model.safetensors {name}", edited("model.safetensors", function))
    objects = {
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a link to nothing": lambda path: path.symlink_to(path.parent / "nothing"),
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
        "not there": lambda path: None,
    }
    for name, make in objects.items():
        for base, file in (("plain", "model.safetensors"), ("sharded", SHARDS[1]), ("plain", "config.json")):
            yield Mutant(base, f"{file} is {name}", instead(file, make))
    yield Mutant("sharded", "no index", lambda folder: (folder / INDEX).unlink())
    yield Mutant("sharded", "shards exchanged", exchange)


def exchange(folder: Path) -> None:
    first, second = ((folder / shard).read_bytes() for shard in SHARDS)
    (folder / SHARDS[0]).write_bytes(second)
    (folder / SHARDS[1]).write_bytes(first)


def flipped_headers(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    content = (folders["plain"] / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    for _ in range(40):
        at, bit = rng.randrange(8 + size), rng.randrange(8)

        def flip(content: bytes, at: int = at, bit: int = bit) -> bytes:
            return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]

        yield Mutant("plain", f"bit {bit} of byte {at}", edited("model.safetensors", flip), right=True)
