"""Shared memory of a CTA, byte by byte: data, and who wrote and read it since the last barrier.

A race is an access that only a barrier could order after another warp's (write then read, read then write), or any
access to the destination of a cp.async that its thread has not waited for. Lanes of one warp are taken to run in
lockstep, and two warps may write the same bytes (Triton stores replicated values twice).
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tests.ptx.integer import UNSIGNED, Array
from tests.ptx.parse import Instruction, PtxError

if TYPE_CHECKING:
    from tests.ptx.state import Machine

UNINITIALISED, PENDING = -1, -2


class Copy(NamedTuple):
    """A cp.async of some lanes: the group of each, the destination in units of its size, and the bytes."""

    instruction: Instruction
    lanes: Array
    group: Array
    rows: Array
    data: Array


class Shared:
    def __init__(self, size: int, threads: int, machine: "Machine"):
        self.size = size
        self.machine = machine
        self.warps = threads // 32
        self.warp_of = np.arange(threads) // 32
        self.padded = -(-size // 16) * 16
        self.conflict_cache: dict[tuple[int, bytes, bytes], int] = {}
        self.reset()

    def reset(self) -> None:
        """As a CTA finds it."""
        self.data = np.full(self.padded, 0xA5, np.uint8)
        self.writer = np.full(self.padded, UNINITIALISED, np.int32)  # epoch * warps + warp
        self.reader = np.zeros((self.warps, self.padded), np.int32)  # epoch
        self.epoch = 1
        self.committed = np.zeros(self.warps * 32, np.int64)
        self.copies: list[Copy] = []

    def barrier(self) -> None:
        self.epoch += 1

    def rows(self, instruction: Instruction, addresses: Array, size: int) -> Array:
        """Addresses in units of the access size. Raises where one is out of bounds or misaligned."""
        if len(addresses) and (addresses.max() > self.size - size or addresses.min() < 0):
            raise PtxError(f"{instruction}: shared address {addresses.max()} is outside of {self.size} bytes")
        if (addresses & (size - 1)).any():
            raise PtxError(f"{instruction}: shared address is not aligned to {size} bytes")
        return addresses >> (size.bit_length() - 1)

    def load(self, instruction: Instruction, addresses: Array, lanes: Array, width: int, count: int) -> Array:
        """[lanes, count] elements of `width` bytes."""
        size = width * count
        rows = self.rows(instruction, addresses, size)
        self.check_read(instruction, rows, lanes, size)
        self.count_conflicts(instruction, addresses, lanes, size)
        return self.data.view(UNSIGNED[width]).reshape(-1, count)[rows]

    def store(self, instruction: Instruction, addresses: Array, lanes: Array, values: Array) -> None:
        """`values`: [lanes, count]; of lanes with the same address the last wins."""
        size = values.shape[1] * values.itemsize
        rows = self.rows(instruction, addresses, size)
        self.check_write(instruction, rows, lanes, size)
        self.count_conflicts(instruction, addresses, lanes, size)
        self.data.view(values.dtype).reshape(-1, values.shape[1])[rows] = values
        self.mark_written(rows, lanes, size)

    def mark_written(self, rows: Array, lanes: Array, size: int) -> None:
        self.writer.reshape(-1, size)[rows] = (self.epoch * self.warps + self.warp_of[lanes])[:, None]

    def check_read(self, instruction: Instruction, rows: Array, lanes: Array, size: int) -> None:
        writer, now = self.writer.reshape(-1, size)[rows], self.epoch * self.warps
        warps = self.warp_of[lanes]
        readable = (writer >= 0) & ((writer < now) | (writer == (now + warps)[:, None]))
        if not readable.all():
            report = self.machine.report
            if (writer == PENDING).any():
                self.machine.hazard(report.races, f"{instruction}: reads what cp.async has not been waited for")
            elif (writer == UNINITIALISED).any():
                self.machine.hazard(report.uninitialised, f"{instruction}: reads uninitialised shared memory")
            else:
                message = f"{instruction}: reads what another warp wrote since the last barrier"
                self.machine.hazard(report.races, message)
        if self.warps > 1:
            self.reader.reshape(self.warps, -1, size)[warps, rows] = self.epoch

    def check_write(self, instruction: Instruction, rows: Array, lanes: Array, size: int) -> None:
        report = self.machine.report
        if (self.writer.reshape(-1, size)[rows] == PENDING).any():
            self.machine.hazard(report.races, f"{instruction}: writes where a cp.async has not been waited for")
        if self.warps > 1:
            read = self.reader.reshape(self.warps, -1, size)[:, rows] == self.epoch
            read[self.warp_of[lanes], np.arange(len(lanes))] = False
            if read.any():
                message = f"{instruction}: overwrites what another warp read since the last barrier"
                self.machine.hazard(report.races, message)

    def copy(self, instruction: Instruction, addresses: Array, lanes: Array, data: Array) -> None:
        """Start a cp.async of `data` [lanes, bytes]."""
        size = data.shape[1]
        rows = self.rows(instruction, addresses, size)
        self.check_write(instruction, rows, lanes, size)
        self.count_conflicts(instruction, addresses, lanes, size)
        self.writer.reshape(-1, size)[rows] = PENDING
        self.copies.append(Copy(instruction, lanes, self.committed[lanes], rows, data))

    def commit(self, lanes: Array) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: Array, pending_groups: int) -> None:
        """Complete the copies of all but the last `pending_groups` committed groups of each lane."""
        waiting = np.zeros(len(self.committed), bool)
        waiting[lanes] = True
        left = []
        for copy in self.copies:
            done = waiting[copy.lanes] & (copy.group < self.committed[copy.lanes] - pending_groups)
            if done.any():
                size = copy.data.shape[1]
                self.data.reshape(-1, size)[copy.rows[done]] = copy.data[done]
                self.mark_written(copy.rows[done], copy.lanes[done], size)
            if not done.all():
                keep = ~done
                left.append(Copy(copy.instruction, *(part[keep] for part in copy[1:])))
        self.copies = left

    def count_conflicts(self, instruction: Instruction, addresses: Array, lanes: Array, size: int) -> None:
        if len(addresses) == 0:
            return
        shape = (addresses - (addresses[0] & ~3)).tobytes()
        key = (size, shape, b"" if len(lanes) == self.warps * 32 else lanes.tobytes())
        extra = self.conflict_cache.get(key)
        if extra is None:
            extra = self.conflict_cache[key] = bank_conflicts(addresses, lanes, size, self.warps * 32)
        if extra:
            self.machine.report.bank_conflicts[str(instruction)] += extra


def bank_conflicts(addresses: Array, lanes: Array, size: int, threads: int) -> int:
    """Wavefronts beyond one for each 32 words: lanes of a warp at once for up to 4 bytes, half of them for 8, a
    quarter for 16. Lanes that access the same word share it; words of one bank take a wavefront each."""
    words_each = max(1, size // 4)
    words = np.full((threads, words_each), -1, np.int64)
    words[lanes] = (addresses // 4)[:, None] + np.arange(words_each)
    phases = np.sort(words.reshape(-1, 32), axis=1)
    distinct = phases >= 0
    distinct[:, 1:] &= phases[:, 1:] != phases[:, :-1]
    slots = np.arange(len(phases))[:, None] * 32 + phases % 32
    per_bank = np.bincount(slots[distinct], minlength=32 * len(phases)).reshape(-1, 32)
    return int(np.maximum(per_bank.max(axis=1) - 1, 0).sum())
