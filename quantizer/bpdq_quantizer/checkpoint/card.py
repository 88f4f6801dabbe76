"""README.md of a checkpoint: the model card that the Hub shows, for the publisher to go on with."""

import json
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load
from tqdm import tqdm
from transformers import PreTrainedModel

from bpdq_kernels.skeleton import auto_class
from bpdq_quantizer.checkpoint.carried import LICENCES, hub_commit
from bpdq_quantizer.checkpoint.picture import draw, place
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.storage.files import save

CARD, PICTURE = "README.md", "bits_per_layer.png"
TAKEN = ("license", "license_name", "license_link", "language", "pipeline_tag")  # from the source's card
TITLES = {  # that a licence file begins with, behind lines of copyright; others, such as `Modified MIT`, are `other`
    "apache-2.0": r"Apache License,?\s+(Version )?2\.0(, January 2004)?\W*$",
    "mit": r"MIT License( \(MIT\))?\W*$",
}
ABOVE = r"\W*(Copyright[^\n]*\n\W*)*(The )?"
START = 2000  # characters of a licence file that are looked at
UNMEASURED = "Its quality was not measured: `bpdq eval DIR --reference ORIGINAL --text FILE` does."


class Origin(NamedTuple):
    """What a model folder, hub id or `.gguf` file says of itself. name: its hub id, or its own without the path;
    hub_id: where it is on the Hub, if that is known; metadata: TAKEN of its own card."""

    name: str
    hub_id: str | None
    metadata: dict[str, Any]


class Made(NamedTuple):
    """What a checkpoint is, for its card. name: of its folder; command: that makes it; version: of this package;
    calibration: what text it was calibrated on; evaluation: `compare.summary`, and of the 16-bit model, on held-out
    text, or None."""

    name: str
    origin: Origin
    command: str
    version: str
    calibration: str
    evaluation: dict[str, Any] | None


def origin(model: str) -> Origin:
    """Of a source that is there: of a hub id in the Hugging Face cache."""
    path = Path(os.path.abspath(model))
    if not path.exists():
        card = try_to_load_from_cache(model, CARD, revision=hub_commit(model))
        return Origin(model, model, _metadata(Path(card) if isinstance(card, str) else None))
    cached = [part for part in path.parts if part.startswith("models--")]  # of the Hugging Face cache
    hub_id = cached[-1].removeprefix("models--").replace("--", "/") if cached else None
    if path.is_dir():
        return Origin(hub_id or path.name, hub_id, _metadata(path / CARD))
    return Origin(path.name, hub_id, _metadata(path.parent / CARD))


def _metadata(card: Path | None) -> dict[str, Any]:
    """TAKEN of a card, which may be missing; one line says so where it can't be read."""
    if card is None or not card.is_file():
        return {}
    try:
        found = metadata_load(card) or {}
    except Exception as e:  # of YAML's many, and of bytes that are no text
        reason = " ".join(str(e).split())
        tqdm.write(f"{card}: its metadata can't be read ({reason}): the checkpoint's card has none of it")
        return {}
    return {key: found[key] for key in TAKEN if _is_text(found.get(key))}


def _is_text(value: Any) -> bool:
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(isinstance(part, str) and part for part in parts)


def licence_of(folder: Path) -> dict[str, Any]:
    """Metadata of the licence files in a folder that are not for code alone; those for the model go before others."""
    files = sorted({file for pattern in LICENCES for file in folder.glob(pattern) if file.is_file()})
    words = {file: set(re.split(r"[^a-z]+", file.name.lower())) for file in files}
    files = [file for file in files if "model" in words[file]] or [file for file in files if "code" not in words[file]]
    if not files:
        return {}
    known = {_known(file) for file in files}
    if len(known) > 1 or None in known:
        return {"license": "other", "license_name": "source", "license_link": files[0].name}
    return {"license": known.pop()}


def _known(file: Path) -> str | None:
    """The Hub's name of a licence in TITLES."""
    start = file.read_bytes()[:START].decode(errors="replace")
    return next((name for name, title in TITLES.items() if re.match(ABOVE + title, start, re.I | re.M)), None)


def write_card(folder: Path, made: Made, lm: PreTrainedModel, report: Mapping[str, Any], size: int) -> None:
    """Write CARD, and PICTURE where matplotlib is installed, into a folder that has its quantization_report.json.

    report: what that says; size: bytes of all tensors.
    """
    auto, layers = auto_class(lm.config).__name__, report["layers"]
    metadata = {"pipeline_tag": "text-generation" if auto == "AutoModelForCausalLM" else "image-text-to-text"}
    if "license" not in made.origin.metadata:
        metadata |= licence_of(folder)
    metadata |= made.origin.metadata
    bits = sorted({layer["bits"] for layer in layers})
    data = ModelCardData(
        base_model=made.origin.hub_id,
        base_model_relation="quantized" if made.origin.hub_id else None,
        library_name="vllm",  # for `transformers` the Hub shows lines that lack the import, and end in random weights
        tags=["bpdq", *(f"{k}-bit" for k in bits), "quantized"],
        **metadata,
    )
    figure = None
    with suppress(InputError):  # without matplotlib
        figure = draw({"checkpoint": folder, "architecture": type(lm).__name__, **report})
    if figure is not None:
        save(folder / PICTURE, lambda partial: figure.savefig(partial, dpi=100, format="png"))
    parts = [
        _head(made),
        _use(made.name, auto),
        _bits(report, size),
        f"![bits per weight of every layer]({PICTURE})" if figure else _by_module(layers),
        _calibration(made, report),
        _evaluation(made.evaluation) if made.evaluation else UNMEASURED,
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")
    save(folder / CARD, lambda partial: partial.write_text(str(card), encoding="utf-8"))


def _head(made: Made) -> str:
    hub_id = made.origin.hub_id
    base = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{made.origin.name}`"
    return (
        f"# {made.name}\n\n{base}, quantized to bit-planes with BPDQ "
        f"([arXiv 2602.04163](https://arxiv.org/abs/2602.04163)) by vllm-bpdq {made.version}. What it is for, "
        "how it was trained and where its limits are, the original's own card says."
    )


def _use(name: str, auto: str) -> str:
    place = f"./{name}"
    return f"""## Use

Install the package `vllm-bpdq` where vLLM is, which finds its plugin by itself:

```bash
vllm serve {shlex.quote(place)}
```

In transformers, which without the import goes on with random weights after a warning:

```python
import bpdq_quantizer, transformers
model = transformers.{auto}.from_pretrained({json.dumps(place)})
```"""


def _bits(report: Mapping[str, Any], size: int) -> str:
    kinds = defaultdict(list)
    for layer in report["layers"]:
        kinds["Linears of the blocks" if re.search(r"\.\d+\.", layer["name"]) else f"`{layer['name']}`"].append(layer)
    rows, planes = [], 0.0
    for kind, layers in kinds.items():
        weights = [layer["in_features"] * layer["out_features"] for layer in layers]
        stored = sum(n * layer["bits_per_weight"] / 8 for n, layer in zip(weights, layers, strict=True))
        planes += stored
        rows.append(f"| {kind} | {sum(weights) / 1e6:.1f} | {8 * stored / sum(weights):.3f} | {stored / 1e6:.1f} |")
    return "\n".join(
        [
            "## Bits and bytes",
            "",
            "| in bit-planes | million weights | bits per weight | MB |",
            "|---|---|---|---|",
            *rows,
            f"| all else, in 16 bits or more | | | {(size - planes) / 1e6:.1f} |",
            f"| all tensors | | | {size / 1e6:.1f} |",
        ]
    )


def _by_module(layers: Sequence[Mapping[str, Any]]) -> str:
    modules = defaultdict(list)
    for layer in layers:
        modules[place(layer["name"])[1]].append(layer)
    rows = []
    for module, members in modules.items():
        bits, groups = (sorted({layer[key] for layer in members}) for key in ("bits", "group_size"))
        rows.append(f"| `{module}` | {len(members)} | {', '.join(map(str, bits))} | {', '.join(map(str, groups))} |")
    return "\n".join(["| layers | count | bit-planes | weights in a group |", "|---|---|---|---|", *rows])


def _calibration(made: Made, report: Mapping[str, Any]) -> str:
    images = report["calibration_windows_with_images"]
    with_images = f", in {images} windows with images" if images else ""
    return (
        f"## Recipe\n\n```bash\n{made.command}\n```\n\nCalibrated on {report['calibration_tokens']} tokens of "
        f"{made.calibration}{with_images}, in windows of {report['options']['seq_len']}. `quantization_report.json` "
        "has every layer's bits and error, and `bpdq inspect DIR --verify` compares the files with `digests.json`."
    )


def _evaluation(found: Mapping[str, Any]) -> str:
    low, high = found["kl_interval"] or (found["kl"], found["kl"])
    spread = f" (95 % interval {low:.4f} to {high:.4f})" if found["kl_interval"] else ""
    return f"""## Quality

On {found["windows"]} windows of {found["seq_len"]} tokens of that text, behind those that it was calibrated on:

| | this checkpoint | the original |
|---|---|---|
| perplexity | {found["perplexity"]:.3f} | {found["reference_perplexity"]:.3f} |
| KL to the original, nats a token | {found["kl"]:.4f}{spread} | 0 |
| its 99th percentile over tokens | {found["kl_p99"]:.3f} | 0 |
| same likeliest token | {100 * found["top1_agreement"]:.1f} % | 100 % |"""
