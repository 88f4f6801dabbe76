"""The residual stream that a weight's outputs are added to, found whatever the architecture."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from bpdq_quantizer.model.calls import block_inputs, block_runs
from bpdq_quantizer.model.residual import Read, Reader, Stream, added, find_streams
from bpdq_quantizer.model.stream import decoder_blocks
from bpdq_quantizer.model.weights import hooked, weights_in
from bpdq_quantizer.model.windows import text_windows
from tests.tiny import tiny_model

OUT, DOWN = "self_attn.o_proj", "mlp.down_proj"
ATTENTION, MLP = "input_layernorm", "post_attention_layernorm"


def streams_of(folder: Path, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, Stream], tuple]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    _, blocks = decoder_blocks(model)
    tokens = torch.randint(0, 384, (1, 24), generator=torch.Generator().manual_seed(0))
    hidden, calls = block_inputs(model, blocks, text_windows(tokens))
    run = block_runs(blocks[0], calls[0], torch.device("cpu"), 1)[0]
    weights = weights_in(blocks[0]).values()
    return blocks[0], find_streams(blocks[0], weights, run, hidden[0]), (weights, run, hidden[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("arch", "options", "expected"),
    [
        ("llama", {}, {OUT: (ATTENTION, 1), DOWN: (MLP, 1)}),
        ("qwen2", {"hidden": 256}, {OUT: (ATTENTION, 1), DOWN: (MLP, 1)}),
        ("granite", {"residual_multiplier": 0.22}, {OUT: (ATTENTION, 0.22), DOWN: (MLP, 0.22)}),
        ("cohere", {}, {}),  # attention and MLP are added together
        ("gemma2", {"gains": 0.5}, {}),  # outputs are normed
    ],
)
def test_outputs_are_added_to(arch, options, expected, dtype, tmp_path):
    _, found, _ = streams_of(tiny_model(tmp_path / "model", arch, **options), dtype)
    assert {name: stream.reader for name, stream in found.items()} == {name: at for name, (at, _) in expected.items()}
    for name, (_, factor) in expected.items():
        assert found[name].factor == pytest.approx(factor, rel=0.01)


def test_a_stream_is_read_before_its_weight(tmp_path):
    """The weight's outputs are added to it times the factor."""
    folder = tiny_model(tmp_path / "model", "granite", residual_multiplier=0.5)
    block, streams, (weights, run, hidden) = streams_of(folder, torch.float32)
    (down,) = (weight for weight in weights if weight.name == DOWN)
    reads: list[Read] = []
    with torch.no_grad(), hooked(Reader(down, block, streams[DOWN]).on_read(reads.append)):
        output = run(hidden)
    assert reads[0].factor == pytest.approx(0.5, rel=1e-3)
    torch.testing.assert_close(output, reads[0].stream + 0.5 * down.linear(reads[0].x))


class Twice(torch.nn.Module):
    """A block whose norm reads two streams, one after the other, and which is given other things too."""

    def __init__(self):
        super().__init__()
        self.norm, self.scale = torch.nn.LayerNorm(32), torch.nn.Identity()
        self.first, self.second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)

    def forward(self, x):
        self.scale(torch.tensor(3.0))
        self.scale(torch.arange(32))
        y = 2 * x
        x = x + self.first(self.norm(x))
        self.norm(y)
        return x + self.second(x)


@torch.no_grad()
def test_a_module_that_reads_several_times_is_no_reader():
    block = Twice()
    weights = weights_in(block)
    found = find_streams(block, weights.values(), block, torch.randn(1, 70, 32))
    assert {name: stream.reader for name, stream in found.items()} == {"first": "", "second": "second"}
    reads: list[Read] = []
    with hooked(Reader(weights["second"], block, found["second"]).on_read(reads.append)):
        block(torch.randn(1, 70, 32))
    torch.testing.assert_close(reads[0].stream, reads[0].x)


@settings(deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    factor=st.sampled_from([1.0, 0.22, -1.5]),
    size=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_what_is_added_is_told_from_what_is_not(dtype, factor, size, seed):
    """Also beside a few channels that are a thousand times as large."""
    generator = torch.Generator().manual_seed(seed)
    before, outputs, others = torch.randn(3, 64, 128, generator=generator)
    before[:, :3] *= 1000
    before, outputs = before.to(dtype), (size * outputs).to(dtype)
    after = before + factor * outputs
    assert added(before, after, outputs) == pytest.approx(factor, rel=0.02)
    assert added(before, after + (0.3 * size * others).to(dtype), outputs) is None
    assert added(before, before, outputs) is None
