"""Checkpoints that are not whole or not right, made from sound ones by one change each; the same for the same seed.

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
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


class Mutant(NamedTuple):
    base: str
    name: str
    change: Callable[[Path], None]
    right: bool = False

    def __str__(self) -> str:
        return f"{self.base}: {self.name}"


def bases(folder: Path) -> dict[str, Path]:
    """Sound checkpoints of one block: `plain`, `authors`, `sharded`, `tied` tables in bit-planes, and `scales`."""
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


def all_mutants(folders: dict[str, Path], seed: int = 0) -> list[Mutant]:
    rng = random.Random(seed)
    families = (missing, misshapen, mistyped, not_numbers, doubled, broken_files, flipped_headers, broken_index)
    families += (broken_config, broken_quantization, bad_patterns, harmless)
    return [mutant for family in families for mutant in family(folders, rng)]


# --- tensors


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
    for kind in ("bias", "norm", ".B", ".c"):
        change = rewrite(lambda t, k=kind: [t.pop(name) for name in [*t] if k in name])
        yield Mutant("plain", f"without any {kind}", change)


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
    for name, shape in (("model.embed_tokens.B", "the last dimension less"), ("model.embed_tokens.c", "[1]")):
        yield Mutant("tied", f"{name} {shape}", replaced(name, SHAPES[shape]))


def mistyped(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    wrong = [torch.int32, torch.bool, torch.int8, torch.float64, torch.float8_e4m3fn, torch.uint8, torch.int64]
    for name in sorted(tensors_of(folders["plain"])):
        choice = [d for d in wrong if not (name.endswith(".B") and d == torch.int32)]
        for dtype in rng.sample(choice, 2):
            yield Mutant("plain", f"{name} in {dtype}", replaced(name, lambda t, d=dtype: t.float().to(d)))


def not_numbers(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    def spoiled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(t: torch.Tensor) -> torch.Tensor:
            t = t.clone()
            t.view(-1)[rng.randrange(t.numel())] = value
            return t

        return change

    for name, tensor in sorted(tensors_of(folders["plain"]).items()):
        if tensor.is_floating_point():
            for value in rng.sample([torch.nan, torch.inf, -torch.inf], 2):
                yield Mutant("plain", f"{name} with {value}", replaced(name, spoiled(value)))
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


# --- JSON


def json_edited(file: str, function: Callable[[dict], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        function(content)
        (folder / file).write_text(json.dumps(content))

    return change


def texts(base: str, file: str) -> Iterator[Mutant]:
    for name, text in {
        "empty": b"",
        "cut": b'{"weight_map": {"model.norm.weight": "mod',
        "a list": b"[]",
        "null": b"null",
        "a number": b"7",
        "not UTF-8": b'{"a": "\xff\xfe"}',
        "deep": b"[" * 100_000,
        "an empty object": b"{}",
    }.items():
        yield Mutant(base, f"{file} is {name}", edited(file, lambda _, text=text: text))


def broken_index(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    yield from texts("sharded", INDEX)
    norm = "model.norm.weight"
    changes = {
        "no weight_map": lambda i: i.pop("weight_map"),
        "an empty weight_map": lambda i: i.update(weight_map={}),
        "a weight_map that is a list": lambda i: i.update(weight_map=[[norm, SHARDS[0]]]),
        "a weight_map of numbers": lambda i: i["weight_map"].update({norm: 3}),
        "a weight_map of lists": lambda i: i["weight_map"].update({norm: [SHARDS[0]]}),
        "no metadata": lambda i: i.pop("metadata"),
        "metadata null": lambda i: i.update(metadata=None),
        "a tensor that no shard has": lambda i: i["weight_map"].update({"model.nothing": SHARDS[0]}),
        "a tensor less": lambda i: i["weight_map"].pop(norm),
        "a tensor in another shard": lambda i: i["weight_map"].update(
            {norm: SHARDS[1 - SHARDS.index(i["weight_map"][norm])]}
        ),
        "only the first shard": lambda i: i.update(weight_map=dict.fromkeys(i["weight_map"], SHARDS[0])),
    }
    for path in ("model-3.safetensors", f"../{SHARDS[0]}", f"sub/{SHARDS[0]}", "/etc/passwd", "", ".", "..", "a\0b"):
        changes[f"a shard {path!r}"] = lambda i, p=path: i["weight_map"].update({norm: p})
    for name, change in changes.items():
        yield Mutant("sharded", f"index with {name}", json_edited(INDEX, change))

    def outside(prefix: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            place = folder.parent / f"{folder.name}-elsewhere.safetensors"
            (folder / SHARDS[0]).rename(place)
            name = place if prefix == "/" else f"../{place.name}"
            file = folder / INDEX
            file.write_text(file.read_text().replace(SHARDS[0], str(name)))

        return change

    yield Mutant("sharded", "a shard in the folder above", outside(".."))
    yield Mutant("sharded", "a shard by its absolute path", outside("/"))


CONFIG = {
    "hidden_size": [-1, 0, 63, 65, 128, 10**9, "64", None, 3.5, [64]],
    "num_hidden_layers": [0, 2, -1, 10**6, 10**9, "1", None, 1.5],
    "vocab_size": [383, 385, 0, -5, "many", None],
    "intermediate_size": [95, 97, 0, -96, "x", None],
    "num_attention_heads": [0, 1, 3, 4, -2, "2", None],
    "num_key_value_heads": [0, 2, 3, -1, "1"],
    "head_dim": [0, 1, 16, -32, "x"],
    "model_type": ["", "nonsense", "llama", "gpt2", "t5", "mixtral", "qwen3", None, 5, ["qwen2"]],
    "tie_word_embeddings": [True],
    "hidden_act": ["nonsense", None, 5],
    "architectures": [["LlamaForCausalLM"], ["BertForMaskedLM"]],
    "rms_norm_eps": ["x", [1], -1, 1e30, float("nan")],
    "rope_parameters": ["x", {"rope_type": "nonsense"}, 5, {"rope_theta": 0}, {"rope_theta": -1.0}],
    "layer_types": [["nonsense"], ["full_attention"] * 2, 7],
    "dtype": ["float99", 5],
    "transformers_weights": ["other.safetensors", "../plain/model.safetensors"],
}


# read by one loader only, or with a default of the same meaning
MAYBE = ("architectures", "dtype", "layer_types", "rope_parameters", "head_dim", "transformers_weights")


def broken_config(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    yield from texts("plain", "config.json")
    for key, values in CONFIG.items():
        for value in values:
            change = json_edited("config.json", lambda c, k=key, v=value: c.update({k: v}))
            right = key in MAYBE or value is None
            yield Mutant("plain", f"config.json: {key} = {value!r}", change, right)


QUANTIZATION = {
    "quant_method": ["gptq", "awq", "", None, 5, ["bpdq"]],
    "format_version": [0, 2, "1", None, [1]],
    "bits": [0, 1, 3, 5, -2, "2", True, 2.5, None, [2]],
    "group_size": [0, 48, 64, 128, 256, -1, "32", None, 32.5],
    "ignore": ["lm_head", [0], {"a": 1}, 7, ["model.layers.0.mlp.down_proj"], [r"re:.*mlp"], [[]]],
    "layers": [
        ["lm_head"],
        "x",
        7,
        {"model.layers.0.mlp.down_proj": 3},
        {"model.layers.0.mlp.down_proj": {"bits": 3}},
        {"model.layers.0.mlp.down_proj": {"group_size": 64}},
        {"model.layers.0.mlp.down_proj": {"bit": 3}},
        {"re:.*q_proj": {"bits": "2"}},
        {"lm_head": {"bits": 2}},
        {"model.embed_tokens": {}},
    ],
    "kv_cache_scheme": [True, "fp8", {"num_bits": 4}, [8]],
}
AUTHORS = {
    "meta": [None, {}, "x", {"bpdq": 3}, {"bpdq": {"msbits": 3}}, {"bpdq": {"msbits": "2"}}, {"bpdq": {}}],
    "group_size": [64, "32", None, 7],
    "lm_head": [True],
    "dynamic": ["x", {"-:.*mlp": {}}, {".*": 3}, {".*": {"group_size": 64}}, {"-:[": {}}],
    "checkpoint_format": ["gptq", None, 7],
    "quant_method": ["bpdq"],
}


def quantization(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return json_edited("config.json", lambda config: change(config["quantization_config"]))


def broken_quantization(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    for base, fields in (("plain", QUANTIZATION), ("authors", AUTHORS)):
        for key, values in fields.items():
            harmless = key in ("format_version", "ignore")
            for value in values:
                change = quantization(lambda q, k=key, v=value: q.update({k: v}))
                right = (harmless and value is None) or value in (
                    "gptq",
                    {"lm_head": {"bits": 2}},
                )  # of which it is both
                yield Mutant(base, f"{key} = {value!r}", change, right)
            required = key in ("quant_method", "bits", "group_size", "meta", "checkpoint_format")
            change = quantization(lambda q, k=key: q.pop(k, None))
            yield Mutant(base, f"no {key}", change, right=not required)
    for value in (None, {}, [], "bpdq", 5):
        yield Mutant(
            "plain", f"{value!r}", json_edited("config.json", lambda c, v=value: c.update(quantization_config=v))
        )
    yield Mutant("scales", "no kv_cache_scheme", quantization(lambda q: q.pop("kv_cache_scheme")), right=True)
    yield Mutant("tied", "the head alone", quantization(lambda q: q["layers"].pop("model.embed_tokens")))
    yield Mutant("tied", "different tables", quantization(lambda q: q["layers"]["lm_head"].update(bits=3)))


PATTERNS = [
    r"([a-z._0-9]+)+!$",
    r"([a-z._0-9]+)+(?<!j)$",
    r"(a|a|.)*(?<!j)$",
    r"(?:.*)*(?:.*)*[^a-z]$",
    "(?:" * 100 + "a" + ")+" * 100 + "!",
    r"(?:(?:(?:a{1000}){1000}){1000}){1000}",
    "a{99999999999999999999}",
    "[",
    "*",
    "(?P<x",
    "(?P<1>x)",
    r"\8",
    "(" * 5000,
    "a" * 100_000 + "[",
    r"(?R)",
]


def bad_patterns(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    for pattern in PATTERNS:
        target = f"re:{pattern}"
        yield Mutant(
            "plain", f"ignore {target[:40]}", quantization(lambda q, t=target: q["ignore"].append(t)), right=True
        )
        change = quantization(lambda q, t=target: q.update(layers={t: {"bits": 2}}))
        yield Mutant("plain", f"layers {target[:40]}", change, right=True)
        change = quantization(lambda q, p=pattern: q.update(dynamic={f"-:{p}": {}}))
        yield Mutant("authors", f"dynamic {pattern[:40]}", change, right=True)


# --- what is right as it is


def harmless(folders: dict[str, Path], rng: random.Random) -> Iterator[Mutant]:
    """Changes after which the checkpoint is still whole and right, and must load."""

    def link(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            place = folder.parent / f"{folder.name}-blob-{file.name}"
            file.rename(place)
            file.symlink_to(place)

    pattern = r"re:.*layers\.\d{1,2}\.x"
    reordered = rewrite(lambda t: t.update({n: t.pop(n) for n in sorted(t, reverse=True)}))
    changes = {
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
