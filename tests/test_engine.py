"""vLLM serves BPDQ checkpoints with exactly the tokens of transformers on the dequantized weights.

Models are float32: a rounding difference must not flip the argmax between two implementations.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bpdq_quantizer
from generate import PROMPTS, TOKENS, transformers_tokens, vllm_tokens
from tiny import TEXT, bpdq_checkpoint, tiny_model, with_kv_scales

LAYERS = {f"model.layers.1.mlp.{name}_proj": {"bits": 3, "group_size": 32} for name in ("gate", "up")}
MIXED = {  # k from 1 to 4 and two group sizes, in two blocks
    f"model.layers.{layer}.{module}.{name}_proj": {"bits": bits, "group_size": group_size}
    for layer, module, names, bits, group_size in (
        (0, "self_attn", "qkv", 3, 64),
        (0, "self_attn", "o", 4, 32),
        (0, "mlp", ("gate", "up"), 1, 32),
        (0, "mlp", ("down",), 4, 64),
        (1, "self_attn", "qkv", 1, 64),
        (1, "mlp", ("down",), 3, 32),
    )
    for name in names
}
TABLES = {name: {"bits": 4, "group_size": 32} for name in ("model.embed_tokens", "lm_head")}
EAGER = {
    "llama": ({"group_size": 128, "layers": LAYERS, "ignore": ("model.layers.0.mlp.down_proj",)}, {}),
    "llama authors": ({"dialect": "authors", "group_size": 256, "bits": 3}, {"quantization": "bpdq"}),
    "qwen2": ({"group_size": 64, "coefficient_dtype": torch.float16}, {"quantization": "bpdq"}),
    "qwen2 authors": ({"dialect": "authors", "group_size": 128}, {}),
    "llama tables": ({"group_size": 128, "layers": TABLES}, {}),
    "llama mixed": ({"group_size": 64, "layers": MIXED}, {}),
    "tied tables": ({"group_size": 128, "layers": TABLES}, {}),
}
SCALES = {
    "model.layers.0.self_attn.k_scale": 3.1,
    "model.layers.0.self_attn.v_scale": 1.7,
    "model.layers.1.self_attn.k_scale": 2.3,
    "model.layers.1.self_attn.v_scale": 2.9,
}
fp8_cache = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM's CPU build has no fp8 KV cache without AVX-512 or AMX",
)
OTHERS = {name: 1.4 * scale for name, scale in SCALES.items()}  # twice as large, most of a cache would be the same


def dequantized(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + "-dequantized")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """BPDQ checkpoints of two tiny models; llama's and qwen2's FFN of 352 inputs ends in a short group."""
    folder = tmp_path_factory.mktemp("engine")
    models = {arch: tiny_model(folder / f"{arch}-model", arch) for arch in ("llama", "qwen2")}
    models["tied"] = tiny_model(folder / "tied-model", "qwen2", tie_word_embeddings=True)
    made = {
        name: bpdq_checkpoint(models[name.split()[0]], folder / name.replace(" ", "-"), **options)
        for name, (options, _) in EAGER.items()
    }
    (folder / "text.txt").write_text(TEXT * 4)
    small = {"calibration": str(folder / "text.txt"), "samples": 2, "seq_len": 32, "iterations": 1, "solver": "paper"}
    made["rotated"] = folder / "rotated"
    model = tiny_model(folder / "gains", "qwen2", gains=0.3, tie_word_embeddings=True)
    bpdq_quantizer.quantize(str(model), made["rotated"], rotate="hadamard", **small)
    return made


@pytest.fixture(scope="module")
def eager(checkpoints) -> dict[str, list[list[int]] | str]:
    """Tokens, or the error, of engines that share one process to save the start-up of vLLM."""
    base = checkpoints["llama"]
    other = bpdq_checkpoint(tiny_model(base.parent / "other-model", seed=1), base.parent / "other", **EAGER["llama"][0])
    without_b = shutil.copytree(base, base.parent / "without-b")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.B"]
    save_file(tensors, without_b / "model.safetensors", metadata={"format": "pt"})
    without_norm = shutil.copytree(base, base.parent / "without-norm")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, without_norm / "model.safetensors", metadata={"format": "pt"})
    damaged = shutil.copytree(checkpoints["qwen2"], base.parent / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.bias"][5] = torch.nan
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    runs = {name: {"load": {"model": str(checkpoints[name]), **flags}} for name, (_, flags) in EAGER.items()}
    runs["llama"]["reload_from"] = str(other)
    tables = bpdq_checkpoint(base.parent / "other-model", base.parent / "other-tables", **EAGER["llama tables"][0])
    runs["llama tables"]["reload_from"] = str(tables)
    cache = {"kv_cache_dtype": "fp8_e5m2"}
    runs["8-bit cache"] = {"load": {"model": str(checkpoints["qwen2"]), **cache}}
    runs["8-bit cache, 16 bits"] = {"load": {"model": str(dequantized(checkpoints["qwen2"])), **cache}}
    runs["rotated"] = {"load": {"model": str(checkpoints["rotated"])}}
    folders = {}
    for name, scales in {"scales": SCALES, "others": OTHERS, "one missing": dict(list(SCALES.items())[1:])}.items():
        folders[name] = with_kv_scales(checkpoints["qwen2"], base.parent / name, scales)
    scaled = {"model": str(folders["scales"])}
    runs["scales"] = {"load": {**scaled, "kv_cache_dtype": "fp8_e4m3"}, "reload_from": str(folders["others"])}
    runs["other scales"] = {"load": {"model": str(folders["others"]), "kv_cache_dtype": "fp8_e4m3"}}
    runs["scales, 16-bit cache"] = {"load": scaled}
    runs["scales, e5m2"] = {"load": {**scaled, **cache}}
    runs["scales, dummy"] = {"load": {**scaled, "kv_cache_dtype": "fp8_e4m3", "load_format": "dummy"}}
    runs["a scale is missing"] = {"load": {"model": str(folders["one missing"]), "kv_cache_dtype": "fp8_e4m3"}}
    runs["dummy"] = {"load": {"model": str(base), "load_format": "dummy"}}
    runs["without B"] = {"load": {"model": str(without_b)}}
    runs["without a norm"] = {"load": {"model": str(without_norm)}}
    runs["without a norm, dummy"] = {"load": {"model": str(without_norm), "load_format": "dummy"}}
    runs["NaN in a bias"] = {"load": {"model": str(damaged)}}
    runs["another method"] = {"load": {"model": str(base), "quantization": "awq"}}
    return dict(zip(runs, vllm_tokens(list(runs.values())), strict=True))


@pytest.mark.parametrize("name", EAGER)
def test_eager_tokens_equal_transformers(checkpoints, eager, name):
    assert eager[name][: len(PROMPTS)] == transformers_tokens(dequantized(checkpoints[name]))


def test_a_rotated_checkpoint_is_a_model_like_any_other(checkpoints, eager):
    """Its tied tables have become two; the model's last norm has gains."""
    assert eager["rotated"] == transformers_tokens(checkpoints["rotated"])


@pytest.mark.parametrize(("name", "other"), [("llama", "other"), ("llama tables", "other-tables")])
def test_reloading_another_checkpoint_serves_the_other_weights(checkpoints, eager, name, other):
    before, after = eager[name][: len(PROMPTS)], eager[name][len(PROMPTS) :]
    assert after == transformers_tokens(checkpoints["llama"].parent / f"{other}-dequantized")
    assert after != before


@fp8_cache
def test_an_8_bit_kv_cache_works_as_with_16_bit_weights(eager):
    assert isinstance(eager["8-bit cache"], list), "tokens, not an error"
    assert eager["8-bit cache"] == eager["8-bit cache, 16 bits"]
    assert eager["8-bit cache"] != eager["qwen2"], "the cache makes a difference that the test can see"


@fp8_cache
def test_an_fp8_cache_is_rounded_with_the_scales_of_the_checkpoint(checkpoints, eager):
    model = dequantized(checkpoints["qwen2"])
    before, after = eager["scales"][: len(PROMPTS)], eager["scales"][len(PROMPTS) :]
    assert before == transformers_tokens(model, scales=SCALES)
    assert after == eager["other scales"], "after a reload"
    assert before != after
    assert eager["qwen2"] not in (before, after)


@fp8_cache
def test_scales_change_nothing_where_the_cache_has_none(eager):
    assert eager["scales, 16-bit cache"] == eager["qwen2"]
    assert eager["scales, e5m2"] == eager["8-bit cache"]


@fp8_cache
def test_a_checkpoint_without_one_scale_does_not_start(eager):
    assert "model.layers.0.self_attn.k_scale is not in the checkpoint" in eager["a scale is missing"]


@pytest.mark.parametrize("name", ["dummy", "without a norm, dummy", pytest.param("scales, dummy", marks=fp8_cache)])
def test_dummy_weights_generate(eager, name):
    assert [len(tokens) for tokens in eager[name]] == [TOKENS] * len(PROMPTS)


def test_layers_that_are_not_in_bit_planes_are_checked_too(eager):
    assert "model.layers.1.input_layernorm.weight is not in the checkpoint" in eager["without a norm"]
    assert "model.layers.0.self_attn.k_proj.bias holds NaN or infinity" in eager["NaN in a bias"]


def test_a_checkpoint_without_one_tensor_does_not_start(eager):
    assert "model.layers.1.mlp.up_proj.B is not in the checkpoint" in eager["without B"]


def test_a_flag_for_another_method_does_not_start(eager):
    assert "does not match the quantization method" in eager["another method"]


def test_compiled_tokens_equal_transformers_and_every_linear_is_one_op(checkpoints, tmp_path):
    model = checkpoints["qwen2"]
    (tokens,) = vllm_tokens([{"load": {"model": str(model), "enforce_eager": False}}], VLLM_CACHE_ROOT=str(tmp_path))
    assert tokens == transformers_tokens(dequantized(model))
    generated = [path.read_text() for path in tmp_path.glob("**/inductor_cache/**/*.py")]
    calls = [code.count("torch.ops.bpdq.linear.default(") for code in generated]
    assert [n for n in calls if n] == [2 * 4]  # one graph for every number of tokens; 2 blocks of qkv, o, gate_up, down


def test_two_ranks_give_the_tokens_of_one(tmp_path):
    """FFN 320 over 2 ranks: 160 inputs each, so the second starts inside a group of 128. The vocabulary is cut too."""
    model = bpdq_checkpoint(
        tiny_model(tmp_path / "model", ffn=320), tmp_path / "bpdq", group_size=128, layers=TABLES | MIXED
    )
    (tokens,) = vllm_tokens([{"load": {"model": str(model), "tensor_parallel_size": 2}}], multiprocess=True)
    assert tokens == transformers_tokens(dequantized(model))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_mixed_checkpoints_give_the_tokens_of_transformers(tmp_path, ranks):
    model = bpdq_checkpoint(tiny_model(tmp_path / "model", ffn=320), tmp_path / "bpdq", group_size=64, layers=MIXED)
    load = {"model": str(model), "tensor_parallel_size": ranks, "enforce_eager": False}
    (tokens,) = vllm_tokens([{"load": load}], multiprocess=True, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    assert tokens == transformers_tokens(dequantized(model))


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["ours", "authors"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_two_compiled_ranks_give_the_tokens_of_transformers(tmp_path, arch, dialect):
    model = bpdq_checkpoint(
        tiny_model(tmp_path / "model", arch, ffn=320), tmp_path / "bpdq", group_size=256, dialect=dialect
    )
    load = {"model": str(model), "tensor_parallel_size": 2, "enforce_eager": False}
    (tokens,) = vllm_tokens([{"load": load}], multiprocess=True, VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    assert tokens == transformers_tokens(dequantized(model))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen3", "mistral", "gemma2"])
@pytest.mark.parametrize("eager", [True, False])
def test_other_architectures_give_the_tokens_of_transformers(tmp_path, arch, eager):
    model = bpdq_checkpoint(tiny_model(tmp_path / "model", arch), tmp_path / "bpdq", group_size=128)
    load = {"model": str(model), "enforce_eager": eager}
    (tokens,) = vllm_tokens([{"load": load}], VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    assert tokens == transformers_tokens(dequantized(model))


@pytest.mark.slow
def test_transformers_modelling_code_gives_the_same_tokens(tmp_path):
    """`--model-impl transformers` builds layers that are not fused."""
    model = bpdq_checkpoint(tiny_model(tmp_path / "model"), tmp_path / "bpdq", group_size=128)
    (tokens,) = vllm_tokens([{"load": {"model": str(model), "model_impl": "transformers"}}])
    assert tokens == transformers_tokens(dequantized(model))
