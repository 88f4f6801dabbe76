"""How fast this GPU's tensor cores really are at the two instructions that the kernels live on.

`mma_bits` (binary, m16n8k128) decides whether one token is best multiplied bit-plane by bit-plane; `mma` (m16n8k16,
fp32 sums) bounds everything above it. Neither rate is in a data sheet of every architecture, so both are measured: one
block per multiprocessor, chains of instructions that depend on their predecessor only, and the multiprocessor's own
clock around them.

    python -m benchmarks.mma_rates --json rates.json
"""

import sys

import torch
import triton
import triton.language as tl

from benchmarks.gpu_part import Parser, finish, new_report, save
from benchmarks.sass import MACHINES
from bpdq_kernels.tiled_linear import machine
from bpdq_kernels.warp import mma

CHAINS = 8
WARPS = 16
TRIPS = 2048


@triton.jit
def clock(after: tl.tensor) -> tl.tensor:
    """The multiprocessor's clock, read once `after` is known."""
    return tl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r,r", [after], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def add_common_bits(a: tl.tensor, b: tl.tensor, c: tl.tuple) -> tl.tuple:
    """c + popcount(A & B), as `mma_bits` without a sum has it: its instruction with the sum's registers in place."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {$0, $1, $2, $3}, {$4, $4}, {$5}, {$6, $7, $8, $9};",
        "=r,=r,=r,=r,r,r,r,r,r,r",
        [a, b, c[0], c[1], c[2], c[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def rate_kernel(clocks_ptr: tl.tensor, sums_ptr: tl.tensor, TRIPS: tl.constexpr, BINARY: tl.constexpr) -> None:
    thread = tl.arange(0, 512)
    start = clock(thread)
    a = start & 0x3FFF3FFF
    b = thread * 0x00010001
    zero = thread - thread if BINARY else tl.zeros([512], tl.float32)
    sums = (zero,) * 32
    for _ in range(TRIPS):
        added = ()
        for i in tl.static_range(8):
            c = sums[4 * i : 4 * i + 4]
            added = added + (
                add_common_bits(a + i, b, c) if BINARY else mma(a + i, b, a, b, b, a, c[0], c[1], c[2], c[3], True)
            )
        sums = added
    total = sums[0]
    for i in tl.static_range(31):
        total += sums[i + 1]
    end = clock(total.to(tl.int32, bitcast=True))
    tl.store(clocks_ptr + tl.program_id(0) * 512 + thread, end - start)
    tl.store(sums_ptr + tl.program_id(0) * 512 + thread, total)


def mma_rate(binary: bool, device: str = "cuda") -> float:
    """Instructions per clock and multiprocessor of `mma_bits` (binary) or `mma` with bf16 operands."""
    blocks = torch.cuda.get_device_properties(device).multi_processor_count
    clocks = torch.empty(blocks, 32 * WARPS, dtype=torch.int32, device=device)
    sums = torch.empty_like(clocks, dtype=torch.int32 if binary else torch.float32)
    for _ in range(3):
        rate_kernel[(blocks,)](clocks, sums, TRIPS=TRIPS, BINARY=binary, num_warps=WARPS)
    return WARPS * CHAINS * TRIPS / clocks.amax(1).float().median().item()


def main(argv: list[str] | None = None) -> int:
    """Measure both rates beside what the static model assumes; returns the exit status."""
    args = Parser("mma_rates", __doc__).parse_args(argv)
    report = new_report(args)
    arch = machine(torch.device("cuda"))[1]
    assumed = MACHINES[f"sm_{arch}"].rates if f"sm_{arch}" in MACHINES else {}
    for name, binary, pipe in (("bf16", False, "hmma32"), ("binary", True, "bmma")):
        if binary and arch >= 100:
            continue  # not an instruction there
        rate = mma_rate(binary)
        report[name] = {"per_clock_and_multiprocessor": rate, "assumed": assumed.get(pipe)}
        print(f"{name}: {rate:.3f} instructions per clock and multiprocessor, assumed {assumed.get(pipe)}")
        if not rate > 0:
            report["failures"].append(f"{name}: no rate")
        save(report, args.json)
    return finish(report, args.json)


if __name__ == "__main__":
    sys.exit(main())
