"""BPDQ checkpoints, ours and the authors', through transformers' own from_pretrained."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, GPTQConfig
from transformers.quantizers.auto import AutoQuantizationConfig

import bpdq_quantizer  # noqa: F401, registers the loader
from bpdq_quantizer.checkpoint.inspection import inspect
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.modules import BPDQEmbedding, BPDQLinear, TiedHead
from tiny import bpdq_checkpoint, tiny_model

IDS = torch.arange(30)[None] * 7 % 380
LAYER = "model.layers.1.mlp.down_proj"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TABLE = {"bits": 4, "group_size": 32}


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model", "qwen2")


def logits(folder, **kwargs):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()(IDS).logits


WIDTHS = pytest.mark.parametrize("width", [16, 8])  # of coefficients


@pytest.mark.parametrize(("dialect", "width"), [("ours", 16), ("authors", 16), ("ours", 8)])
@pytest.mark.parametrize(("bits", "group_size"), [(1, 32), (2, 256), (3, 128), (4, 64)])
def test_logits_equal_those_of_the_dequantized_weights(model, dialect, width, bits, group_size):
    out = bpdq_checkpoint(model, model.parent / "out", bits, group_size, dialect, coefficient_bits=width)
    torch.testing.assert_close(logits(out), logits(f"{out}-dequantized"), rtol=1e-4, atol=1e-4)


@WIDTHS
def test_layers_can_differ_in_planes_group_size_and_width_of_coefficients(model, width):
    layers = {LAYER: {"bits": 4, "group_size": 32}, "model.layers.0.self_attn.o_proj": {"bits": 1}}
    layers |= {f"model.layers.{i}.self_attn.q_proj": {"coefficient_bits": 24 - width} for i in (0, 1)}
    out = bpdq_checkpoint(model, model.parent / "out", layers=layers, coefficient_bits=width)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.get_submodule(LAYER).B.shape[1] == 4
    widths = {layer["name"]: layer["coefficient_bits"] for layer in inspect(out)["layers"]}
    assert {name for name, found in widths.items() if found != width} == {name for name in layers if "q_proj" in name}
    assert {name for name, found in widths.items() if found == 8} == {
        name.removesuffix(".s") for name in loaded.state_dict() if name.endswith(".s")
    }
    torch.testing.assert_close(logits(out), logits(f"{out}-dequantized"), rtol=1e-4, atol=1e-4)


def test_fp16_coefficients_keep_their_bits_in_a_bf16_model(tmp_path):
    tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    out = bpdq_checkpoint(tmp_path / "model", tmp_path / "out", coefficient_dtype=torch.float16)
    c = AutoModelForCausalLM.from_pretrained(out).get_submodule(LAYER).c
    assert torch.equal(c, load_file(out / "model.safetensors")[f"{LAYER}.c"])


@WIDTHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_loaded_checkpoint_saves_to_one_that_loads(model, width, dtype):
    """Also if the model was in other dtypes before, which its planes and coefficients never are."""
    out = bpdq_checkpoint(model, model.parent / "out", coefficient_bits=width, coefficient_dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for other in (torch.bfloat16, torch.float16, torch.float32):
        loaded.to(other)
    loaded.save_pretrained(model.parent / "again")
    stored, again = (load_file(folder / "model.safetensors") for folder in (out, model.parent / "again"))
    assert stored.keys() == again.keys()
    packed = [name for name in stored if name.endswith((".B", ".c", ".s"))]
    assert [name for name in packed if stored[name].dtype != again[name].dtype] == []
    assert all(torch.equal(stored[name], again[name]) for name in packed)
    assert logits(model.parent / "again").isfinite().all()


@WIDTHS
def test_a_state_dict_goes_into_another_model(model, width):
    out = bpdq_checkpoint(model, model.parent / "out", coefficient_bits=width)
    loaded, other = (AutoModelForCausalLM.from_pretrained(out) for _ in range(2))
    for tensor in other.state_dict().values():
        tensor.zero_()
    other.load_state_dict(loaded.state_dict())
    with torch.inference_mode():
        assert torch.equal(other.eval()(IDS).logits, loaded.eval()(IDS).logits)


def test_weights_stay_packed(model):
    out = bpdq_checkpoint(model, model.parent / "out")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    quantized = [m for m in loaded.modules() if isinstance(m, BPDQLinear)]
    assert len(quantized) == 14
    assert not [m for m in loaded.model.layers.modules() if isinstance(m, torch.nn.Linear)]


def with_tables(folder, arch="llama", tie=False, names=(EMBEDDING, HEAD), width=16):
    """A checkpoint whose tables `names` are in bit-planes."""
    tiny_model(folder / "model", arch, tie_word_embeddings=tie)
    layers = dict.fromkeys(names, TABLE)
    return bpdq_checkpoint(folder / "model", folder / "out", layers=layers, coefficient_bits=width)


@pytest.mark.parametrize(  # gemma scales what it looks up
    ("arch", "width"), [("llama", 16), ("llama", 8), ("qwen3", 16), ("gemma", 16), ("gemma", 8), ("gemma3_text", 16)]
)
@pytest.mark.parametrize("tie", [False, True])
def test_tables_give_the_logits_of_the_dequantized_weights(tmp_path, arch, width, tie):
    out = with_tables(tmp_path, arch, tie, width=width)
    torch.testing.assert_close(logits(out), logits(f"{out}-dequantized"), rtol=1e-4, atol=1e-4)
    model = AutoModelForCausalLM.from_pretrained(out)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, BPDQEmbedding)
    assert type(head) is (TiedHead if tie else BPDQLinear)
    assert not [name for name, p in model.named_parameters() if p.ndim == 2]
    model.tie_weights()  # transformers calls it wherever weights may have moved
    assert torch.equal(model(IDS).logits, logits(out))


@pytest.mark.parametrize("names", [(EMBEDDING,), (HEAD,)])
def test_one_table_alone_can_be_in_planes(tmp_path, names):
    out = with_tables(tmp_path, names=names)
    torch.testing.assert_close(logits(out), logits(f"{out}-dequantized"), rtol=1e-4, atol=1e-4)
    tensors = load_file(out / "model.safetensors")
    assert [f"{name}.B" in tensors for name in (EMBEDDING, HEAD)] == [name in names for name in (EMBEDDING, HEAD)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_come_in_the_dtype_of_the_model(tmp_path, dtype):
    out = with_tables(tmp_path, "gemma")
    model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
    plain = AutoModelForCausalLM.from_pretrained(f"{out}-dequantized", dtype=dtype)
    assert torch.equal(model.get_input_embeddings()(IDS), plain.get_input_embeddings()(IDS))
    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
    assert model.to(other).get_input_embeddings()(IDS).dtype == other


@WIDTHS
@pytest.mark.parametrize("tie", [False, True])
def test_a_loaded_checkpoint_with_tables_saves_to_one_that_loads(tmp_path, tie, width):
    out = with_tables(tmp_path, tie=tie, width=width)
    AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")
    assert torch.equal(logits(out), logits(tmp_path / "again"))
    names = load_file(tmp_path / "again" / "model.safetensors").keys()
    assert names == load_file(out / "model.safetensors").keys()


@pytest.mark.parametrize("tie", [False, True])
def test_the_model_without_its_head_gives_the_hidden_states_of_the_dequantized_weights(tmp_path, tie):
    out = with_tables(tmp_path, tie=tie)
    with torch.inference_mode():
        found, expected = (AutoModel.from_pretrained(f"{out}{kind}").eval()(IDS)[0] for kind in ("", "-dequantized"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


OWN = {LAYER: {"bits": 3, "group_size": 32}, EMBEDDING: TABLE, HEAD: TABLE}
ALONE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("names", [tuple(OWN), (LAYER,)])
@pytest.mark.parametrize("tie", [False, True])
def test_what_automodel_saves_is_opened_with_names_that_it_has_shortened(tmp_path, tie, names):
    """Its tensors lack the prefix that names in quantization_config have."""
    tiny_model(tmp_path / "model", tie_word_embeddings=tie)
    layers = {name: OWN[name] for name in names}
    out = bpdq_checkpoint(tmp_path / "model", tmp_path / "out", layers=layers, ignore=(ALONE,))
    model = AutoModel.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    assert not [name for name in load_file(tmp_path / "again" / "model.safetensors") if name.startswith("model.")]
    with torch.inference_mode():
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "again").eval()(IDS)[0], model.eval()(IDS)[0])
    found, before = (
        {layer["name"].removeprefix("model."): layer["bits"] for layer in inspect(tmp_path / folder)["layers"]}
        for folder in ("again", "out")
    )
    assert found == {name: bits for name, bits in before.items() if name != HEAD}
    if tie:
        assert torch.equal(logits(tmp_path / "again"), logits(out))
    else:
        with pytest.raises(InputError, match=r"lm_head\.(B|weight) is not in the checkpoint"):
            logits(tmp_path / "again")


@pytest.mark.parametrize("tables", [(), (EMBEDDING, HEAD)])
def test_a_new_head_goes_on_packed_weights(tmp_path, tables):
    out = with_tables(tmp_path, names=tables)
    model, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert {"score.weight"} == set(info["missing_keys"])
    assert sum(isinstance(m, BPDQLinear) for m in model.modules()) == 14


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("names", [(), (EMBEDDING, HEAD)])
def test_a_model_with_a_new_head_saves_to_one_that_loads(tmp_path, tie, names):
    out = with_tables(tmp_path, "qwen3", tie, names)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    damage(tmp_path / "again", lambda tensors: tensors.pop(f"{LAYER}.B"))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.B is not in the checkpoint"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification])
def test_without_its_head_too_a_model_misses_no_layer(tmp_path, kind):
    out = with_tables(tmp_path)
    damage(out, lambda tensors: tensors.pop(f"{LAYER}.B"))
    with pytest.raises(InputError, match=f"{LAYER}.B is not in the checkpoint"):
        kind.from_pretrained(out)


def test_tied_tables_of_different_schemes_stop_the_load(tmp_path):
    out = with_tables(tmp_path, tie=True, names=(EMBEDDING,))
    with pytest.raises(InputError, match=r"model\.embed_tokens and lm_head are tied.*`layers` must name both"):
        AutoModelForCausalLM.from_pretrained(out)


@WIDTHS
@pytest.mark.parametrize("tie", [False, True])
def test_inspect_lists_tables_and_counts_their_bytes(tmp_path, tie, width):
    out = with_tables(tmp_path, tie=tie, width=width)
    found = inspect(out)
    stored = load_file(out / "model.safetensors")
    names = (EMBEDDING,) if tie else (EMBEDDING, HEAD)
    tables = {layer["name"]: layer for layer in found["layers"] if layer["name"] in (EMBEDDING, HEAD)}
    assert tuple(tables) == names
    for name, table in tables.items():
        assert (table["out_features"], table["in_features"], table["bits"], table["group_size"]) == (384, 128, 4, 32)
        assert table["coefficient_bits"] == width
        assert table["bytes"] == sum(stored[f"{name}.{key}"].nbytes for key in "Bcs" if f"{name}.{key}" in stored)
    assert found["other_bytes"] == sum(t.nbytes for name, t in stored.items() if not name.endswith((".B", ".c", ".s")))


def test_other_gptq_configs_are_left_to_transformers():
    config = AutoQuantizationConfig.from_dict({"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert type(config) is GPTQConfig


def damage(out, change):
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.s"), f"{LAYER}.s is not in the checkpoint"),
        (lambda t: t.update({f"{LAYER}.s": t[f"{LAYER}.s"].float()}), f"{LAYER}.s is torch.float32"),
        (lambda t: t.update({f"{LAYER}.s": t[f"{LAYER}.s"][:, 1:].clone()}), f"{LAYER}.s is .* expected 16-bit"),
        (lambda t: t.update({f"{LAYER}.c": t[f"{LAYER}.c"].bfloat16()}), f"{LAYER}.c is .* expected int8"),
        (lambda t: t[f"{LAYER}.s"].fill_(float("nan")), f"{LAYER}.s holds NaN"),
    ],
)
def test_a_damaged_tensor_of_a_layer_in_8_bits_stops_the_load_and_is_named(model, change, message):
    out = bpdq_checkpoint(model, model.parent / "out", coefficient_bits=8)
    damage(out, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.B"), f"{LAYER}.B is not in the checkpoint"),
        (lambda t: t.pop(f"{LAYER}.c"), f"{LAYER}.c is not in the checkpoint"),
        (lambda t: t.update({f"{LAYER}.B": t[f"{LAYER}.B"][:-1].clone()}), f"{LAYER}.B is .* expected int32"),
        (lambda t: t.update({f"{LAYER}.B": t[f"{LAYER}.B"].float()}), f"{LAYER}.B is torch.float32"),
        (lambda t: t.update({f"{LAYER}.c": t[f"{LAYER}.c"][:, :-1].clone()}), f"{LAYER}.c is .* expected"),
        (lambda t: t[f"{LAYER}.c"].fill_(float("nan")), f"{LAYER}.c holds NaN"),
    ],
)
def test_a_damaged_tensor_stops_the_load_and_is_named(model, change, message):
    out = bpdq_checkpoint(model, model.parent / "out")
    damage(out, change)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(f"{name}.B"), r"\.B is not in the checkpoint"),
        (lambda t, name: t.update({f"{name}.B": t[f"{name}.B"][..., 1:].clone()}), r"\.B is .* expected int32"),
        (lambda t, name: t.update({f"{name}.c": t[f"{name}.c"][:, 1:].clone()}), r"\.c is .* expected"),
        (lambda t, name: t[f"{name}.c"].fill_(float("nan")), r"\.c holds NaN"),
    ],
)
def test_a_damaged_table_stops_the_load_and_is_named(tmp_path, name, change, message):
    out = with_tables(tmp_path)
    damage(out, lambda tensors: change(tensors, name))
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + message):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_truncated_file_stops_the_load_and_is_named(model):
    out = bpdq_checkpoint(model, model.parent / "out")
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: not a complete safetensors file"):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format_version": 4}, "format_version 4"), ({"bits": 5}, "bits = 5"), ({"group_size": 48}, "group_size = 48")],
)
def test_an_unsupported_format_stops_the_load(model, change, message):
    out = bpdq_checkpoint(model, model.parent / "out")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"].update(change)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(out)
