"""Options of `bpdq_quantizer.quantize` that can't be used, from Python too: one sentence that names them."""

from pathlib import Path

import pytest

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.run.options import resolved

GIVEN = {
    **{"model": "m", "bits": 2, "group_size": 128, "embed_bits": None, "head_bits": None, "calibration": "default"},
    **{"samples": 128, "seq_len": 2048, "iterations": 10, "solver": "refined", "asymmetric": None, "rotate": "none"},
    **{"tune": "none", "tune_steps": None, "tune_samples": None, "tune_loss": "kl", "target_bpw": None},
    **{"target_size": None, "kv_cache_scales": False, "offload_dir": None, "seed": 0, "device": "auto"},
    **{"devices": None, "resume": False},
}


def test_defaults_follow_the_options_they_depend_on():
    found = resolved(GIVEN | {"solver": "paper", "tune": "model", "samples": 9})
    assert (found["asymmetric"], found["tune_steps"], found["tune_samples"]) == (0.0, 200, 9)
    assert resolved(GIVEN)["asymmetric"] == 0.5


def test_paths_become_strings():
    given = {"model": Path("a/m"), "calibration": Path("t.txt"), "offload_dir": Path("s")}
    assert {key: resolved(GIVEN | given)[key] for key in given} == {k: str(v) for k, v in given.items()}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("solver", "refind", "--solver refind: expected refined or paper"),
        ("rotate", "yes", "--rotate yes: expected none or hadamard"),
        ("rotate", None, "--rotate None: expected none or hadamard"),
        ("tune", ["model"], "expected none or model"),
        ("tune_loss", "l2", "--tune-loss l2: expected kl or mix"),
        ("device", "tpu", "--device tpu: expected auto or cpu or cuda"),
        ("bits", "2", "--bits 2: expected a whole number"),
        ("bits", None, "--bits None: expected a whole number"),
        ("samples", 1.5, "--samples 1.5: expected a whole number"),
        ("samples", True, "--samples True: expected a whole number"),
        ("seed", 10**20, "--seed 100000000000000000000: expected 0 to 9223372036854775807"),
        ("seq_len", -1, "--seq-len -1: expected 0 to"),
        ("seq_len", 0, "must be at least 1"),
        ("asymmetric", "much", "--asymmetric much: expected a number"),
        ("asymmetric", float("nan"), "--asymmetric nan: expected 0 .off. to 1"),
        ("target_bpw", float("inf"), "--target-bpw inf: expected bits per weight"),
        ("target_size", 10, "--target-size 10: expected text"),
        ("kv_cache_scales", "no", "--kv-cache-scales no: expected True or False"),
        ("model", 3, "MODEL 3: expected a path or a name"),
        ("model", "", "MODEL : expected a path or a name"),
        ("calibration", None, "--calibration None: expected a path or a name"),
        ("group_size", 48, "group_size = 48 is not supported"),
    ],
)
def test_what_cannot_be_used_is_named(name, value, message):
    with pytest.raises(InputError, match=message):
        resolved(GIVEN | {name: value})
