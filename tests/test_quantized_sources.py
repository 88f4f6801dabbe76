"""Sources that are quantized already: what comes out is, to the bit, what comes out of their weights in 16 bits."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import bpdq_quantizer
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.plan import plan
from bpdq_quantizer.model import stored_weights
from bpdq_quantizer.model.stream import load_block, open_model
from bpdq_quantizer.run import prepare, progress
from quantized_sources import (
    FORMATS,
    compressed,
    fp8_blocks,
    fp8_rows,
    fp8_whole,
    mxfp8,
    quantized_pair,
    rewrite,
)
from tiny import LINEARS, load_tensors, tiny_model

FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
WHOLE = FP8_CONFIG | {"weight_block_size": None}
FP8_SOURCES = {
    "blocks": (FP8_CONFIG, fp8_blocks),
    "blocks, fp32 scales": (FP8_CONFIG, partial(fp8_blocks, dtype=torch.float32)),
    "blocks of 64 x 32": (FP8_CONFIG | {"weight_block_size": [64, 32]}, partial(fp8_blocks, block=(64, 32))),
    "whole": (WHOLE, fp8_whole),
    "whole, AutoFP8": ({"quant_method": "fp8", "activation_scheme": "static"}, partial(fp8_whole, suffix="_scale")),
    "whole, one element": (WHOLE, partial(fp8_whole, shape=(1,))),
    "rows": (WHOLE, fp8_rows),
    "exponents": ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, mxfp8),
}
SOURCES = FP8_SOURCES | {name: compressed(name) for name in FORMATS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A llama with sizes that 128 does not divide."""
    sizes = {"hidden": 192, "ffn": 352, "heads": 6, "kv_heads": 3, "dtype": torch.bfloat16}
    return tiny_model(tmp_path_factory.mktemp("quantized-sources") / "model", **sizes)


def options(text, **others):
    return {"bits": 2, "group_size": 64, "calibration": text, "samples": 4, "seq_len": 32, "iterations": 1, **others}


def tensors(source):
    """All tensors of an opened model, block by block."""
    source = open_model(str(source))
    found = {name: t for name, t in source.model.state_dict().items() if not t.is_meta}
    for index in range(len(source.blocks)):
        block = load_block(source, index, torch.device("cpu"))
        found |= {f"{source.prefix}.{index}.{name}": tensor for name, tensor in block.state_dict().items()}
    return found


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", SOURCES)
def test_weights_are_read_as_their_16_bits(model, tmp_path, name):
    quantization, store = SOURCES[name]
    quantized, plain = quantized_pair(model, tmp_path / "source", quantization, store)
    found, expected = tensors(quantized), load_tensors(plain)
    assert same(found, expected)
    assert not same(expected, load_tensors(model))
