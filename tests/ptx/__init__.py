"""Executes the PTX that Triton emits for sm_80 and sm_86 on the CPU, with numpy: what its interpreter can't, such as
inline assembly, is tested before it meets a GPU. `launch` describes the use."""

from tests.ptx.machine import launch
from tests.ptx.parse import PtxError
from tests.ptx.state import Report

__all__ = ["PtxError", "Report", "launch"]
