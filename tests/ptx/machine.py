"""Runs a kernel: steps the lanes of each CTA through its decoded instructions."""

from typing import Any

import numpy as np
import torch

from tests.ptx import floating, memory
from tests.ptx.decode import BARRIER, BRANCH, PLAIN, Step, decode
from tests.ptx.integer import Array
from tests.ptx.parse import Parameter, PtxError, parse
from tests.ptx.state import Machine, Report, float_bits, mask_of

_HIDDEN_POINTERS = 2  # scratch memory that Triton appends to the parameters


def launch(
    ptx: str,
    grid: tuple[int, ...],
    num_threads: int,
    args: list[Any],
    shared_bytes: int = 0,
    *,
    strict: bool = True,
    max_instructions: int = 20_000_000,
) -> Report:
    """Execute the only kernel of `ptx`, one CTA after another.

    args: in the order of the parameters: contiguous CPU tensors or numpy arrays (pointers; written in place), None
    (a null pointer), int or float. A tensor's storage offset is kept in its address modulo 256, else buffers are
    aligned to 256 bytes. shared_bytes: dynamic shared memory. Under strict=False hazards are counted in the report
    instead of raised: reads out of bounds give 0 and writes vanish. max_instructions: of one CTA.
    """
    program = parse(ptx)
    if num_threads % 32 or program.threads not in (None, num_threads):
        raise PtxError(f"{num_threads} threads: the kernel wants {program.threads}")
    buffers: list[memory.Buffer] = []
    values = [_argument(arg, buffers) for arg in args]
    missing = program.parameters[len(values) :]
    if len(values) > len(program.parameters) or len(missing) > _HIDDEN_POINTERS:
        raise PtxError(f"{len(values)} arguments for {len(program.parameters)} parameters")
    machine = Machine(program, num_threads, shared_bytes, buffers, strict)
    for parameter, value in zip(program.parameters, values + [0] * len(missing), strict=True):
        bits = _parameter_bits(parameter, value)
        machine.parameters[parameter.name] = machine.source(str(bits), parameter.type, program.code[0])
    extent = (*grid, 1, 1)[:3]
    _set_constant_registers(machine, extent)
    cta = Cta(machine, decode(machine))
    garbage = list(machine.R)
    with np.errstate(all="ignore"):
        for z, y, x in np.ndindex(extent[::-1]):
            machine.R[:] = garbage
            machine.shared.reset()
            for axis, index in zip("xyz", (x, y, z), strict=True):
                machine.set_special(f"%ctaid.{axis}", int(index))
            cta.run(max_instructions)
    for instruction, count in zip(program.code, cta.executed, strict=True):
        if count:
            machine.report.instructions[".".join(instruction.op)] += count
    return machine.report


def _argument(arg: Any, buffers: list[memory.Buffer]) -> int | float:
    """The value of an argument; a buffer's is its address."""
    if arg is None:
        return 0
    if isinstance(arg, torch.Tensor):
        if not arg.is_contiguous():
            raise PtxError("tensors must be contiguous")
        misalignment = arg.storage_offset() * arg.element_size() % 256
        arg = arg.detach().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(arg, np.ndarray):
        if not arg.flags.c_contiguous:
            raise PtxError("arrays must be contiguous")
        misalignment = 0
        arg = arg.reshape(-1).view(np.uint8)
    else:
        return arg
    buffers.append(memory.Buffer(len(buffers), arg, misalignment))
    return buffers[-1].base


def _parameter_bits(parameter: Parameter, value: int | float) -> int:
    if isinstance(value, float) or parameter.type in floating.TYPES:
        return float_bits(float(value), parameter.type)
    return int(value) & mask_of(parameter.type)


def _set_constant_registers(machine: Machine, grid: tuple[int, ...]) -> None:
    lane = machine.lanes % 32
    for name, values in {
        "%tid.x": machine.lanes,
        "%laneid": lane,
        "%warpid": machine.lanes // 32,
        "%lanemask_lt": (1 << lane) - 1,
        "%lanemask_le": (2 << lane) - 1,
        "%lanemask_eq": 1 << lane,
        "%lanemask_gt": ~((2 << lane) - 1) & 0xFFFFFFFF,
        "%lanemask_ge": ~((1 << lane) - 1) & 0xFFFFFFFF,
    }.items():
        machine.set_special(name, values)
    numbers = {"%tid.y": 0, "%tid.z": 0, "%ntid.x": machine.threads, "%ntid.y": 1, "%ntid.z": 1, "%smid": 0}
    numbers |= {"%nwarpid": machine.warps, "%clock": 0, "%dynamic_smem_size": machine.shared.size}
    for axis, size in zip("xyz", grid, strict=True):
        numbers |= {f"%nctaid.{axis}": size, f"%ctaid.{axis}": 0}
    for name, value in numbers.items():
        machine.set_special(name, value)


class Cta:
    """Where each lane of the running CTA is. `waiting`: at a barrier, or for lanes of its warp."""

    def __init__(self, machine: Machine, steps: list[Step]):
        self.machine = machine
        self.steps = steps
        self.executed = [0] * len(steps)

    def run(self, limit: int) -> None:
        """Step the lanes with the smallest pc until they part, meet others or wait; repeat until all have ended.

        If all wait for lanes that never come, PtxError; under strict=False a collective instruction then runs with
        those there are.
        """
        self.pcs = np.zeros(self.machine.threads, np.int64)
        self.waiting = np.zeros(self.machine.threads, bool)
        self.limit = limit
        while True:
            ready = (self.pcs < len(self.steps)) & ~self.waiting
            stuck = not ready.any()
            if stuck and not self.waiting.any():
                return
            pc = int(self.pcs[self.waiting if stuck else ready].min())
            if stuck:
                self.report_stuck(pc)
            group = self.pcs == pc
            self.waiting &= ~group
            self.advance(pc, group, stuck)

    def report_stuck(self, pc: int) -> None:
        step = self.steps[pc]
        if step.kind == BARRIER:
            raise PtxError(f"{step.instruction}: some threads never arrive")
        self.machine.hazard(self.machine.report.partial_warps, f"{step.instruction}: without all lanes of the warp")

    def advance(self, pc: int, group: Array, forced: bool) -> None:
        """Run `group` until its next step needs another group. forced: the step at `pc` needs no other lanes."""
        steps, executed = self.steps, self.executed
        mask = None if group.all() else group
        ahead = self.pcs[self.pcs > pc]
        stop = int(ahead.min()) if len(ahead) else len(steps)
        warps = int(group.reshape(-1, 32).any(axis=1).sum())
        while pc < stop:
            instruction, kind, run, _ = steps[pc]
            self.limit -= 1
            if self.limit < 0:
                raise PtxError(f"{instruction}: too many instructions: an endless loop?")
            if kind == PLAIN:
                executed[pc] += warps
                run(mask)
                pc += 1
                continue
            chosen = group if instruction.guard is None else group & self.guard(pc)
            if not chosen.any():
                executed[pc] += warps
                pc += 1
            elif kind == BRANCH and (chosen == group).all():
                executed[pc] += warps
                pc = instruction.target
                if mask is not None:
                    break
            elif kind == BRANCH:
                executed[pc] += warps
                self.pcs[group] = pc + 1
                self.pcs[chosen] = instruction.target
                return
            elif (chosen != group).any():  # the others go on: they don't take part
                self.pcs[group] = pc + 1
                self.pcs[chosen] = pc
                return
            elif mask is None or forced or self.complete(pc, group):
                executed[pc] += warps
                run(mask)
                forced = False
                pc += 1
            else:
                self.waiting |= group
                break
        self.pcs[group] = pc

    def guard(self, pc: int) -> Array:
        instruction = self.steps[pc].instruction
        return self.machine.R[instruction.guard.index] ^ instruction.negated

    def complete(self, pc: int, group: Array) -> bool:
        """Whether `group` holds all threads that a barrier, or all lanes that a collective instruction needs."""
        if self.steps[pc].kind == BARRIER:
            return bool((group == (self.pcs < len(self.steps))).all())
        present = np.repeat(np.packbits(group.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)[:, 0], 32)
        return not (self.machine.R[self.steps[pc].members] & ~present)[group].any()
