"""Bits and group sizes chosen per layer: the knapsack, what it is fed, and checkpoints made from it."""

import itertools
import json
import math
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import bpdq_quantizer
from bpdq_kernels.format import PLAIN, TRELLIS, Scheme
from bpdq_quantizer.algorithm.grid import range_start
from bpdq_quantizer.algorithm.solver import quantize_linear
from bpdq_quantizer.checkpoint.inspection import inspect
from bpdq_quantizer.checkpoint.picture import draw
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.model.stream import open_model
from bpdq_quantizer.model.windows import text_windows
from bpdq_quantizer.passes import kv_scales, sensitivity
from bpdq_quantizer.passes.allocate import allocate, check_costs, hull, parse_size, stage_bytes
from bpdq_quantizer.passes.sensitivity import Stage, choices, gradient_energies, sensitivities
from bpdq_quantizer.run import steps
from tiny import TEXT, load_tensors, tiny_model

SOME = [Scheme(1, 128), Scheme(2, 256), Scheme(2, 64), Scheme(3, 128), Scheme(4, 32)]
costs = st.lists(st.floats(0.01, 100), min_size=len(SOME), max_size=len(SOME))
stages_of_costs = st.lists(st.tuples(costs, st.sampled_from([(64, 256), (96, 512), (32, 352)])), min_size=1, max_size=4)


def as_stages(drawn):
    named = [(f"layer{i}", *stage) for i, stage in enumerate(drawn)]
    return [Stage([name], [shape], dict(zip(SOME, values, strict=True))) for name, values, shape in named]


def total(stages, schemes):
    """Cost and bytes of an allocation."""
    chosen = list(zip(stages, schemes, strict=True))
    return sum(stage.costs[s] for stage, s in chosen), sum(stage_bytes(stage)[s] for stage, s in chosen)


@settings(deadline=None)  # on a busy machine
@given(stages_of_costs, st.floats(0, 1))
def test_an_allocation_meets_the_budget_and_is_at_most_one_step_from_the_best(drawn, share):
    stages = as_stages(drawn)
    smallest, largest = (sum(pick(stage_bytes(s).values()) for s in stages) for pick in (min, max))
    budget = int(smallest + share * (largest - smallest))
    cost, size = total(stages, allocate(stages, budget))
    assert size <= budget
    everything = (total(stages, schemes) for schemes in itertools.product(SOME, repeat=len(stages)))
    best = min(cost for cost, size in everything if size <= budget)
    step = max(max(stage.costs.values()) - min(stage.costs.values()) for stage in stages)
    assert cost <= best + step


@given(stages_of_costs)
def test_the_hull_is_convex_and_below_every_scheme(drawn):
    (stage, *_) = as_stages(drawn)
    sizes = stage_bytes(stage)
    corners = hull(stage.costs, sizes)
    points = [(sizes[s], stage.costs[s]) for s in corners]
    assert points == sorted(points)
    assert corners[0] == min(SOME, key=lambda s: sizes[s])
    for scheme in SOME:
        x, y = sizes[scheme], stage.costs[scheme]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if x0 <= x <= x1:
                assert y >= y0 + (y1 - y0) * (x - x0) / (x1 - x0) - 1e-9
        assert y >= points[-1][1]


def test_bits_go_where_they_lower_the_cost_most():
    """Costs that fall as 4^-bits: the equal-loss principle gives every fourfold cost one bit more."""
    schemes = [Scheme(bits, 128) for bits in (1, 2, 3, 4)]
    stages = [
        Stage([f"{weight}"], [(64, 512)], {s: weight * 4.0**-s.bits for s in schemes}) for weight in (1, 4, 16, 64)
    ]
    budget = sum(stage_bytes(stages[0]).values())
    assert allocate(stages, budget) == schemes


def test_a_budget_below_the_smallest_schemes_is_refused():
    stages = as_stages([([5, 4, 3, 2, 1], (64, 256))])
    smallest = min(stage_bytes(stages[0]).values())
    assert allocate(stages, smallest) == [Scheme(1, 128)]
    with pytest.raises(bpdq_quantizer.InputError, match=f"take {smallest} bytes, the target leaves {smallest - 1}"):
        allocate(stages, smallest - 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_costs_that_are_no_numbers_are_named(value):
    stages = [Stage(["a"], [(128, 128)], dict.fromkeys(SOME, value))]
    with pytest.raises(bpdq_quantizer.InputError, match="a: what its errors cost is NaN or infinite: check the model"):
        check_costs(stages)


def test_costs_that_are_zero_everywhere_are_named():
    stages = [Stage([name], [(128, 128)], dict.fromkeys(SOME, 0.0)) for name in "ab"]
    with pytest.raises(bpdq_quantizer.InputError, match="a: what its errors cost is 0, as of all others: bring other"):
        check_costs(stages)
    stages[1] = Stage(["b"], [(128, 128)], dict(zip(SOME, (5, 4, 3, 2, 1), strict=True)))
    check_costs(stages)


def test_sizes_are_read_with_their_units():
    assert parse_size("20GiB") == 20 * 2**30
    assert parse_size(" 1.5 GB ") == 1_500_000_000
    assert parse_size("93000000") == 93_000_000
    for wrong in ("20G", "-1GB", "lots", "20 gib", "", "9" * 400 + "GB"):
        with pytest.raises(bpdq_quantizer.InputError, match=re.escape(f"--target-size {wrong}: expected a number")):
            parse_size(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allocate")
    tiny_model(folder / "model", "qwen2", layers=3, tie_word_embeddings=True)
    (folder / "text.txt").write_text(TEXT * 8)
    return folder


@pytest.fixture(scope="module")
def tokens(folder):
    ids = AutoTokenizer.from_pretrained(folder / "model")(TEXT * 8, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: 8 * 64]).view(8, 64)


def mean_energy(g):
    """E[|g|] E[g^2 / |g|] of gradients g [..., N]."""
    lengths = g.norm(dim=-1, keepdim=True)
    return lengths.mean() * (g.square() / lengths.clamp(min=1e-30)).flatten(0, -2).mean(0)


@pytest.mark.parametrize("arch", ["qwen2", "gemma2"])  # the second caps its logits
def test_gradients_are_those_of_the_whole_model(arch, tokens, tmp_path):
    tiny_model(tmp_path, arch, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(lambda _, __, y, name=name: (y.retain_grad(), outputs.update({name: y}))[0])
    logits = model(tokens).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    source = open_model(str(tmp_path))
    expected = {name: mean_energy(y.grad) for name, y in outputs.items()}
    states = [hidden.split(1) for hidden in model(tokens, output_hidden_states=True).hidden_states[:-1]]
    last = {}
    hook = model.model.layers[-1].register_forward_hook(lambda _, __, y: last.update(y=y))
    model(tokens)
    hook.remove()
    energies = gradient_energies(source, text_windows(tokens), [*states, last["y"].split(1)], torch.device("cpu"))
    assert energies.keys() == expected.keys()
    for name, energy in energies.items():
        torch.testing.assert_close(energy, expected[name], rtol=1e-3, atol=1e-7)
    assert all(p.is_meta for p in source.blocks.parameters()), "a block that was passed takes no memory"


@pytest.mark.parametrize(("code", "count"), [(PLAIN, 32), (TRELLIS, 32)])
def test_losses_of_sampled_rows_are_those_of_the_solver(code: str, count: int):
    generator = torch.Generator().manual_seed(5)
    W, X = torch.randn(8, 96, generator=generator), torch.randn(400, 96, generator=generator)
    H = 2 * (X * torch.linspace(0.2, 2, 96)).T @ (X * torch.linspace(0.2, 2, 96)) / len(X)
    options = {"iterations": sensitivity.ITERATIONS, "refinements": 1, "starts": (range_start,), "dtype": torch.float32}
    tried = sensitivity.try_schemes(W, H, choices(8, code), 1e-6, 0.01)
    assert len(tried) == count
    assert all(scheme.code == code or scheme.bits == 4 for scheme, _ in tried)
    for scheme, loss in tried:
        width = scheme.coefficient_bits
        arguments = scheme.bits, scheme.group_size, width
        expected = quantize_linear(W, H, *arguments, trellis=scheme.trellis, **options).loss
        rounding = 1e-4 if width == 8 else 0.02  # the solver rounds 16 bits to fp32 here, not to bf16
        torch.testing.assert_close(loss.sum(), expected.sum(), rtol=rounding, atol=1e-6)


def test_layers_get_schemes_that_fit_their_inputs():
    assert {scheme.code for scheme in sensitivity.schemes_for(96, choices(8, TRELLIS)) if scheme.bits < 4} == {TRELLIS}
    assert {scheme.code for scheme in sensitivity.schemes_for(100, choices(8, TRELLIS))} == {PLAIN}
    assert sensitivity.schemes_for(96, choices(16)) == [*choices(16)]


def test_what_coefficients_may_be_follows_the_option():
    assert {scheme.coefficient_bits for scheme in choices(8)} == {8, 16}
    assert {scheme.coefficient_bits for scheme in choices(16)} == {16}
    assert len(choices(8)) == 2 * len(choices(16)) == 32
    assert len(choices(8, TRELLIS)) == 32 + 24


def test_costs_of_every_scheme_fall_with_bits(folder, tokens):
    solver = {"alpha": 1e-6, "damping": 0.01}
    source = open_model(str(folder / "model"))
    stages = sensitivities(source, text_windows(tokens), torch.device("cpu"), schemes=choices(8), **solver)
    assert [len(stage.names) for stage in stages] == [3, 1, 2, 1] * 3
    assert stages[3].names == ["model.layers.0.mlp.down_proj"]
    assert stages[3].shapes == [(128, 352)]
    for stage in stages:
        assert stage.costs.keys() == set(choices(8))
        for bits, width in itertools.product((1, 2, 3), (8, 16)):
            assert stage.costs[Scheme(bits + 1, 128, width)] < 0.6 * stage.costs[Scheme(bits, 128, width)]


def quantize(folder, out, **options):
    options = {"calibration": str(folder / "text.txt"), "samples": 8, "seq_len": 64, "iterations": 3, **options}
    return bpdq_quantizer.quantize(str(folder / "model"), out, **options)


@pytest.fixture(scope="module")
def mixed(folder):
    report = quantize(folder, folder / "mixed", target_bpw=2.6)
    return folder / "mixed", report


def test_bits_per_weight_land_under_the_target(mixed):
    out, report = mixed
    found = inspect(out)
    assert 0.97 * 2.6 < found["bits_per_weight"] <= 2.6
    assert found["bits_per_weight"] == pytest.approx(report["bits_per_weight"])
    assert len({(layer["bits"], layer["group_size"]) for layer in found["layers"]}) > 1
    schemes = {layer["name"]: (layer["bits"], layer["group_size"]) for layer in found["layers"]}
    assert len({schemes[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv"}) == 1, "vLLM fuses them"


def test_a_mixed_checkpoint_loads_in_transformers(mixed, tokens):
    out, _ = mixed
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    default = {key: config[key] for key in ("bits", "group_size", "coefficient_bits")}
    assert default not in config["layers"].values(), "layers that are like most need no entry"
    original = AutoModelForCausalLM.from_pretrained(out.parent / "model")
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        error = (model(tokens).logits - original(tokens).logits).std() / original(tokens).logits.std()
    assert error < 1.0  # unrelated logits would give 1.4


@pytest.mark.parametrize("with_report", [True, False])
def test_inspect_draws_every_layer(mixed, tmp_path, with_report):
    out = shutil.copytree(mixed[0], tmp_path / "out")
    if not with_report:
        (out / "quantization_report.json").unlink()
    found = inspect(out)
    axes, _ = draw(found).axes
    (dots,) = axes.collections
    assert sorted(map(tuple, dots.get_offsets().tolist())) == [
        (block, module) for block in range(3) for module in range(7)
    ]
    assert dots.get_array().tolist() == [layer["bits_per_weight"] for layer in found["layers"]]
    assert (len(set(dots.get_sizes())) > 1) == with_report
    assert main(["inspect", str(out), "--plot", str(tmp_path / "bits.png")]) == 0
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["bits.docx", "none/bits.png", "."])
def test_a_picture_that_cannot_be_written_is_named_before_the_work(mixed, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("bpdq_quantizer.cli.manifest.verify", lambda _: pytest.fail("work has begun"))
    assert main(["inspect", str(mixed[0]), "--verify", "--plot", str(tmp_path / name)]) == 2
    assert f"--plot {tmp_path / name}: " in capsys.readouterr().err


WRONG = st.sampled_from([None, "a", {}, [1], -0.5, math.nan, math.inf, 10**400])
DAMAGED = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"[]", b"{}", b'{"layers": 3}', b'{"layers": [{"nam": 1}]}', b"[" * 10**5]),
    WRONG.map(lambda error: json.dumps({"layers": [{"name": "a", "relative_error": error}]}).encode()),
)


@settings(deadline=None, max_examples=40)
@given(DAMAGED)
def test_a_damaged_report_is_named(mixed, content):
    report = shutil.copytree(mixed[0], mixed[0].parent / "damaged", dirs_exist_ok=True) / "quantization_report.json"
    report.write_bytes(content)
    with pytest.raises(InputError, match="quantization_report"):
        draw(inspect(report.parent))


def test_a_checkpoint_lands_under_its_target_size(folder, tmp_path):
    quantize(folder, tmp_path / "out", target_size="300KB", embed_bits=4, group_size=64)
    found = inspect(tmp_path / "out")
    size = found["quantized_bytes"] + found["other_bytes"]
    assert size == sum(t.nbytes for t in load_tensors(tmp_path / "out").values())
    assert 0.97 * 300_000 < size <= 300_000


def test_scales_of_the_kv_cache_are_within_the_target_size(folder, tmp_path):
    with pytest.raises(bpdq_quantizer.InputError) as refusal:
        quantize(folder, tmp_path / "out", target_size="50KB", kv_cache_scales=True)
    least = int(re.search(r"take (\d+) bytes", str(refusal.value))[1])
    quantize(folder, tmp_path / "out", target_size=str(least), kv_cache_scales=True)
    tensors = load_tensors(tmp_path / "out")
    scales = [tensor for name, tensor in tensors.items() if name.endswith("_scale")]
    assert sum(tensor.nbytes for tensor in scales) == kv_scales.BLOCK_BYTES * 3
    assert sum(tensor.nbytes for tensor in tensors.values()) == least


def test_a_run_stopped_after_the_allocation_does_not_decide_again(folder, mixed, tmp_path, monkeypatch):
    def stop(*args):
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(steps, "quantize_blocks", stop)
        with pytest.raises(TypeError):
            quantize(folder, tmp_path / "out", target_bpw=2.6)
    monkeypatch.setattr(steps, "sensitivities", stop)
    quantize(folder, tmp_path / "out", target_bpw=2.6, resume=True)
    tensors = load_tensors(tmp_path / "out")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_tensors(mixed[0]).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_bpw": 2.5, "target_size": "1MB"}, "--target-bpw and --target-size: give one of them"),
        ({"target_bpw": 0.0}, "--target-bpw 0.0: expected bits per weight"),
        ({"target_bpw": 1.0}, r"--target-bpw 1\.0: the smallest schemes take 1\.\d{1,4}: give that or more"),
        ({"target_size": "50KB"}, r"--target-size 50KB: the smallest schemes take \d+ bytes: give that or more"),
    ],
)
def test_targets_that_cannot_be_met_are_refused(folder, tmp_path, options, message):
    with pytest.raises(bpdq_quantizer.InputError, match=message):
        quantize(folder, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("option", "least", "less"), [("target_bpw", 1.0, 1e-4), ("target_size", "50KB", 1)])
def test_the_smallest_target_that_is_named_can_be_met(folder, tmp_path, option, least, less):
    with pytest.raises(bpdq_quantizer.InputError) as refusal:
        quantize(folder, tmp_path / "out", **{option: least})
    named = re.search(r"take ([\d.]+)", str(refusal.value))[1]
    below = float(named) - less if option == "target_bpw" else str(int(named) - less)
    with pytest.raises(bpdq_quantizer.InputError, match="the smallest schemes take"):
        quantize(folder, tmp_path / "out", **{option: below})
    quantize(folder, tmp_path / "out", **{option: float(named) if option == "target_bpw" else named})
    bits = {layer["bits"] for layer in inspect(tmp_path / "out")["layers"]}
    assert bits == {1}
