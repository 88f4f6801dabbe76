"""Tiny random models that see images, with processors that cut these into few pieces, and rows to calibrate on."""

import json
from pathlib import Path

from PIL import Image
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from architectures import model_folder
from tiny import tiny_tokenizer

FIRST = 380  # id of the token that stands for a piece of an image, and then others, in the configs of WRAPPERS
NAMES = {  # of those tokens
    "gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
    "llava": ("<image>",),
}
QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
PLACES = {"gemma3": "<start_of_image>", "llava": "<image>"}  # what stands for an image in a prompt
SIZE = {"height": 28, "width": 28}
PIXELS = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
SEEING = ("qwen3_5", "qwen3_vl", "qwen2_5_vl", "gemma3", "llava")


def vision_tokenizer(arch: str) -> PreTrainedTokenizerFast:
    tokenizer, names = tiny_tokenizer(), NAMES.get(arch, QWEN)
    unused = [f"<unused{i}>" for i in range(FIRST - len(tokenizer))]
    tokenizer.add_special_tokens({"additional_special_tokens": [*unused, *names]})
    if arch == "gemma3":
        attributes = dict(zip(("image_token", "boi_token", "eoi_token"), names, strict=True))
        tokenizer._set_model_specific_special_tokens(special_tokens=attributes)
    return tokenizer


def template(arch: str) -> str:
    image = PLACES.get(arch, "<|vision_start|><|image_pad|><|vision_end|>")
    part = "{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}" + image + "{% endif %}"
    parts = "{% for p in m['content'] %}" + part + "{% endfor %}"
    content = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + parts + "{% endif %}"
    messages = "{% for m in messages %}{{ m['role'] }}: " + content + "{{ '\\n' }}{% endfor %}"
    return messages + "{% if add_generation_prompt %}assistant:{% endif %}"


def processor(arch: str) -> ProcessorMixin:
    tokenizer = vision_tokenizer(arch)
    chat = {"chat_template": template(arch)}
    if arch == "gemma3":
        images = Gemma3ImageProcessor(size=SIZE, do_pan_and_scan=False)
        return Gemma3Processor(images, tokenizer, image_seq_length=4, **chat)
    if arch == "llava":
        images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIZE)
        details = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return LlavaProcessor(images, tokenizer, **details, **chat)
    if arch == "qwen2_5_vl":
        images, videos = Qwen2VLImageProcessor(size=PIXELS), Qwen2VLVideoProcessor(size=PIXELS)
        return Qwen2_5_VLProcessor(images, tokenizer, videos, **chat)
    patches = {"size": PIXELS, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    return Qwen3VLProcessor(Qwen2VLImageProcessor(**patches), tokenizer, Qwen3VLVideoProcessor(**patches), **chat)


def seeing_model(folder: Path, arch: str) -> Path:
    """Write a Hugging Face folder of a random `arch` model, and its processor."""
    model_folder(folder, arch)
    processor(arch).save_pretrained(folder)
    return folder


def picture(file: Path, color: int, size: tuple[int, int] = (64, 48)) -> str:
    """Write an image of two colors; returns its name."""
    image = Image.new("RGB", size, (color, 255 - color, 128))
    image.paste((255 - color, color, color), (0, 0, size[0] // 2, size[1] // 3))
    image.save(file)
    return file.name


def rows(folder: Path, text: str) -> Path:
    """Write images and a .jsonl file of rows with them, and of rows of text between these."""
    found = []
    for i in range(4):
        words = text[40 * i : 40 * i + 60 + 20 * i]
        name = picture(folder / f"{i}.png", 60 * i, (48 + 16 * i, 48))
        found.append({"image": name, "text": words})
        parts = [{"type": "image", "image": name}, {"type": "text", "text": "What is it?"}]
        answer = {"role": "assistant", "content": words}
        found.append({"messages": [{"role": "user", "content": parts}, answer]})
        found.append({"text": text[200 * i : 200 * i + 200]})
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in found))
    return file
