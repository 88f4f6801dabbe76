"""PTX text of one kernel -> instructions with resolved registers and labels."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class PtxError(Exception):
    """PTX that can't be emulated, or an execution that a GPU would not define."""


class Register(NamedTuple):
    index: int
    type: str


class Negated(NamedTuple):
    """`!%p`"""

    register: Register


class Address(NamedTuple):
    """`[base + offset]`; a base that is no register is the name of a parameter or a variable, or a number."""

    base: "Register | str"
    offset: int


# A tuple is `{a, b}` or `a|b`; a str is an immediate, a symbol, a special register or the sink `_`.
Operand = Register | Negated | Address | str | tuple["Register | str", ...]


def vector(operand: Operand) -> tuple["Register | str", ...]:
    """The elements of `{a, b}` or `a|b`; any other operand alone."""
    return operand if type(operand) is tuple else (operand,)  # the named tuples are single operands


class Instruction(NamedTuple):
    text: str
    line: int
    op: tuple[str, ...]
    guard: Register | None
    negated: bool
    operands: tuple[Operand, ...]
    target: int  # of a branch, else -1

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


class Parameter(NamedTuple):
    name: str
    type: str


class Program(NamedTuple):
    name: str
    parameters: list[Parameter]
    threads: int | None  # .reqntid
    registers: list[str]  # type of each
    symbols: dict[str, int]  # address of each shared variable
    static_shared: int
    code: list[Instruction]


SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4}
SIZES |= {"f32": 4, "f16x2": 4, "bf16x2": 4, "tf32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 1}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_DEBUG_LINE = re.compile(r"^[ \t]*\.(?:loc|file)\b.*$", re.M)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
_LABEL = re.compile(r"([\w$%]+)\s*:(?!:)")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[\s*(\d*)\s*\])?\s*;")
_ADDRESS = re.compile(r"([\w$%.]+)\s*(?:\+\s*(-?\s*\w+)|(-\s*\w+))?")
_GUARD = re.compile(r"@(!?)\s*([\w$%]+)\s+")


@lru_cache(maxsize=64)
def parse(ptx: str) -> Program:
    """The only entry of a module. Raises PtxError where a statement isn't understood."""
    text = _DEBUG_LINE.sub("", _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), ptx))
    entries = list(_ENTRY.finditer(text))
    if len(entries) != 1:
        raise PtxError(f"expected one .entry, found {len(entries)}")
    name, parameters, directives = entries[0].groups()
    threads = re.search(r"\.reqntid\s+(\d+)", directives)
    symbols, static_shared = _shared_variables(text)
    registers: list[str] = []
    code = list(_instructions(text, entries[0].end(), registers))
    return Program(
        name=name,
        parameters=[_parameter(declaration) for declaration in parameters.split(",") if declaration.strip()],
        threads=int(threads[1]) if threads else None,
        registers=registers,
        symbols=symbols,
        static_shared=static_shared,
        code=code,
    )


def _parameter(declaration: str) -> Parameter:
    words = declaration.split()
    kind = next((word[1:] for word in words if word[1:] in SIZES), None)
    if words[0] != ".param" or kind is None or "[" in declaration:
        raise PtxError(f"unsupported parameter: {declaration.strip()}")
    return Parameter(words[-1], kind)


def _shared_variables(text: str) -> tuple[dict[str, int], int]:
    """Addresses of the shared variables, the unsized (dynamic) one after all others, and where it starts."""
    symbols: dict[str, int] = {}
    end = 0
    for align, kind, name, length in sorted(_SHARED.findall(text), key=lambda found: found[3] == ""):
        step = int(align or SIZES[kind])
        end = -(-end // step) * step
        symbols[name] = end
        end += SIZES[kind] * int(length or 0)
    return symbols, end


def _statements(text: str, start: int) -> Iterator[tuple[int, str]]:
    """(line, statement) from `start`, just past a brace, to the brace that closes it.

    A statement is "{", "}", "label:" or an instruction or directive without its semicolon.
    """
    position, depth = start, 0
    space = re.compile(r"[\s;]*")
    while True:
        position = space.match(text, position).end()
        line = text.count("\n", 0, position) + 1
        if position == len(text):
            raise PtxError("the body of the kernel does not end")
        label = _LABEL.match(text, position)
        if text[position] in "{}":
            depth += 1 if text[position] == "{" else -1
            if depth < 0:
                return
            yield line, text[position]
            position += 1
        elif label:
            yield line, label[1] + ":"
            position = label.end()
        else:
            end = text.index(";", position)
            yield line, " ".join(text[position:end].split())
            position = end + 1


def _instructions(text: str, start: int, registers: list[str]) -> Iterator[Instruction]:
    """Appends the types of declared registers to `registers`. Names and labels are those of the innermost block."""
    scopes: list[dict[str, Register]] = [{}]
    labels: list[dict[str, int]] = [{}]
    code: list[tuple[Instruction, list[dict[str, int]]]] = []
    for line, statement in _statements(text, start):
        if statement == "{":
            scopes.append({})
            labels.append({})
        elif statement == "}":
            scopes.pop()
            labels.pop()
        elif statement.endswith(":"):
            labels[-1][statement[:-1]] = len(code)
        elif statement.startswith(".reg"):
            _declare(statement, scopes[-1], registers)
        elif statement.startswith((".pragma", ".shared")):
            pass
        elif statement.startswith("."):
            raise PtxError(f"line {line}: unsupported directive: {statement}")
        else:
            code.append((_instruction(statement, line, scopes), list(labels)))
    for instruction, visible in code:
        if instruction.op[0] == "bra":
            label = instruction.operands[0]
            targets = [scope[label] for scope in visible if label in scope]
            if not targets:
                raise PtxError(f"{instruction}: no such label")
            instruction = instruction._replace(target=targets[-1])
        elif instruction.op[0] in ("ret", "exit"):
            instruction = instruction._replace(target=len(code))
        yield instruction


def _declare(statement: str, scope: dict[str, Register], registers: list[str]) -> None:
    match = re.fullmatch(r"\.reg\s*\.(\w+)\s+(.*)", statement)
    if not match or match[1] not in SIZES:
        raise PtxError(f"unsupported declaration: {statement}")
    for item in match[2].split(","):
        name, _, count = item.strip().partition("<")
        names = [f"{name}{i}" for i in range(int(count.rstrip("> ")))] if count else [name]
        for each in names:
            scope[each] = Register(len(registers), match[1])
            registers.append(match[1])


def _instruction(statement: str, line: int, scopes: list[dict[str, Register]]) -> Instruction:
    guard = _GUARD.match(statement)
    rest = statement[guard.end() :] if guard else statement
    opcode, _, operands = rest.partition(" ")
    opcode, brace, glued = opcode.partition("{")
    guarding = _operand(guard[2], scopes) if guard else None
    if guard and not isinstance(guarding, Register):
        raise PtxError(f"line {line}: no such predicate: {statement}")
    return Instruction(
        text=statement,
        line=line,
        op=tuple(opcode.replace("::cta", "").split(".")),
        guard=guarding,
        negated=bool(guard and guard[1]),
        operands=tuple(_operand(item, scopes) for item in _split(brace + glued + " " + operands)),
        target=-1,
    )


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    items, depth = [""], 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    return [item.strip() for item in items if item.strip()]


def _operand(text: str, scopes: list[dict[str, Register]]) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(item, scopes) for item in _split(text[1:-1]))
    if text.startswith("["):
        match = _ADDRESS.fullmatch(text[1:-1].strip())
        if not match:
            raise PtxError(f"unsupported address: {text}")
        offset = int((match[2] or match[3] or "0").replace(" ", ""), 0)
        return Address(_operand(match[1], scopes), offset)
    if text.startswith("!"):
        return Negated(_operand(text[1:].strip(), scopes))
    if "|" in text:
        return tuple(_operand(item.strip(), scopes) for item in text.split("|"))
    for scope in reversed(scopes):
        if text in scope:
            return scope[text]
    return text
