"""Instructions -> closures that execute them on the lanes of a mask."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tests.ptx import convert, floating, integer, memory, mma, warp
from tests.ptx.integer import Array, Pure
from tests.ptx.parse import SIZES, Instruction, Negated, PtxError, Register, vector
from tests.ptx.state import Machine, Mask, Run, dtype_of

PLAIN, BRANCH, BARRIER, COLLECTIVE = range(4)
_NOTHING = {"membar", "fence", "prefetch", "prefetchu", "discard", "applypriority", "nanosleep"}
_BUILDERS: dict[str, Callable[[Machine, Instruction], Run]] = {
    "ld": memory.load,
    "st": memory.store,
    "atom": memory.atomic,
    "red": memory.atomic,
    "shfl": warp.shuffle,
    "vote": warp.vote,
    "activemask": warp.active_mask,
    "redux": warp.reduce,
    "ldmatrix": mma.load_matrix,
    "mma": mma.multiply,
}


class Step(NamedTuple):
    """A decoded instruction; `members` is the register with the lanes that a collective one needs."""

    instruction: Instruction
    kind: int
    run: Run
    members: int


def decode(machine: Machine) -> list[Step]:
    return [_step(machine, instruction) for instruction in machine.program.code]


def _step(machine: Machine, instruction: Instruction) -> Step:
    kind, members = _kind(instruction), -1
    if kind == COLLECTIVE:
        whole = instruction.op[0] in ("ldmatrix", "mma")
        members = machine.source("-1" if whole else instruction.operands[-1], "b32", instruction)
    return Step(instruction, kind, _decode(machine, instruction, kind), members)


def _kind(instruction: Instruction) -> int:
    op = instruction.op
    if op[0] in ("bra", "ret", "exit"):
        return BRANCH
    if op[:3] == ("bar", "warp", "sync") or op[0] in ("shfl", "vote", "redux", "ldmatrix", "mma"):
        return COLLECTIVE
    return BARRIER if op[0] in ("bar", "barrier") else PLAIN


def _decode(machine: Machine, instruction: Instruction, kind: int) -> Run:
    if kind == BRANCH:
        return lambda mask: None
    run = _decode_unguarded(machine, instruction)
    if instruction.guard is None or kind != PLAIN:  # the scheduler looks at the guards of the others
        return run
    R, guard, negated = machine.R, instruction.guard.index, instruction.negated

    def guarded(mask: Mask) -> None:
        chosen = ~R[guard] if negated else R[guard]
        if mask is not None:
            chosen = chosen & mask
        if chosen.all():
            run(None)
        elif chosen.any():
            run(chosen)

    return guarded


def _decode_unguarded(machine: Machine, instruction: Instruction) -> Run:
    op = instruction.op
    try:
        if op[0] in _BUILDERS:
            return _BUILDERS[op[0]](machine, instruction)
        if op[0] in _NOTHING or op[:3] == ("bar", "warp", "sync"):
            return lambda mask: None
        if op[:2] == ("cp", "async"):
            return memory.async_copy(machine, instruction)
        if op[0] in ("bar", "barrier"):
            return _barrier(machine, instruction)
        if op[0] == "mov":
            return _move(machine, instruction)
        if op[0] == "cvta":
            return _copy(machine, instruction)
        if op[0] == "setp":
            return _compare(machine, instruction)
        if op[0] == "trap":
            return _trap(instruction)
        if op[0] == "createpolicy":
            target = machine.target(instruction.operands[0], "b64", instruction)
            return lambda mask: machine.write(target, np.zeros(machine.threads, np.uint64), mask)
        pure = convert.lookup(op) if op[0] == "cvt" else floating.lookup(op)
        if pure is None and op[0] != "cvt" and op[-1] not in floating.TYPES:
            pure = integer.lookup(op)
    except (IndexError, KeyError, ValueError, StopIteration, TypeError) as error:
        raise PtxError(f"unknown instruction: {instruction}") from error
    if pure is None:
        raise PtxError(f"unknown instruction: {instruction}")
    return _apply(machine, instruction, pure)


def _apply(machine: Machine, instruction: Instruction, pure: Pure) -> Run:
    """A closure that reads the sources of `pure`, calls it and writes its result."""
    operands = instruction.operands
    if len(operands) != 1 + len(pure.sources):
        raise PtxError(f"{instruction}: expected {1 + len(pure.sources)} operands")
    converts = instruction.op[0] == "cvt"  # it alone takes registers wider than its types
    its = operands[0].type if converts and isinstance(operands[0], Register) else pure.result
    target = machine.target(operands[0], its, instruction)
    function = pure.run
    if SIZES[its] != SIZES[pure.result]:
        function = _extended(function, pure.result, its)
    indices = []
    for operand, kind in zip(operands[1:], pure.sources, strict=True):
        if converts and isinstance(operand, Register) and SIZES[operand.type] != SIZES[kind]:
            indices.append(machine.source(operand, operand.type, instruction))
            function = _truncating(function, kind)
        else:
            indices.append(machine.source(operand, kind, instruction))
    return _bind(machine, function, target, indices)


def _extended(function: Callable[..., Array], kind: str, to: str) -> Callable[..., Array]:
    return lambda *sources: integer.widen(function(*sources), kind).astype(dtype_of(to))


def _truncating(function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    return lambda a: function(a.astype(dtype_of(kind)))


def _bind(machine: Machine, function: Callable[..., Array], target: int, indices: list[int]) -> Run:
    R = machine.R
    if len(indices) == 1:
        a = indices[0]
        compute = lambda: function(R[a])  # noqa: E731
    elif len(indices) == 2:
        a, b = indices
        compute = lambda: function(R[a], R[b])  # noqa: E731
    elif len(indices) == 3:
        a, b, c = indices
        compute = lambda: function(R[a], R[b], R[c])  # noqa: E731
    else:
        compute = lambda: function(*(R[i] for i in indices))  # noqa: E731

    def run(mask: Mask) -> None:
        R[target] = compute() if mask is None else np.where(mask, compute(), R[target])

    return run


def _copy(machine: Machine, instruction: Instruction) -> Run:
    kind = instruction.op[-1]
    target = machine.target(instruction.operands[0], kind, instruction)
    return _bind(machine, lambda a: a, target, [machine.source(instruction.operands[1], kind, instruction)])


def _move(machine: Machine, instruction: Instruction) -> Run:
    """mov of a register or constant, to a vector of parts or from one."""
    kind = instruction.op[-1]
    to, source = instruction.operands
    if type(to) is not tuple and type(source) is not tuple:
        return _copy(machine, instruction)
    parts = to if type(to) is tuple else source
    part_kind = f"b{8 * SIZES[kind] // len(parts)}"
    dtype, whole = integer.UNSIGNED[SIZES[part_kind]], integer.UNSIGNED[SIZES[kind]]
    R = machine.R
    if type(to) is tuple:
        index = machine.source(source, kind, instruction)
        targets = [machine.target(part, part_kind, instruction) for part in parts]

        def unpack(mask: Mask) -> None:
            values = R[index].view(dtype).reshape(-1, len(targets))
            for column, target in enumerate(targets):
                machine.write(target, np.ascontiguousarray(values[:, column]), mask)

        return unpack
    target = machine.target(to, kind, instruction)
    sources = [machine.source(part, part_kind, instruction) for part in parts]
    return _bind(machine, lambda *values: np.stack(values, axis=1).view(whole)[:, 0].copy(), target, sources)


def _compare(machine: Machine, instruction: Instruction) -> Run:
    """setp.CMP{.BOOL}{.ftz}.type p{|q}, a, b{, {!}c}"""
    op, kind = instruction.op, instruction.op[-1]
    modifiers = op[2:-1]
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(modifiers[0] if modifiers else "")
    if set(modifiers) - {"and", "or", "xor", "ftz"} or kind.endswith("x2"):
        raise PtxError(f"unknown instruction: {instruction}")
    if kind in floating.TYPES:
        compare = floating.comparison(op[1], kind, "ftz" in modifiers)
    else:
        compare = integer.comparison(op[1], kind)
    to, *operands = instruction.operands
    targets = [machine.target(each, "pred", instruction) for each in vector(to)]
    a, b = (machine.source(operand, kind, instruction) for operand in operands[:2])
    third = operands[2] if combine else "1"
    negated = isinstance(third, Negated)
    c = machine.source(third.register if negated else third, "pred", instruction)
    R = machine.R

    def run(mask: Mask) -> None:
        result = compare(R[a], R[b])
        other = ~R[c] if negated else R[c]
        for target, values in zip(targets, (result, ~result), strict=False):
            machine.write(target, combine(values, other) if combine else values, mask)

    return run


def _barrier(machine: Machine, instruction: Instruction) -> Run:
    """bar.sync a{, threads} of the whole CTA."""
    plain = [part for part in instruction.op[1:] if part not in ("cta", "aligned")] == ["sync"]
    if not plain or instruction.operands[1:] not in ((), (str(machine.threads),)):
        raise PtxError(f"unknown instruction: {instruction}")
    return lambda mask: machine.shared.barrier()


def _trap(instruction: Instruction) -> Run:
    def run(mask: Mask) -> None:
        raise PtxError(f"{instruction}: executed")

    return run
