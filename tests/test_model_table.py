"""docs/models.md says what families.py and `bpdq plan` say."""

import pytest

import bpdq_quantizer
from architectures import ARCHITECTURES, model_folder
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.fit.plan import plan
from bpdq_quantizer.run import prepare
from families import FAMILIES, ROTATED
from scripts.model_table import PAGE, planned, published_config, updated


def test_the_page_is_up_to_date():
    page = PAGE.read_text()
    assert updated(page) == page, "run python -m scripts.model_table"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_said_to_be_planned_is(tmp_path, arch):
    published_config(arch).save_pretrained(tmp_path)
    if planned(arch) == "yes":
        assert plan(str(tmp_path), context=64)["serve_command"]
        return
    with pytest.raises(InputError):
        plan(str(tmp_path), context=64)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_is_said_to_be_refused_is_before_any_work(tmp_path, text, arch, monkeypatch):
    monkeypatch.setattr(prepare, "begin", None)
    source, refused = str(model_folder(tmp_path / "model", arch)), set()
    options = {"kv_cache_scales": True, "target_bpw": 2.6, "embed_bits": 4, "rotate": "hadamard"}
    for name, value in options.items():
        small = {"calibration": text, "bits": 2, "group_size": 32, "samples": 2, "seq_len": 16, name: value}
        with pytest.raises((InputError, TypeError)) as stopped:
            bpdq_quantizer.quantize(source, tmp_path / "out", **small)
        refused |= {f"--{name.replace('_', '-')}"} if stopped.type is InputError else set()
    assert refused == {*FAMILIES[arch].refuses, *(() if arch in ROTATED else ("--rotate",))}
