"""Names in quantization_config against the names that vLLM's models give to their layers."""

from importlib import import_module

import pytest
import torch
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from bpdq_kernels.format import Scheme
from vllm_bpdq.config import BPDQConfig
from vllm_bpdq.linear import BPDQLinearMethod
from vllm_bpdq.names import origins

OURS = {"quant_method": "bpdq", "checkpoint_format": "bpdq", "format_version": 1, "bits": 2, "group_size": 128}
TEXT, VISION = "model.language_model.layers.0.mlp.down_proj", "model.visual.blocks.0.mlp.down_proj"
TOWER = "model.vision_tower.encoder.layers.0.mlp.down_proj"
PIXTRAL = "model.vision_tower.transformer.layers.0.feed_forward.down_proj"
MODELS = {  # a layer of the text model and one of the vision tower, as transformers has them
    "qwen2_5_vl.Qwen2_5_VLForConditionalGeneration": (TEXT, VISION),
    "qwen3_vl.Qwen3VLForConditionalGeneration": (TEXT, VISION),
    "qwen3_5.Qwen3_5ForConditionalGeneration": (TEXT, VISION),
    "gemma3_mm.Gemma3ForConditionalGeneration": (TEXT, TOWER),
    "gemma4_mm.Gemma4ForConditionalGeneration": (TEXT, TOWER),
    "mistral3.Mistral3ForConditionalGeneration": (TEXT, PIXTRAL),
    "llava.LlavaForConditionalGeneration": (TEXT, TOWER),
}
HEAD = "language_model.lm_head"


def mapper_of(model: str) -> WeightsMapper:
    module, _, name = model.partition(".")
    return getattr(import_module(f"vllm.model_executor.models.{module}"), name).hf_to_vllm_mapper.get_rename_mapper()


def config(model: str, **changes) -> BPDQConfig:
    quant = BPDQConfig.from_config(OURS | changes)
    quant.packed_modules_mapping = {}
    quant.apply_vllm_mapper(mapper_of(model))
    return quant


def scheme_of(quant: BPDQConfig, prefix: str, kind: type[torch.nn.Module] = ColumnParallelLinear) -> Scheme | None:
    method = quant.get_quant_method(kind.__new__(kind), prefix)
    return method.scheme if isinstance(method, BPDQLinearMethod) else None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("is_pattern", [False, True])
def test_names_of_the_checkpoint_choose_layers_of_wrappers(model, is_pattern):
    text, vision = MODELS[model]
    ignored = "re:" + vision.split(".")[0] + r"[.](visual|vision_tower)[.]" if is_pattern else vision
    chosen = r"re:model[.]language_model[.].*down_proj" if is_pattern else text
    quant = config(model, ignore=[ignored], layers={chosen: {"bits": 3}})
    assert scheme_of(quant, "language_model.model.layers.0.mlp.down_proj") == Scheme(3, 128)
    assert scheme_of(quant, vision.removeprefix("model.")) is None
    assert scheme_of(quant, "language_model.model.layers.0.mlp.up_proj") == Scheme(2, 128)


@pytest.mark.parametrize("model", MODELS)
def test_the_lm_head_of_a_wrapper_is_in_planes_where_layers_name_it(model):
    assert scheme_of(config(model, layers={"lm_head": {"bits": 4}}), HEAD, ParallelLMHead) == Scheme(4, 128)
    assert scheme_of(config(model, ignore=["lm_head"]), HEAD, ParallelLMHead) is None


@pytest.mark.parametrize(
    ("model", "name", "stored"),
    [
        ("falcon_h1.FalconH1ForCausalLM", "model.layers.0.mamba.mamba.in_proj", "model.layers.0.mamba.in_proj"),
        ("lfm2.Lfm2ForCausalLM", "model.layers.0.short_conv.in_proj", "model.layers.0.conv.in_proj"),
        ("nemotron_h.NemotronHForCausalLM", "model.layers.0.mixer.in_proj", "backbone.layers.0.mixer.in_proj"),
        ("gemma3_mm.Gemma3ForConditionalGeneration", "vision_tower.head.mlp.fc1", "vision_tower.head.mlp.fc1"),
    ],
)
def test_names_of_the_checkpoint_are_found_again(model, name, stored):
    assert stored in origins(name, mapper_of(model))
