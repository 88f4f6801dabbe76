"""ldmatrix and mma.sync.m16n8kX on all warps at once.

Every shape has the same fragments, in 32-bit words along k: with g = lane // 4 and t = lane % 4,

    A  a0 a1 a2 a3   rows g, g + 8, g, g + 8,  words t, t, t + 4, t + 4   (a2, a3 only where k spans 8 words)
    B  b0 b1         column g,                 words t, t + 4
    C  c0 c1 c2 c3   row g: columns 2t, 2t + 1; row g + 8: columns 2t, 2t + 1   (f16: two columns a register)

Floating-point products are exact and summed in float64 with C, then rounded once to the type of D. A GPU adds in
another order with fewer bits, so results agree only within its accumulation error.
"""

from collections.abc import Callable

import numpy as np

from tests.ptx.floating import F16, F32, F64, decode
from tests.ptx.integer import U32, Array
from tests.ptx.memory import address_of, lanes_of
from tests.ptx.parse import Instruction, PtxError
from tests.ptx.state import Machine, Mask, Run

_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "s8": 8, "u8": 8, "s4": 4, "u4": 4, "b1": 1}


def load_matrix(machine: Machine, instruction: Instruction) -> Run:
    """ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{.trans}.shared.b16"""
    op = instruction.op
    if op[:4] != ("ldmatrix", "sync", "aligned", "m8n8") or "shared" not in op or op[-1] != "b16":
        raise PtxError(f"unknown instruction: {instruction}")
    count, transposed = int(op[4][1:]), "trans" in op
    targets = [machine.target(operand, "b32", instruction) for operand in instruction.operands[0]]
    address = address_of(machine, instruction, instruction.operands[1], "shared")
    if len(targets) != count:
        raise PtxError(f"{instruction}: expected {count} registers")

    def run(mask: Mask) -> None:
        lanes = lanes_of(machine, mask)
        lanes = lanes[lanes % 32 < 8 * count]
        words = np.zeros((machine.threads, 4), U32)
        words[lanes] = machine.shared.load(instruction, address(lanes), lanes, 4, 4)
        for matrix, target in enumerate(targets):
            rows = np.ascontiguousarray(words.reshape(-1, 4, 8, 4)[:, matrix])
            if transposed:
                rows = np.ascontiguousarray(rows.view(np.uint16).transpose(0, 2, 1)).view(U32)
            machine.write(target, rows.reshape(-1), mask)

    return run


def rows_of_a(registers: list[Array]) -> Array:
    """Words [warps, 16, 4 or 8] of A."""
    halves = len(registers) // 2
    return np.stack(registers).reshape(halves, 2, -1, 8, 4).transpose(2, 1, 3, 0, 4).reshape(-1, 16, 4 * halves)


def columns_of_b(registers: list[Array]) -> Array:
    """Words [warps, 8, 4 or 8] of B transposed."""
    return (
        np.stack(registers).reshape(len(registers), -1, 8, 4).transpose(1, 2, 0, 3).reshape(-1, 8, 4 * len(registers))
    )


def matrix_of_c(registers: list[Array]) -> Array:
    """Elements [warps, 16, 8] of C as raw bits: 32 bits each of four registers, 16 bits of two."""
    if len(registers) == 4:
        return np.stack(registers).reshape(2, 2, -1, 8, 4).transpose(2, 0, 3, 4, 1).reshape(-1, 16, 8)
    return np.stack(registers).reshape(2, -1, 8, 4).transpose(1, 0, 2, 3).reshape(-1, 16, 4).view(np.uint16)


def registers_of_d(matrix: Array) -> list[Array]:
    """The inverse of `matrix_of_c`."""
    if matrix.itemsize == 4:
        parts = matrix.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
    else:
        parts = np.ascontiguousarray(matrix).view(U32).reshape(-1, 2, 8, 4).transpose(1, 0, 2, 3).reshape(2, -1)
    return list(np.ascontiguousarray(parts))


def elements(words: Array, kind: str) -> Array:
    """Elements along the last axis of `words`, as float64 or int32."""
    if kind == "tf32":
        return (words & ~U32(0x1FFF)).view(F32).astype(F64)
    if kind in ("f16", "bf16"):
        return decode(words, kind).astype(F64)
    if kind in ("s8", "u8"):
        return words.view(np.int8 if kind == "s8" else np.uint8).astype(np.int32)
    nibbles = np.stack([words.view(np.uint8) & 15, words.view(np.uint8) >> 4], axis=-1).astype(np.int32)
    nibbles = nibbles.reshape(*words.shape[:-1], -1)
    return (nibbles ^ 8) - 8 if kind == "s4" else nibbles


def _product(types: list[str], op: tuple[str, ...]) -> Callable[[Array, Array, Array], Array] | None:
    """(words of A, words of B, bits of C) -> bits of D."""
    d, a, b, c = types
    if a == "b1":
        combine = np.bitwise_and if "and" in op else np.bitwise_xor
        return lambda x, y, z: (
            np.bitwise_count(combine(x[:, :, None], y[:, None])).sum(-1, dtype=np.int32) + z.view(np.int32)
        ).view(U32)
    if a[0] in "su":
        low, high = -(1 << 31), (1 << 31) - 1

        def integer(x: Array, y: Array, z: Array) -> Array:
            product = elements(x, a).astype(np.int64) @ elements(y, b).astype(np.int64).swapaxes(1, 2)
            total = product + z.view(np.int32)
            return (np.clip(total, low, high) if "satfinite" in op else total).astype(np.int32).view(U32)

        return integer
    if a != b or c != d:
        return None
    accumulator = {"f16": F16, "f32": F32}[c]
    bits = {"f16": np.uint16, "f32": U32}[d]
    return lambda x, y, z: (
        (elements(x, a) @ elements(y, b).swapaxes(1, 2) + z.view(accumulator)).astype(accumulator).view(bits)
    )


def multiply(machine: Machine, instruction: Instruction) -> Run:
    """mma.sync.aligned.m16n8kX.row.col{.satfinite}.d.a.b.c{.and.popc}"""
    op = instruction.op
    types = [part for part in op[6:] if part in _BITS or part in ("f32", "s32")]
    supported = op[1:3] == ("sync", "aligned") and op[3][:6] == "m16n8k" and op[4:6] == ("row", "col")
    known = set(types) | {"satfinite", "and", "xor", "popc"}
    product = _product(types, op) if supported and len(types) == 4 and set(op[6:]) <= known else None
    if product is None:
        raise PtxError(f"unknown instruction: {instruction}")
    words = int(op[3][6:]) * _BITS[types[1]] // 32
    counts = (2 if types[0] == "f16" else 4, words // 2, words // 4, 2 if types[3] == "f16" else 4)
    if tuple(len(operand) for operand in instruction.operands) != counts:
        raise PtxError(f"{instruction}: expected {counts} registers")
    d_type, a_type, c_type = (("b32" if kind != "f32" else "f32") for kind in (types[0], types[1], types[3]))
    d = [machine.target(operand, d_type, instruction) for operand in instruction.operands[0]]
    a, b, c = (
        [machine.source(operand, kind, instruction) for operand in group]
        for group, kind in zip(instruction.operands[1:], (a_type, a_type, c_type), strict=True)
    )
    R = machine.R

    def run(mask: Mask) -> None:
        x, y = rows_of_a([R[i] for i in a]), columns_of_b([R[i] for i in b])
        results = registers_of_d(product(x, y, matrix_of_c([R[i] for i in c])))
        for index, values in zip(d, results, strict=True):
            machine.write(index, values, mask)

    return run
