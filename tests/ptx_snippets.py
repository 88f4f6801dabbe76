"""Small PTX kernels around a few instructions, run by the emulator, and exact floating point to compare with."""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import triton

from tests.ptx import launch

RNG = np.random.default_rng(0)
U32 = 0xFFFFFFFF
SHARED = ".extern .shared .align 16 .b8 smem[];"
WRITTEN: set[str] = set()  # every kernel text made here
EDGES = {
    16: [0, 1, 2, 0x3FF, 0x400, 0x7BFF, 0x7C00, 0x7E00, 0x8000, 0x8001, 0x83FF, 0x8400, 0xFBFF, 0xFC00, 0x3C00, 0xBC00],
    32: [0, 1, 0x7FFFFFFF, 0x80000000, U32, 0x7F800000, 0x7FC00000, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000],
    64: [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 32, U32],
}


def random_bits(width: int, lanes: int = 128) -> np.ndarray:
    """Any bits, with the edge cases at the start, in another order each time."""
    bits = (
        RNG.integers(0, 1 << width, lanes, np.uint64, endpoint=False)
        if width < 64
        else RNG.integers(0, 1 << 63, lanes, np.uint64) * np.uint64(2) + RNG.integers(0, 2, lanes, np.uint64)
    )
    edges = RNG.permutation(np.array(EDGES[width], np.uint64))
    bits[: len(edges)] = edges
    return bits.astype(f"u{width // 8}")


def kernel_text(body: str, buffers: int, declarations: str = "") -> str:
    """A kernel with the shared array `smem`, pointers %a0, %a1, ... and %t, the number of the thread."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(buffers))
    loads = "\n".join(f"ld.param.u64 %a{i}, [p{i}];" for i in range(buffers))
    text = f"""
.version 7.8
.target sm_86
.address_size 64
{SHARED}
.visible .entry k({parameters})
{{
.reg .b64 %a<{buffers}>;
.reg .b64 %at;
.reg .b32 %t;
{declarations}
mov.u32 %t, %tid.x;
{loads}
{body}
ret;
}}
"""
    WRITTEN.add(text)
    return text


def evaluate(body: str, inputs: list[np.ndarray], results: list[str]) -> list[np.ndarray]:
    """Run `body` on lanes that hold their elements of the inputs in %x0, %x1, ..., and return its %y0, %y1, ...

    results: numpy types of the outputs.
    """
    outputs = [np.zeros(len(inputs[0]), kind) for kind in results]
    buffers = [*inputs, *outputs]
    names = [f"%x{i}" for i in range(len(inputs))] + [f"%y{i}" for i in range(len(outputs))]
    sizes = [array.itemsize for array in buffers]
    declarations = "\n".join(f".reg .b{8 * size} {name};" for name, size in zip(names, sizes, strict=True))
    steps = []
    for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
        access = f"ld.global.b{8 * size} {name}, [%at];" if i < len(inputs) else f"st.global.b{8 * size} [%at], {name};"
        steps.append(f"mad.wide.u32 %at, %t, {size}, %a{i};\n{access}")
    text = kernel_text("\n".join([*steps[: len(inputs)], body, *steps[len(inputs) :]]), len(buffers), declarations)
    launch(text, (1,), len(inputs[0]), buffers)
    return outputs


def check(body: str, inputs: list[np.ndarray], result: str, oracle: Callable[..., int]) -> None:
    """Assert that %y0 of every lane is `oracle` of the lane's inputs, both as unsigned integers."""
    (got,) = evaluate(body, inputs, [result])
    expected = [oracle(*(int(x[lane]) for x in inputs)) for lane in range(len(got))]
    for lane, (y, wanted) in enumerate(zip(got.tolist(), expected, strict=True)):
        operands = [hex(int(x[lane])) for x in inputs]
        assert y == wanted, f"{body}: {operands} gives {y:#x}, not {wanted:#x}"


def signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) else value


FORMATS = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23)}


def number(bits: int, kind: str) -> Fraction | float:
    """Exact value; infinities and NaN as floats."""
    exponent_bits, fraction_bits = FORMATS[kind]
    sign = -1 if bits >> (exponent_bits + fraction_bits) else 1
    exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1)
    fraction = bits & ((1 << fraction_bits) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        return float("nan") if fraction else sign * float("inf")
    if exponent:
        fraction |= 1 << fraction_bits
    return sign * Fraction(fraction) * Fraction(2) ** (max(exponent, 1) - bias - fraction_bits)


def rounded(value: Fraction, kind: str, mode: str = "rn") -> int:
    """Bits of the nearest even or, for rz, of the next number toward zero; of a positive zero for 0."""
    exponent_bits, fraction_bits = FORMATS[kind]
    bias = (1 << (exponent_bits - 1)) - 1
    sign, value = (value < 0) << (exponent_bits + fraction_bits), abs(value)
    exponent = 1 - bias
    while value >= Fraction(2) ** (exponent + 1):
        exponent += 1
    scaled = value / Fraction(2) ** (exponent - fraction_bits)
    mantissa = round(scaled) if mode == "rn" else int(scaled)  # Python rounds fractions to even
    bits = mantissa if exponent == 1 - bias else mantissa + (exponent + bias - 1 << fraction_bits)
    infinity = (1 << exponent_bits) - 1 << fraction_bits
    return sign | min(bits, infinity - (mode == "rz"))


def finite(bits: np.ndarray, kind: str) -> np.ndarray:
    """With infinities and NaN replaced by 1."""
    exponent_bits, fraction_bits = FORMATS[kind]
    special = ((1 << exponent_bits) - 1) << fraction_bits
    one = ((1 << (exponent_bits - 1)) - 1) << fraction_bits
    return np.where((bits & special) == special, one, bits).astype(bits.dtype)


def assembled() -> Iterator[None]:
    """Fixture of a module: ptxas accepts, for sm_86, every kernel that its tests have made."""
    WRITTEN.clear()
    yield
    entries = (text[text.index(".visible .entry") :] for text in sorted(WRITTEN))
    kernels = [entry.replace(".entry k(", f".entry k{i}(") for i, entry in enumerate(entries)]
    header = f".version 8.6\n.target sm_86\n.address_size 64\n{SHARED}\n"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernels.ptx"
        source.write_text(header + "\n".join(kernels))
        command = [triton.knobs.nvidia.ptxas.path, "-arch=sm_86", "-O0", source, "-o", Path(folder) / "cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            number_of_line = int(re.search(r"line (\d+)", done.stderr)[1])
            pytest.fail(f"{done.stderr}{source.read_text().splitlines()[number_of_line - 1]}")
