"""Instructions in which the lanes of a warp exchange values: shfl, vote, redux."""

import numpy as np

from tests.ptx.integer import U32, Array, signed, unsigned
from tests.ptx.parse import Instruction, PtxError, vector
from tests.ptx.state import Machine, Mask, Run


def shuffle(machine: Machine, instruction: Instruction) -> Run:
    mode = instruction.op[2]
    targets = vector(instruction.operands[0])
    target = machine.target(targets[0], "b32", instruction)
    inside = machine.target(targets[1], "pred", instruction) if len(targets) > 1 else None
    a = machine.source(instruction.operands[1], "b32", instruction)
    b, c = (machine.source(operand, "u32", instruction) for operand in instruction.operands[2:4])
    R, lane = machine.R, machine.lanes % 32
    first = machine.lanes - lane

    def run(mask: Mask) -> None:
        step = (R[b] & U32(31)).astype(np.int64)
        clamp = (R[c] & U32(31)).astype(np.int64)
        segment = (R[c] >> U32(8) & U32(31)).astype(np.int64)
        bound = (lane & segment) | (clamp & ~segment)
        if mode == "up":
            source = lane - step
            valid = source >= bound
        else:
            source = {
                "down": lambda: lane + step,
                "bfly": lambda: lane ^ step,
                "idx": lambda: (lane & segment) | (step & ~segment),
            }[mode]()
            valid = source <= bound
        values = R[a][first + np.where(valid, source, lane)]
        machine.write(target, values, mask)
        if inside is not None:
            machine.write(inside, valid, mask)

    return run


def vote(machine: Machine, instruction: Instruction) -> Run:
    mode, kind = instruction.op[2], instruction.op[3]
    if (mode, kind) not in (("ballot", "b32"), ("any", "pred"), ("all", "pred"), ("uni", "pred")):
        raise PtxError(f"unknown instruction: {instruction}")
    target = machine.target(instruction.operands[0], kind, instruction)
    operand = instruction.operands[1]
    source = machine.source(getattr(operand, "register", operand), "pred", instruction)
    negated = hasattr(operand, "register")

    def run(mask: Mask) -> None:
        active = np.ones(machine.threads, bool) if mask is None else mask
        votes = (machine.R[source] ^ negated).reshape(-1, 32)
        active = active.reshape(-1, 32)
        if mode == "ballot":
            values = np.packbits(votes & active, axis=1, bitorder="little").view(U32)[:, 0]
        else:
            some, every = (votes & active).any(1), (votes | ~active).all(1)
            values = {"any": some, "all": every, "uni": every | ~some}[mode]
        machine.write(target, np.repeat(values, 32), mask)

    return run


def active_mask(machine: Machine, instruction: Instruction) -> Run:
    target = machine.target(instruction.operands[0], "b32", instruction)

    def run(mask: Mask) -> None:
        active = np.ones(machine.threads, bool) if mask is None else mask
        values = np.packbits(active.reshape(-1, 32), axis=1, bitorder="little").view(U32)[:, 0]
        machine.write(target, np.repeat(values, 32), mask)

    return run


def reduce(machine: Machine, instruction: Instruction) -> Run:
    name, kind = instruction.op[2], instruction.op[3]
    if kind not in ("u32", "s32", "b32"):
        raise PtxError(f"unknown instruction: {instruction}")
    function, identity = {
        "add": (np.add, 0),
        "or": (np.bitwise_or, 0),
        "xor": (np.bitwise_xor, 0),
        "and": (np.bitwise_and, 0xFFFFFFFF),
        "min": (np.minimum, 0x7FFFFFFF if kind == "s32" else 0xFFFFFFFF),
        "max": (np.maximum, 0x80000000 if kind == "s32" else 0),
    }[name]
    target = machine.target(instruction.operands[0], kind, instruction)
    source = machine.source(instruction.operands[1], kind, instruction)

    def run(mask: Mask) -> None:
        values = machine.R[source]
        if mask is not None:
            values = np.where(mask, values, U32(identity))
        rows: Array = (signed(values) if kind == "s32" else values).reshape(-1, 32)
        reduced = function.reduce(rows, axis=1, dtype=rows.dtype)
        machine.write(target, np.repeat(unsigned(reduced), 32), mask)

    return run
