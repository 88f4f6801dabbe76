"""Rows of a JSON-lines file that have images, as windows of a model that sees them."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from bpdq_kernels.skeleton import auto_class
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.sources import gguf_arguments, read_config
from bpdq_quantizer.model.windows import Window

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow's others may start programs (EPS)
PLAIN = {"add_special_tokens": False, "padding": False}
PATHS = ("image", "path", "url", "image_url")  # what a part of a message may call the place of its image
DEEP = ("I", "F")  # how the names of Pillow's modes begin that have more than 8 bits, of which RGB would be clipped
STANDING = ("image_token_id", "video_token_id", "audio_token_id", "boi_token_index")  # configs' words for such tokens


class Sight:
    """How a model sees images. model: its folder or hub id; image_token: the id that stands for a piece of one;
    standing: how the tokens are written that stand for pieces of images, videos and sounds."""

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, image_token: int, standing: Sequence[str]
    ) -> None:
        self.model, self.tokenizer, self.image_token, self.standing = model, tokenizer, image_token, standing

    @cached_property
    def processor(self) -> ProcessorMixin:
        """The model's own; no code from the folder runs. Raises InputError."""
        try:
            found = AutoProcessor.from_pretrained(trust_remote_code=False, **gguf_arguments(self.model))
        except Exception as e:  # of many kinds
            raise InputError(f"{self.model}: its image processor can't be loaded ({e})") from e
        if not hasattr(found, "image_processor"):
            raise InputError(
                f"{self.model}: has no preprocessor_config.json that says how it sees images: download the model "
                "again, or calibrate on text"
            )
        if type(found.tokenizer) is not type(self.tokenizer):  # which gives other ids than tokenizer.json
            found.tokenizer = self.tokenizer
        return found

    def window(self, row: dict[str, Any], folder: Path, place: str, seq_len: int, lead: Sequence[int]) -> Window:
        """A row's images, by paths from `folder`, and text, at most `seq_len` tokens with those of `lead` in front.

        Raises InputError, which names `place`, for rows and images that can't be used, and for images that end beyond
        `seq_len`.
        """
        messages, paths = parts_of(row, place)
        for part in (part for message in messages for part in message["content"] if part["type"] == "text"):
            self.check_text(part["text"], place)
        images = [open_image(folder, path, place) for path in paths]
        try:
            text = self.prompt(messages)
            found = self.processor(text=[text], images=images, return_tensors="pt", **PLAIN)
        except InputError:
            raise
        except Exception as e:  # of the template, and of transformers' code for the model
            raise InputError(f"{place}: the model's image processor can't take the row ({e})") from e
        given = {k: v for k, v in found.items() if isinstance(v, Tensor) and k != "attention_mask"}
        begins = given["input_ids"][0, : len(lead)].tolist() == list(lead)
        shape = given["input_ids"].shape
        per_token = {k: _piece(v, 0 if begins else len(lead), seq_len) for k, v in given.items() if v.shape == shape}
        tokens = per_token.pop("input_ids")
        if not begins:
            tokens[0, : len(lead)] = torch.tensor(lead)
        pieces = int((given["input_ids"] == self.image_token).sum())
        if int((tokens == self.image_token).sum()) < pieces:
            raise InputError(
                f"{place}: its images take {pieces} of {shape[1]} tokens, which don't fit --seq-len {seq_len}: raise "
                "it, or make them smaller"
            )
        rest = {k: v for k, v in given.items() if v.shape != shape}
        return Window(tokens, per_token | rest)

    def check_text(self, text: str, place: str) -> None:
        """Raise InputError, which names `place`, for a text in which something stands for an image that is not there:
        written out, or by the chat template for a video, or for a part of a message that names its image otherwise."""
        found = next((token for token in self.standing if token in text), None)
        if found is not None:
            raise InputError(
                f"{place}: its text holds {found}, which stands for what the row does not bring: give its images in "
                "`image`, or in parts of type image, and drop the rest"
            )

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """Messages as the chat template has them; without one the images, then the texts."""
        if self.processor.chat_template is not None:
            return self.processor.apply_chat_template(messages, tokenize=False)
        parts = [part for message in messages for part in message["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        return self.processor.image_token * (len(parts) - len(texts)) + "\n".join(texts)


def _piece(values: Tensor, lead: int, length: int) -> Tensor:
    """Values [1, L] of tokens, after `lead` zeros, cut to `length`."""
    return torch.nn.functional.pad(values, (lead, 0))[:, :length].clone()


def has_images(row: dict[str, Any]) -> bool:
    """Whether a row of JSON has images beside its text, or in its messages."""
    if row.get("image") or row.get("images"):
        return True
    messages = row.get("messages")
    return any(
        isinstance(part, dict) and part.get("type") in ("image", "image_url")
        for message in (messages if isinstance(messages, list) else ())
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        for part in message["content"]
    )


def parts_of(row: dict[str, Any], place: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages of a row that has images, each with parts `{"type": "image"}` and `{"type": "text", "text": ...}`,
    and the images' paths in order. Raises InputError, which names `place`."""
    for one, other in (("image", "images"), ("messages", "text")):
        if row.get(one) and row.get(other):
            raise InputError(f"{place}: has `{one}` and `{other}`, of which only one would be used: drop either")
    given = row.get("image") or row.get("images") or []
    paths = [given] if isinstance(given, str) else given
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise InputError(f"{place}: `image` holds no path of a file, and no list of paths")
    if row.get("messages") is None:
        text = [{"type": "text", "text": row.get("text")}]
        row = {"messages": [{"role": "user", "content": [{"type": "image"} for _ in paths] + text}]}
    messages, found, rest = [], [], iter(paths)
    for message in row["messages"] if isinstance(row["messages"], list) else [None]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"{place}: `messages` must be a list of objects with a role and content")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        read = [_part(part, rest, place) for part in (parts if isinstance(parts, list) else [None])]
        found += [path for path, _ in read if path is not None]
        messages.append({"role": message["role"], "content": [part for _, part in read]})
    if next(rest, None) is not None:
        raise InputError(f"{place}: names more images than its messages have parts of type image")
    return messages, found


def _part(part: Any, paths: Iterator[str], place: str) -> tuple[str | None, dict[str, str]]:
    """A part of a message, and the path of its image: its own, or the next of `paths`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return None, {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        own = next((part[key] for key in PATHS if key in part), None)
        path = own.get("url") if isinstance(own, dict) else own or next(paths, None)
        if isinstance(path, str):
            return path, {"type": "image"}
    raise InputError(
        f"{place}: expected a `text` field that holds a string, or `messages` whose parts are texts and images with "
        "paths"
    )


def open_image(folder: Path, path: str, place: str) -> "Image":
    """An image in RGB, by its path from `folder`; raises InputError, which names `place`."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError(f"{place}: images need more packages: pip install 'vllm-bpdq[vision]'") from None
    if "://" in path.removeprefix("file://") or path.startswith("data:"):
        raise InputError(f"{place}: {path[:80]} is no path of a file: download the image")
    file = folder / path.removeprefix("file://")
    try:
        with Image.open(file, formats=FORMATS) as image:
            mode, rgb = image.mode, _upright_rgb(image)
    except FileNotFoundError:
        raise InputError(f"{place}: {file}: no such file") from None
    except Image.DecompressionBombError as e:
        raise InputError(f"{place}: {file} is too large an image ({e}): make it smaller") from None
    except Exception as e:  # damaged images raise all kinds
        formats = ", ".join(FORMATS)
        raise InputError(f"{place}: {file} can't be read as an image ({e}): save it anew, as one of {formats}") from e
    if mode.startswith(DEEP):
        raise InputError(f"{place}: {file} has more than 8 bits for a gray value (mode {mode}): save it with 8")
    return rgb


def _upright_rgb(image: "Image") -> "Image":
    """As vLLM gives images to a model: turned as EXIF says, on white where they are transparent."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" or not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def sight_of(model: str, tokenizer: PreTrainedTokenizerBase) -> Sight | None:
    """That of a folder or hub id, None of a model that sees no images; raises InputError as `read_config` does."""
    config = read_config(model)
    token = getattr(config, "image_token_id", None)
    if token is None or auto_class(config) is not AutoModelForImageTextToText:
        return None
    standing = [token for token in tokenizer.convert_ids_to_tokens(standing_ids(config)) if token]
    return Sight(model, tokenizer, token, standing)


def standing_ids(config: PreTrainedConfig) -> list[int]:
    """Ids of the tokens that stand for something else than text, none of a model that reads text alone."""
    return [found for key in STANDING if isinstance(found := getattr(config, key, None), int)]
