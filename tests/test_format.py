"""What is read from `quantization_config`, in both dialects, and what a user is told when it can't be."""

import copy
from math import prod
from typing import Any

import pytest
import torch

from bpdq_kernels import format, layout, patterns
from bpdq_kernels.errors import InputError
from bpdq_kernels.format import TRELLIS, Scheme
from bpdq_kernels.layout import coefficient_shape

OURS = {
    "quant_method": "bpdq",
    "checkpoint_format": "bpdq",
    "format_version": 1,
    "bits": 2,
    "group_size": 64,
    "ignore": ["lm_head"],
    "layers": {},
    "meta": {"bpdq": {"msbits": 2, "n_iters": 10, "alpha": 1e-4}},
}
AUTHORS = {
    "quant_method": "gptq",
    "checkpoint_format": "bpdq",
    "format": "bpdq",
    "bits": 8,
    "group_size": 64,
    "desc_act": False,
    "lm_head": False,
    "dynamic": None,
    "meta": {"bpdq": {"msbits": 2, "n_iters": 10, "alpha": 1e-4}, "quantizer": ["gptqmodel:5.7.0"]},
}
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.0.mlp.down_proj"


def changed(config: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """`config` with keys replaced, or removed where the value is `...`."""
    config = copy.deepcopy(config) | keys
    return {key: value for key, value in config.items() if value is not ...}


@pytest.mark.parametrize("config", [OURS, AUTHORS], ids=["ours", "authors"])
def test_both_dialects_describe_the_same_checkpoint(config: dict[str, Any]):
    parsed = format.parse(config)
    assert format.claims(config)
    assert parsed.default == Scheme(bits=2, group_size=64)
    assert parsed.scheme_for(Q_PROJ) == Scheme(2, 64)
    assert parsed.scheme_for("lm_head") is None


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": 4},
        {"quant_method": "awq", "checkpoint_format": "bpdq"},
        {},
    ],
)
def test_checkpoints_of_other_methods_are_not_claimed(config: dict[str, Any]):
    assert not format.claims(config)
    with pytest.raises(ValueError, match="quantization_config is not BPDQ: quant_method"):
        format.parse(config)


@pytest.mark.parametrize(
    ("planes", "group", "n", "k"), [(2, 128, 4608, 3584), (3, 256, 96, 29568 // 8), (1, 32, 65, 256), (4, 64, 1, 1)]
)
def test_tiled_bytes_are_those_of_the_tiles(planes, group, n, k):
    B = torch.empty(layout.plane_shape(k, n, planes), dtype=torch.int32, device="meta")
    c = torch.empty(layout.coefficient_shape(k, n, planes, group), device="meta")
    tiles = layout.to_tiles(B, c, group, torch.float16)
    assert Scheme(planes, group).tiled_bytes(n, k) == sum(t.nbytes for t in tiles if t is not None)
    s = torch.empty(planes + 1, n, dtype=torch.float16, device="meta")
    tiles = layout.to_tiles(B, c.to(torch.int8), group, torch.float16, s)
    assert Scheme(planes, group, 8).tiled_bytes(n, k) == sum(t.nbytes for t in tiles)


def test_bits_per_weight_count_the_coefficients():
    assert Scheme(2, 64).bits_per_weight == 2.75
    assert Scheme(2, 256).bits_per_weight == 2.1875
    assert Scheme(4, 64).bits_per_weight == 5.25
    assert Scheme(2, 64, 8).bits_per_weight == 2.375


def test_a_layer_gets_its_own_bits_and_group_size():
    layers = {r"re:.*mlp\..*": {"group_size": 32}, DOWN_PROJ: {"bits": 4}, "re:.*up_": {"group_size": 32}}
    parsed = format.parse(changed(OURS, layers=layers))
    assert parsed.scheme_for(DOWN_PROJ) == Scheme(4, 64), "its name counts"
    assert parsed.scheme_for("model.layers.0.mlp.up_proj") == Scheme(2, 32)
    assert parsed.scheme_for(Q_PROJ) == Scheme(2, 64)


@pytest.mark.parametrize("turn", [1, -1])
def test_patterns_that_contradict_each_other_are_refused_in_any_order(turn):
    """transformers sorts them when it saves a model."""
    pairs = [(r"re:.*mlp\.down.*", {"bits": 4}), ("re:.*mlp.*", {"bits": 1})]
    parsed = format.parse(changed(OURS, layers=dict(pairs[::turn])))
    assert parsed.scheme_for("model.layers.0.mlp.up_proj") == Scheme(1, 64)
    with pytest.raises(InputError, match=rf"{DOWN_PROJ}: .* makes it .* by 're:.*' and .* by 're:.*': name the layer"):
        parsed.scheme_for(DOWN_PROJ)


def test_ignored_layers_stay_in_16_bits_even_where_layers_names_them():
    ignore = ["lm_head", r"re:.*\.layers\.0\.mlp\."]
    parsed = format.parse(changed(OURS, ignore=ignore, layers={DOWN_PROJ: {"bits": 4}}))
    assert parsed.scheme_for(DOWN_PROJ) is None
    assert parsed.scheme_for("lm_head") is None
    assert parsed.scheme_for("model.layers.1.mlp.down_proj") == Scheme(2, 64)


def test_an_exact_name_is_not_read_as_a_pattern_or_prefix():
    parsed = format.parse(changed(OURS, ignore=["model.layers.1", "model.layers.0.self_attn.q.proj"]))
    assert parsed.scheme_for("model.layers.1.mlp.up_proj") == Scheme(2, 64)
    assert parsed.scheme_for("model.layers.10.mlp.up_proj") == Scheme(2, 64)
    assert parsed.scheme_for(Q_PROJ) == Scheme(2, 64)


def test_dynamic_of_the_authors_skips_and_regroups_layers_but_never_changes_the_planes():
    dynamic = {
        r"-:model\.layers\.0\.self_attn": {},
        r"+:.*down_proj": {"bits": 4, "group_size": 32},
        r".*\.up_proj": {"group_size": 128},
    }
    parsed = format.parse(changed(AUTHORS, dynamic=dynamic))
    assert parsed.scheme_for(Q_PROJ) is None
    assert parsed.scheme_for("model.layers.1.self_attn.q_proj") == Scheme(2, 64)
    assert parsed.scheme_for(DOWN_PROJ) == Scheme(2, 32), "their `bits` is the initial grid, not the planes"
    assert parsed.scheme_for("model.layers.1.mlp.up_proj") == Scheme(2, 128)
    assert parsed.scheme_for("lm_head") is None


@pytest.mark.parametrize("key", ["layers", "ignore", "format_version", "meta"])
def test_optional_keys_may_be_missing_or_null(key: str):
    for value in (..., None):
        if key != "format_version" or value is ...:
            assert format.parse(changed(OURS, **{key: value})).scheme_for(Q_PROJ) == Scheme(2, 64)


V2 = changed(OURS, format_version=2, coefficient_bits=8)


V3 = changed(OURS, format_version=3, code="trellis4")


def test_version_3_tells_the_code_by_layer_too():
    parsed = format.parse(changed(V3, layers={DOWN_PROJ: {"code": "plain"}, "re:.*q_proj": {"bits": 3}}))
    assert parsed.scheme_for(DOWN_PROJ) == Scheme(2, 64)
    assert parsed.scheme_for(Q_PROJ) == Scheme(3, 64, 16, "trellis4")
    parsed = format.parse(changed(V3, code=..., layers={DOWN_PROJ: {"code": "trellis4"}}))
    assert (parsed.scheme_for(DOWN_PROJ).planes, parsed.scheme_for(Q_PROJ).planes) == (3, 2)


@pytest.mark.parametrize("width", [8, 16])
def test_a_trellis_has_the_bytes_of_its_tensors(width):
    scheme = Scheme(2, 64, width, TRELLIS)
    c = coefficient_shape(160, 48, 2, 64, trellis=True)
    assert scheme.stored_bytes(48, 160) == 4 * 5 * 2 * 48 + width // 8 * prod(c) + (2 * 4 * 48 if width == 8 else 0)
    assert scheme.bits_per_weight == 2 + width * 4 / 64
    assert scheme.for_inputs(160) == scheme
    assert scheme.for_inputs(161) == Scheme(2, 64, width)


def test_version_2_tells_the_width_of_coefficients_by_layer_too():
    parsed = format.parse(changed(V2, layers={DOWN_PROJ: {"coefficient_bits": 16}, "re:.*q_proj": {"bits": 3}}))
    assert parsed.scheme_for(DOWN_PROJ) == Scheme(2, 64, 16)
    assert parsed.scheme_for(Q_PROJ) == Scheme(3, 64, 8)
    assert parsed.scheme_for("model.layers.1.mlp.up_proj") == Scheme(2, 64, 8)
    parsed = format.parse(changed(V2, coefficient_bits=..., layers={DOWN_PROJ: {"coefficient_bits": 8}}))
    assert (parsed.scheme_for(DOWN_PROJ).coefficient_bits, parsed.scheme_for(Q_PROJ).coefficient_bits) == (8, 16)


BAD = {
    "k = 5": (changed(OURS, bits=5), "bits = 5 bit-planes are not supported: use 1 to 4"),
    "k = 0": (changed(OURS, bits=0), "bits = 0 bit-planes are not supported: use 1 to 4"),
    "bits true": (changed(OURS, bits=True), "bits = True bit-planes are not supported: use 1 to 4"),
    "bits a string": (changed(OURS, bits="2"), "bits = '2' bit-planes are not supported: use 1 to 4"),
    "bits a float": (changed(OURS, bits=2.0), "bits = 2.0 bit-planes are not supported: use 1 to 4"),
    "bits missing": (changed(OURS, bits=...), "quantization_config: bits missing: add the value or quantize"),
    "G = 48": (changed(OURS, group_size=48), "group_size = 48 is not supported: use one of (32, 64, 128, 256)"),
    "G a float": (changed(OURS, group_size=64.0), "group_size = 64.0 is not supported: use one of"),
    "G a list": (changed(OURS, group_size=[64]), "group_size = [64] is not supported: use one of"),
    "both missing": (changed(OURS, bits=..., group_size=None), "bits and group_size missing: add the value"),
    "newer format": (
        changed(OURS, format_version=4),
        "format_version 4 is not supported (this release reads 1, 2, 3): upgrade",
    ),
    "version a float": (changed(OURS, format_version=1.0), "format_version 1.0 is not supported (this release reads"),
    "version true": (changed(OURS, format_version=True), "format_version True is not supported (this release reads"),
    "a code of no name": (changed(V3, code="qtip"), "code = 'qtip' is not supported: use one of ('plain', 'trellis4')"),
    "a code too early": (changed(V2, code="trellis4"), "format_version 2 has no code = 'trellis4': download or"),
    "a layer's code too early": (
        changed(V2, layers={"re:.*": {"code": "trellis4"}}),
        "format_version 2 has no code = 'trellis4': download or",
    ),
    "a trellis of 4 planes": (changed(V3, bits=4), "bits = 4 with a trellis is not supported: use 1 to 3"),
    "c of 4 bits": (changed(V2, coefficient_bits=4), "coefficient_bits = 4 is not supported: use one of (8, 16)"),
    "c true": (changed(V2, coefficient_bits=True), "coefficient_bits = True is not supported: use one of (8, 16)"),
    "c a string": (changed(V2, coefficient_bits="8"), "coefficient_bits = '8' is not supported: use one of (8, 16)"),
    "c null": (changed(V2, coefficient_bits=None), "coefficient_bits = None is not supported: use one of (8, 16)"),
    "c of 8 bits in version 1": (
        changed(V2, format_version=1),
        "quantization_config: format_version 1 has no coefficient_bits = 8: download or quantize",
    ),
    "c of 8 bits in no version": (changed(V2, format_version=...), "format_version 1 has no coefficient_bits = 8"),
    "c of 8 bits in a layer in version 1": (
        changed(OURS, layers={"a": {"coefficient_bits": 8}}),
        "format_version 1 has no coefficient_bits = 8: download or quantize",
    ),
    "c of 4 bits in a layer": (
        changed(V2, layers={"a": {"coefficient_bits": 4}}),
        "layers['a']: coefficient_bits = 4 is not supported: use one of (8, 16)",
    ),
    "ignore a string": (changed(OURS, ignore="lm_head"), "ignore = 'lm_head' must be a list of layer names"),
    "ignore of numbers": (changed(OURS, ignore=[0]), "ignore = [0] must be a list of layer names"),
    "layers a list": (changed(OURS, layers=[Q_PROJ]), f"quantization_config: layers = ['{Q_PROJ}'] must be an object"),
    "layer a number": (changed(OURS, layers={"a": 3}), "layers['a'] = 3 must be an object of bits, group_size, coef"),
    "layer key typo": (changed(OURS, layers={"a": {"bit": 3}}), "layers['a'] = {'bit': 3} must be an object of bits"),
    "layer k = 9": (
        changed(OURS, layers={"a": {"bits": 9}}),
        "layers['a']: bits = 9 bit-planes are not supported: use",
    ),
    "msbits missing": (
        changed(AUTHORS, meta={"bpdq": {}}),
        "meta.bpdq.msbits (the number of bit-planes) is missing: add",
    ),
    "msbits are not bits": (
        changed(OURS, meta={"bpdq": {"msbits": 3}}),
        "quantization_config: bits = 2, but meta.bpdq.msbits = 3: download or quantize the model again",
    ),
    "meta missing": (changed(AUTHORS, meta=...), "meta.bpdq.msbits (the number of bit-planes) is missing: add it"),
    "meta a string": (changed(AUTHORS, meta="bpdq"), "quantization_config: meta = 'bpdq' must be an object"),
    "meta.bpdq a list": (changed(AUTHORS, meta={"bpdq": [2]}), "meta: bpdq = [2] must be an object"),
    "msbits a string": (
        changed(AUTHORS, meta={"bpdq": {"msbits": "2"}}),
        "bits = '2' bit-planes are not supported: use",
    ),
    "their G missing": (changed(AUTHORS, group_size=...), "quantization_config: group_size missing: add the value"),
    "their G = -1": (changed(AUTHORS, group_size=-1), "group_size = -1 is not supported: use one of"),
    "their LM head": (
        changed(AUTHORS, lm_head=True),
        "lm_head = true (a quantized LM head) is not supported: quantize",
    ),
    "dynamic a list": (changed(AUTHORS, dynamic=["-:a"]), "quantization_config: dynamic = ['-:a'] must be an object"),
    "dynamic a number": (changed(AUTHORS, dynamic={"a": 3}), "quantization_config: dynamic['a'] = 3 must be an object"),
    "dynamic G": (
        changed(AUTHORS, dynamic={"a": {"group_size": 7}}),
        "dynamic['a']: group_size = 7 is not supported: use",
    ),
}


@pytest.mark.parametrize(("config", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_config_is_refused_with_the_key_and_the_remedy(config: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=r"^quantization_config: ") as e:
        format.parse(config)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def layer(words: int = 3, planes: int = 2, n: int = 8, groups: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """B and c of 96 inputs at k = 2, G = 64, unless changed."""
    return torch.zeros(words, planes, n, dtype=torch.int32), torch.zeros(groups, planes + 1, n, dtype=torch.bfloat16)


def test_a_layer_that_fits_its_scheme_is_accepted():
    format.check(Q_PROJ, layout.Stored(*layer()), 96, 8, Scheme(2, 64))
    B, c = layer()
    format.check(Q_PROJ, layout.Stored(B, c.to(torch.int8), torch.ones(3, 8).half()), 96, 8, Scheme(2, 64, 8))
    B, c = layer(words=8, groups=1)  # the authors pad the inputs to a multiple of 256 where G = 256
    format.check(Q_PROJ, layout.Stored(B, c), 96, 8, Scheme(2, 256))


B, C = layer()
WRONG = {
    "B of another dtype": (B.long(), C, "B is torch.int64 (3, 2, 8), expected int32 (3, 2, 8)"),
    "too few words": (B[:2], C, "B is torch.int32 (2, 2, 8), expected int32 (3, 2, 8)"),
    "too many words": (layer(words=4)[0], C, "B is torch.int32 (4, 2, 8), expected int32 (3, 2, 8)"),
    "another number of planes": (B[:, :1], C, "B is torch.int32 (3, 1, 8), expected int32 (3, 2, 8)"),
    "another number of outputs": (B[..., :7], C, "B is torch.int32 (3, 2, 7), expected int32 (3, 2, 8)"),
    "B transposed": (B.mT, C, "B is torch.int32 (3, 8, 2), expected int32 (3, 2, 8)"),
    "c of integers": (B, C.int(), "c is torch.int32 (2, 3, 8), expected 16-bit floats (2, 3, 8)"),
    "too few groups": (B, C[:1], "c is torch.bfloat16 (1, 3, 8), expected 16-bit floats (2, 3, 8)"),
    "no bias row": (B, C[:, :2], "c is torch.bfloat16 (2, 2, 8), expected 16-bit floats (2, 3, 8)"),
    "NaN in c": (
        B,
        C.index_fill(0, torch.tensor([1]), torch.nan),
        "c holds NaN or infinity, or was not in the checkpoint",
    ),
    "infinity in c": (B, C - torch.inf, "c holds NaN or infinity, or was not in the checkpoint"),
}


@pytest.mark.parametrize(("B", "c", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_layer_that_does_not_fit_is_named_with_what_was_expected(B: torch.Tensor, c: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=f"^{Q_PROJ}.*: download or quantize it again$") as e:
        format.check(Q_PROJ, layout.Stored(B, c), 96, 8, Scheme(2, 64))
    assert f"{Q_PROJ}.{message}" in str(e.value)


NARROW, SCALES = C.to(torch.int8), torch.ones(3, 8).bfloat16()
WRONG_IN_8_BITS = {
    "c in 16 bits": (C, SCALES, "c is torch.bfloat16 (2, 3, 8), expected int8 (2, 3, 8)"),
    "c unsigned": (C.to(torch.uint8), SCALES, "c is torch.uint8 (2, 3, 8), expected int8 (2, 3, 8)"),
    "s in fp32": (NARROW, SCALES.float(), "s is torch.float32 (3, 8), expected 16-bit floats (3, 8)"),
    "s of a plane": (NARROW, SCALES[1:], "s is torch.bfloat16 (2, 8), expected 16-bit floats (3, 8)"),
    "s by group": (NARROW, SCALES[None], "s is torch.bfloat16 (1, 3, 8), expected 16-bit floats (3, 8)"),
    "s of other outputs": (NARROW, SCALES[:, 1:], "s is torch.bfloat16 (3, 7), expected 16-bit floats (3, 8)"),
    "s infinite": (NARROW, SCALES / 0, "s holds NaN or infinity, or was not in the checkpoint"),
    "s NaN": (NARROW, SCALES * torch.nan, "s holds NaN or infinity, or was not in the checkpoint"),
}


@pytest.mark.parametrize(("c", "s", "message"), WRONG_IN_8_BITS.values(), ids=WRONG_IN_8_BITS.keys())
def test_a_layer_in_8_bits_that_does_not_fit_is_named_with_what_was_expected(c, s, message):
    with pytest.raises(ValueError, match=f"^{Q_PROJ}.*: download or quantize it again$") as e:
        format.check(Q_PROJ, layout.Stored(B, c, s), 96, 8, Scheme(2, 64, 8))
    assert f"{Q_PROJ}.{message}" in str(e.value)


@pytest.mark.parametrize("width", [8, 16])
def test_stored_bytes_are_those_of_the_tensors(width):
    scheme = Scheme(3, 64, width)
    planes, coefficients = layout.plane_shape(200, 40, 3), layout.coefficient_shape(200, 40, 3, 64)
    expected = 4 * prod(planes) + (2 * prod(coefficients) if width == 16 else prod(coefficients) + 2 * 4 * 40)
    assert scheme.stored_bytes(40, 200) == expected


def test_padding_is_accepted_only_at_the_group_size_the_authors_pad():
    B, c = layer(words=8)
    with pytest.raises(ValueError, match=r"B is torch.int32 \(8, 2, 8\), expected int32 \(3, 2, 8\)"):
        format.check(Q_PROJ, layout.Stored(B, c), 96, 8, Scheme(2, 64))


@pytest.mark.parametrize(
    "target",
    [
        "lm_head",
        "model.layers.1.mlp",
        "re:.*mlp.*",
        "re:mlp",
        "re:model.layers.1",
        "re:.*_head$",
        r"re:.*\.(q|k)_proj$",
    ],
)
def test_layers_are_named_as_in_compressed_tensors(target):
    from compressed_tensors.utils.match import match_name

    names = ["lm_head", "model.layers.1.mlp", "model.layers.1.mlp.up_proj", "model.layers.10.self_attn.q_proj", "mlp"]
    assert [patterns.matches(name, target) for name in names] == [match_name(name, target) for name in names]
