"""Tiny random models that see images, with processors that cut these into few pieces, and rows to calibrate on."""

import json
from collections.abc import Callable
from pathlib import Path

import transformers as t
from PIL import Image

from architectures import model_folder
from tiny import tiny_tokenizer

FIRST = 380  # id of the token that stands for a piece of an image, and then others, in the configs of WRAPPERS
QWEN = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
NAMES = {  # of those tokens
    "gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
    "gemma4": ("<|image|>", "<boi>", "<eoi>"),
    "glm4v": ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"),
    "idefics3": ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    "internvl": ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
    "llava": ("<image>",),
    "llava_onevision": ("<image>", "<video>"),
    "mistral3": ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
}
ATTRIBUTES = {  # of tokenizers, for the first of those tokens, and others
    "gemma3": ("image_token", "boi_token", "eoi_token"),
    "gemma4": ("image_token", "boi_token", "eoi_token"),
    "internvl": ("context_image_token", "start_image_token", "end_image_token", "video_token"),
}
AUDIO = {"audio_token": "<unused1>", "boa_token": "<unused2>", "eoa_token": "<unused3>"}
PLACES = {
    "gemma3": "<start_of_image>",
    "glm4v": "<|begin_of_image|><|image|><|end_of_image|>",
}  # of an image in a prompt
QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"
SIZE = {"height": 28, "width": 28}
PIXELS = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
PATCHES = PIXELS | {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
LARGE = {"size": {"shortest_edge": 56 * 56, "longest_edge": 2 * 56 * 56}}
TILES = {"size": SIZE, "image_grid_pinpoints": [[28, 28], [28, 56]]}
EDGE = {"longest_edge": 28}
CLIP = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
SEEING = ("qwen3_5", "qwen3_vl", "qwen2_5_vl", "gemma3", "llava")
MORE = ("gemma4", "glm4v", "idefics3", "internvl", "llava_onevision", "mistral3")


def qwen3(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    return t.Qwen3VLProcessor(t.Qwen2VLImageProcessor(**PATCHES), tokenizer, t.Qwen3VLVideoProcessor(**PATCHES))


def qwen2_5(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    return t.Qwen2_5_VLProcessor(t.Qwen2VLImageProcessor(**PIXELS), tokenizer, t.Qwen2VLVideoProcessor(**PIXELS))


def gemma3(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    return t.Gemma3Processor(t.Gemma3ImageProcessor(size=SIZE, do_pan_and_scan=False), tokenizer, image_seq_length=4)


def gemma4(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    images = t.Gemma4ImageProcessor(max_soft_tokens=70, patch_size=14)
    audio, videos = t.Gemma4AudioFeatureExtractor(), t.Gemma4VideoProcessor()
    return t.Gemma4Processor(audio, images, tokenizer, videos, image_seq_length=70)


def glm4v(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    return t.Glm4vProcessor(t.Glm4vImageProcessor(**LARGE), tokenizer, t.Glm4vVideoProcessor(**LARGE))


def idefics3(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    return t.Idefics3Processor(t.Idefics3ImageProcessor(size=EDGE, max_image_size=EDGE), tokenizer, image_seq_len=1)


def internvl(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    images = t.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=False)
    return t.InternVLProcessor(images, tokenizer, t.InternVLVideoProcessor(size=SIZE), image_seq_length=1)


def llava(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    images = t.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIZE)
    return t.LlavaProcessor(images, tokenizer, **CLIP)


def llava_onevision(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    images, videos = t.LlavaOnevisionImageProcessor(**TILES), t.LlavaOnevisionVideoProcessor(size=SIZE)
    pieces = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
    return t.LlavaOnevisionProcessor(images, tokenizer, videos, **pieces)


def mistral3(tokenizer: t.PreTrainedTokenizerFast) -> t.ProcessorMixin:
    images = t.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14})
    return t.PixtralProcessor(images, tokenizer, patch_size=14, spatial_merge_size=2)


PROCESSORS: dict[str, Callable[[t.PreTrainedTokenizerFast], t.ProcessorMixin]] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "glm4v": glm4v,
    "idefics3": idefics3,
    "internvl": internvl,
    "llava": llava,
    "llava_onevision": llava_onevision,
    "mistral3": mistral3,
    "qwen2_5_vl": qwen2_5,
    "qwen3_5": qwen3,
    "qwen3_vl": qwen3,
}


def vision_tokenizer(arch: str) -> t.PreTrainedTokenizerFast:
    tokenizer, names = tiny_tokenizer(), NAMES.get(arch, QWEN)
    unused = [f"<unused{i}>" for i in range(FIRST - len(tokenizer))]
    tokenizer.add_special_tokens({"additional_special_tokens": [*unused, *names]})
    attributes = dict(zip(ATTRIBUTES.get(arch, ()), names, strict=False))
    if attributes:
        tokenizer._set_model_specific_special_tokens(special_tokens=attributes | AUDIO)
    return tokenizer


def template(arch: str) -> str:
    image = PLACES.get(arch, NAMES[arch][0] if arch in NAMES else QWEN_PLACE)
    part = "{% if p['type'] == 'text' %}{{ p['text'] }}{% else %}" + image + "{% endif %}"
    parts = "{% for p in m['content'] %}" + part + "{% endfor %}"
    content = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + parts + "{% endif %}"
    messages = "{% for m in messages %}{{ m['role'] }}: " + content + "{{ '\\n' }}{% endfor %}"
    return messages + "{% if add_generation_prompt %}assistant:{% endif %}"


def processor(arch: str) -> t.ProcessorMixin:
    found = PROCESSORS[arch](vision_tokenizer(arch))
    found.chat_template = template(arch)
    return found


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
