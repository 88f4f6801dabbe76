"""Changes to the JSON files of a checkpoint; see `mutants`."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from mutant_files import DOWN, INDEX, SHARDS, TABLE, Mutant, edited


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
    "architectures": [["LlamaForCausalLM"], ["BertForMaskedLM"], [5], "x", 2],
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
    "coefficient_bits": [4, 8, True, "8", None, 16],
}
NARROW = {
    "coefficient_bits": [0, 4, 16, -8, True, "8", None, 8.0, [8], {}],
    "format_version": [0, 1, 4, "2", None, 2.5, True],
    "layers": [
        {},
        {"lm_head": TABLE},
        {"lm_head": TABLE, DOWN: {"coefficient_bits": 8}},
        {"lm_head": TABLE, DOWN: {"coefficient_bits": 4}},
        {"lm_head": TABLE, DOWN: {"coefficient_bits": None}},
        {"lm_head": {**TABLE, "coefficient_bits": 16}, DOWN: {"coefficient_bits": 16}},
    ],
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
    for base, fields in (("plain", QUANTIZATION), ("authors", AUTHORS), ("narrow", NARROW)):
        for key, values in fields.items():
            harmless = key in ("format_version", "ignore") and base != "narrow"
            for value in values:
                change = quantization(lambda q, k=key, v=value: q.update({k: v}))
                right = (harmless and value is None) or value in (
                    "gptq",
                    {"lm_head": {"bits": 2}},
                )  # of which it is both
                right |= base == "plain" and (key, value) in (("format_version", 2), ("coefficient_bits", 16))
                yield Mutant(base, f"{key} = {value!r}", change, right)
            required = key in ("quant_method", "bits", "group_size", "meta", "checkpoint_format")
            change = quantization(lambda q, k=key: q.pop(k, None))
            yield Mutant(base, f"no {key}", change, right=not required and base != "narrow")
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
