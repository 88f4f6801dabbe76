"""Sources that are quantized already and damaged, or in a way that is not read: one sentence each, before any work."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from architectures import model_folder
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.formats import compressed as compressed_tensors
from bpdq_quantizer.model.formats.compressed import packed_zeros
from bpdq_quantizer.model.stream import open_model
from bpdq_quantizer.run import prepare
from quantized_sources import FORMATS, compressed, fp8_blocks, quantized_pair, rewrite
from tiny import tiny_model, tiny_tokenizer

FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
LAYER = "model.layers.1.mlp.up_proj.weight"


def without(suffix):
    return lambda tensors: tensors.pop(LAYER + suffix)


def renamed(suffix, to):
    return lambda tensors: tensors.update({LAYER + to: tensors.pop(LAYER + suffix)})


def changed(suffix, change):
    return lambda tensors: tensors.update({LAYER + suffix: change(tensors[LAYER + suffix])})


def holding(value):
    return lambda tensor: tensor.float().index_fill(0, torch.tensor([1]), value).to(tensor.dtype)


DAMAGE = {
    "no scale": ("blocks", without("_scale_inv"), f"{LAYER} is F8_E4M3, but {LAYER}_scale_inv, without which it is no"),
    "other name": ("blocks", renamed("_scale_inv", "_scales"), f"{LAYER} is F8_E4M3, but {LAYER}_scale_inv, without"),
    "no weight": ("blocks", without(""), f"{LAYER}_scale_inv is BF16, but {LAYER}, without which it is no fp8 weight"),
    "scale's shape": ("blocks", changed("_scale_inv", lambda s: s[1:]), f"{LAYER}_scale_inv is BF16 (2, 2), expected "),
    "scale's dtype": (
        "blocks",
        changed("_scale_inv", lambda s: s.short()),
        f"{LAYER}_scale_inv is I16 (3, 2), exp",
    ),
    "shape": ("blocks", changed("", lambda w: w[1:]), f"{LAYER} is F8_E4M3 (351, 192), expected F8_E4M3"),
    "NaN": ("blocks", changed("_scale_inv", holding(torch.nan)), f"{LAYER}_scale_inv holds NaN or infinity"),
    "infinity": ("FP8", changed("_scale", holding(torch.inf)), f"{LAYER}_scale holds NaN or infinity"),
    "16 bits and a scale": (
        "FP8",
        changed("", lambda w: w.bfloat16()),
        f"{LAYER} is BF16 (352, 192), expected F8",
    ),
    "two scales": (
        "blocks",
        lambda t: t.update({f"{LAYER}_scale": t[f"{LAYER}_scale_inv"].clone()}),
        f"{LAYER}_scale has no place beside {LAYER} and {LAYER}_scale_inv",
    ),
    "no packed scale": ("W4A16", without("_scale"), f"{LAYER}_packed is I32, but {LAYER}_scale, without which"),
    "no packed weight": ("W4A16", without("_packed"), f"but {LAYER}_packed, without which it is no compressed-tensors"),
    "packed shape": ("W4A16", changed("_packed", lambda w: w[:, 1:]), f"{LAYER}_packed is I32 (352, 23), expected I32"),
    "other groups": ("W4A16", changed("_scale", lambda s: s[:, ::2]), f"{LAYER}_scale is BF16 (352, 3), expected "),
    "shape's values": ("W4A16", changed("_shape", lambda s: s + 1), f"{LAYER}_shape is [353, 193], but config.json"),
    "zero points": (
        "W4A16",
        lambda t: t.update({f"{LAYER}_zero_point": torch.zeros(44, 6, dtype=torch.int32)}),
        f"{LAYER}_zero_point has no place beside",
    ),
    "nothing": ("W4A16", lambda t: [t.pop(n) for n in list(t) if n.startswith(LAYER)], f"{LAYER} is not in its files"),
}


NO_PLACE = {
    "blocks": ("model.layers.2.mlp.up_proj.weight", ["model.layers.2.mlp.up_proj.weight_scale_inv"]),
    "W4A16": ("model.layers.2.mlp.up_proj.weight_packed", [f"{LAYER[:-7]}.input_zero_point"]),
    "FP8": ("model.layers.0.self_attn.q_proj.bias", [f"{LAYER[:-7]}.input_scale", "model.layers.1.self_attn.k_scale"]),
}


UNREAD = "from which 16-bit weights can't be read here: quantize the 16-bit original instead"
AGAIN = "is quantized already: start from the 16-bit model"
SPARSE = {"sparsity_config": {"format": "sparse-24-bitmask"}}
ROTATED = {"transform_config": {"config_groups": {"R1": {}}}}
REFUSED = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, f"by GPTQ, {UNREAD}"),
    "AWQ": ({"quant_method": "awq", "bits": 4}, f"by AWQ, {UNREAD}"),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes"},
        f"by bitsandbytes, {UNREAD}, or save this one in 16 bits",
    ),
    "bitsandbytes of old": ({"load_in_8bit": True}, "(pip install bitsandbytes, then AutoModelForCausalLM.from_pretr"),
    "HQQ": ({"quant_method": "hqq"}, f"by HQQ, {UNREAD}"),
    "torchao": ({"quant_method": "torchao"}, f"by torchao, {UNREAD}"),
    "modelopt": ({"quant_method": "modelopt"}, f"by modelopt, {UNREAD}"),
    "MLX": ({"bits": 4, "group_size": 64}, f"and its config.json names no quant_method, {UNREAD}"),
    "BPDQ": ({"quant_method": "bpdq", "bits": 2}, AGAIN),
    "authors' BPDQ": ({"quant_method": "gptq", "checkpoint_format": "bpdq"}, AGAIN),
    "no blocks": (FP8_CONFIG | {"weight_block_size": [128]}, "weight_block_size = [128] must be two positive integers"),
    "not compressed": (
        FORMATS["FP8"] | {"quantization_status": "frozen"},
        "status is 'frozen', not 'compressed'",
    ),
    "sparse": (FORMATS["FP8"] | SPARSE, "sparsity_config is not supported: quantize the 16-bit"),
    "rotated": (FORMATS["FP8"] | ROTATED, "transform_config is not supported: quantize the 16-bit"),
    "no groups": ({"quant_method": "compressed-tensors"}, "compressed-tensors can't read it"),
    "old format": (
        FORMATS["FP8"] | {"format": "marlin-24"},
        "format = 'marlin-24' is not supported: quantize the",
    ),
    "MXFP4 without experts": (
        {"quant_method": "mxfp4"},
        "as MXFP4, which transformers reads of experts only: qua",
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By format: a folder of quantized weights."""
    folder = tmp_path_factory.mktemp("refused")
    sizes = {"hidden": 192, "ffn": 352, "heads": 6, "kv_heads": 3, "dtype": torch.bfloat16}
    model = tiny_model(folder / "model", **sizes)
    stored = {"blocks": (FP8_CONFIG, fp8_blocks), "W4A16": compressed("W4A16"), "FP8": compressed("FP8")}
    return {name: quantized_pair(model, folder / name, *how)[0] for name, how in stored.items()}


def refusal(folder):
    """What is said of a folder when it is opened, with the folder's name removed."""
    with pytest.raises(InputError, match=str(folder)) as refused:
        open_model(str(folder))
    return str(refused.value).replace(str(folder), "")


def damaged(source, folder, damage):
    shutil.copytree(source, folder)
    stored = load_file(folder / "model.safetensors")
    damage(stored)
    return rewrite(folder, stored, None)


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(sources, tmp_path, name):
    source, damage, message = DAMAGE[name]
    assert message in refusal(damaged(sources[source], tmp_path / "model", damage))


@pytest.mark.parametrize("name", NO_PLACE)
def test_tensors_without_a_place_are_named_and_companions_of_others_are_not(sources, tmp_path, name):
    """Layers that config.json does not know of, and biases; scales of activations are no loss."""
    lost, spare = NO_PLACE[name]
    folder = damaged(sources[name], tmp_path / "model", lambda t: t.update({n: torch.ones(1) for n in spare}))
    open_model(str(folder))
    folder = damaged(folder, tmp_path / "other", lambda t: t.update({lost: torch.ones(8, dtype=torch.bfloat16)}))
    said = f"/model.safetensors: {lost} has no place in the model of config.json, a LlamaForCausalLM, and would be lost"
    assert said in refusal(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(sources, tmp_path, name):
    quantization, message = REFUSED[name]
    folder = shutil.copytree(sources["FP8"], tmp_path / "model")
    rewrite(folder, load_file(folder / "model.safetensors"), quantization)
    assert message in refusal(folder)


def refused(folder, text, capsys, monkeypatch):
    """What `bpdq quantize` says of a folder before any work, of which nothing is left."""
    monkeypatch.setattr(prepare, "begin", None)
    argv = ["quantize", folder, "--output", folder.parent / "out", "--calibration", text, "--seq-len", "32"]
    assert main([str(a) for a in argv]) == 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bpdq: error: ")]
    return line


def test_damage_is_named_before_any_work(sources, tmp_path, text, capsys, monkeypatch):
    source, damage, message = DAMAGE["NaN"]
    folder = damaged(sources[source], tmp_path / "model", damage)
    assert f"{folder / 'model.safetensors'}: {message}" in refused(folder, text, capsys, monkeypatch)


@pytest.mark.parametrize("arch", ["llama", "llava"])
def test_floats_of_8_bits_are_not_read_as_weights_where_config_json_says_nothing(sources, tmp_path, arch):
    """Of the latter transformers changes the tensors' names."""
    folder = tmp_path / "model"
    if arch == "llama":
        shutil.copytree(sources["FP8"], folder)
        rewrite(folder, load_file(folder / "model.safetensors"), {})
    else:
        stored = load_file(model_folder(folder, arch) / "model.safetensors")
        stored["language_model.model.layers.0.mlp.up_proj.weight"] = torch.zeros(192, 128).to(torch.float8_e4m3fn)
        rewrite(folder, stored, None)
    assert "weight is F8_E4M3, though its config.json has no quantization_config: start from the" in refusal(folder)


@pytest.mark.parametrize(
    ("arch", "name", "message"),
    [
        ("llama", "model.norm.weight", "is stored quantized, but is no matrix: not supported, quantize the 16-bit"),
        (
            "olmo_hybrid",
            "model.layers.0.linear_attn.q_conv1d.weight",
            "is stored quantized, and transformers makes others",
        ),
    ],
)
def test_weights_that_no_format_is_for(tmp_path, arch, name, message):
    folder = model_folder(tmp_path / "model", arch)
    stored = load_file(folder / "model.safetensors")
    stored |= {name: stored[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    line = refusal(rewrite(folder, stored, FP8_CONFIG))
    assert name in line
    assert message in line


def test_compressed_tensors_is_named_where_it_is_not_installed(sources, monkeypatch):
    monkeypatch.setattr(compressed_tensors, "is_compressed_tensors_available", lambda: False)
    assert "needs the compressed-tensors package: pip install comp" in refusal(sources["FP8"])


@pytest.mark.parametrize("quantization", [None, FP8_CONFIG])
def test_experts_that_are_not_known_are_refused_first(tmp_path, text, capsys, monkeypatch, quantization):
    """However they are stored: nothing but config.json is looked at, in which a plan finds the same."""
    folder = tmp_path / "model"
    sizes = {"d_model": 64, "n_heads": 2, "n_layers": 1, "max_seq_len": 64, "vocab_size": 384}
    experts = {"ffn_hidden_size": 64, "moe_num_experts": 2, "moe_top_k": 1}
    config = AutoConfig.for_model("dbrx", **sizes, ffn_config=experts, attn_config={"kv_n_heads": 1, "rope_theta": 1e4})
    if quantization is not None:
        config.quantization_config = quantization
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert "nor experts as transformers has them in most families" in refused(folder, text, capsys, monkeypatch)
    assert main(["plan", str(folder)]) == 2
    assert "nor experts as transformers has them in most families" in capsys.readouterr().err


@pytest.mark.parametrize(("columns", "bits", "fits"), [(8, 4, True), (7, 3, True), (6, 3, False)])
def test_zero_points_that_run_over_the_ends_of_words_are_refused(columns, bits, fits):
    """compressed-tensors 0.18 and later pack 64 codes of 3 bits into 6 words, earlier ones into 7."""
    stored = {
        "_packed": torch.zeros(32, columns, dtype=torch.int32),
        "_zero_point": torch.zeros(32 // (32 // bits) + 1, 2, dtype=torch.int32),
    }
    if fits:
        assert packed_zeros("up_proj", stored, 64, bits) is stored["_zero_point"]
    else:
        with pytest.raises(InputError, match="up_proj: zero points of 3 bits, packed without gaps"):
            packed_zeros("up_proj", stored, 64, bits)
