"""llama.cpp's types as a peer: what is measured of a model, and what is asked of libgguf."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import gguf_peer
from bpdq_quantizer.model.windows import text_windows
from tests.tiny import TEXT, load_tensors, tiny_model


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stands in for libgguf, which tests do not install: weights come back in whole numbers of hundredths."""
    asked: list[tuple] = []

    def quantize_rows(rows: np.ndarray, kind: int, imatrix: np.ndarray) -> np.ndarray:
        asked.append((rows.shape, kind, imatrix))
        return (100 * rows).round()

    monkeypatch.setitem(
        sys.modules,
        "libgguf",
        SimpleNamespace(
            GGMLQuantizationType={"IQ2_S": 22},
            row_size=lambda kind, width: 82 * width // 256,
            quantize_rows=quantize_rows,
            dequantize_rows=lambda packed, kind, n_per_row: packed.astype(np.float32) / 100,
        ),
    )
    return asked


def test_linears_come_back_and_everything_else_stays(library: list[tuple], tmp_path: Path, capsys):
    tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--calibration", str(tmp_path / "text.txt"), "--samples", "2", "--seq-len", "16"]
    assert gguf_peer.main([str(tmp_path / "model"), "--output", str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2.562 bits per weight"
    before, after = load_tensors(tmp_path / "model"), load_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        linear = "_proj." in name
        expected = (100 * tensor.float()).round() / 100 if linear else tensor.float()
        torch.testing.assert_close(after[name].float(), expected, rtol=2**-8 if linear else 0, atol=0)
    assert all(shape[1] % 256 == 0 and len(imatrix) == shape[1] and kind == 22 for shape, kind, imatrix in library)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_importance_is_the_mean_square_of_the_inputs(library: list[tuple], tmp_path: Path):
    tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prefix, blocks = gguf_peer.decoder_blocks(model)
    windows = text_windows(torch.randint(0, 384, (3, 8)))
    found = gguf_peer.mean_squares(model, gguf_peer.weights_in(blocks, prefix), windows)
    seen = []
    layer = model.get_submodule(f"{prefix}.1.mlp.down_proj")
    layer.register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    for window in windows:
        model(window.tokens)
    expected = torch.cat(seen).float().square().mean(0)
    torch.testing.assert_close(found[f"{prefix}.1.mlp.down_proj"], expected, rtol=1e-4, atol=1e-9)


def test_a_type_that_there_is_not_is_named(library: list[tuple], tmp_path: Path):
    with pytest.raises(SystemExit, match="--type Q9_K: libgguf has no such type"):
        gguf_peer.main(["/no/model", "--output", str(tmp_path / "out"), "--calibration", "self", "--type", "Q9_K"])
    assert list(tmp_path.iterdir()) == []
