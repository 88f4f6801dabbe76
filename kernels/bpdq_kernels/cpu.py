"""y = x @ W.T + bias on a CPU, and experts: cpu_linear.cpp, compiled once for this machine's instruction set when used,
and called from Python here, or by cpu_op.cpp without it.

Where there is no compiler, or others can write the cache, layers stay as stored and `reference` multiplies.
"""

import ctypes
import functools
import math
import mmap
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from bpdq_kernels import reference
from bpdq_kernels.activation import NAMES, Activation
from bpdq_kernels.compiled import DTYPE_CODES, library_or_none, load_library
from bpdq_kernels.layout import (
    CPU_TILE,
    GROUP_SIZES,
    MAX_PLANES,
    WORD,
    PreparedExperts,
    Stored,
    has_trellis,
    rows_of_cpu_tiles,
    to_cpu_tiles,
)

SOURCE = Path(__file__).with_name("cpu_linear.cpp")
OP_SOURCE = Path(__file__).with_name("cpu_op.cpp")
MACROS = (f"-DBPDQ_WORD={WORD}", f"-DBPDQ_TILE={CPU_TILE}", f"-DBPDQ_MAX_GROUP={max(GROUP_SIZES)}")
MACROS += (f"-DBPDQ_MAX_PLANES={MAX_PLANES}",)
OP_TORCH = (2, 10)  # whose stable interface for C++ has all that OP_SOURCE calls
LINE, SLAB = 64, 64 << 20  # bytes: where tensors begin, and of memory that they share
ACTIVATION_CODES = {dtype: code for dtype, code in DTYPE_CODES.items() if dtype.is_floating_point}
FEW = -1  # tokens that are looked up: as many as suits


class _Matrix(ctypes.Structure):
    """`Matrix` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("planes", "coefficients", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("dtype", "in_features", "out_features", "group_size", "plane_count")),
        ("trellis", ctypes.c_bool),
    ]


def open_library(isa: str, macros: Sequence[str] = ()) -> ctypes.CDLL:
    """The library for an instruction set, which is its `isa`; macros: more of them. Raises as
    `compiled.compile_library`."""
    library = load_library(SOURCE, isa, (*MACROS, *macros))
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    matrix = ctypes.POINTER(_Matrix)
    library.bpdq_linear.restype = library.bpdq_experts.restype = None
    library.bpdq_linear.argtypes = [matrix, pointer, *[integer] * 4, pointer]
    library.bpdq_experts.argtypes = [matrix, matrix, integer, pointer, *[integer] * 2, *[pointer] * 2, *[integer] * 3]
    library.bpdq_experts.argtypes += [number, number, ctypes.c_bool, integer, pointer]
    library.isa = isa
    return library


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library for this machine, which ops then use; None, after one line in the log, where there can be none."""
    found = library_or_none(open_library, "BPDQ layers run slowly on this CPU, as their kernel")
    if found is not None:
        use(found)
    return found


def use(kernels: ctypes.CDLL, few: int = FEW) -> None:
    """Let the ops `bpdq::linear`, `bpdq::embedding` and `bpdq::moe` call these kernels without Python between, where
    that can be: cpu_op.cpp is then what they are on a CPU, in place of what `ops` and `moe` have for any device."""
    compiled = op_library()
    if compiled is not None:
        functions = kernels.bpdq_linear, kernels.bpdq_rows, kernels.bpdq_experts
        compiled.bpdq_use(*(ctypes.cast(function, ctypes.c_void_p) for function in functions), few)


@functools.cache
def op_library() -> ctypes.CDLL | None:
    """The ops compiled against this torch; None where it is too old, or, after one line in the log, for want of what
    that takes."""
    if TorchVersion(torch.__version__) < OP_TORCH:
        return None
    return library_or_none(_open_op_library, "BPDQ layers take 10 us more to call on this CPU, as their op")


def _open_op_library(isa: str) -> ctypes.CDLL:
    torch_folder = Path(torch.__file__).parent
    target = sum(number << shift for number, shift in zip(OP_TORCH, (56, 48), strict=True))
    macros = (f"-DTORCH_TARGET_VERSION={target:#x}", f"-DBPDQ_TORCH={torch.__version__}")  # compiled anew for each
    include = ("-isystem", str(torch_folder / "include"))
    library = load_library(OP_SOURCE, isa, (*macros, *include), (f"-L{torch_folder / 'lib'}", "-ltorch_cpu"))
    library.bpdq_use.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64]
    return library


def prepare(
    B: Tensor, c: Tensor, group_size: int, s: Tensor | None, empty: Callable[[torch.Size], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """B [ceil(K/32), k, N], c [ceil(K/G), k+1, N] and s [k+1, N] (k+2 of a trellis) in the order of
    `bpdq_kernels.layout.to_cpu_tiles`.

    Returns planes int32, coefficients in c's dtype and scales fp32 or None, with N padded to tiles; the sizes of the
    first two are kept, but say nothing of the order inside. Planes are in memory that `empty` makes. Without a library,
    B, c and s themselves.
    """
    if library() is None:
        return B.contiguous(), c.contiguous(), None if s is None else s.contiguous()
    padding = -B.shape[2] % CPU_TILE
    B, c = (torch.nn.functional.pad(tensor, (0, padding)) for tensor in (B, c))
    s = None if s is None else torch.nn.functional.pad(s, (0, padding))
    planes = empty(B.shape)
    return planes, *to_cpu_tiles(B, c, group_size, planes, s, bytes_together())


class Pages:
    """Memory that Linux may hold in pages of 2 MiB, which smaller tensors share: a token reads every weight once, and
    small pages stall each time. Memory is freed with the last tensor of a slab."""

    def __init__(self) -> None:
        self._slab, self._used, self._lock = mmap.mmap(-1, 1), 1, threading.Lock()

    def tensor(self, shape: Sequence[int]) -> Tensor:
        """An int32 tensor whose values are undefined."""
        count = math.prod(shape)
        if not count or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=torch.int32)
        nbytes = -(-4 * count // LINE) * LINE
        with self._lock:
            if self._used + nbytes > len(self._slab):
                self._slab, self._used = mmap.mmap(-1, max(nbytes, SLAB), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
                with suppress(OSError):  # advice: where it is refused, nothing is lost
                    self._slab.madvise(mmap.MADV_HUGEPAGE)
            offset, self._used = self._used, self._used + nbytes
            return torch.frombuffer(self._slab, dtype=torch.int32, count=count, offset=offset).view(*shape)


@functools.cache
def pages() -> Pages:
    """Those of this process."""
    return Pages()


def stored_rows(planes: Tensor, coefficients: Tensor, scales: Tensor | None, group_size: int, rows: Tensor) -> Stored:
    """The tensors of the outputs `rows` [R] from what `prepare` returned, as they were stored, but s in fp32."""
    if library() is None:
        return Stored(planes, coefficients, scales).outputs(rows)
    return rows_of_cpu_tiles(planes, coefficients, scales, group_size, rows, bytes_together())


def bytes_together() -> bool:
    """Whether the library reads planes with the bytes of outputs together (`bpdq_kernels.layout.to_cpu_tiles`)."""
    return library().isa == "avx2"


def linear(
    x: Tensor,
    planes: Tensor,
    coefficients: Tensor,
    scales: Tensor | None,
    group_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """y [..., N] = x [..., K] @ W.T + bias in x.dtype; planes, coefficients and scales from `prepare`.

    Sums are fp32. W is exact, or rounded to bf16 where bf16 x is multiplied in bf16. With AVX2 or VBMI, 16-bit x is
    rounded to multiples of at most 2^-14 of the most that four neighbours have together in its group, of a trellis
    neighbours in a chain; fp32 x, with VBMI, of 2^-29, and a group's sums of that are exact.
    """
    if library() is None:
        return reference.linear(x, planes, coefficients, group_size, bias, scales)
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype)
    rows = _rows(x.reshape(-1, x.shape[-1]))
    bias = None if bias is None else bias.float().contiguous()
    stored = Stored(planes, coefficients, scales)
    compiled = library()
    compiled.bpdq_linear(
        _matrix(stored, rows.shape[1], out_features, group_size, bias),
        rows.data_ptr(),
        ACTIVATION_CODES[x.dtype],
        rows.stride(0),
        len(rows),
        FEW,
        y.data_ptr(),
    )
    return y


def moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    up: PreparedExperts,
    down: PreparedExperts,
    activation: Activation,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    weights_on_input: bool,
) -> Tensor:
    """As `bpdq_kernels.moe.moe`; sums and W are those of `linear`."""
    if library() is None:
        return reference.moe(x, topk_weights, topk_ids, up, down, activation, up_bias, down_bias, weights_on_input)
    y, rows = torch.empty_like(x, memory_format=torch.contiguous_format), _rows(x)
    weights, ids = topk_weights.float().contiguous(), topk_ids.long().contiguous()
    biases = [None if bias is None else bias.float().contiguous() for bias in (up_bias, down_bias)]
    held = [
        _matrix(m.stored, m.in_features, m.out_features, m.group_size, bias)
        for m, bias in zip((up, down), biases, strict=True)
    ]
    compiled = library()
    compiled.bpdq_experts(
        *held,
        len(up.planes),
        rows.data_ptr(),
        ACTIVATION_CODES[x.dtype],
        rows.stride(0),
        ids.data_ptr(),
        weights.data_ptr(),
        *ids.shape,
        NAMES.index(activation.name),
        activation.alpha,
        activation.limit,
        weights_on_input,
        FEW,
        y.data_ptr(),
    )
    return y


def _rows(x: Tensor) -> Tensor:
    """x [M, K] with each row's numbers beside each other."""
    return x if x.stride(1) == 1 else x.contiguous()


def _matrix(stored: Stored, in_features: int, out_features: int, group_size: int, bias: Tensor | None) -> _Matrix:
    planes, coefficients, scales = stored
    return _Matrix(
        planes.data_ptr(),
        coefficients.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        DTYPE_CODES[coefficients.dtype],
        in_features,
        out_features,
        group_size,
        planes.shape[-2],
        has_trellis(planes, coefficients),
    )
