"""The layout that the CUDA kernels read (`bpdq_kernels.layout.to_tiles`): bit for bit where its drawing puts it."""

import pytest
import torch
from torch import Tensor

from bpdq_kernels import layout, trellis
from bpdq_kernels.layout import to_tiles
from tests.offline import BF16, FP16


def random_layer(K: int, N: int, planes: int, group: int, is_trellis: bool = False) -> tuple[Tensor, Tensor]:
    """B and c, fp16."""
    B = torch.randint(-(2**31), 2**31, layout.plane_shape(K, N, planes), dtype=torch.int32)
    return B, torch.randn(layout.coefficient_shape(K, N, planes, group, is_trellis)).half()


@pytest.mark.parametrize(
    ("group", "starts"),  # of the runs of 8 inputs: four of lane 0, four of lane 1, ...
    [
        (32, [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120]),
        (64, [0, 16, 32, 48, 8, 24, 40, 56, 64, 80, 96, 112, 72, 88, 104, 120]),
        (128, [0, 32, 64, 96, 8, 40, 72, 104, 16, 48, 80, 112, 24, 56, 88, 120]),
        (256, [0, 32, 64, 96, 8, 40, 72, 104, 16, 48, 80, 112, 24, 56, 88, 120]),
    ],
)
def test_tiles_put_an_input_where_the_drawing_says(group: int, starts: list[int]):
    for number in range(128):
        bits = torch.zeros(1, 1, 128, dtype=torch.int32)
        bits[0, 0, number] = 1
        planes = to_tiles(layout.pack(bits), torch.ones(-(-128 // group), 2, 1), group, FP16).planes
        lane, run = divmod(starts.index(number // 8 * 8), 4)
        bit = (11 + number % 8 // 2 + 16 * (number % 2) + 4 * run) % 32
        assert planes[0, 0, 0, lane, 0, 0].item() & 0xFFFFFFFF == 1 << bit
        assert planes.count_nonzero() == 1


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_tiles_put_words_and_coefficients_where_the_drawing_says(planes: int):
    group_size = 32  # in groups of which the words stay whole
    B = torch.arange(13 * planes * 200, dtype=torch.int32).view(13, planes, 200)
    c = torch.randn(13, planes + 1, 200).half()
    tiles = to_tiles(B, c, group_size, FP16)
    assert tiles.planes.shape[:2] == (16, 4)  # 13 tiles up to a multiple of 4
    v = 2 - planes % 2
    for t, u, r, q, p, h in [(0, 0, 0, 0, 0, 0), (3, 1, 5, 2, planes - 1, 1), (12, 3, 7, 0, 0, 0), (6, 2, 1, 3, 0, 1)]:
        word = tiles.planes[t, u, p // v, 4 * r + q, p % v, h]
        own = to_tiles(B[4 * u + q : 4 * u + q + 1, p : p + 1, 16 * t + 8 * h + r :][..., :1], c[:1, :2, :1], 32, FP16)
        assert word == own.planes[0, 0, 0, 0, 0, 0]
        for group in (0, 4 * u):
            stored = tiles.coefficients[t, group, r, p, h] * tiles.scales[16 * t + 8 * h + r]
            assert stored == c[group, p, 16 * t + 8 * h + r]
    assert tiles.coefficients.abs().max() <= 1
    assert tiles.planes.numel() == 16 * 4 * 64 * planes


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("planes", [1, 2, 3])
def test_tiles_of_a_trellis_hold_chains_upwards_from_bit_11(planes: int, group: int):
    B, c = random_layer(160, 16, planes, group, is_trellis=True)
    tiles = to_tiles(B, c, group, FP16)
    assert (tiles.stored, tiles.multiplied) == (planes, planes + 1)
    chains = layout.unpack(B, 160)[..., trellis.chain_order(160)].view(planes, 16, 5, 32)
    v = 2 - planes % 2
    for plane, row, word in ((0, 0, 0), (planes - 1, 5, 3), (0, 13, 4)):
        found = tiles.planes[0, word // 4, plane // v, row % 8 * 4 + word % 4, plane % v, row // 8]
        assert [found >> (11 + i) % 32 & 1 for i in range(32)] == chains[plane, row, word].tolist()


def test_fp16_coefficients_are_rounded_once_for_bf16_activations():
    c = torch.randn(2, 3, 40).half()
    tiles = to_tiles(torch.zeros(4, 2, 40, dtype=torch.int32), c, 64, BF16)
    stored = tiles.coefficients.permute(1, 3, 0, 4, 2).flatten(2)[..., :40] * tiles.scales
    assert torch.equal(stored, c.bfloat16().float())


def test_layers_larger_than_one_step_are_tiled_alike(monkeypatch: pytest.MonkeyPatch):
    B, c = random_layer(400, 300, 3, 64)
    whole = to_tiles(B, c, 64, FP16)
    monkeypatch.setattr(layout, "_TILED_AT_ONCE", 13 * 3 * 16 * 7)  # 7 tiles, so that 4 x 5 don't divide
    assert torch.equal(to_tiles(B, c, 64, FP16).planes, whole.planes)
