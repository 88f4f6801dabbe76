"""The plain Triton kernel: executed by Triton's interpreter, compiled offline for GPUs, and run for real (-m gpu)."""

import re
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import bpdq_kernels
from bpdq_kernels import layout, reference
from bpdq_kernels.triton_linear import TILES_16BIT, TILES_FP32, Tile, linear_kernel, stored_linear, tile_for
from tests.offline import BF16, FP16, FP32, compile_stored


class Case(NamedTuple):
    """One layer and one batch; the fields print as the test's name."""

    planes: int
    group: int
    M: int
    N: int
    K: int
    dtype: torch.dtype
    c_dtype: torch.dtype  # int8: with scales
    bias: bool
    trellis: bool = False

    def __str__(self) -> str:
        dtypes = f"{self.dtype}-c_{self.c_dtype}".replace("torch.", "")
        name = f"k{self.planes}-G{self.group}-M{self.M}-N{self.N}-K{self.K}-{dtypes}"
        return f"{name}{'-bias' if self.bias else ''}{'-trellis' if self.trellis else ''}"


CASES = [
    Case(1, 32, 1, 65, 96, FP16, FP16, False),
    Case(1, 256, 17, 64, 352, BF16, BF16, True),
    Case(1, 128, 70, 33, 200, FP32, FP16, True),
    Case(2, 64, 3, 127, 352, FP16, BF16, True),
    Case(2, 128, 1, 130, 512, BF16, BF16, False),
    Case(2, 128, 8, 63, 200, FP16, FP16, True),
    Case(2, 32, 17, 7, 100, BF16, FP16, True),
    Case(2, 256, 70, 65, 640, FP16, FP16, False),
    Case(2, 64, 3, 33, 33, FP32, BF16, False),
    Case(3, 64, 8, 65, 96, BF16, BF16, True),
    Case(3, 256, 1, 1, 31, FP16, FP32, True),
    Case(3, 128, 17, 129, 352, FP32, FP32, True),
    Case(4, 32, 8, 65, 352, FP16, BF16, False),
    Case(4, 256, 3, 95, 200, BF16, FP16, False),
    Case(4, 128, 70, 17, 384, BF16, BF16, True),
    Case(4, 64, 33, 66, 352, FP16, FP16, True),
    Case(2, 64, 2, 65, 200, BF16, torch.int8, True),
    Case(3, 128, 17, 70, 352, FP16, torch.int8, False),
    Case(1, 32, 9, 33, 100, FP32, torch.int8, True),
    Case(4, 256, 65, 40, 300, FP16, torch.int8, True),
    Case(1, 32, 1, 65, 96, FP16, FP16, True, trellis=True),
    Case(2, 128, 8, 63, 352, BF16, BF16, False, trellis=True),
    Case(3, 64, 17, 70, 160, FP32, torch.int8, True, trellis=True),
    Case(2, 256, 70, 33, 288, FP16, torch.int8, False, trellis=True),
]


def scales(case: Case, device: str) -> torch.Tensor | None:
    """s of coefficients in 8 bits: few powers of two, so that sums of them are exact in bf16."""
    if case.c_dtype != torch.int8:
        return None
    exponents = torch.randint(
        4, 6, (case.planes + case.trellis + 1, case.N), generator=torch.Generator().manual_seed(2)
    )
    return (2.0**-exponents).to(device, BF16)


def random_layer(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """B of any bit pattern, past K too, c and bias. Coefficients are sixteenths, so that every weight is exact in
    bf16: the interpreter truncates fp32 to bf16 where a GPU rounds."""
    generator = torch.Generator().manual_seed(0)
    shape = layout.plane_shape(case.K, case.N, case.planes)
    B = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    shape = layout.coefficient_shape(case.K, case.N, case.planes, case.group, case.trellis)
    if case.dtype == BF16 and device == "cpu":
        c = torch.randint(-16, 17, shape, generator=generator) / 16
    else:
        c = torch.randn(shape, generator=generator)
    if case.c_dtype == torch.int8:
        c = torch.randint(-16, 17, shape, generator=generator)
    bias = torch.randn(case.N, generator=generator).to(device, case.dtype) if case.bias else None
    return B.to(device), c.to(device, case.c_dtype), bias


def compare(case: Case, device: str) -> None:
    """Assert that the kernel's outputs are those of the oracle's weights, within fp32 accumulation and one rounding."""
    B, c, bias = random_layer(case, device)
    x = torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(1)).to(device, case.dtype)
    s = scales(case, device)
    y = stored_linear(x, B, c, case.group, bias, s)
    W = reference.dequantize_t(B, c, case.group, case.K, case.dtype, s).double()
    expected = x.double() @ W + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ W.abs() + (0 if bias is None else bias.double().abs())
    error = (y.double() - expected).abs()
    rounding = 0 if case.dtype == FP32 else torch.finfo(case.dtype).eps
    assert y.shape == expected.shape
    assert y.dtype == case.dtype
    assert (error <= rounding * expected.abs() + 2e-6 * magnitude).all(), f"{case}: off by {error.max()}"


def one_hot_inputs_give_the_weights(dtype: torch.dtype, device: str) -> None:
    case = Case(planes=3, group=64, M=200, N=70, K=200, dtype=dtype, c_dtype=FP16, bias=False)
    B, c, _ = random_layer(case, device)
    y = stored_linear(torch.eye(case.K, dtype=dtype, device=device), B, c, case.group, None)
    torch.testing.assert_close(y, reference.dequantize_t(B, c, case.group, case.K, dtype), rtol=0, atol=0)


def any_view_of_x_gives_the_same_rows(device: str) -> None:
    case = Case(planes=2, group=64, M=6, N=65, K=96, dtype=FP16, c_dtype=FP16, bias=True)
    B, c, bias = random_layer(case, device)
    x = torch.randn(case.M, case.K, generator=torch.Generator().manual_seed(1)).to(device, FP16)
    y = stored_linear(x, B, c, case.group, bias)
    wide = torch.full((case.M, 3 * case.K), float("nan"), dtype=FP16, device=device)
    wide[:, case.K : 2 * case.K] = x
    views = {
        "rows of a wider tensor": wide[:, case.K : 2 * case.K],
        "transposed": x.T.contiguous().T,
        "every second input": x.repeat_interleave(2, dim=1)[:, ::2],
        "leading dimensions": x.view(2, 3, case.K),
        "leading dimensions swapped": x.view(2, 3, case.K).transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, view in views.items():
        assert torch.equal(stored_linear(view, B, c, case.group, bias).reshape(case.M, case.N), y), name
    assert torch.equal(stored_linear(x[4], B, c, case.group, bias), y[4])
    assert stored_linear(x[:0], B, c, case.group, bias).shape == (0, case.N)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_agrees_with_the_oracle(case: Case, interpreter: ProcessPoolExecutor):
    interpreter.submit(compare, case, "cpu").result()


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_interpreted_kernel_multiplies_the_oracles_weights_bit_for_bit(
    dtype: torch.dtype, interpreter: ProcessPoolExecutor
):
    interpreter.submit(one_hot_inputs_give_the_weights, dtype, "cpu").result()


def test_interpreted_kernel_takes_strided_batched_and_empty_inputs(interpreter: ProcessPoolExecutor):
    interpreter.submit(any_view_of_x_gives_the_same_rows, "cpu").result()


def test_sliced_weights_are_refused_instead_of_read_wrongly():
    B, c, _ = random_layer(Case(2, 64, 1, 64, 64, FP16, FP16, False), "cpu")
    with pytest.raises(ValueError, match=r"contiguous: build them with bpdq_kernels\.prepare"):
        stored_linear(torch.zeros(1, 64, dtype=FP16), B[:, :, :32], c[:, :, :32], 64, None)
    s = torch.ones(3, 128)[:, :64]
    with pytest.raises(ValueError, match=r"contiguous: build them with bpdq_kernels\.prepare"):
        stored_linear(torch.zeros(1, 64, dtype=FP16), B, c.to(torch.int8), 64, None, s)


def test_every_token_count_gets_the_smallest_tile_that_holds_it():
    for dtype, tiles in ((FP16, TILES_16BIT), (BF16, TILES_16BIT), (FP32, TILES_FP32)):
        assert [tile_for(tile.m, dtype) for tile in tiles] == list(tiles)
        assert tile_for(1, dtype) == tiles[0]
        assert tile_for(100_000, dtype) == tiles[-1]
    assert [tile_for(M, FP16).m for M in (8, 9, 16, 17, 33, 65)] == [8, 16, 16, 32, 64, 64]


def spills(sass: str) -> list[str]:
    return re.findall(r"\b(?:STL|LDL)\S*", sass)


@pytest.mark.parametrize(
    ("tile", "planes", "group"),
    [(tile, *layer) for tile in TILES_16BIT for layer in ((2, 128), (4, 256))]
    + [(TILES_16BIT[0], 1, 32), (TILES_16BIT[-1], 3, 64)],
)
@pytest.mark.parametrize("trellis", [False, True])
def test_kernel_for_rtx_3090_uses_tensor_cores_and_spills_no_register(
    tile: Tile, planes: int, group: int, trellis: bool
):
    dtype = FP16 if planes % 2 else BF16
    kernel = compile_stored(86, tile, dtype, min(planes, 3) if trellis else planes, group, trellis=trellis)
    sass = kernel.asm["sass"]
    assert f"HMMA.16816.F32{'.BF16' if dtype == BF16 else ' '}" in sass, "no tensor cores, or 16-bit accumulation"
    assert not spills(sass)
    assert kernel.metadata.shared <= 99 * 1024, "more shared memory than a block may have on sm_86"


@pytest.mark.parametrize("tile", [TILES_16BIT[0], TILES_16BIT[-1]], ids=lambda tile: f"M{tile.m}")
def test_kernel_for_sizes_that_16_does_not_divide_uses_tensor_cores(tile: Tile):
    assert "HMMA.16816.F32.BF16" in compile_stored(86, tile, BF16, 2, 128, aligned=False).asm["sass"]


@pytest.mark.parametrize("tile", TILES_FP32, ids=lambda tile: f"M{tile.m}")
def test_kernel_for_fp32_activations_multiplies_in_fp32(tile: Tile):
    sass = compile_stored(86, tile, FP32, 4, 128).asm["sass"]
    assert "FFMA" in sass
    assert "HMMA" not in sass, "TF32 or 16-bit products"
    assert not spills(sass)


def test_bf16_weights_are_rounded_to_nearest_on_a_gpu():
    ptx = compile_stored(86, TILES_16BIT[0], BF16, 2, 128).asm["ptx"]
    assert set(re.findall(r"cvt\S*\.bf16(?:x2)?\.f32", ptx)) <= {"cvt.rn.bf16x2.f32", "cvt.rn.bf16.f32"}
    assert "cvt.rn.bf16x2.f32" in ptx


def test_decode_stays_within_the_instruction_budget_of_the_module_docstring():
    tile = TILES_16BIT[0]
    sass = compile_stored(86, tile, FP16, 2, 128).asm["sass"]
    loop = re.search(r"(?P<label>LBB\d+):\n(?P<body>(?:.*\n)*?.*BRA (?P=label);)", sass)["body"]
    instructions = len(loop.splitlines())
    assert instructions * 32 * tile.warps / (tile.n * tile.k) < 6.6


def test_one_compilation_serves_every_token_count_of_a_tile():
    backend = make_backend(GPUTarget("cuda", 86, 32))
    bind = create_function_from_signature(linear_kernel.signature, linear_kernel.params, backend)
    tensors = [torch.zeros(1, dtype=dtype) for dtype in (BF16, torch.int32, BF16, BF16, BF16)]
    constants = {"PLANES": 2, "STORED": 2, "GROUP": 128, "INTERPRETED": False}
    constants |= {"TILE_M": 8, "TILE_N": 64, "TILE_K": 128}
    tensors.insert(3, None)
    keys = {str(bind(*tensors, M, 4096, 4096, 4096, **constants)[1]) for M in (1, 2, 7, 8, 16, 64, 4097)}
    assert len(keys) == 1
    assert {str(bind(*tensors, 8, N, 4096, 4096, **constants)[1]) for N in (4096, 8192, 151936)} == keys


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_on_a_gpu_agrees_with_the_oracle(case: Case):
    compare(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_kernel_on_a_gpu_multiplies_the_oracles_weights_bit_for_bit(dtype: torch.dtype):
    one_hot_inputs_give_the_weights(dtype, "cuda")


@pytest.mark.gpu
def test_kernel_on_a_gpu_takes_strided_batched_and_empty_inputs():
    any_view_of_x_gives_the_same_rows("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 8, 70])
def test_kernel_replays_from_a_cuda_graph_with_new_inputs(M: int):
    case = Case(planes=2, group=128, M=M, N=512, K=1024, dtype=BF16, c_dtype=BF16, bias=True)
    B, c, bias = random_layer(case, "cuda")
    x = torch.zeros(M, case.K, dtype=BF16, device="cuda")
    bpdq_kernels.stored_linear(x, B, c, case.group, bias)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bpdq_kernels.stored_linear(x, B, c, case.group, bias)
    x.normal_()
    graph.replay()
    assert torch.equal(y, bpdq_kernels.stored_linear(x, B, c, case.group, bias))


@pytest.mark.gpu
def test_offsets_past_two_billion_elements_are_right():
    case = Case(planes=2, group=128, M=2**31 // 1024 + 8, N=64, K=1024, dtype=FP16, c_dtype=FP16, bias=False)
    B, c, _ = random_layer(case, "cuda")
    x = torch.zeros(case.M, case.K, dtype=FP16, device="cuda")
    x[-8:] = torch.randn(8, case.K, device="cuda")
    y = stored_linear(x, B, c, case.group, None)
    torch.testing.assert_close(y[-8:], stored_linear(x[-8:], B, c, case.group, None), rtol=2e-3, atol=1e-3)
    assert not y[:-8].any()
