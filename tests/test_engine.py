"""vLLM serves BPDQ checkpoints with exactly the tokens of transformers on the dequantized weights.

Models are float32: a rounding difference must not flip the argmax between two implementations.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import bpdq_quantizer
from bpdq_kernels.format import TRELLIS
from generate import PROMPTS, TOKENS, transformers_tokens, vllm_tokens
from tiny import bpdq_checkpoint, tiny_model, with_kv_scales

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
CODED = {  # stored planes 1 to 3, of which one more are multiplied
    name: {**scheme, "bits": min(scheme["bits"], 3), "code": TRELLIS} for name, scheme in (MIXED | TABLES).items()
}
WIDE = {f"model.layers.1.mlp.{name}_proj": {"coefficient_bits": 16} for name in ("gate", "up")}
EAGER = {
    "llama": ({"group_size": 128, "layers": LAYERS, "ignore": ("model.layers.0.mlp.down_proj",)}, {}),
    "llama authors": ({"dialect": "authors", "group_size": 256, "bits": 3}, {"quantization": "bpdq"}),
    "qwen2": ({"group_size": 64, "coefficient_dtype": torch.float16}, {"quantization": "bpdq"}),
    "llama trellis": ({"group_size": 64, "coefficient_bits": 8, "layers": CODED}, {}),
    "llama 8-bit": ({"group_size": 64, "coefficient_bits": 8, "layers": TABLES | WIDE}, {}),
}
MORE_EAGER = {
    "qwen2 authors": ({"dialect": "authors", "group_size": 128}, {}),
    "llama tables": ({"group_size": 128, "layers": TABLES}, {}),
    "llama mixed": ({"group_size": 64, "layers": MIXED}, {}),
    "tied tables": ({"group_size": 128, "layers": TABLES}, {}),
}
QUANTIZED = {  # from a model with tied tables, of which rotation makes two, as the last norm has gains
    "quantized": {"embed_bits": 4},
    "rotated": {"rotate": "hadamard", "embed_bits": 3, "head_bits": 4},
}
SCALES = {
    "model.layers.0.self_attn.k_scale": 3.1,
    "model.layers.0.self_attn.v_scale": 1.7,
    "model.layers.1.self_attn.k_scale": 2.3,
    "model.layers.1.self_attn.v_scale": 2.9,
}
HAS_FP8_CACHE = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
fp8_cache = pytest.mark.skipif(not HAS_FP8_CACHE, reason="vLLM's CPU build has no fp8 KV cache without AVX-512 or AMX")
E4M3, E5M2 = ({"kv_cache_dtype": f"fp8_{name}"} for name in ("e4m3", "e5m2"))
OTHERS = {name: 1.4 * scale for name, scale in SCALES.items()}  # twice as large, most of a cache would be the same


def dequantized(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + "-dequantized")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """BPDQ checkpoints of two tiny models; llama's and qwen2's FFN of 352 inputs ends in a short group."""
    folder = tmp_path_factory.mktemp("engine")
    models = {arch: tiny_model(folder / f"{arch}-model", arch) for arch in ("llama", "qwen2")}
    models["tied"] = tiny_model(folder / "tied-model", "qwen2", tie_word_embeddings=True)
    return {
        name: bpdq_checkpoint(models[name.split()[0]], folder / name.replace(" ", "-"), **options)
        for name, (options, _) in (EAGER | MORE_EAGER).items()
    }


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, text) -> dict[str, Path]:
    """Checkpoints of the quantizer, tables too."""
    folder = tmp_path_factory.mktemp("quantized")
    model = tiny_model(folder / "model", "qwen2", gains=0.3, tie_word_embeddings=True)
    small = {"calibration": text, "samples": 2, "seq_len": 32, "group_size": 64, "iterations": 1, "solver": "paper"}
    for name, options in QUANTIZED.items():
        bpdq_quantizer.quantize(str(model), folder / name, **small, **options)
    return {name: folder / name for name in QUANTIZED}


def run(engines: dict[str, dict]) -> dict[str, list[list[int]] | str]:
    """Tokens, or the error, of engines that share one process to save the start-up of vLLM."""
    return dict(zip(engines, vllm_tokens(list(engines.values())), strict=True))


def other_weights(checkpoints, name: str, options: dict) -> Path:
    """A checkpoint like another one, of a model with other weights."""
    folder = checkpoints[name].parent
    return bpdq_checkpoint(tiny_model(folder / f"other-{name}-model", seed=1), folder / f"other-{name}", **options)


@pytest.fixture(scope="module")
def scaled(checkpoints) -> dict[str, Path]:
    """Checkpoints with scales of the KV cache."""
    base = checkpoints["qwen2"]
    scales = {"scales": SCALES, "other scales": OTHERS, "a scale is missing": dict(list(SCALES.items())[1:])}
    return {name: with_kv_scales(base, base.with_name(name), values) for name, values in scales.items()}


@pytest.fixture(scope="module")
def eager(checkpoints, quantized, scaled) -> dict[str, list[list[int]] | str]:
    base = checkpoints["llama"]
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
    engines = {name: {"load": {"model": str(checkpoints[name]), **flags}} for name, (_, flags) in EAGER.items()}
    for name in ("llama", "llama 8-bit"):
        engines[name]["reload_from"] = str(other_weights(checkpoints, name, EAGER[name][0]))
    engines |= {name: {"load": {"model": str(folder)}} for name, folder in quantized.items()}
    engines["dummy"] = {"load": {"model": str(base), "load_format": "dummy"}}
    engines["dummy, 8-bit"] = {"load": {"model": str(checkpoints["llama 8-bit"]), "load_format": "dummy"}}
    engines["without B"] = {"load": {"model": str(without_b)}}
    engines["without a norm"] = {"load": {"model": str(without_norm)}}
    engines["without a norm, dummy"] = {"load": {"model": str(without_norm), "load_format": "dummy"}}
    engines["NaN in a bias"] = {"load": {"model": str(damaged)}}
    engines["another method"] = {"load": {"model": str(base), "quantization": "awq"}}
    if HAS_FP8_CACHE:
        engines |= {name: {"load": {"model": str(folder), **E4M3}} for name, folder in scaled.items()}
        engines["scales"]["reload_from"] = str(scaled["other scales"])
    return run(engines)


@pytest.fixture(scope="module")
def more_eager(checkpoints) -> dict[str, list[list[int]] | str]:
    engines = {name: {"load": {"model": str(checkpoints[name]), **flags}} for name, (_, flags) in MORE_EAGER.items()}
    other = other_weights(checkpoints, "llama tables", MORE_EAGER["llama tables"][0])
    engines["llama tables"]["reload_from"] = str(other)
    return run(engines)


@pytest.fixture(scope="module")
def cached(checkpoints, scaled) -> dict[str, list[list[int]] | str]:
    """Of engines whose KV cache has 8 bits, or scales, or both."""
    base, scales = str(checkpoints["qwen2"]), str(scaled["scales"])
    engines = {
        "qwen2": {"model": base},
        "8-bit cache": {"model": base, **E5M2},
        "8-bit cache, 16 bits": {"model": str(dequantized(checkpoints["qwen2"])), **E5M2},
        "scales, 16-bit cache": {"model": scales},
        "scales, e5m2": {"model": scales, **E5M2},
        "scales, dummy": {"model": scales, **E4M3, "load_format": "dummy"},
    }
    return run({name: {"load": load} for name, load in engines.items()})


@pytest.mark.parametrize("name", EAGER)
def test_eager_tokens_equal_transformers(checkpoints, eager, name):
    assert eager[name][: len(PROMPTS)] == transformers_tokens(dequantized(checkpoints[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_EAGER)
def test_eager_tokens_of_more_layouts_equal_transformers(checkpoints, more_eager, name):
    assert more_eager[name][: len(PROMPTS)] == transformers_tokens(dequantized(checkpoints[name]))


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_engine_serves_what_bpdq_quantize_wrote(quantized, eager, name):
    assert eager[name] == transformers_tokens(quantized[name])


def other_tokens(checkpoints, name: str) -> list[list[int]]:
    return transformers_tokens(dequantized(checkpoints[name].with_name(f"other-{name}")))


@pytest.mark.parametrize("name", ["llama", "llama 8-bit"])
def test_reloading_another_checkpoint_serves_the_other_weights(checkpoints, eager, name):
    before, after = eager[name][: len(PROMPTS)], eager[name][len(PROMPTS) :]
    assert after == other_tokens(checkpoints, name)
    assert after != before


def test_coefficients_in_8_bits_are_served_as_transformers_reads_them(checkpoints, eager):
    assert eager["llama 8-bit"][: len(PROMPTS)] == transformers_tokens(checkpoints["llama 8-bit"])


@pytest.mark.slow
def test_reloading_another_checkpoint_serves_the_other_tables(checkpoints, more_eager):
    before, after = more_eager["llama tables"][: len(PROMPTS)], more_eager["llama tables"][len(PROMPTS) :]
    assert after == other_tokens(checkpoints, "llama tables")
    assert after != before


@fp8_cache
def test_an_fp8_cache_is_rounded_with_the_scales_of_the_checkpoint(checkpoints, eager):
    model = dequantized(checkpoints["qwen2"])
    before, after = eager["scales"][: len(PROMPTS)], eager["scales"][len(PROMPTS) :]
    assert before == transformers_tokens(model, scales=SCALES)
    assert after == eager["other scales"], "after a reload"
    assert before != after
    assert eager["qwen2"] not in (before, after)


@fp8_cache
def test_a_checkpoint_without_one_scale_does_not_start(eager):
    assert "model.layers.0.self_attn.k_scale is not in the checkpoint" in eager["a scale is missing"]


@pytest.mark.slow
@fp8_cache
def test_an_8_bit_kv_cache_works_as_with_16_bit_weights(cached):
    assert isinstance(cached["8-bit cache"], list), "tokens, not an error"
    assert cached["8-bit cache"] == cached["8-bit cache, 16 bits"]
    assert cached["8-bit cache"] != cached["qwen2"], "the cache makes a difference that the test can see"


@pytest.mark.slow
@fp8_cache
def test_scales_change_nothing_where_the_cache_has_none(cached):
    assert cached["scales, 16-bit cache"] == cached["qwen2"]
    assert cached["scales, e5m2"] == cached["8-bit cache"]


@pytest.mark.parametrize("name", ["dummy", "dummy, 8-bit", "without a norm, dummy"])
def test_dummy_weights_generate(eager, name):
    assert [len(tokens) for tokens in eager[name]] == [TOKENS] * len(PROMPTS)


@pytest.mark.slow
@fp8_cache
def test_dummy_scales_generate(cached):
    assert [len(tokens) for tokens in cached["scales, dummy"]] == [TOKENS] * len(PROMPTS)


def test_layers_that_are_not_in_bit_planes_are_checked_too(eager):
    assert "model.layers.1.input_layernorm.weight is not in the checkpoint" in eager["without a norm"]
    assert "model.layers.0.self_attn.k_proj.bias holds NaN or infinity" in eager["NaN in a bias"]


def test_a_checkpoint_without_one_tensor_does_not_start(eager):
    assert "model.layers.1.mlp.up_proj.B is not in the checkpoint" in eager["without B"]


def test_a_flag_for_another_method_does_not_start(eager):
    assert "does not match the quantization method" in eager["another method"]


@pytest.mark.parametrize("name", ["qwen2", pytest.param("llama 8-bit", marks=pytest.mark.slow)])
def test_compiled_tokens_equal_transformers_and_every_linear_is_one_op(checkpoints, tmp_path, name):
    model = checkpoints[name]
    (tokens,) = vllm_tokens([{"load": {"model": str(model), "enforce_eager": False}}], VLLM_CACHE_ROOT=str(tmp_path))
    assert tokens == transformers_tokens(dequantized(model))
    generated = [path.read_text() for path in tmp_path.glob("**/inductor_cache/**/*.py")]
    calls = [code.count("torch.ops.bpdq.linear.default(") for code in generated]
    assert [n for n in calls if n] == [2 * 4]  # one graph for every number of tokens; 2 blocks of qkv, o, gate_up, down


def test_two_ranks_give_the_tokens_of_one(tmp_path):
    """FFN 320 over 2 ranks: 160 inputs each, so the second starts inside a group of 128. The vocabulary is cut too. Of
    the second block and the LM head coefficients are in 8 bits."""
    assert_two_ranks_serve(tmp_path, TABLES | MIXED)


def test_two_ranks_cut_trellis_coded_planes_anywhere_between_words(tmp_path):
    assert_two_ranks_serve(tmp_path, CODED)


def assert_two_ranks_serve(tmp_path, layers):
    narrow = [name for name in MIXED if "layers.1" in name] + ["lm_head"]
    narrow += [f"model.layers.1.{name}_proj" for name in ("self_attn.o", "mlp.gate", "mlp.up")]
    layers = layers | {name: {**layers.get(name, {}), "coefficient_bits": 8} for name in narrow}
    model = bpdq_checkpoint(tiny_model(tmp_path / "model", ffn=320), tmp_path / "bpdq", group_size=128, layers=layers)
    (tokens,) = vllm_tokens([{"load": {"model": str(model), "tensor_parallel_size": 2}}], multiprocess=True)
    assert tokens == transformers_tokens(dequantized(model))


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "width"), [(MIXED, 16), (MIXED, 8), (CODED, 8)], ids=["16", "8", "trellis"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_mixed_checkpoints_give_the_tokens_of_transformers(tmp_path, ranks, layers, width):
    model = bpdq_checkpoint(
        tiny_model(tmp_path / "model", ffn=320), tmp_path / "bpdq", 2, 64, layers=layers, coefficient_bits=width
    )
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
def test_transformers_modelling_code_gives_the_same_tokens(checkpoints):
    """`--model-impl transformers` builds layers that are not fused, and asks a tied LM head for its bias."""
    names = ("llama authors", "tied tables")
    loads = [{"model": str(checkpoints[name]), "model_impl": "transformers"} for name in names]
    found = vllm_tokens([{"load": load} for load in loads])
    assert found == [transformers_tokens(dequantized(checkpoints[name])) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama tables", "llama"])
def test_a_checkpoint_drafts_for_itself(checkpoints, name):
    """Every token that it proposes is accepted: layers that `layers` and `ignore` name are what they are there."""
    model = str(checkpoints[name])
    drafting = {"method": "draft_model", "model": model, "num_speculative_tokens": 2}
    load = {"model": model, "speculative_config": drafting, "disable_log_stats": False}
    (found,) = vllm_tokens([{"load": load, "drafts": True}])
    *tokens, (drafted, accepted) = found
    assert tokens == transformers_tokens(dequantized(checkpoints[name]))
    assert drafted == accepted > 0
