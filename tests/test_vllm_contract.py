"""What the plugin relies upon in vLLM. A failure here says which of it a new vLLM release has changed."""

import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
import vllm
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization import base_config, kv_cache
from vllm.model_executor.model_loader import weight_utils

import vllm_sources
from vllm_bpdq.config import BPDQConfig
from vllm_bpdq.experts import BPDQExpertsMethod
from vllm_bpdq.kv_scales import MISSING
from vllm_bpdq.linear import BPDQLinearMethod, StoredParameter

INSTALLED = Path(vllm.__file__).parent
RELEASES = ("0.32.0", "0.33.0")


def promised() -> SpecifierSet:
    """The releases of vLLM that the extra `cuda` accepts."""
    requirements = map(Requirement, requires("vllm-bpdq"))
    return next(requirement.specifier for requirement in requirements if requirement.name == "vllm")


def test_installed_sources_have_what_the_plugin_was_written_for():
    assert vllm_sources.problems(INSTALLED, like=INSTALLED) == []


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_sources_of_every_promised_release_have_what_the_plugin_was_written_for(tmp_path, release):
    """Downloads CUDA wheels of 330 MB; the sdist is smaller, but pip would build it."""
    target = ["--only-binary", ":all:", "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *target, "--dest", str(tmp_path)]
    subprocess.run([*pip, f"vllm=={release}"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        names = {f"vllm/{file}" for file in vllm_sources.FILES} & set(files.namelist())
        files.extractall(tmp_path, names)
    wheel.unlink()
    assert vllm_sources.problems(tmp_path / "vllm", like=INSTALLED) == []


def test_the_checked_releases_are_the_promised_ones():
    assert all(release in promised() for release in RELEASES)
    minors = [int(release.split(".")[1]) for release in RELEASES]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert f"0.{minors[0] - 1}.99" not in promised()
    assert f"0.{minors[-1] + 1}.0" not in promised()


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        (vllm_sources.LINEAR, "**extra_weight_attrs", "**attributes", "create_weights(self layer input_size"),
        (vllm_sources.LINEAR, "param.tp_rank = self.tp_rank", "param.rank = self.tp_rank", "update_param_tp_status"),
        (vllm_sources.EMBEDDING, "class ParallelLMHead", "class LMHead", "no ParallelLMHead"),
        (vllm_sources.PARAMETER, "def load_qkv_weight", "def load_fused_weight", "load_fused_weight"),
        (vllm_sources.PARAMETER, "def load_qkv_weight", "def load_qkv", "expected load_column_parallel_weight"),
        (vllm_sources.KV_CACHE, "torch.tensor(-1.0)", "torch.tensor(1.0)", "KVCacheScaleParameter"),
        (vllm_sources.TURBOQUANT, "+ 4", "+ 8", "TurboQuantConfig is other code"),
        (vllm_sources.EXPERTS, "and named_expert is None", "", "without 'is_fused"),
        ("config/cache.py", "ClassVar[int] = 16", "ClassVar[int] = 64", "DEFAULT_BLOCK_SIZE"),
    ],
)
def test_a_changed_vllm_is_noticed(tmp_path, file, old, new, problem):
    for name in vllm_sources.FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(INSTALLED / name)
    text = (INSTALLED / file).read_text()
    assert old in text
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(text.replace(old, new))
    found = vllm_sources.problems(tmp_path, like=INSTALLED)
    assert any(problem in line for line in found), found


def test_the_config_implements_every_abstract_method():
    assert not BPDQConfig.__abstractmethods__
    assert not BPDQLinearMethod.__abstractmethods__
    assert not BPDQExpertsMethod.__abstractmethods__


def test_methods_registered_for_the_second_loader_are_found_by_name():
    assert "BPDQLinearMethod" in linear.WEIGHT_LOADER_V2_SUPPORTED


def test_the_dummy_loader_leaves_integers_alone_and_fills_floats():
    """`--load-format dummy` is told from a missing tensor by coefficients that are no longer NaN."""
    planes, coefficients = torch.full((4,), 7, dtype=torch.int32), torch.full((4,), torch.nan)
    weight_utils.initialize_single_dummy_weight(planes)
    weight_utils.initialize_single_dummy_weight(coefficients)
    assert planes.tolist() == [7] * 4
    assert torch.isfinite(coefficients).all()


def test_scales_of_the_kv_cache_are_renamed_and_start_as_missing():
    names = ["model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale"]
    renamed = base_config.QuantizationConfig.get_cache_scale_mapper().apply_list(names)
    assert renamed == ["model.layers.0.self_attn.attn.k_scale", "model.layers.0.self_attn.attn.v_scale"]
    assert kv_cache.KVCacheScaleParameter().item() == MISSING


def test_the_parameter_overrides_every_way_of_loading():
    """A new `load_*` method would bypass the checks."""
    known = {name for name in dir(parameter.ModelWeightParameter) if name.startswith("load_")}
    assert known == {name for name in vars(StoredParameter) if name.startswith("load_")}
