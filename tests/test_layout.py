"""The bit order of B and its relatives, checked against plain Python integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bpdq_kernels import layout, reference, triton_layout
from bpdq_kernels.trellis import chain_order

sizes = st.fixed_dictionaries(
    {"k": st.integers(1, 4), "n": st.integers(1, 7), "in_features": st.integers(1, 150), "seed": st.integers(0, 2**32)}
)


def random_bits(k: int, n: int, in_features: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (k, n, in_features), dtype=torch.uint8, generator=generator)


def words_in_plain_python(bits: torch.Tensor) -> list[list[list[int]]]:
    """B as nested lists: bit j of word t is input 32 t + j, read as a two's complement integer."""
    k, n, in_features = bits.shape
    B = [[[0] * n for _ in range(k)] for _ in range(-(-in_features // 32))]
    for p in range(k):
        for out in range(n):
            for i in range(in_features):
                if bits[p, out, i]:
                    B[i // 32][p][out] += -(2**31) if i % 32 == 31 else 2 ** (i % 32)
    return B


@given(sizes)
@settings(deadline=None, max_examples=40)
def test_bit_j_of_word_t_is_input_32t_plus_j(size: dict[str, int]):
    bits = random_bits(**size)
    assert layout.pack(bits).tolist() == words_in_plain_python(bits)


@given(sizes)
@settings(deadline=None, max_examples=60)
def test_unpacking_returns_the_bits_that_were_packed(size: dict[str, int]):
    bits = random_bits(**size)
    B = layout.pack(bits)
    assert B.dtype == torch.int32
    assert B.shape == layout.plane_shape(size["in_features"], size["n"], size["k"])
    assert torch.equal(layout.unpack(B, size["in_features"]), bits)
    padded = torch.nn.functional.pad(B, (0, 0, 0, 0, 0, 3), value=-1)
    assert torch.equal(layout.unpack(padded, size["in_features"]), bits)
    assert torch.equal(layout.trim(padded, size["in_features"]), B)


@given(sizes)
@settings(deadline=None, max_examples=40)
def test_bits_past_the_last_input_are_zero(size: dict[str, int]):
    in_features = size["in_features"]
    B = layout.pack(torch.ones_like(random_bits(**size)))
    bits = layout.unpack(B, 32 * B.shape[0])
    assert bits[..., :in_features].all()
    assert not bits[..., in_features:].any()


@given(sizes)
@settings(deadline=None, max_examples=40)
def test_words_of_a_slice_of_outputs_expand_to_its_bits(size: dict[str, int]):
    bits = random_bits(**size)
    B = layout.pack(bits)
    expanded = layout.expand_words(B[:, :, ::2])  # strided, as a tensor-parallel shard may be
    assert expanded.shape == (size["k"], B.shape[0], 32, -(-size["n"] // 2))
    inputs = expanded.flatten(1, 2)[:, : size["in_features"]]
    assert torch.equal(inputs.transpose(1, 2), bits[:, ::2])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
def test_bits_of_any_integer_dtype_pack_alike(dtype: torch.dtype):
    bits = random_bits(2, 5, 70, seed=0)
    assert torch.equal(layout.pack(bits.to(dtype)), layout.pack(bits))


@given(sizes, st.sampled_from([(256, 32), (256, 64), (256, 128), (128, 32), (128, 64), (64, 32), (64, 64)]))
@settings(deadline=None, max_examples=40)
def test_coefficients_of_split_groups_give_the_same_weights(size: dict[str, int], groups: tuple[int, int]):
    group_size, finer = groups
    in_features = size["in_features"]
    B = layout.pack(random_bits(**size))
    shape = layout.coefficient_shape(in_features, size["n"], size["k"], group_size)
    c = torch.randn(shape, generator=torch.Generator().manual_seed(size["seed"]))
    split = layout.split_groups(c, group_size, finer)[: layout.cdiv(in_features, finer)]
    weights = reference.dequantize(B, c, group_size, in_features)
    assert torch.equal(reference.dequantize(B, split, finer, in_features), weights)


def test_splitting_into_a_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="group size 64 can't be split into 48s"):
        layout.split_groups(torch.zeros(1, 3, 4), 64, 48)


@pytest.mark.parametrize(
    ("k", "group", "words", "n"), [(1, 32, 3, 64), (3, 64, 5, 32), (2, 128, 6, 96), (4, 256, 9, 64)]
)
@pytest.mark.parametrize("bytes_together", [False, True])
@pytest.mark.parametrize("trellis", [False, True])
def test_cpu_tiles_hold_words_and_coefficients_as_drawn(
    k: int, group: int, words: int, n: int, bytes_together: bool, trellis: bool
):
    """The last group is short; of a trellis bits are those of even inputs, then those of odd ones."""
    B = torch.arange(words * k * n, dtype=torch.int32).view(words, k, n)
    groups = -(-32 * words // group)
    rows = k + 1 + trellis
    c = torch.arange(groups * rows * n, dtype=torch.float32).view(groups, rows, n)
    s = torch.arange(rows * n).view(rows, n).bfloat16()
    planes = torch.empty_like(B)
    coefficients, scales = layout.to_cpu_tiles(B, c, group, planes, s, bytes_together)
    in_order = layout.unpack(B, 32 * words)[..., chain_order(32 * words)]
    lying = layout.pack(in_order) if trellis else B
    expected_planes, expected_coefficients = [], []
    for g in range(groups):
        for tile in range(0, n, 32):
            for word in range(g * group // 32, min((g + 1) * group // 32, words)):
                expected_planes += [lying[word, p, tile : tile + 32] for p in range(k)]
            expected_coefficients += [c[g, p, tile : tile + 32] for p in range(rows)]
    expected_scales = [s[p, tile : tile + 32].float() for tile in range(0, n, 32) for p in range(rows)]
    words_of_tiles = torch.stack(expected_planes)
    if bytes_together:
        expected = torch.empty(len(words_of_tiles), 4, 32, dtype=torch.uint8)
        for output in range(32):
            place = 16 * (output // 4 % 2) + 4 * (output // 8) + output % 4
            expected[:, :, place] = words_of_tiles[:, output : output + 1].view(torch.uint8)
        words_of_tiles = expected.flatten().view(torch.int32)
    assert torch.equal(planes.flatten(), words_of_tiles.flatten())
    assert torch.equal(coefficients.flatten(), torch.cat(expected_coefficients))
    assert torch.equal(scales.flatten(), torch.cat(expected_scales))
    outputs = torch.tensor([n - 1, 0, 33 % n])
    found = layout.rows_of_cpu_tiles(planes, coefficients, scales, group, outputs, bytes_together)
    expected = layout.Stored(B, c, s.float()).outputs(outputs)
    assert all(torch.equal(tensor, other) for tensor, other in zip(found, expected, strict=True))


scales = st.fixed_dictionaries(
    {"group": st.sampled_from(layout.GROUP_SIZES), "powers_of_two": st.booleans(), "trellis": st.booleans()}
)


@given(sizes, scales, st.sampled_from([torch.float16, torch.bfloat16]))
@settings(deadline=None, max_examples=60)
def test_tiles_of_8_bit_coefficients_hold_the_numbers_of_the_oracle(
    size: dict[str, int], scale: dict, dtype: torch.dtype
):
    """Exactly, where an output's scales are powers of two apart, else to the rounding of their ratios."""
    k, n, in_features, seed = (size[name] for name in ("k", "n", "in_features", "seed"))
    generator = torch.Generator().manual_seed(seed)
    multiplied = k + scale["trellis"]
    shape = layout.coefficient_shape(in_features, n, multiplied, scale["group"])
    c = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
    s = torch.randn(multiplied + 1, n, generator=generator)
    if scale["powers_of_two"]:
        s = s[:1].bfloat16() * 2.0 ** -torch.randint(0, 8, (multiplied + 1, n), generator=generator)
    s[:, seed % n] = 0
    s = s.bfloat16()
    tiles = layout.to_tiles(layout.pack(random_bits(**size)), c, scale["group"], dtype, s)
    assert (tiles.dtype, tiles.stored, tiles.multiplied) == (dtype, k, multiplied)
    assert tiles.ratios.abs().max() <= 1
    stored = tiles.coefficients.float() * tiles.ratios.float().unsqueeze(1)  # [T, Gn, 8, k+1, 2]
    stored = stored.permute(1, 3, 0, 4, 2).flatten(2)
    assert not stored[..., n:].any()
    assert not stored[shape[0] :].any()
    expected = layout.coefficients(c, s)
    error = (stored[: shape[0], :, :n] * tiles.scales - expected).abs()
    if scale["powers_of_two"]:
        assert not error.any()
    rounding = (torch.finfo(dtype).eps / 2 + 1e-6) * expected.abs() + 2.0**-25 * 128 * tiles.scales
    assert (error <= rounding).all()


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
def test_triton_counts_words_and_coefficients_as_the_tiles_have_them(planes: int):
    shapes = layout.plane_shape(256, 64, planes), layout.coefficient_shape(256, 64, planes, 64)
    tiles = layout.to_tiles(torch.zeros(shapes[0], dtype=torch.int32), torch.zeros(shapes[1]), 64, torch.float16)
    _, unit, several, lane, plane, _ = tiles.planes.stride()
    assert triton_layout.unit_words(planes) == unit
    assert triton_layout.lane_words(planes) == lane
    beside = triton_layout.planes_beside(planes)
    starts = [p // beside * several + p % beside * plane for p in range(planes)]
    assert [triton_layout.plane_start(p, planes) for p in range(planes)] == starts
    pairs = [triton_layout.group_pairs(planes), triton_layout.row_pairs(planes)]
    assert [2 * count for count in pairs] == list(tiles.coefficients.stride()[1:3])
    tiles = layout.to_tiles(
        torch.zeros(shapes[0], dtype=torch.int32),
        torch.zeros(shapes[1], dtype=torch.int8),
        64,
        torch.float16,
        torch.zeros(planes + 1, 64),
    )
    assert [2 * count for count in pairs] == list(tiles.coefficients.stride()[1:3]) == list(tiles.ratios.stride()[:2])


@pytest.mark.parametrize("group", layout.GROUP_SIZES)
@pytest.mark.parametrize("trellis", [False, True])
def test_triton_takes_a_bit_for_the_input_that_the_tiles_have_there(group: int, trellis: bool):
    beside = triton_layout.words_beside(group, trellis)
    for number in range(layout.UNIT):
        bits = torch.zeros(1, 1, layout.UNIT, dtype=torch.int32)
        bits[0, 0, number] = 1
        c = torch.ones(layout.coefficient_shape(layout.UNIT, 1, 1, group, trellis))
        q, word = next(
            (q, w)
            for q, w in enumerate(
                layout.to_tiles(layout.pack(bits), c, group, torch.float16).planes[0, 0, 0, :4, 0, 0].tolist()
            )
            if w
        )
        bit = (word & 0xFFFFFFFF).bit_length() - 1
        first = triton_layout.input_of_bit.fn(bit, beside)
        assert triton_layout.input_of_word.fn(first, q, beside) == number
        run, place = first // (8 * beside), first % 8
        assert triton_layout.bit_of_input.fn(run, place) == bit
        turned = 1 << (bit + triton_layout.turn(run)) % 32
        assert triton_layout.pair_mask(place // 2) & turned
        assert (turned >= 1 << 16) == place % 2
