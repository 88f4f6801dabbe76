"""Rotating a model's basis: the function stays, the outliers go."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bpdq_quantizer
from bpdq_quantizer.checkpoint.loader import load_model
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.stream import from_memory, load_block, open_model
from bpdq_quantizer.passes.rotate import hadamard, random_rotation, rotate, rotate_heads, rotated
from tiny import TEXT, load_tensors, tiny_model, tiny_tokenizer

IDS = torch.tensor([tiny_tokenizer()(TEXT)["input_ids"][40:60]])
CPU = torch.device("cpu")


def lively_model(folder, arch="llama", **options):
    """A tiny model whose norms have gains; its width is 96 = 32 x 3, that of heads 24 = 8 x 3."""
    return tiny_model(folder, arch, hidden=96, ffn=160, gains=0.3, **options)


def whole(source):
    """The model with all its blocks in memory."""
    for index in range(len(source.blocks)):
        load_block(source, index, CPU)
    return source.model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@settings(deadline=None, max_examples=30)
@given(width=st.sampled_from([1, 2, 3, 24, 64, 96, 100, 256, 320, 576, 896]), seed=st.integers(0, 99))
def test_a_rotation_is_orthogonal_and_leaves_no_channel_alone(width, seed):
    Q = rotate(torch.eye(width), random_rotation(width, torch.Generator().manual_seed(seed)))
    torch.testing.assert_close(Q @ Q.T, torch.eye(width), rtol=0, atol=1e-5)
    power = width & -width
    assert Q.abs().max() <= power**-0.5 + 1e-6
    if power == width:
        assert torch.allclose(Q.abs(), torch.tensor(width**-0.5))


def test_a_rotation_is_the_kronecker_product_of_its_factors():
    rotation = random_rotation(1280, torch.Generator().manual_seed(0))
    assert [len(factor) for factor in rotation.factors] == [5, 128, 2]
    a, b, c = (factor.contiguous() for factor in rotation.factors)
    Q = rotation.signs.diag() @ torch.kron(torch.kron(a, b), c)
    x = torch.randn(3, 4, 1280)
    torch.testing.assert_close(rotate(x, rotation), x @ Q, rtol=1e-4, atol=1e-4)
    x = torch.randn(3, 2 * 1280)
    torch.testing.assert_close(rotate_heads(x, rotation), x @ torch.block_diag(Q, Q), rtol=1e-4, atol=1e-4)
    assert torch.equal(hadamard(4) * 2, torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1.0]]))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_logits_stay(arch, tie, tmp_path):
    biases = {"attention_bias": True, "mlp_bias": True} if arch == "llama" else {}
    folder = str(lively_model(tmp_path / "model", arch, tie_word_embeddings=tie, **biases))
    before = logits(load_model(folder))
    source = rotated(open_model(folder), seed=3)
    model = whole(source)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=2e-4 * before.std().item())
    norms = [m for name, m in model.named_modules() if name.endswith("layernorm") or name == "model.norm"]
    assert len(norms) == 5
    assert all(torch.all(m.weight == (0 if arch == "gemma" else 1)) for m in norms)
    original = load_model(folder).state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, original[name])}
    assert {name for name in original if name.endswith("proj.weight")} <= moved


def test_bf16_logits_stay_within_the_noise_of_bf16(tmp_path):
    folder = str(lively_model(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=True))
    exact = logits(load_model(folder, torch.float32))
    noise = (logits(load_model(folder)) - exact).std()
    model = whole(rotated(open_model(folder), seed=0))
    assert model.dtype == torch.bfloat16
    assert (logits(model) - exact).std() < 2 * noise


def test_a_model_in_memory_is_rotated_to_the_same_tensors(tmp_path):
    """As GGUF files are read."""
    folder = str(lively_model(tmp_path / "model"))
    sources = open_model(folder), from_memory(load_model(folder))
    streamed, in_memory = (whole(rotated(source, 0)).state_dict() for source in sources)
    assert streamed.keys() == in_memory.keys()
    assert all(torch.equal(tensor, in_memory[name]) for name, tensor in streamed.items())


def test_the_seed_makes_the_rotation(tmp_path):
    folder = str(lively_model(tmp_path / "model"))
    tables = [rotated(open_model(folder), seed).model.get_input_embeddings().weight for seed in (0, 0, 1)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.allclose(tables[0], tables[2])


def test_outliers_are_spread(tmp_path):
    folder = lively_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][:, 5] *= 50
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weight = rotated(open_model(str(folder)), seed=0).weights[name]
    peaks = [(w.abs().amax(1) / w.square().mean(1).sqrt()).mean() for w in (tensors[name], weight)]
    assert peaks[0] > 8
    assert peaks[1] < 5


@pytest.mark.parametrize("gain", [1.0, 1.5])
def test_tied_tables_part_only_if_the_last_norm_has_gains(gain, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    folder = lively_model(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(gain)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    small = {"bits": 4, "group_size": 32, "calibration": str(text), "samples": 6, "seq_len": 32, "iterations": 3}
    bpdq_quantizer.quantize(str(folder), tmp_path / "out", rotate="hadamard", **small)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (gain == 1)
    stored = load_tensors(tmp_path / "out")
    assert ("lm_head.weight" in stored) == (gain != 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = logits(load_model(str(folder)))
    assert (logits(model) - before).std() < 0.5 * before.std()  # unrelated logits would give 1.4


def test_rotation_composes_with_tables_and_tuning(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    folder = lively_model(tmp_path / "model", tie_word_embeddings=True)
    small = {"bits": 4, "group_size": 32, "calibration": str(text), "samples": 6, "seq_len": 32, "iterations": 3}
    for name, number, tuning in (("tuned", 4, {"tune": "model", "tune_steps": 2}), ("plain", None, {})):
        out = tmp_path / name
        bpdq_quantizer.quantize(str(folder), out, rotate="hadamard", embed_bits=number, head_bits=3, **tuning, **small)
        before, after = (logits(load_model(str(model))) for model in (folder, out))
        assert (after - before).std() < 0.5 * before.std()
        tables = {name for name in load_tensors(out) if name.startswith(("lm_head", "model.embed_tokens"))}
        planes = {name: {f"{name}.{tensor}" for tensor in "Bcs"} for name in ("lm_head", "model.embed_tokens")}
        embedding = planes["model.embed_tokens"] if number else {"model.embed_tokens.weight"}
        assert tables == planes["lm_head"] | embedding, "untied: each with its own bits"


@pytest.mark.parametrize(
    ("arch", "config", "culprit"),
    [
        ("gemma2", {}, "model.layers.0.post_feedforward_layernorm.weight"),
        ("gemma3_text", {}, "model.layers.0.post_feedforward_layernorm.weight"),
        ("olmo2", {}, "model.layers.0.input_layernorm.weight"),
        ("olmo", {}, "model.norm.weight"),
        ("cohere", {}, "model.layers.0.post_attention_layernorm.weight"),
        ("stablelm", {}, "model.norm.bias"),
        ("phi3", {}, "model.layers.0.mlp.gate_proj.weight"),
        ("mixtral", {"num_local_experts": 2}, "model.layers.0.mlp"),
    ],
)
def test_what_does_not_fold_is_refused_by_name(arch, config, culprit, tmp_path):
    folder = tiny_model(tmp_path / "model", arch, **config)
    with pytest.raises(InputError, match=r"^--rotate: .* because of .*: leave the option out$") as refused:
        rotated(open_model(str(folder)), 0)
    assert culprit in str(refused.value)


def test_a_norm_that_is_no_rms_norm_is_refused(tmp_path):
    class Shifted(torch.nn.LayerNorm):
        def __init__(self, width):
            super().__init__(width, bias=False)

    model = load_model(str(tiny_model(tmp_path / "model")))
    for block, name in itertools.product(model.model.layers, ("input_layernorm", "post_attention_layernorm")):
        block.set_submodule(name, Shifted(128))
    with pytest.raises(InputError, match=r"because of model\.layers\.0\.input_layernorm"):
        rotated(from_memory(model), 0)
    model.model.norm = Shifted(128)
    with pytest.raises(InputError, match=r"model\.norm is a Shifted, not an RMSNorm"):
        rotated(from_memory(model), 0)
