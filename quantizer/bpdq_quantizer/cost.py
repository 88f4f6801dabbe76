"""What a run costs: seconds and memory."""

import re
import time
from collections.abc import Mapping
from pathlib import Path

STATUS = Path("/proc/self/status")


class Clock:
    """Seconds and CPU seconds, those of earlier runs included."""

    def __init__(self, before: Mapping[str, float]) -> None:
        self.before, self.start = dict(before), self._now()

    def _now(self) -> dict[str, float]:
        return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}

    def read(self) -> dict[str, float]:
        return {key: self.before.get(key, 0.0) + now - self.start[key] for key, now in self._now().items()}


def total(*costs: Mapping[str, float]) -> dict[str, float]:
    """Of what several `Clock`s have read; what else is in a mapping is left out."""
    return {key: sum(cost.get(key, 0.0) for cost in costs) for key in ("seconds", "cpu_seconds")}


def peak_memory() -> int | None:
    """The most bytes of host memory that this process has held, None where the system does not say. Not ru_maxrss,
    which starts from the parent's."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
