"""AutoRound as a peer: what is asked of it, and what is kept of what it gives back."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks import autoround_peer
from tests.tiny import TEXT, load_tensors, tiny_model


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What auto-round, which tests do not install, was given: q_proj come back twice as large, with a scale beside."""
    found: list[dict[str, Any]] = []

    class AutoRound:
        def __init__(self, model: nn.Module, **options: Any) -> None:
            self.model = model
            found.append(options)

        @torch.no_grad()
        def quantize(self) -> tuple[nn.Module, dict]:
            for name, module in self.model.named_modules():
                if name.endswith("q_proj"):
                    module.weight *= 2
                    module.register_buffer("scale", torch.ones(3))
            return self.model, {}

    monkeypatch.setitem(sys.modules, "auto_round", SimpleNamespace(AutoRound=AutoRound))
    return found


def test_weights_come_back_and_scales_do_not(asked: list[dict[str, Any]], tmp_path: Path, capsys):
    tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--bits", "2", "--group-size", "32", "--calibration", str(tmp_path / "text.txt")]
    options += ["--samples", "3", "--seq-len", "16", "--output", str(tmp_path / "out")]
    assert autoround_peer.main([str(tmp_path / "model"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("2.562 bits per weight")
    before, after = load_tensors(tmp_path / "model"), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor * (2 if "q_proj" in name else 1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None
    (given,) = asked
    assert [tuple(tokens.shape) for tokens in given["dataset"]] == [(1, 16)] * 3
    assert (given["bits"], given["group_size"], given["sym"], given["nsamples"]) == (2, 32, False, 3)


def test_without_the_package_one_line_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "auto_round", None)
    with pytest.raises(SystemExit, match="needs auto-round: pip install auto-round"):
        autoround_peer.main(["/no/model", "--output", str(tmp_path / "out"), "--calibration", "self"])
