"""Memory of this process as the system counts it."""

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The most memory this process has held so far.

    On Linux VmHWM: `ru_maxrss` there may be the figure of the process that started this one.
    """
    return _read("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def resident_bytes() -> int:
    """The memory this process holds now; its peak so far where the system does not tell."""
    return _read("VmRSS") or peak_bytes()


def _read(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
