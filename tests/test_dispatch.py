"""Which kernel a layer and a batch get: enough blocks for the card, and no configuration that no test compiles."""

import itertools

import pytest

from bpdq_kernels.dispatch import Dense, balance, gemm_config, linear_config
from bpdq_kernels.layout import cdiv
from tests.offline import GEMM, GEMM_K4_8_BITS, GEMV, fits

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
    for planes, group in itertools.product((1, 2, 3, 4), (32, 64, 128, 256)):
        one = {linear_config(1, planes, group, n, K, s, arch) for n, K, s in sizes}
        gemm = {linear_config(M, planes, group, n, K, s, arch) for M in several for n, K, s in sizes}
        assert gemm == {config for config in GEMM if fits(config, planes, group)}
        one_8 = {linear_config(1, planes, group, n, K, s, arch, 8) for n, K, s in sizes}
        assert arch >= 100 or one_8 == {config for config in GEMV if fits(config, planes, group, 8)}
        eight_bits = {linear_config(M, planes, group, n, K, s, arch, 8) for M in several for n, K, s in sizes}
        assert eight_bits == {config for config in GEMM + GEMM_K4_8_BITS if fits(config, planes, group, 8)}
        eight = {config for config in gemm if config.tokens == 8}
        assert one == (eight if arch >= 100 else {config for config in GEMV if fits(config, planes, group)})
        assert {type(linear_config(M, planes, group, 4096, 4096, 82, arch)) for M in (1024, 5000)} == {Dense}
