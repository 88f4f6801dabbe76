"""Which kernel a layer and a batch get: enough blocks for the card, and no configuration that no test compiles."""

import itertools

import pytest

from bpdq_kernels.activation import Activation
from bpdq_kernels.dispatch import (
    Dense,
    Gemm,
    Matrix,
    balance,
    experts_config,
    experts_configs,
    gemm_config,
    linear_config,
    linear_configs,
)
from bpdq_kernels.layout import cdiv
from tests.offline import (
    BF16,
    EXPERT_GEMM,
    EXPERT_GEMV,
    GEMM,
    GEMM_ONE_TILE,
    GEMV,
    ExpertLayer,
    Layer,
    fits,
)

SHAPES_7B = [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (152064, 3584)]
SHAPES_72B = [(10240, 8192), (8192, 8192), (59136, 8192), (8192, 29568), (152064, 8192)]


@pytest.mark.parametrize(("N", "K"), SHAPES_7B + SHAPES_72B, ids=str)
def test_decode_fills_an_rtx_3090(N: int, K: int):
    multiprocessors = 82
    blocks = cdiv(N, 16 * linear_config(1, 2, 128, N, K, multiprocessors, 86).tiles)
    assert blocks >= multiprocessors
    assert balance(blocks, multiprocessors) >= 0.85
    assert cdiv(N, 16 * linear_config(8, 2, 128, N, K, multiprocessors, 86).tiles) >= multiprocessors


@pytest.mark.parametrize("tokens", [64, 128, 256, 1000])
@pytest.mark.parametrize(("N", "K"), SHAPES_7B + SHAPES_72B, ids=str)
def test_prefill_keeps_an_rtx_3090_busy(N: int, K: int, tokens: int):
    config = gemm_config(tokens, 2, N, 82)
    blocks = cdiv(tokens, 64) * cdiv(N, 16 * config.tiles * config.warps // config.split)
    assert blocks >= 82
    assert tokens < 256 or balance(blocks, 82) >= 0.85


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_dispatch_picks_only_what_the_tests_run(arch: int):
    N, sms = range(16, 20000, 400), (1, 46, 82, 132)
    sizes = list(itertools.product(N, (64, 4096), sms))
    several = [2, 8, 9, 16, 17, 32, 33, 64, 65, 500]
    for planes, group, width in itertools.product((2, 3, 4), (32, 64, 128, 256), (8, 16)):
        coded = {
            linear_config(M, planes, group, n, K, s, arch, width, True) for M in (1, *several) for n, K, s in sizes
        }
        few = GEMM + GEMM_ONE_TILE + (GEMV if arch < 100 else [])
        assert coded == {config for config in few if fits(config, planes, group, width, True, arch)}
    for planes, group in itertools.product((1, 2, 3, 4), (32, 64, 128, 256)):
        one = {linear_config(1, planes, group, n, K, s, arch) for n, K, s in sizes}
        gemm = {linear_config(M, planes, group, n, K, s, arch) for M in several for n, K, s in sizes}
        assert gemm == {config for config in GEMM + GEMM_ONE_TILE if fits(config, planes, group)}
        one_8 = {linear_config(1, planes, group, n, K, s, arch, 8) for n, K, s in sizes}
        assert arch >= 100 or one_8 == {config for config in GEMV if fits(config, planes, group, 8, arch=arch)}
        eight_bits = {linear_config(M, planes, group, n, K, s, arch, 8) for M in several for n, K, s in sizes}
        assert eight_bits == {config for config in GEMM + GEMM_ONE_TILE if fits(config, planes, group, 8, arch=arch)}
        eight = {config for config in gemm if config.tokens == 8}
        assert one == (eight if arch >= 100 else {config for config in GEMV if fits(config, planes, group)})
        assert {type(linear_config(M, planes, group, 4096, 4096, 82, arch)) for M in (1024, 5000)} == {Dense}


# experts, chosen ones, hidden and inner size: Qwen3-30B-A3B, Qwen3-Next-80B-A3B, Mixtral, gpt-oss-20b, small ones
EXPERTS = [(128, 8, 2048, 768), (512, 10, 2048, 512), (8, 2, 4096, 14336), (32, 4, 2880, 2880), (4, 1, 256, 100)]


@pytest.mark.parametrize(("experts", "choices", "hidden", "inner"), EXPERTS[:4], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_decode_of_experts_fills_an_rtx_3090(experts: int, choices: int, hidden: int, inner: int, tokens: int):
    up, down = Matrix(2, 128, 2 * inner, hidden), Matrix(2, 128, hidden, inner)
    config = experts_config(tokens, choices, experts, up, down, True, 82, 86)
    assert not config.is_sorted
    assert config.is_fused
    for matrix, part in ((up, config.up), (down, config.down)):
        assert balance(tokens * choices * cdiv(matrix.out_features, 16 * part.tiles), 82) >= 0.85


@pytest.mark.parametrize(("planes", "group", "bits", "most"), [(2, 64, 16, 64), (3, 128, 16, 64), (3, 64, 16, 32)])
def test_weights_with_many_coefficients_are_multiplied_by_fewer_tokens(planes, group, bits, most):
    """64 tokens of three planes in groups of 64 spilled 4 to 6 registers on sm_86 (Triton 3.9)."""
    up, down = Matrix(planes, group, 1536, 2048, bits), Matrix(planes, group, 2048, 768, bits)
    config = experts_config(4096, 8, 128, up, down, True, 82, 86)
    assert (config.up.tokens, config.down.tokens) == (most, most)


@pytest.mark.parametrize(
    ("tokens", "planes", "group", "where"),
    [(8, 4, 32, "80 86 90 100"), (16, 4, 32, "80 86 90 100"), (8, 4, 64, "100"), (64, 1, 32, "100")],
)
def test_blocks_have_one_tile_where_two_leave_too_few_registers(tokens, planes, group, where):
    """Two of 8-bit coefficients spilled 3 to 6 registers on sm_80 (Triton 3.9), 90 and 100 (3.6)."""
    for arch, out_features in itertools.product((80, 86, 90, 100), (4096, 152064)):
        found = [linear_config(tokens, planes, group, out_features, 4096, 82, arch, width) for width in (8, 16)]
        assert [config.tiles for config in found] == [1 if str(arch) in where.split() else 2, 2]


@pytest.mark.parametrize(("planes", "group", "tiles"), [(3, 64, 1), (3, 128, 2), (2, 64, 2), (4, 64, 2)])
def test_a_narrow_layer_of_three_planes_has_one_tile_for_64_tokens_in_groups_of_64(planes, group, tiles):
    """Two of 16-bit coefficients spilled 2 registers on sm_80 and sm_86 (Triton 3.9), with eight warps alone."""
    assert linear_config(64, planes, group, 1024, 4096, 82, 86) == Gemm(64, tiles, 8, 8)
    assert linear_config(64, planes, group, 4096, 4096, 82, 86).tiles == 2


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
@pytest.mark.parametrize("coefficient_bits", [16, 8])
@pytest.mark.parametrize("gated", [True, False])
def test_experts_get_only_what_the_tests_compile(arch: int, coefficient_bits: int, gated: bool):
    seen = set()
    for (experts, choices, hidden, inner), planes, group, sms in itertools.product(
        EXPERTS, (1, 2, 3, 4), (32, 64, 128, 256), (1, 82)
    ):
        up = Matrix(planes, group, (1 + gated) * inner, hidden, coefficient_bits)
        down = Matrix(planes, group, hidden, inner, coefficient_bits)
        configs = experts_configs(choices, experts, up, down, gated, sms, arch)
        several = (1, 3, 8, 9, 30, 100, 500, 2000, 100_000)
        assert {experts_config(m, choices, experts, up, down, gated, sms, arch) for m in several} <= {*configs}
        for config in configs:
            assert config.is_fused == (gated and inner % 16 == 0)
            layers = [Layer(planes, group, m.out_features, m.in_features, BF16, coefficient_bits) for m in (up, down)]
            first = ExpertLayer(layers[0], Activation("silu"), config.is_fused)
            assert first.takes(config.up)
            assert ExpertLayer(layers[1], None).takes(config.down)
            assert not config.is_sorted or config.up.tokens == config.down.tokens
            seen |= {config.up, config.down}
    gemm = {config for config in EXPERT_GEMM if coefficient_bits == 16 or config.tokens < 64}
    assert {config for config in seen if isinstance(config, Gemm)} == gemm
    assert seen - gemm <= {*EXPERT_GEMV}
    assert (seen == gemm) == (arch >= 100)


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("arch", [86, 90, 120])
@pytest.mark.parametrize(("planes", "group"), [(2, 32), (3, 64), (4, 128)])
def test_what_any_batch_gets_was_compiled_before(planes: int, group: int, arch: int, trellis: bool):
    for out_features, in_features in SHAPES_72B:
        layer = (planes, group, out_features, in_features, 82, arch, 8, trellis)
        compiled = linear_configs(*layer)
        assert {linear_config(tokens, *layer) for tokens in (1, 2, 9, 17, 33, 64, 65, 200, 512, 4096)} <= {*compiled}
