"""Loads, stores, atomics and cp.async. Global buffers lie 2^40 bytes apart in a made-up address space; an address
belongs to the nearest."""

from collections.abc import Callable, Iterator

import numpy as np

from tests.ptx.floating import TYPES, decode, encode
from tests.ptx.integer import U64, UNSIGNED, Array, numbers, unsigned, widen
from tests.ptx.parse import SIZES, Address, Instruction, PtxError, Register, vector
from tests.ptx.state import Machine, Mask, Run, dtype_of

GAP = 40
_IGNORED = {"nc", "ca", "cg", "cs", "cv", "lu", "wb", "wt", "volatile", "relaxed", "acquire", "release", "acq_rel"}
_IGNORED |= {"weak", "gpu", "cta", "sys", "noftz"}
_VECTORS = {"v2": 2, "v4": 4, "v8": 8}


class Buffer:
    """One argument: its bytes, and its address."""

    def __init__(self, index: int, data: Array, misalignment: int):
        self.index = index
        self.data = data
        self.base = (index + 1 << GAP) + misalignment
        self.views: dict[tuple[int, int], tuple[Array, int]] = {}

    def view(self, width: int, count: int) -> tuple[Array, int]:
        """[rows, count] elements of all that can be accessed with this alignment, and the address of row 0."""
        if (width, count) not in self.views:
            size = width * count
            skip = min(-self.base % size, len(self.data))
            rows = (len(self.data) - skip) // size
            view = self.data[skip : skip + rows * size].view(UNSIGNED[width]).reshape(-1, count)
            self.views[width, count] = (view, self.base + skip)
        return self.views[width, count]


def rows_of(
    machine: Machine, instruction: Instruction, addresses: Array, lanes: Array, size: tuple[int, int]
) -> Iterator[tuple[Array, Array, Array]]:
    """(view, which of the addresses, their rows) for each buffer accessed; what is out of bounds is left out."""
    step = U64(size[0] * size[1])
    if (addresses & (step - U64(1))).any():
        raise PtxError(f"{instruction}: global address is not aligned to {step} bytes")
    nearest = (addresses + U64(1 << GAP - 1)) >> U64(GAP)
    for index in np.unique(nearest):
        chosen = np.flatnonzero(nearest == index)
        if not 1 <= index <= len(machine.buffers):
            _out_of_bounds(machine, instruction, lanes[chosen][0], f"the unmapped address {addresses[chosen][0]:#x}")
            continue
        buffer = machine.buffers[int(index) - 1]
        view, start = buffer.view(*size)
        rows = (addresses[chosen] - U64(start)) // step  # below the start it wraps to a huge row
        outside = rows >= U64(len(view))
        if outside.any():
            offset = int(addresses[chosen][outside][0]) - buffer.base
            where = f"offset {offset} of buffer {buffer.index}, which has {len(buffer.data)} bytes"
            _out_of_bounds(machine, instruction, lanes[chosen][outside][0], where)
        yield view, chosen[~outside], rows[~outside]


def one_buffer(machine: Machine, addresses: Array, size: tuple[int, int]) -> tuple[Array, Array] | None:
    """(view, rows) where all addresses are aligned and in bounds of one buffer, which is the common case."""
    index = (int(addresses[0]) >> GAP) - 1 if len(addresses) else -1
    if not 0 <= index < len(machine.buffers):
        return None
    step = size[0] * size[1]
    view, start = machine.buffers[index].view(*size)
    offsets = addresses - U64(start)  # below the start it wraps to a huge offset
    if len(view) == 0 or offsets.max() > (len(view) - 1) * step or (step > 1 and (offsets & U64(step - 1)).any()):
        return None
    return view, (offsets >> U64(step.bit_length() - 1)).view(np.int64)


def _out_of_bounds(machine: Machine, instruction: Instruction, lane: int, where: str) -> None:
    machine.hazard(machine.report.out_of_bounds, f"{instruction}: lane {lane} accesses {where}")


def load_global(
    machine: Machine, instruction: Instruction, addresses: Array, lanes: Array, width: int, count: int
) -> Array:
    """[lanes, count] elements of `width` bytes; zeros where out of bounds."""
    common = one_buffer(machine, addresses, (width, count))
    if common:
        return common[0][common[1]]
    values = np.zeros((len(addresses), count), UNSIGNED[width])
    for view, chosen, rows in rows_of(machine, instruction, addresses, lanes, (width, count)):
        values[chosen] = view[rows]
    return values


def store_global(machine: Machine, instruction: Instruction, addresses: Array, lanes: Array, values: Array) -> None:
    common = one_buffer(machine, addresses, (values.itemsize, values.shape[1]))
    if common:
        common[0][common[1]] = values
        return
    for view, chosen, rows in rows_of(machine, instruction, addresses, lanes, (values.itemsize, values.shape[1])):
        view[rows] = values[chosen]


def address_of(machine: Machine, instruction: Instruction, operand: object, space: str) -> Callable[[Array], Array]:
    """Lanes -> addresses: unsigned for global memory, signed for shared memory."""
    if not isinstance(operand, Address):
        raise PtxError(f"{instruction}: expected an address, not {operand}")
    R, lanes_of_all = machine.R, machine.threads
    wide = space == "global" or (isinstance(operand.base, Register) and SIZES[operand.base.type] == 8)
    base = machine.source(operand.base, "u64" if wide else "u32", instruction)
    if space == "global":
        offset = U64(operand.offset & 0xFFFF_FFFF_FFFF_FFFF)
        return lambda lanes: (R[base] if len(lanes) == lanes_of_all else R[base][lanes]) + offset
    return lambda lanes: (R[base] if len(lanes) == lanes_of_all else R[base][lanes]).astype(np.int64) + operand.offset


def lanes_of(machine: Machine, mask: Mask) -> Array:
    return machine.lanes if mask is None else np.flatnonzero(mask)


def _space(instruction: Instruction, extra: set[str]) -> str:
    """The state space of a load, store or atomic; refuses modifiers it does not know."""
    spaces = [part for part in instruction.op if part in ("global", "shared", "param")]
    for part in instruction.op[1:-1]:
        known = part in _IGNORED | extra or part in _VECTORS or part in spaces or part[:4] in ("L1::", "L2::")
        if not known:
            raise PtxError(f"{instruction}: unknown modifier .{part}")
    return spaces[0] if spaces else "global"  # generic addresses are global ones here


def _elements(instruction: Instruction, operand: object) -> tuple:
    count = next((_VECTORS[part] for part in instruction.op if part in _VECTORS), 1)
    elements = vector(operand)
    if len(elements) != count:
        raise PtxError(f"{instruction}: expected {count} elements")
    return elements


def _own_type(operand: object, kind: str) -> str:
    """Loads and stores take registers wider than their type."""
    return operand.type if isinstance(operand, Register) else kind


def load(machine: Machine, instruction: Instruction) -> Run:
    kind, space = instruction.op[-1], _space(instruction, set())
    targets = _elements(instruction, instruction.operands[0])
    own = [_own_type(operand, kind) for operand in targets]
    indices = [machine.target(operand, its, instruction) for operand, its in zip(targets, own, strict=True)]
    if space == "param":
        return _load_parameter(machine, instruction, indices[0], own[0])
    address = address_of(machine, instruction, instruction.operands[1], space)
    R, width, count = machine.R, SIZES[kind], len(targets)

    def run(mask: Mask) -> None:
        lanes = lanes_of(machine, mask)
        if space == "shared":
            values = machine.shared.load(instruction, address(lanes), lanes, width, count)
        else:
            values = load_global(machine, instruction, address(lanes), lanes, width, count)
        for column, (index, its) in enumerate(zip(indices, own, strict=True)):
            value = np.ascontiguousarray(values[:, column])
            if SIZES[its] != width:
                value = widen(value, kind).astype(dtype_of(its))
            if mask is None:
                R[index] = value
            else:
                R[index] = R[index].copy()
                R[index][lanes] = value

    return run


def _load_parameter(machine: Machine, instruction: Instruction, target: int, own: str) -> Run:
    address, kind = instruction.operands[1], instruction.op[-1]
    name = address.base if isinstance(address, Address) and address.offset == 0 else None
    if name not in machine.parameters:
        raise PtxError(f"{instruction}: no such parameter")
    parameter = machine.R[machine.parameters[name]]
    if parameter.itemsize < SIZES[kind]:
        raise PtxError(f"{instruction}: the parameter has {parameter.itemsize} bytes")
    value = widen(parameter.astype(dtype_of(kind)), kind).astype(dtype_of(own))
    return lambda mask: machine.write(target, value, mask)


def store(machine: Machine, instruction: Instruction) -> Run:
    kind, space = instruction.op[-1], _space(instruction, set())
    address = address_of(machine, instruction, instruction.operands[0], space)
    operands = _elements(instruction, instruction.operands[1])
    sources = [machine.source(operand, _own_type(operand, kind), instruction) for operand in operands]
    R, dtype = machine.R, dtype_of(kind)

    def run(mask: Mask) -> None:
        lanes = lanes_of(machine, mask)
        columns = [R[source].astype(dtype, copy=False) for source in sources]
        values = columns[0][:, None] if len(columns) == 1 else np.stack(columns, axis=1)
        if mask is not None:
            values = values[lanes]
        if space == "shared":
            machine.shared.store(instruction, address(lanes), lanes, values)
        else:
            store_global(machine, instruction, address(lanes), lanes, values)

    return run


def async_copy(machine: Machine, instruction: Instruction) -> Run:
    """cp.async.{ca,cg}.shared.global [to], [from], size{, bytes to read} and its commit and wait instructions."""
    shared, action = machine.shared, instruction.op[2]
    if action == "commit_group":
        return lambda mask: shared.commit(lanes_of(machine, mask))
    if action == "wait_group":
        groups = int(instruction.operands[0], 0)
        return lambda mask: shared.wait(lanes_of(machine, mask), groups)
    if action == "wait_all":
        return lambda mask: shared.wait(lanes_of(machine, mask), -1)
    if not {"shared", "global"} <= set(instruction.op):
        raise PtxError(f"unknown instruction: {instruction}")
    to = address_of(machine, instruction, instruction.operands[0], "shared")
    source = address_of(machine, instruction, instruction.operands[1], "global")
    size = int(instruction.operands[2], 0)
    if size not in ((16,) if action == "cg" else (4, 8, 16)):
        raise PtxError(f"{instruction}: can't copy {size} bytes")
    operands = instruction.operands[: -1 if "L2::cache_hint" in instruction.op else None]
    length = machine.source(operands[3] if len(operands) > 3 else str(size), "u32", instruction)

    def run(mask: Mask) -> None:
        lanes = lanes_of(machine, mask)
        addresses, lengths = source(lanes), machine.R[length][lanes]
        data = np.zeros((len(lanes), size), np.uint8)
        if (addresses[lengths > 0] & U64(size - 1)).any():
            raise PtxError(f"{instruction}: global address is not aligned to {size} bytes")
        for read in np.unique(lengths):
            if read > size:
                raise PtxError(f"{instruction}: reads {read} of {size} bytes")
            some = np.flatnonzero(lengths == read)
            if read == size:
                data[some] = load_global(machine, instruction, addresses[some], lanes[some], 1, size)
            for byte in range(0 if read == size else read):
                at = addresses[some] + U64(byte)
                data[some, byte] = load_global(machine, instruction, at, lanes[some], 1, 1)[:, 0]
        shared.copy(instruction, to(lanes), lanes, data)

    return run


def _combine(name: str, kind: str) -> Callable[[Array, Array], Array]:
    """(old, operand) -> new, on raw bits."""
    if kind in TYPES:
        return {
            "add": lambda old, a: encode(decode(old, kind) + decode(a, kind), kind),
            "min": lambda old, a: encode(np.fmin(decode(old, kind), decode(a, kind)), kind),
            "max": lambda old, a: encode(np.fmax(decode(old, kind), decode(a, kind)), kind),
            "exch": lambda old, a: a,
        }[name]
    view = numbers(kind)
    one = UNSIGNED[SIZES[kind]](1)
    return {
        "add": np.add,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, a: a,
        "min": lambda old, a: unsigned(np.minimum(view(old), view(a))),
        "max": lambda old, a: unsigned(np.maximum(view(old), view(a))),
        "inc": lambda old, a: np.where(old >= a, 0 * one, old + one),
        "dec": lambda old, a: np.where((old == 0) | (old > a), a, old - one),
    }[name]


_OPERATIONS = {"add", "and", "or", "xor", "exch", "min", "max", "inc", "dec", "cas"}


def atomic(machine: Machine, instruction: Instruction) -> Run:
    """atom and red, lane after lane where addresses are equal."""
    kind, space = instruction.op[-1], _space(instruction, _OPERATIONS)
    name = next(part for part in instruction.op if part in _OPERATIONS)
    returns = instruction.op[0] == "atom"
    operands = instruction.operands[1:] if returns else instruction.operands
    target = machine.target(instruction.operands[0], kind, instruction) if returns else None
    address = address_of(machine, instruction, operands[0], space)
    sources = [machine.source(operand, kind, instruction) for operand in operands[1 : 3 if name == "cas" else 2]]
    combine = (lambda old, a, b: np.where(old == a, b, old)) if name == "cas" else _combine(name, kind)
    R, width, shared = machine.R, SIZES[kind], machine.shared

    def run(mask: Mask) -> None:
        lanes = lanes_of(machine, mask)
        addresses = address(lanes)
        old = R[target].copy() if returns else np.zeros(machine.threads, dtype_of(kind))
        while len(lanes):
            _, first = np.unique(addresses, return_index=True)
            now, at = lanes[first], addresses[first]
            if space == "shared":
                values = shared.load(instruction, at, now, width, 1)[:, 0]
            else:
                values = load_global(machine, instruction, at, now, width, 1)[:, 0]
            new = combine(values, *(R[source][now] for source in sources))[:, None]
            if space == "shared":
                shared.data.view(new.dtype)[at // width] = new[:, 0]
            else:
                store_global(machine, instruction, at, now, new)
            old[now] = values
            lanes, addresses = np.delete(lanes, first), np.delete(addresses, first)
        if returns:
            R[target] = old

    return run
