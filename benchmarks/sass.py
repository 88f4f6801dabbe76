"""What a kernel's machine code (SASS) says about its speed: a static model that needs no GPU.

A loop's instructions are counted per execution pipe; a pipe that starts r warp instructions per clock and
multiprocessor (SM) needs count / r clocks. The busiest pipe, or DRAM, bounds the time. Latencies, caches and bank
conflicts are not modelled: a kernel can't be faster than this says, and may be slower.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import triton


class Machine(NamedTuple):
    """A GPU: `gbps` of DRAM in 1e9 bytes/s, per-SM limits, and warp instructions per clock and SM of each pipe."""

    name: str
    arch: str
    multiprocessors: int
    ghz: float
    gbps: float
    max_warps: int
    max_ctas: int
    shared_bytes: int
    rates: dict[str, float]

    @property
    def capability(self) -> int:
        """86 for sm_86."""
        return int(self.arch.removeprefix("sm_"))

    @property
    def bytes_per_clock(self) -> float:
        """An SM's share of DRAM bandwidth, bytes per clock."""
        return self.gbps / (self.multiprocessors * self.ghz)


# Warp instructions per clock and SM. CUDA C++ Programming Guide, "Arithmetic Instructions" (results per clock / 32),
# compute capability 8.6. `alu`: logic, shifts, byte permutes, integer adds. `fmah`: IMAD and half2 arithmetic, which
# share a pipe. `redux`: warp reductions. `hmma32`, `hmma16`: m16n8k16 with fp32, fp16 accumulation, from GA102's
# 71 and 142 dense TFLOP/s (NVIDIA Ampere GA102 whitepaper). `bmma`: m16n8k128 of bits, an assumption: four times the
# INT4 rate of the whitepaper, as on A100, is 8192 bit products, so m16n8k256 at 1/4 and m16n8k128 at 1/2.
RATES_86 = {
    "issue": 4.0,
    "fp32": 4.0,
    "alu": 2.0,
    "fmah": 2.0,
    "conv": 2.0,
    "shfl": 1.0,
    "redux": 0.5,
    "mufu": 0.5,
    "lds": 1.0,
    "ldg": 0.5,
    "hmma32": 1 / 8,
    "hmma16": 1 / 4,
    "bmma": 1 / 2,
}
# A100 whitepaper: 312 TFLOP/s either way, 4992 binary TOP/s.
RATES_80 = RATES_86 | {"fp32": 2.0, "hmma32": 1 / 2, "hmma16": 1 / 2, "bmma": 1.0}
# hmma32 (bf16) and bmma measured: `python -m benchmarks.mma_rates` on an H100 80GB HBM3, torch 2.11, Triton 3.6;
# hmma16 is A100's.
RATES_90 = RATES_80 | {"fp32": 4.0, "hmma32": 0.5626, "bmma": 0.988}
# NVIDIA RTX Blackwell whitepaper: GB202 has the fp16 tensor rates of GA102 and AD102 per SM and clock (209.5 dense
# TFLOP/s with fp32 accumulation); the other pipes are taken from there too. No kernel for it has a BMMA.
RATES_120 = RATES_86

_MACHINES = (
    Machine("RTX 3090", "sm_86", 82, 1.695, 936.2, 48, 16, 100 << 10, RATES_86),
    Machine("A100 40 GB", "sm_80", 108, 1.41, 1555.0, 64, 32, 164 << 10, RATES_80),
    Machine("RTX 4090", "sm_89", 128, 2.52, 1008.0, 48, 24, 100 << 10, RATES_86),
    Machine("H100 SXM", "sm_90", 132, 1.83, 3352.0, 64, 32, 228 << 10, RATES_90),
    Machine("RTX 5090", "sm_120", 170, 2.407, 1792.0, 48, 24, 100 << 10, RATES_120),
)
MACHINES = {machine.arch: machine for machine in _MACHINES}

_PIPES = {
    "fp32": "FFMA FADD FMUL FSEL FSETP FMNMX",
    "fmah": "HFMA2 HADD2 HMUL2 HSETP2 HSET2 HMNMX2 IMAD IMUL IDP",
    "conv": "I2F F2I F2F I2I",
    "shfl": "SHFL",
    "redux": "REDUX",
    "mufu": "MUFU",
    "lds": "LDS STS LDSM ATOMS",
    "ldg": "LDG STG LDGSTS LD ST RED ATOMG",
    "bmma": "BMMA",
    "issue": "BRA BAR NOP EXIT DEPBAR LDGDEPBAR WARPSYNC BSSY BSYNC CALL S2R CS2R YIELD ERRBAR MEMBAR",
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
# what makes weights of bits and coefficients; integer additions and multiplications make addresses
_DEQUANTIZATION = {"LOP3", "SHF", "PRMT", "HFMA2", "HADD2", "HMUL2", "F2FP"}


class Instruction(NamedTuple):
    address: int
    opcode: str
    operands: str


_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)


def parse(listing: str) -> list[Instruction]:
    """The instructions in a listing of `cuobjdump -sass`."""
    return [Instruction(int(m["address"], 16), m["opcode"], m["operands"]) for m in _INSTRUCTION.finditer(listing)]


def loops(instructions: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last address of every loop (a branch backwards and its target), in address order."""
    found = []
    for address, opcode, operands in instructions:
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode.split(".")[0] == "BRA" else None
        if target and int(target[1], 16) < address:
            found.append((int(target[1], 16), address))
    return sorted(found)


def main_loop(instructions: Sequence[Instruction]) -> int | None:
    """Index in `loops` of the longest one, None if there is no loop."""
    spans = loops(instructions)
    return max(range(len(spans)), key=lambda i: spans[i][1] - spans[i][0], default=None)


def pipe_of(opcode: str) -> str:
    """The pipe that executes it; "issue" for what only takes an issue slot; unknown ones are put on the ALU."""
    name, *modifiers = opcode.split(".")
    if name == "HMMA":
        return "hmma32" if "F32" in modifiers else "hmma16"
    return "issue" if name.startswith("U") else _PIPE_OF.get(name, "alu")


def count_pipes(instructions: Iterable[Instruction]) -> Counter[str]:
    """Instructions per pipe; all of them take an issue slot."""
    pipes = Counter(pipe_of(instruction.opcode) for instruction in instructions)
    pipes["issue"] = pipes.total()
    return pipes


def clocks(pipes: Counter[str], rates: dict[str, float]) -> dict[str, float]:
    """Clocks that one warp's instructions keep each pipe of an SM busy."""
    return {pipe: pipes[pipe] / rate for pipe, rate in rates.items()}


class Code(NamedTuple):
    """A kernel as its cubin has it: registers per thread, spill instructions, the index of its main loop (`loops`),
    instructions per pipe of one trip of it and of all the rest, the trip's logic, shifts, byte permutes, half2
    arithmetic and conversions, and subroutines: ptxas calls one for an instruction that the machine lacks."""

    registers: int
    spills: int
    loop: int | None
    trip: Counter[str]
    once: Counter[str]
    dequantization: int
    subroutines: int


def read_listing(listing: str) -> Code:
    """Read the output of `cuobjdump -sass -res-usage`; without a loop, all the code counts as one trip."""
    instructions = parse(listing)
    index = main_loop(instructions)
    first, last = (0, instructions[-1].address) if index is None else loops(instructions)[index]
    inside = [i for i in instructions if first <= i.address <= last]
    outside = [i for i in instructions if not first <= i.address <= last and i.opcode != "NOP"]
    names = Counter(i.opcode.split(".")[0] for i in instructions)
    registers = int(re.search(r"\bREG:(\d+)", listing)[1])
    dequantization = sum(i.opcode.split(".")[0] in _DEQUANTIZATION for i in inside)
    spills = names["LDL"] + names["STL"]
    # CALLs are no measure: some versions of ptxas leave a loop by one. On sm_100, errors call a trap (BPT).
    subroutines = names["RET"] - names["BPT"]
    return Code(registers, spills, index, count_pipes(inside), count_pipes(outside), dequantization, subroutines)


def disassemble(cubin: bytes) -> str:
    """What `read_listing` reads, by the cuobjdump that Triton ships."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-sass", "-res-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_cubin(cubin: bytes) -> Code:
    """What is counted of a kernel's machine code."""
    return read_listing(disassemble(cubin))


def ctas_per_sm(registers: int, shared: int, warps: int, machine: Machine) -> int:
    """Blocks (CTAs) that an SM holds at once.

    A warp's registers are allocated 256 at a time from its quarter of the SM's 65536, and a block's shared memory 128
    bytes at a time, with 1 KB more for the system (CUDA occupancy calculator).
    """
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (65536 // 4 // per_warp) // (-(-warps // 4) * 4)
    by_shared = machine.shared_bytes // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, machine.max_warps // warps, machine.max_ctas)
