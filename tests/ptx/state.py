"""What a running CTA consists of: registers with one lane per thread, shared memory, the buffers, and the report."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx.floating import F16, F32, bf16_bits
from tests.ptx.integer import UNSIGNED, Array
from tests.ptx.parse import SIZES, Instruction, Operand, Program, PtxError, Register
from tests.ptx.shared import Shared

Mask = Array | None  # of the lanes that execute; None: all of them
Run = Callable[[Mask], None]

GARBAGE = 0xA5C3_5A3C_96E1_D287  # what registers hold before they are written


@dataclass
class Report:
    """What happened in a launch. Under strict=False the hazards are counted by message, else the first one raises."""

    instructions: Counter[str] = field(default_factory=Counter)  # executed warp-instructions of each opcode
    bank_conflicts: Counter[str] = field(default_factory=Counter)  # extra wavefronts of each shared-memory instruction
    out_of_bounds: Counter[str] = field(default_factory=Counter)  # global accesses
    uninitialised: Counter[str] = field(default_factory=Counter)  # reads of shared memory
    races: Counter[str] = field(default_factory=Counter)  # in shared memory, between warps or with cp.async
    partial_warps: Counter[str] = field(default_factory=Counter)  # collective instructions without some lanes


class Machine:
    """Registers R hold arrays that are replaced, never written into, so they may be shared. buffers: memory.Buffer."""

    def __init__(self, program: Program, threads: int, shared_bytes: int, buffers: list[Any], strict: bool):
        self.program = program
        self.threads = threads
        self.warps = threads // 32
        self.buffers = buffers
        self.strict = strict
        self.report = Report()
        self.R: list[Array] = []
        self.constants: dict[tuple[str, str], int] = {}
        self.special: dict[str, int] = {}
        self.parameters: dict[str, int] = {}
        self.lanes = np.arange(threads)
        self.shared = Shared(program.static_shared + shared_bytes, threads, self)
        for kind in program.registers:
            self.append(np.full(threads, 0 if kind == "pred" else GARBAGE & mask_of(kind), dtype_of(kind)))

    def append(self, values: Array) -> int:
        self.R.append(values)
        return len(self.R) - 1

    def set_special(self, name: str, values: "Array | int") -> None:
        filled = np.full(self.threads, values, np.uint32) if isinstance(values, int) else values.astype(np.uint32)
        if name in self.special:
            self.R[self.special[name]] = filled
        else:
            self.special[name] = self.append(filled)

    def source(self, operand: Operand, kind: str, instruction: Instruction) -> int:
        """Index in R of a register, special register, symbol or immediate read as `kind`."""
        if isinstance(operand, Register):
            if dtype_of(operand.type) != dtype_of(kind):
                raise PtxError(f"{instruction}: a .{operand.type} register read as .{kind}")
            return operand.index
        if not isinstance(operand, str):
            raise PtxError(f"{instruction}: expected a register or an immediate, not {operand}")
        if operand in self.special:
            return self.special[operand]
        key = (operand, kind)
        if key not in self.constants:
            value = self.program.symbols.get(operand)
            bits = immediate(operand, kind, instruction) if value is None else value
            self.constants[key] = self.append(np.full(self.threads, bits, dtype_of(kind)))
        return self.constants[key]

    def target(self, operand: Operand, kind: str, instruction: Instruction) -> int:
        """Index in R of a register written as `kind`; the sink `_` gets one of its own."""
        if operand == "_":
            return self.append(np.zeros(self.threads, dtype_of(kind)))
        if not isinstance(operand, Register):
            raise PtxError(f"{instruction}: can't write to {operand}")
        return self.source(operand, kind, instruction)

    def write(self, index: int, values: Array, mask: Mask) -> None:
        self.R[index] = values if mask is None else np.where(mask, values, self.R[index])

    def hazard(self, counter: Counter[str], message: str) -> None:
        if self.strict:
            raise PtxError(message)
        counter[message] += 1


def dtype_of(kind: str) -> type:
    return np.bool_ if kind == "pred" else UNSIGNED[SIZES[kind]]


def mask_of(kind: str) -> int:
    return (1 << 8 * SIZES[kind]) - 1


def immediate(text: str, kind: str, instruction: Instruction) -> int:
    """Bits of a literal read as `kind`."""
    digits = text.lstrip("+-")
    try:
        if digits[:2] in ("0f", "0F", "0d", "0D"):
            return int(digits[2:], 16)
        if digits == "WARP_SZ":
            return 32
        if digits.isdigit() or digits[:2] in ("0x", "0X", "0b", "0B") or digits[-1] == "U":
            digits = digits.rstrip("U")
            octal = digits.isdigit() and len(digits) > 1 and digits[0] == "0"
            value = int(digits, 8 if octal else 0)
            if kind == "pred":
                return int(value != 0)
            return (-value if text[0] == "-" else value) & mask_of(kind)
        return float_bits(float(text), kind)
    except (ValueError, KeyError):
        raise PtxError(f"{instruction}: can't read {text!r} as .{kind}") from None


def float_bits(value: float, kind: str) -> int:
    if kind == "bf16":
        return int(bf16_bits(np.array([value], F32))[0])
    dtype = {"f16": F16, "b16": F16, "f32": F32, "b32": F32, "u32": F32, "f64": np.float64, "b64": np.float64}[kind]
    return int(np.array([value], dtype).view(UNSIGNED[SIZES[kind]])[0])
