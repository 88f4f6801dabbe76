"""The PTX emulator on what Triton compiles for sm_86, against torch: the plain linear kernel, and kernels that test the
emulator alone, most of them behind -m slow."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from bpdq_kernels import reference
from test_triton_linear import BF16, FP16, TILES_16BIT, Case, random_layer
from tests.offline import compile_stored
from tests.ptx import Report, launch

TRITON_TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}


@functools.cache
def compiled(
    function: triton.JITFunction, types: tuple[str, ...], constants: tuple[Any, ...], warps: int, aligned: bool
) -> CompiledKernel:
    """For sm_86; constants: the last arguments. aligned: 16 divides all pointers and integers."""
    names = function.arg_names
    values = dict(zip(names[len(types) :], constants, strict=True))
    source = ASTSource(
        function,
        signature={**dict(zip(names, types, strict=False)), **dict.fromkeys(values, "constexpr")},
        constexprs=values,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(len(types)) if aligned},
    )
    target = GPUTarget("cuda", 86, 32)
    options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def run(
    function: triton.JITFunction,
    grid: tuple[int, ...],
    args: list,
    constants: tuple = (),
    warps: int = 4,
    aligned: bool = False,
) -> Report:
    types = tuple(TRITON_TYPES[arg.dtype] if isinstance(arg, torch.Tensor) else "i32" for arg in args)
    kernel = compiled(function, types, constants, warps, aligned)
    return launch(kernel.asm["ptx"], grid, 32 * warps, args, kernel.metadata.shared)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize(("n", "aligned"), [(1000, False), (1008, True)])
def test_masked_add(n: int, aligned: bool):
    x, y, out = normal(n, dtype=BF16), normal(n, dtype=BF16, seed=1), torch.zeros(n, dtype=BF16)
    report = run(add_kernel, (2,), [x, y, out, n], (512,), aligned=aligned)
    assert torch.equal(out, x + y)
    assert any(".v2" in op for op in report.instructions) == aligned


@triton.jit
def softmax_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * n
    values = tl.load(x + row + i, mask=i < n, other=-float("inf")).to(tl.float32)
    values = tl.exp(values - tl.max(values, 0))
    tl.store(out + row + i, (values / tl.sum(values, 0)).to(out.dtype.element_ty), mask=i < n)


@pytest.mark.slow
def test_softmax_across_warps():
    x, out = normal(3, 777, dtype=FP16), torch.zeros(3, 777, dtype=FP16)
    report = run(softmax_kernel, (3,), [x, out, 777], (1024,))
    torch.testing.assert_close(out, x.float().softmax(1).half())
    assert report.instructions["bar.sync"] >= 3 * 4


@triton.jit
def matmul_kernel(a, b, c, M, N, K, TILE: tl.constexpr, ACC: tl.constexpr):
    m, n = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    k = tl.arange(0, TILE)
    acc = tl.zeros((TILE, TILE), ACC)
    for start in range(0, K, TILE):
        live = start + k < K
        x = tl.load(a + m[:, None] * K + (start + k)[None, :], mask=(m < M)[:, None] & live[None, :], other=0)
        y = tl.load(b + (start + k)[:, None] * N + n[None, :], mask=(n < N)[None, :] & live[:, None], other=0)
        acc = tl.dot(x, y, acc, out_dtype=ACC)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "acc", "tolerance"),
    [(FP16, tl.float32, 1e-3), (BF16, tl.float32, 8e-3), (FP16, tl.float16, 1e-2), (torch.float32, tl.float32, 5e-3)],
    ids=["f16", "bf16", "f16-accumulated", "tf32"],
)
def test_pipelined_dot(dtype: torch.dtype, acc: tl.dtype, tolerance: float):
    M, N, K = 40, 48, 112
    a, b, c = normal(M, K, dtype=dtype), normal(K, N, dtype=dtype, seed=1), torch.zeros(M, N, dtype=dtype)
    report = run(matmul_kernel, (2, 2), [a, b, c, M, N, K], (32, acc), aligned=True)
    expected = a.double() @ b.double()
    magnitude = a.double().abs() @ b.double().abs()
    assert ((c.double() - expected).abs() <= tolerance * magnitude / 4).all()
    for op in ("cp.async.cg.shared.global", "cp.async.wait_group", "ldmatrix", "mma.sync"):
        assert any(executed.startswith(op) for executed in report.instructions), op


@pytest.mark.slow
def test_pipelined_dot_reads_no_async_copy_early_because_it_waits():
    """The detector sees what a kernel does wrong whose waits are removed."""
    M = N = K = 64
    a, b, c = normal(M, K, dtype=FP16), normal(K, N, dtype=FP16), torch.zeros(M, N, dtype=FP16)
    kernel = compiled(matmul_kernel, ("*fp16",) * 3 + ("i32",) * 3, (32, tl.float32), 4, True)
    args = ((2, 2), 128, [a, b, c, M, N, K], kernel.metadata.shared)
    ptx = kernel.asm["ptx"]
    assert not launch(ptx, *args, strict=False).races
    assert launch(ptx.replace("cp.async.wait_group", "cp.async.wait_group 9; //"), *args, strict=False).races
    assert launch(ptx.replace("bar.sync", "//"), *args, strict=False).races


@triton.jit
def scatter_add_kernel(x, index, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    tl.atomic_add(out + tl.load(index + i, mask=live, other=0), tl.load(x + i, mask=live, other=0), mask=live)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, FP16, torch.int32], ids=str)
def test_atomic_add(dtype: torch.dtype):
    x = torch.randint(-8, 9, (300,), generator=torch.Generator().manual_seed(0)).to(dtype)  # exact in any order
    index = torch.randint(0, 16, (300,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    out = torch.zeros(16, dtype=dtype)
    run(scatter_add_kernel, (2,), [x, index, out, 300], (256,))
    assert torch.equal(out, torch.zeros(16, dtype=dtype).index_add(0, index, x))


@triton.jit
def collatz_kernel(x, out):
    value = tl.load(x + tl.program_id(0))
    steps = 0
    while value != 1:
        value = value // 2 if value % 2 == 0 else 3 * value + 1
        steps += 1
    tl.store(out + tl.program_id(0), steps)


@pytest.mark.slow
def test_loop_that_depends_on_data():
    x, out = torch.tensor([1, 2, 27, 7], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    run(collatz_kernel, (4,), [x, out], warps=1)
    assert out.tolist() == [0, 1, 111, 16]


@triton.jit
def bit_product_kernel(a, b, out):
    lane = tl.arange(0, 32)
    c0, c1, c2, c3 = tl.inline_asm_elementwise(
        """{
        .reg .b32 zero;
        mov.b32 zero, 0;
        mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {$0, $1, $2, $3}, {$4, $5}, {$6},
            {zero, zero, zero, zero};
        }""",
        "=r,=r,=r,=r,r,r,r",
        [tl.load(a + lane), tl.load(a + 32 + lane), tl.load(b + lane)],
        dtype=(tl.int32,) * 4,
        is_pure=True,
        pack=1,
    )
    tl.store(out + lane, c0)
    tl.store(out + 32 + lane, c1)
    tl.store(out + 64 + lane, c2)
    tl.store(out + 96 + lane, c3)


def test_single_bit_mma_in_inline_assembly():
    words = [
        torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32, generator=torch.Generator().manual_seed(n))
        for n in (64, 32)
    ]
    out = torch.zeros(128, dtype=torch.int32)
    run(bit_product_kernel, (1,), [*words, out], warps=1)
    a, b = (
        words[0].numpy().view("u4").reshape(16, 4),
        words[1].numpy().view("u4").reshape(8, 4),
    )  # [row or column, word]
    expected = np.bitwise_count(a[:, None] & b[None]).sum(-1)
    got = out.numpy().reshape(2, 2, 8, 4)  # row half, column parity, row, column pair
    np.testing.assert_array_equal(got.transpose(0, 2, 3, 1).reshape(16, 8), expected)


@pytest.mark.parametrize(
    "case",
    [Case(2, 128, 3, 65, 200, FP16, BF16, True), Case(2, 128, 3, 97, 352, BF16, BF16, True, trellis=True)],
    ids=str,
)
def test_linear_kernel_agrees_with_the_oracle(case: Case):
    tile = TILES_16BIT[0]
    kernel = compile_stored(86, tile, case.dtype, case.planes, case.group, aligned=False, trellis=case.trellis)
    B, c, bias = random_layer(case, "cpu")
    x = normal(case.M, case.K, dtype=case.dtype)
    y = torch.zeros(case.M, case.N, dtype=case.dtype)
    grid = (triton.cdiv(case.M, tile.m), triton.cdiv(case.N, tile.n))
    args = [x, B, c, bias, y, case.M, case.N, case.K, case.K]
    report = launch(kernel.asm["ptx"], grid, 32 * tile.warps, args, kernel.metadata.shared)
    W = reference.dequantize_t(B, c, case.group, case.K, case.dtype).double()
    expected = x.double() @ W + bias.double()
    magnitude = x.double().abs() @ W.abs() + bias.double().abs()
    error = (y.double() - expected).abs()
    assert grid == (1, 2)
    assert (error <= torch.finfo(case.dtype).eps * expected.abs() + 2e-6 * magnitude).all(), f"off by {error.max()}"
    assert sum(count for op, count in report.instructions.items() if op.startswith("mma.sync")) > 0
