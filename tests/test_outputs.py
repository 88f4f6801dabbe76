"""Errors weighed by what they do to the model's loss: gradients of the 16-bit model, and rows solved in turn."""

import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import bpdq_quantizer
from bpdq_quantizer.algorithm.in_turn import approximation
from bpdq_quantizer.algorithm.solver import quantize_linear
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.activations import kept_states, weighted
from bpdq_quantizer.model.stream import open_model, solved
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.passes import outputs, sensitivity
from bpdq_quantizer.passes.gradients import all_states, backwards, draw, loss_gradients
from bpdq_quantizer.passes.outputs import Outputs, load_outputs, measure_outputs, save_outputs, token_weights
from tests.tiny import TEXT, load_tensors, tiny_model

SOLVE = partial(quantize_linear, iterations=2)


def low_rank(size: int, rank: int, seed: int) -> Tensor:
    """E[g g^T] of gradients that have `rank` directions in common."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(4 * size, rank, generator=generator) @ torch.randn(rank, size, generator=generator)
    return g.T @ g + 0.05 * torch.eye(size) * g.square().sum() / size


def both_sides(E: Tensor, G: Tensor, H: Tensor) -> float:
    return torch.einsum("mn,nk,kl,ml->", G, E, H, E).item()


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), bits=st.sampled_from([2, 3]), coefficient_bits=st.sampled_from([8, 16]))
def test_rows_in_turn_lower_the_loss_of_both_sides(seed: int, bits: int, coefficient_bits: int):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(192, 64, generator=generator)
    x = torch.randn(256, 64, generator=generator)
    H, covariances = x.T @ x, [low_rank(128, 8, seed), low_rank(64, 8, seed + 1)]
    alone = SOLVE(W, H, bits, 32, coefficient_bits)
    in_turn = SOLVE(W, H, bits, 32, coefficient_bits, covariances=covariances)
    losses = [both_sides(W - approximation(s, 32), torch.block_diag(*covariances), H) for s in (alone, in_turn)]
    assert losses[1] < 0.9 * losses[0]


def test_rows_whose_gradients_have_nothing_in_common_are_solved_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(160, 64, generator=generator), torch.randn(256, 64, generator=generator)
    covariances = [torch.rand(100, generator=generator).diag(), torch.rand(60, generator=generator).diag()]
    alone = SOLVE(W, x.T @ x, 2, 32, 8)
    in_turn = SOLVE(W, x.T @ x, 2, 32, 8, covariances=covariances)
    assert torch.equal(in_turn.codes, alone.codes)
    torch.testing.assert_close(in_turn.loss, alone.loss)
    assert torch.equal(approximation(in_turn, 32), approximation(alone, 32))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("outputs") / "model")


def measured(model: Path, tokens: Tensor, seed: int = 0) -> dict[str, Outputs]:
    found = {}
    measure_outputs(
        open_model(str(model)), text_windows(tokens), torch.device("cpu"), seed, lambda _, part: found.update(part)
    )
    return found


def test_gradients_are_those_of_the_whole_model(model: Path):
    tokens = torch.randint(0, 384, (1, 6), generator=torch.Generator().manual_seed(0))
    found = [measured(model, tokens, seed) for seed in range(4)]
    whole = AutoModelForCausalLM.from_pretrained(model).requires_grad_(False)
    name, seen = "model.layers.0.mlp.up_proj", []

    def hook(_: nn.Module, __: tuple, output: Tensor) -> None:
        output.register_hook(lambda g: seen.append(g[0]))

    whole.get_submodule(name).register_forward_hook(hook)
    for seed in range(4):
        embedded = whole.get_input_embeddings()(tokens).requires_grad_()
        log_p = whole(inputs_embeds=embedded).logits[0, :-1].log_softmax(-1)
        labels = draw(log_p.detach(), torch.Generator().manual_seed(seed))
        log_p.gather(1, labels.unsqueeze(1)).sum().neg().backward()
        g, norms = seen[-1], seen[-1].norm(dim=1, keepdim=True)
        g = g / norms.clamp(min=1e-30).sqrt()
        expected = outputs.shrunk(g.T @ g / len(g), pair_squares(g), len(g))
        torch.testing.assert_close(torch.block_diag(*found[seed][name].covariances), expected, rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(found[seed][name].lengths, norms.T, rtol=1e-3, atol=1e-8)


def test_tokens_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = draw(p.log().expand(20000, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.bincount(minlength=6) / 20000, p, atol=0.01, rtol=0)
    assert set(drawn.unique().tolist()) == {1, 3, 4}, "what can't be is never drawn"


def pair_squares(g: Tensor) -> Tensor:
    """The mean over g [T, n] of the sum of (g_i g_j)^2 over i != j."""
    products = (g.unsqueeze(1) * g.unsqueeze(2)).square()
    return (products.sum((1, 2)) - products.diagonal(dim1=1, dim2=2).sum(1)).mean()


@pytest.mark.parametrize(("common", "kept"), [(True, (0.5, 1.0)), (False, (0.0, 0.3))])
@pytest.mark.parametrize("tokens", [64, 1024])
def test_what_few_tokens_have_in_common_by_chance_is_taken_out(tokens: int, common: bool, kept: tuple[float, float]):
    truth = low_rank(24, 3, 0)
    truth = truth if common else truth.diagonal().diag()
    g = torch.randn(tokens, 24, generator=torch.Generator().manual_seed(0)) @ torch.linalg.cholesky(truth).T
    G = g.T @ g / tokens
    found = outputs.shrunk(G, pair_squares(g), tokens)
    assert torch.equal(found.diagonal(), G.diagonal())
    assert (found - truth).norm() < (G - truth).norm()
    assert kept[0] <= found.tril(-1).norm() / G.tril(-1).norm() < kept[1]


def test_outputs_that_have_nothing_in_common_stay_so():
    assert torch.equal(outputs.shrunk(torch.eye(3), torch.tensor(0.0), 8), torch.eye(3))
    assert torch.equal(outputs.shrunk(torch.zeros(3, 3), torch.tensor(0.0), 8), torch.zeros(3, 3))


def test_outputs_come_in_even_chunks(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outputs, "CHUNK", 100)
    found = measured(model, torch.randint(0, 384, (2, 8)))
    sizes = {name.rpartition(".")[2]: [len(G) for G in part.covariances] for name, part in found.items()}
    assert sizes["up_proj"] == [88] * 4
    assert sizes["k_proj"] == [64]
    assert len(found) == 14


def test_what_was_measured_is_read_back(model: Path, tmp_path: Path):
    found = measured(model, torch.randint(0, 384, (2, 8)))
    save_outputs(tmp_path / "outputs.safetensors", found)
    again = load_outputs(tmp_path / "outputs.safetensors", torch.device("cpu"))
    assert again.keys() == found.keys()
    for name, part in found.items():
        assert torch.equal(part.lengths, again[name].lengths)
        for G, read in zip(part.covariances, again[name].covariances, strict=True):
            assert torch.equal(read, G.bfloat16().float())


@given(length=st.integers(1, 70), value=st.floats(0.1, 10))
def test_smoothed_profiles_have_a_mean_of_one(length: int, value: float):
    profile = torch.rand(length) + value
    assert outputs.smooth(profile).mean().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(outputs.smooth(torch.full((length,), value)), torch.ones(length))
    assert torch.equal(outputs.smooth(torch.zeros(length)), torch.ones(length))


def test_tokens_count_what_their_gradients_are_long_or_others_at_their_place():
    found = Outputs(torch.tensor([[6.0, 2.0, 1.0], [6.0, 0.0, 0.0]]), [])  # the second window has one token
    known, average = [1.6, 2 / 3.75, 1 / 3.75, 1.6], outputs.smooth(torch.tensor([6.0, 2.0, 1.0])).tolist()
    expected = torch.tensor([*known, *average[:2], *average, average[2]])
    torch.testing.assert_close(token_weights([found, found], [3, 1, 2, 4]), expected)
    nothing = found._replace(lengths=torch.zeros(2, 3))
    torch.testing.assert_close(token_weights([nothing, found], [3, 1, 2, 4]), (expected + 1) / 2)


def test_inputs_of_other_axes_count_the_same_everywhere():
    weights, x = torch.tensor([4.0, 1.0, 0.25, 9.0, 0.0, 1.0]), torch.ones(2, 3, 5)
    expected = torch.tensor([2, 1, 0.5, 3, 0, 1]).view(2, 3, 1).expand(2, 3, 5)
    assert torch.equal(weighted(x, weights), expected)
    assert torch.equal(weighted(x.flatten(0, 1), weights), expected.flatten(0, 1))
    assert weighted(x[:, :2], weights).shape == (2, 2, 5)
    assert torch.equal(weighted(x[:, :2], weights), x[:, :2])


@pytest.mark.parametrize("batch_bytes", [1 << 30, 1])
def test_a_run_that_knows_outputs_goes_on_to_the_same_tensors(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int
):
    monkeypatch.setattr("bpdq_quantizer.model.activations.ACTIVATION_BYTES", batch_bytes)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = {"group_size": 32, "calibration": str(text), "samples": 4, "seq_len": 16, "output_tokens": 32}
    bpdq_quantizer.quantize(model, tmp_path / "once", **options)
    write = "bpdq_quantizer.run.steps.save_progress"
    with monkeypatch.context() as patched:
        patched.setattr(write, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bpdq_quantizer.quantize(model, tmp_path / "again", **options)
    with monkeypatch.context() as patched:  # what was measured is there
        patched.setattr("bpdq_quantizer.run.steps.measure_outputs", None)
        bpdq_quantizer.quantize(model, tmp_path / "again", resume=True, **options)
    once, again = load_tensors(tmp_path / "once"), load_tensors(tmp_path / "again")
    assert once.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())
    bpdq_quantizer.quantize(model, tmp_path / "off", **{**options, "output_tokens": 0})
    off = load_tensors(tmp_path / "off")
    assert any(not torch.equal(tensor, off[name]) for name, tensor in once.items() if name.endswith(".B"))


def test_damaged_statistics_are_measured_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = {"group_size": 32, "calibration": str(text), "samples": 2, "seq_len": 16, "output_tokens": 16}
    bpdq_quantizer.quantize(model, tmp_path / "once", **options)
    with monkeypatch.context() as patched:
        patched.setattr("bpdq_quantizer.run.steps.save_progress", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bpdq_quantizer.quantize(model, tmp_path / "again", **options)
    file = tmp_path / "again.partial" / "resume" / "outputs-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    bpdq_quantizer.quantize(model, tmp_path / "again", resume=True, **options)
    assert "outputs-00001.safetensors" in capsys.readouterr().err
    once, again = load_tensors(tmp_path / "once"), load_tensors(tmp_path / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())


def test_the_option_is_checked(model: Path, tmp_path: Path):
    with pytest.raises(InputError, match="--output-tokens"):
        bpdq_quantizer.quantize(model, tmp_path / "out", output_tokens=-1)


def test_energies_are_those_that_bits_are_allocated_by(model: Path, monkeypatch: pytest.MonkeyPatch):
    of_text = sensitivity.loss_gradients  # the same labels for both
    monkeypatch.setattr(outputs, "loss_gradients", lambda *arguments: of_text(*arguments[:3]))
    tokens = torch.randint(0, 384, (2, 24), generator=torch.Generator().manual_seed(0))
    source, windows, cpu = open_model(str(model)), text_windows(tokens), torch.device("cpu")
    expected = sensitivity.gradient_energies(source, windows, list(all_states(source, windows, cpu)), cpu)
    found = measured(model, tokens)
    assert found.keys() == expected.keys()
    for name, energy in expected.items():
        torch.testing.assert_close(outputs.energies(found[name]), energy, rtol=1e-3, atol=0)


@given(blocks=st.integers(1, 200))
def test_few_states_are_held_and_each_block_runs_twice_at_most(blocks: int):
    kept = kept_states(blocks)
    assert (kept[0], kept[-1]) == (0, blocks)
    between = max(after - before for before, after in pairwise(kept)) - 1
    assert len(kept) + between <= 2 * blocks**0.5 + 3
    assert len(kept) + between <= blocks + 1


def collect(seen: dict[str, list[Tensor]], name: str, gradient: Tensor) -> None:
    seen.setdefault(name, []).append(gradient)


def test_states_that_are_not_kept_are_computed_again(tmp_path: Path):
    model = tiny_model(tmp_path / "model", layers=9)
    tokens = torch.randint(0, 384, (3, 12), generator=torch.Generator().manual_seed(0))
    source, windows, cpu = open_model(str(model)), text_windows(tokens), torch.device("cpu")
    everything = dict(enumerate(all_states(source, windows, cpu)))
    found = []
    for indices in (range(10), kept_states(9), (0, 9)):
        states = {index: everything[index] for index in indices}
        gradients, seen, held = loss_gradients(source, windows, states.pop(9)), {}, []
        for _ in backwards(source, windows, states, gradients, cpu, partial(collect, seen)):
            held.append(len(states))
        assert not states
        found.append((seen, gradients, max(held)))
    assert [most for _, _, most in found] == [8, 4, 8]
    for seen, gradients, _ in found[1:]:
        torch.testing.assert_close(seen, found[0][0])
        torch.testing.assert_close(gradients, found[0][1])


def test_bits_are_allocated_by_what_outputs_cost(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sensitivity, "GROUP_SIZES", (32,))
    monkeypatch.setattr(sensitivity, "gradient_energies", None)  # no gradient is followed twice
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = {"calibration": str(text), "samples": 2, "seq_len": 16, "output_tokens": 32, "target_bpw": 2.9}
    report = bpdq_quantizer.quantize(model, tmp_path / "out", **options)
    assert len({layer["bits"] for layer in report["layers"]}) > 1
    source, windows = open_model(str(model)), text_windows(torch.randint(0, 384, (2, 16)))
    shapes = {name: weight.shape for name, weight in solved(source).items()}
    by_factor = [
        sensitivity.sensitivities(
            open_model(str(model)),
            windows,
            torch.device("cpu"),
            schemes=sensitivity.choices(8),
            alpha=1e-6,
            damping=0.01,
            energies={name: torch.full(shape[:1], factor) for name, shape in shapes.items()},
        )
        for factor in (1.0, 2.0)
    ]
    for one, two in zip(*by_factor, strict=True):
        assert two.costs == {scheme: pytest.approx(2 * cost) for scheme, cost in one.costs.items()}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.k_proj.weight holds NaN"),
        ("model.layers.1.input_layernorm.weight", "the 16-bit model computes NaN or infinity in its block"),
        ("model.norm.weight", r"gradients at its outputs hold NaN or infinity: .*--output-tokens 0"),
    ],
)
def test_a_damaged_model_is_told_of_before_its_gradients_are_used(model: Path, tmp_path: Path, name: str, said: str):
    shutil.copytree(model, tmp_path / "model")
    tensors = load_tensors(model)
    tensors[name][3] = torch.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=said):
        measured(tmp_path / "model", torch.randint(0, 384, (2, 16)))
