"""Calibrated scales of an fp8 KV cache: against what transformers' own cache holds, and in the checkpoint."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import bpdq_quantizer
from bpdq_kernels import format as bpdq_format
from bpdq_kernels.format import KV_CACHE_SCHEME
from bpdq_quantizer.checkpoint import inspection
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.passes import kv_scales
from bpdq_quantizer.run import steps
from bpdq_quantizer.run.block_files import BlockFiles
from tiny import TEXT, load_tensors, tiny_model

NAMES = [f"model.layers.{i}.self_attn.{kind}_scale" for i in range(2) for kind in "kv"]


def quantize(folder, text, arch="llama", tie=False, **options):
    if not (folder / "model").exists():
        tiny_model(folder / "model", arch, tie_word_embeddings=tie)
    small = {"bits": 2, "group_size": 64, "calibration": text, "samples": 6, "seq_len": 32, "iterations": 2}
    bpdq_quantizer.quantize(str(folder / "model"), folder / "out", **small, kv_cache_scales=True, **options)
    return folder / "out"


def cached(out):
    """The keys and values that the finished checkpoint puts into a cache for the calibration windows, by scale."""
    ids = AutoTokenizer.from_pretrained(out)(TEXT * 4, add_special_tokens=False)["input_ids"][: 6 * 32]
    cache = DynamicCache()
    with torch.no_grad():
        AutoModelForCausalLM.from_pretrained(out)(torch.tensor(ids).view(6, 32), past_key_values=cache)
    return dict(zip(NAMES, [x for layer in cache.layers for x in (layer.keys, layer.values)], strict=True))


def expected(out):
    magnitudes = {name: x.abs().flatten() for name, x in cached(out).items()}
    return {n: x.quantile(kv_scales.PERCENTILE, interpolation="higher").item() / 448 for n, x in magnitudes.items()}


def stored(out):
    return {name: x.item() for name, x in load_tensors(out).items() if name.endswith("_scale")}


MORE = [pytest.param(arch, marks=pytest.mark.slow) for arch in ("qwen2", "mistral", "gemma", "gemma2")]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text", *MORE])
def test_scales_are_those_of_what_the_quantized_model_caches(tmp_path, text, arch):
    out = quantize(tmp_path, text, arch)
    assert stored(out) == pytest.approx(expected(out), rel=0.01)  # magnitudes are counted in bfloat16
    assert len(set(stored(out).values())) > 2  # of four; two may round to one bfloat16


@pytest.mark.parametrize("options", [{"tune": "model", "tune_steps": 8}, {"embed_bits": 2}])
def test_scales_belong_to_the_model_as_it_is_in_the_end(tmp_path, text, options):
    out = quantize(tmp_path, text, tie=True, **options)
    assert stored(out) == pytest.approx(expected(out), rel=0.01)


def test_a_run_that_stops_while_calibrating_goes_on_to_the_same_scales(tmp_path, text, monkeypatch):
    whole = stored(quantize(tmp_path, text))
    (tmp_path / "out").rename(tmp_path / "whole")

    class Stop(Exception):  # noqa: N818, stands for a crash
        pass

    reads, read_block = [], BlockFiles.read

    def stop(*args):
        reads.append(args)
        if len(reads) == 2:
            raise Stop
        return read_block(*args)

    with monkeypatch.context() as patch:
        patch.setattr(BlockFiles, "read", stop)
        with pytest.raises(Stop):
            quantize(tmp_path, text)
    assert stored(quantize(tmp_path, text, resume=True)) == whole


def test_transformers_loads_the_scales_and_saves_them_again(tmp_path, text):
    out = quantize(tmp_path, text)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    model.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again") == stored(out)
    assert inspection.inspect(tmp_path / "again")["kv_cache_scales"]


def test_config_and_inspect_say_that_there_are_scales(tmp_path, text, capsys):
    tiny_model(tmp_path / "model")
    argv = ["quantize", tmp_path / "model", "--calibration", text, "--samples", "4", "--seq-len", "32", "--output"]
    for out, option in (("with", ["--kv-cache-scales"]), ("without", [])):
        assert main([str(a) for a in (*argv, tmp_path / out, *option)]) == 0
        capsys.readouterr()
        assert main(["inspect", str(tmp_path / out)]) == 0
        assert ("scales for an fp8 KV cache" in capsys.readouterr().out) == (out == "with")
        config = json.loads((tmp_path / out / "config.json").read_text())["quantization_config"]
        assert config.get("kv_cache_scheme") == (KV_CACHE_SCHEME if out == "with" else None)
        assert set(stored(tmp_path / out)) == (set(NAMES) if out == "with" else set())


def test_the_scale_of_a_percentile(monkeypatch):
    x = torch.arange(1, 1001).float().view(1, 1, 10, 100)
    cache = kv_scales._CountingCache()
    cache.update(x, -2 * x)
    cache.update(x / 4, torch.zeros(1))
    for percentile, magnitude in ((1.0, 1000), (0.995, 990), (0.5, 200)):
        monkeypatch.setattr(kv_scales, "PERCENTILE", percentile)
        assert kv_scales.scale(cache.counts[0]) * 448 == pytest.approx(magnitude, rel=0.01)
    assert kv_scales.scale(cache.counts[1]) * 448 == pytest.approx(1000, rel=0.01)  # half of 2000 values
    assert kv_scales.scale(torch.eye(1, kv_scales.MAGNITUDES, dtype=torch.int64)[0]) == 1, "all are zero"


def test_a_model_without_a_cache_to_look_into_is_refused(tmp_path, text, monkeypatch):
    monkeypatch.setattr(kv_scales._CountingCache, "update", lambda self, keys, values, *args: (keys, values))
    monkeypatch.setattr(steps, "quantize_blocks", lambda *args, **kwargs: pytest.fail("work has begun"))
    with pytest.raises(InputError, match=r"--kv-cache-scales: model\.layers\.0 has no attention layer"):
        quantize(tmp_path, text)


@pytest.mark.parametrize("change", [{"num_bits": 4}, {"strategy": "attn_head"}, {"type": "int"}])
def test_other_kinds_of_scales_are_refused(change):
    config = {"quant_method": "bpdq", "bits": 2, "group_size": 64}
    assert not bpdq_format.parse(config).kv_cache_scales
    assert bpdq_format.parse(config | {"kv_cache_scheme": KV_CACHE_SCHEME | {"observer": "minmax"}}).kv_cache_scales
    with pytest.raises(ValueError, match=r"kv_cache_scheme = .* is not supported"):
        bpdq_format.parse(config | {"kv_cache_scheme": KV_CACHE_SCHEME | change})
