"""Sources that are quantized already: what their config.json says of it, and which of them can be read."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from bpdq_kernels import format as bpdq_format
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.formats import FORMATS
from bpdq_quantizer.model.formats.layout import ORIGINAL
from bpdq_quantizer.model.sources import read_config

KEYS = ("quantization_config", "compression_config")
LABELS = {"gptq": "GPTQ", "awq": "AWQ", "hqq": "HQQ", "aqlm": "AQLM", "vptq": "VPTQ", "spqr": "SpQR"}


def open_config(model: str) -> tuple[PreTrainedConfig, dict[str, Any] | None]:
    """The config of a source's model in 16 bits, and the `quantization_config` that its files go by, None for 16 bits.

    Raises InputError for what `read_config` refuses, and for quantization that can't be undone here.
    """
    config = copy.deepcopy(read_config(model))
    parts = [config, config.get_text_config(decoder=True)]
    values = [vars(part).pop(key, None) for part in parts for key in KEYS]
    found = next((value for value in values if value), None)
    if found is None:
        return config, None
    check_method(model, found)
    for part in parts:
        if part.dtype not in (torch.float16, torch.bfloat16):
            part.dtype = torch.bfloat16
    return config, found


def check_method(model: str, quantization: Mapping[str, Any]) -> None:
    """Raise InputError for a `quantization_config` of which no weights in 16 bits can be made."""
    if bpdq_format.claims(quantization):
        raise InputError(f"{model} is quantized already: start from the 16-bit model")
    method = quantization.get("quant_method")
    if {"load_in_4bit", "load_in_8bit"} & quantization.keys():
        method = "bitsandbytes"
    if not isinstance(method, str):
        method = None
    if method in FORMATS:
        return
    how = f"by {LABELS.get(method, method)}" if method else "and its config.json names no quant_method"
    remedy = ORIGINAL
    if method == "bitsandbytes":  # all of the model in memory
        remedy += (
            ", or save this one in 16 bits first (pip install bitsandbytes, then "
            "AutoModelForCausalLM.from_pretrained(MODEL).dequantize().save_pretrained(DIR))"
        )
    raise InputError(f"{model} is quantized already, {how}, from which 16-bit weights can't be read here: {remedy}")
