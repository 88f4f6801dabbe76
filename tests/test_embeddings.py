"""Quantizing the embedding and the LM head, on tiny models."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import bpdq_quantizer
from bpdq_kernels import dequantize
from bpdq_kernels.format import Scheme
from bpdq_quantizer.algorithm.solver import quantize_linear
from bpdq_quantizer.checkpoint.inspection import inspect
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.plan import plan
from bpdq_quantizer.model import support
from bpdq_quantizer.passes import embeddings
from bpdq_quantizer.passes.tune import final_states
from tiny import TEXT, load_tensors, tiny_model

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
IDS = torch.arange(30)[None] * 7 % 380


def quantize(folder, text, arch="llama", tie=False, **options):
    """A checkpoint of a tiny model and its report."""
    tiny_model(folder / "model", arch, tie_word_embeddings=tie)
    small = {"bits": 3, "group_size": 64, "calibration": text, "samples": 6, "seq_len": 32, "iterations": 3}
    report = bpdq_quantizer.quantize(str(folder / "model"), folder / "out", **(small | options))
    return folder / "out", report


def dequantized(out):
    """The 16-bit model with the weights that the checkpoint stands for."""
    stored = load_tensors(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(out.parent / "model")
    for name in [name.removesuffix(".B") for name in stored if name.endswith(".B")]:
        weight = model.get_submodule(name).weight
        G = config.get("layers", {}).get(name, config)["group_size"]
        B, c, s = (stored[f"{name}.{tensor}"] for tensor in "Bcs")
        weight.data = dequantize(B, c, G, weight.shape[1], s)
    model.tie_weights()
    return model


@pytest.mark.parametrize(
    ("arch", "tie", "options", "stored"),
    [
        ("llama", False, {"embed_bits": 4, "head_bits": 2}, {EMBEDDING: 4, HEAD: 2}),
        ("gemma2", False, {"embed_bits": 1}, {EMBEDDING: 1}),
        ("llama", False, {"head_bits": 4}, {HEAD: 4}),
        ("gemma2", True, {"embed_bits": 4, "head_bits": 4}, {EMBEDDING: 4}),
        ("llama", True, {"embed_bits": 3}, {EMBEDDING: 3}),
        ("llama", True, {"head_bits": 3}, {EMBEDDING: 3}),
    ],
)
def test_tables_are_stored_in_planes_and_load(tmp_path, text, arch, tie, options, stored):
    out, report = quantize(tmp_path, text, arch, tie, **options)
    tensors = load_tensors(out)
    assert {name: tensors[f"{name}.B"].shape[1] for name in (EMBEDDING, HEAD) if f"{name}.B" in tensors} == stored
    left = {EMBEDDING, HEAD} - set(stored) - ({HEAD} if tie else set())
    assert {name for name in (EMBEDDING, HEAD) if f"{name}.weight" in tensors} == left

    config = json.loads((out / "config.json").read_text())["quantization_config"]
    named = dict.fromkeys((EMBEDDING, HEAD), stored[EMBEDDING]) if tie else stored
    assert config["layers"] == {name: {"bits": k, "group_size": 64, "coefficient_bits": 8} for name, k in named.items()}
    assert config["ignore"] == ([] if HEAD in named else [HEAD])

    assert [layer["name"] for layer in report["layers"][14:]] == list(stored)
    planes = {name: t.nbytes for name, t in tensors.items() if name.endswith((".B", ".c", ".s"))}
    size = sum(nbytes for name, nbytes in planes.items() if not name.startswith((EMBEDDING, HEAD)))
    weights = sum(layer["in_features"] * layer["out_features"] for layer in report["layers"][:14])
    assert report["bits_per_weight"] == pytest.approx(8 * size / weights, rel=0.02)  # 352 inputs end in a short group
    assert inspect(out)["bits_per_weight"] == pytest.approx(report["bits_per_weight"])

    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(out)(IDS).logits
        torch.testing.assert_close(logits, dequantized(out)(IDS).logits, rtol=1e-4, atol=1e-3)


def test_without_the_options_tables_stay_as_they_were(tmp_path, text):
    out, _ = quantize(tmp_path, text)
    before, after = (load_tensors(folder) for folder in (tmp_path / "model", out))
    for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
        assert torch.equal(before[name], after[name])
    assert "layers" not in json.loads((out / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("arch", "tie", "options", "bits"),
    [
        ("llama", True, {}, 4),
        ("qwen2", True, {"bits": 3, "code": "trellis"}, 4),
        ("llama", True, {"embed_bits": 16}, None),
        ("llama", True, {"head_bits": 16}, None),
        ("llama", True, {"head_bits": 3}, 3),
        ("llama", True, {"solver": "paper"}, None),
        ("llama", False, {}, None),
        ("gemma2", True, {}, None),  # vLLM's model takes none
    ],
)
def test_a_tied_table_that_is_much_of_a_small_model_has_bit_planes(
    monkeypatch, tmp_path, text, arch, tie, options, bits
):
    monkeypatch.setattr(support, "SMALLEST_TABLE", 384 * 128)
    out, report = quantize(tmp_path, text, arch, tie, **options)
    tensors = load_tensors(out)
    assert (tensors[f"{EMBEDDING}.B"].shape[1] if f"{EMBEDDING}.B" in tensors else None) == bits
    assert report["options"]["embed_bits"] == options.get("embed_bits", bits if "head_bits" not in options else None)
    if "solver" not in options:  # of which a plan knows nothing
        planned = plan(str(tmp_path / "model"), **({"bits": 3, "group_size": 64} | options))
        assert planned["embedding_bytes"] == sum(t.nbytes for n, t in tensors.items() if n.startswith(EMBEDDING))


@pytest.mark.parametrize(
    ("architecture", "table", "others", "bits"),
    [
        ("LlamaForCausalLM", 49152 * 576, 106_203_456, 4),  # SmolLM2-135M
        ("Qwen2ForCausalLM", 151936 * 1536, 1_310_000_000, 4),  # 1.5B
        ("Qwen3ForCausalLM", 151936 * 2560, 3_633_000_000, None),  # 4B
        ("LlamaForCausalLM", 1 << 22, 1 << 23, None),
        ("Gemma2ForCausalLM", 256000 * 2304, 2_024_000_000, None),
    ],
)
def test_which_tables_are_much_of_a_small_model(architecture, table, others, bits):
    assert support.table_bits(architecture, table, table + others) == bits


@pytest.mark.parametrize(
    ("tie", "options"), [(False, {}), (True, {}), (False, {"bits": 1, "tune": "model", "tune_steps": 20})]
)
def test_each_table_is_solved_in_its_own_metric(tmp_path, text, tie, options):
    """The embedding in the identity, the head in the Hessian of what it is fed in the end, tied ones in the sum."""
    out, report = quantize(tmp_path, text, tie=tie, embed_bits=2, head_bits=2, **options)
    assert "tune" not in options or report["tuning"]["best_evaluation"] > 0, "tuning has changed the model"
    model = AutoModelForCausalLM.from_pretrained(out)
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(out)(TEXT * 4, add_special_tokens=False)["input_ids"][: 6 * 32]
    tokens = torch.tensor(ids).view(6, 32)
    fed = dequantized(out)  # but for the embedding, which was still in 16 bits
    fed.get_input_embeddings().weight.data = original.get_input_embeddings().weight.data
    x, x_original = (final_states(m, tokens).flatten(0, 1) for m in (fed, original))
    H, H_original = (2 / len(states) * states.T @ states for states in (x, x_original))
    assert (H - H_original).norm() > 0.02 * H.norm(), "the test can tell them apart"
    identity = torch.eye(len(H))
    metrics = [H + embeddings.TIED_SHARE * H.diagonal().mean() * identity] if tie else [identity, H]
    for layer, metric in zip(report["layers"][14:], metrics, strict=True):
        stored, weight = model.get_submodule(layer["name"]), original.get_submodule(layer["name"]).weight.detach()
        D = weight - dequantize(stored.B, stored.c, 64, weight.shape[1], stored.s)
        loss, energy = (((M @ metric) * M).sum().item() for M in (D, weight))
        assert layer["loss"] == pytest.approx(loss, rel=1e-3)
        assert layer["relative_error"] == pytest.approx(loss / energy, rel=1e-3)


@settings(deadline=None, max_examples=20)
@given(
    rows=st.integers(1, 70),
    width=st.sampled_from([32, 96, 160]),
    bits=st.integers(1, 4),
    group_size=st.sampled_from([32, 64]),
    at_once=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_a_table_solved_in_chunks_is_the_table_solved_at_once(rows, width, bits, group_size, at_once, seed):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, width, generator=generator).bfloat16()
    x = torch.randn(2 * width, width, generator=generator)
    H = x.T @ x / width
    solve = partial(quantize_linear, iterations=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "CHUNK_ELEMENTS", at_once * width)
        layer, loss, energy, _ = embeddings.solve_rows("table", W, H, Scheme(bits, group_size), solve)
    D = W.float() - dequantize(layer.B, layer.c, group_size, width)
    assert loss == pytest.approx(((D @ H) * D).sum().item(), rel=1e-3)
    assert energy == pytest.approx(((W.float() @ H) * W).sum().item(), rel=1e-3)
    whole = quantize_linear(W, H, bits, group_size, iterations=2)
    assert loss == pytest.approx(whole.loss.sum().item(), rel=0.05)  # rounding may flip a code


def test_tied_tables_have_one_number_of_bits(tmp_path, text):
    message = "--embed-bits 4 --head-bits 3: this model's embedding and LM head are tied"
    with pytest.raises(InputError, match=message):
        quantize(tmp_path, text, tie=True, embed_bits=4, head_bits=3)
    assert not (tmp_path / "out").exists()


def test_an_embedding_that_does_more_than_look_up_is_refused(tmp_path):
    class Odd(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "model"))
    model.set_input_embeddings(Odd(384, 128))
    with pytest.raises(InputError, match=r"model\.embed_tokens is a Odd, which is not supported"):
        embeddings.embedding_schemes(model, 4, None, Scheme(2, 64, 8))
    assert embeddings.embedding_schemes(model, None, 4, Scheme(2, 64, 8)) == {HEAD: Scheme(4, 64, 8)}


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_nan_in_a_table_is_named(tmp_path, name):
    model = tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors[f"{name}.weight"][383, 5] = torch.nan  # a token that the text has not
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    lm = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(InputError, match=rf"{name}\.weight holds NaN or infinity"):
        embeddings.embedding_schemes(lm, 4, 4, Scheme(2, 64))
