"""Embedding and LM head in bit-planes in vLLM: its layers over simulated tensor-parallel ranks, and an engine."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedConfig
from vllm import distributed
from vllm.config import SpeculativeConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

import vllm_bpdq.embedding
from bpdq_kernels.format import Format, Scheme
from ranks import become, finish, load, stored
from vllm_bpdq.config import BPDQConfig

VOCABULARY, HIDDEN = 300, 96  # 300 rows: vLLM pads to 320, 160 on each of two ranks
TABLE = Scheme(4, 32)
TABLES = ("model.embed_tokens", "lm_head")


def tables(*names: str, ignore: tuple[str, ...] = (), width: int = 16) -> BPDQConfig:
    return BPDQConfig(Format(Scheme(2, 64), ignore, dict.fromkeys(names, Scheme(4, 32, width))))


@pytest.fixture
def rank(monkeypatch):
    def set_rank(tp_rank: int, tp_size: int) -> None:
        become(monkeypatch, tp_rank, tp_size)
        for name, value in (("rank", tp_rank), ("world_size", tp_size)):
            function = f"get_tensor_model_parallel_{name}"
            monkeypatch.setattr(vocab_parallel_embedding, function, lambda value=value: value)

    set_rank(0, 1)
    return set_rank


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("width", [16, 8])
def test_ranks_hold_and_look_up_their_part_of_the_vocabulary(rank, width, tp_size):
    tensors, W = stored(VOCABULARY, HIDDEN, TABLE.group_size, TABLE.bits, width=width)
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        quant = tables("model.embed_tokens", width=width)
        layer = VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=quant, prefix="model.embed_tokens")
        load(layer, tensors)
        finish(layer)
        rows = 320 // tp_size
        own = W[tp_rank * rows : (tp_rank + 1) * rows]
        ids = torch.randint(0, len(own), (3, 5))
        assert torch.equal(layer.quant_method.embedding(layer, ids), own[ids])
        assert not layer.quant_method.embedding(layer, torch.arange(len(own), rows)).any(), "padding rows"


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("width", [16, 8])
def test_ranks_of_the_lm_head_give_their_part_of_the_logits(rank, width, tp_size):
    tensors, W = stored(VOCABULARY, HIDDEN, TABLE.group_size, TABLE.bits, width=width)
    x = torch.randn(4, HIDDEN)
    for tp_rank in range(tp_size):
        rank(tp_rank, tp_size)
        quant = tables("lm_head", width=width)
        layer = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=quant, prefix="lm_head")
        load(layer, tensors)
        logits = finish(layer).quant_method.apply(layer, x)
        rows = 320 // tp_size
        expected = x @ W[tp_rank * rows : (tp_rank + 1) * rows].T
        assert logits.shape == (4, rows)
        torch.testing.assert_close(logits[:, : expected.shape[1]], expected, rtol=1e-5, atol=1e-4)


def test_a_tables_kernels_are_warmed_up_for_looking_up_and_for_multiplying(rank, monkeypatch):
    warmed = []
    monkeypatch.setattr(vllm_bpdq.linear, "warm_up", lambda prepared, bias: warmed.append(bias))
    monkeypatch.setattr(vllm_bpdq.embedding, "warm_up_embedding", lambda prepared, dtype: warmed.append(dtype))
    tensors, _ = stored(VOCABULARY, HIDDEN, TABLE.group_size, TABLE.bits)
    quant = tables("model.embed_tokens")
    layer = VocabParallelEmbedding(VOCABULARY, HIDDEN, torch.bfloat16, quant_config=quant, prefix="model.embed_tokens")
    load(layer, tensors)
    finish(layer)
    assert warmed == [None, torch.bfloat16]


def test_tables_stay_in_16_bits_unless_named(rank):
    for quant in (tables(), tables("lm_head", ignore=("lm_head",)), tables("model.layers.0.mlp.up_proj")):
        layer = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=quant, prefix="lm_head")
        assert hasattr(layer, "weight")


def test_an_embedding_that_vllm_creates_without_a_name_is_found(rank):
    layer = VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=tables("lm_head", "model.embed_tokens"))
    assert layer.quant_method.name == "model.embed_tokens"


@pytest.mark.parametrize(("width", "tensor"), [(16, "c"), (8, "s")])
def test_a_missing_table_is_named(rank, width, tensor):
    layer = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=tables("lm_head", width=width), prefix="lm_head")
    with pytest.raises(ValueError, match=rf"lm_head\.{tensor} holds NaN or infinity, or was not in the checkpoint"):
        finish(layer)


def test_a_table_is_reloaded_in_place_whose_rows_are_padded(rank):
    """vLLM counts the elements that arrive, of which padding is a part."""
    quant = tables("model.embed_tokens", width=8)
    layer = VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=quant, prefix="model.embed_tokens")
    record_metadata_for_reloading(layer)
    for seed in 1, 2:
        tensors, W = stored(VOCABULARY, HIDDEN, TABLE.group_size, TABLE.bits, seed=seed, width=8)
        if seed == 2:
            initialize_layerwise_reload(layer)
        load(layer, tensors)
        if seed == 1:
            finish(layer)
            addresses = [tensor.data_ptr() for tensor in layer.parameters()]
    assert not get_layerwise_info(layer).can_load(), "it is whole before the load is said to end"
    finalize_layerwise_reload(layer, None)
    assert addresses == [tensor.data_ptr() for tensor in layer.parameters()]
    assert torch.equal(layer.quant_method.embedding(layer, torch.arange(VOCABULARY)), W)


def test_after_a_refused_reload_a_table_has_no_rows(rank):
    layer = VocabParallelEmbedding(
        VOCABULARY, HIDDEN, quant_config=tables("model.embed_tokens"), prefix="model.embed_tokens"
    )
    record_metadata_for_reloading(layer)
    tensors, _ = stored(VOCABULARY, HIDDEN, TABLE.group_size, TABLE.bits)
    load(layer, tensors)
    finish(layer)
    initialize_layerwise_reload(layer)
    load(layer, tensors._replace(B=None))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.B not in the checkpoint"):
        finalize_layerwise_reload(layer, None)
    with pytest.raises(RuntimeError, match="a layer's weights are not loaded, as after a reload that was refused"):
        layer.quant_method.embedding(layer, torch.arange(VOCABULARY))


def test_a_head_that_a_pooling_model_puts_aside_is_left_there(rank):
    layer = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=tables("lm_head"), prefix="lm_head").to("meta")
    finish(layer)
    assert layer.B.is_meta


def test_a_table_of_another_vocabulary_is_refused(rank):
    tensors, _ = stored(VOCABULARY - 1, HIDDEN, TABLE.group_size, TABLE.bits)
    layer = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=tables("lm_head"), prefix="lm_head")
    with pytest.raises(ValueError, match=r"lm_head\.B is torch\.int32 \(3, 4, 299\), expected int32 \(3, 4, 300\)"):
        load(layer, tensors)


def test_a_tied_head_has_what_vllm_reads_of_a_head(rank):
    """Its model of transformers' modelling code reads the bias."""
    quant = tables(*TABLES)
    embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=quant, prefix="model.embed_tokens")
    head = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=quant, prefix="lm_head").tie_weights(embedding)
    assert head is embedding
    assert head.bias is None
    assert not hasattr(head, "weight")


def test_tables_of_a_draft_model_are_found(rank, monkeypatch):
    monkeypatch.setattr(distributed, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True))
    quant = tables(*TABLES)
    VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=quant, prefix="draft_model.model.embed_tokens")
    head = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=quant, prefix="draft_model.lm_head")
    assert head.quant_method.name == "lm_head"
    assert quant.get_checkpoint_weight_mapper() is not None


CLASSIFIER = {"convert_type": "classify"}
RERANKER = {"classifier_from_token": ["no", "yes"], "method": "from_2_way_softmax"}


@pytest.mark.parametrize(
    ("names", "kind", "config", "is_refused"),
    [
        (TABLES, CLASSIFIER, RERANKER, True),
        (TABLES[1:], CLASSIFIER, {"method": "no_post_processing"}, True),
        (TABLES[:1], CLASSIFIER, RERANKER, False),
        (TABLES, CLASSIFIER, {}, False),  # with a head of its own
        (TABLES, {"convert_type": "none"}, RERANKER, False),
    ],
)
def test_a_head_that_becomes_a_classifier_is_refused(names, kind, config, is_refused):
    current = VllmConfig()
    current.model_config = SimpleNamespace(**kind, hf_config=PreTrainedConfig(**config))
    expected = pytest.raises(ValueError, match=r"lm_head: vLLM makes this classifier .* again with --head-bits 16")
    with set_current_vllm_config(current), expected if is_refused else nullcontext():
        tables(*names).get_quant_method(VocabParallelEmbedding.__new__(VocabParallelEmbedding), "model.embed_tokens")


def test_tying_to_an_embedding_in_16_bits_is_refused(rank):
    embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, quant_config=tables(), prefix="model.embed_tokens")
    head = ParallelLMHead(VOCABULARY, HIDDEN, quant_config=tables("lm_head"), prefix="lm_head")
    with pytest.raises(ValueError, match="lm_head is in bit-planes and tied to an embedding in 16 bits"):
        head.tie_weights(embedding)


def test_an_embedding_that_a_draft_model_shares_is_refused(monkeypatch):
    """An LM head is not: vLLM looks whether it has a weight."""
    current = VllmConfig()
    current.speculative_config = SpeculativeConfig(method="ngram", num_speculative_tokens=1)
    quant = tables(*TABLES)
    embedding, head = (kind.__new__(kind) for kind in (VocabParallelEmbedding, ParallelLMHead))
    with set_current_vllm_config(current):
        assert quant.get_quant_method(embedding, "model.embed_tokens")
        monkeypatch.setattr(current.speculative_config, "method", "eagle3")
        assert quant.get_quant_method(head, "lm_head")
        with pytest.raises(ValueError, match=r"model.embed_tokens: .* can't be shared .* with --embed-bits 16"):
            quant.get_quant_method(embedding, "model.embed_tokens")


@pytest.mark.parametrize(
    ("is_first_rank", "offered", "names", "refused"),
    [
        (True, VocabParallelEmbedding, TABLES, False),
        (True, ParallelLMHead, TABLES, True),
        (True, ParallelLMHead, TABLES[1:], False),
        (False, ParallelLMHead, TABLES, False),  # of a pipeline, whose first stage has the embedding
    ],
)
def test_an_embedding_that_vllm_never_offers_is_refused_by_name(monkeypatch, is_first_rank, offered, names, refused):
    monkeypatch.setattr(distributed, "get_pp_group", lambda: SimpleNamespace(is_first_rank=is_first_rank))
    quant = tables(*names)
    quant.get_quant_method(offered.__new__(offered), "lm_head" if offered is ParallelLMHead else "model.embed_tokens")
    expected = pytest.raises(ValueError, match=r"model.embed_tokens: .* 16 bits only: .* with --embed-bits 16")
    with expected if refused else nullcontext():
        quant.get_checkpoint_weight_mapper()
