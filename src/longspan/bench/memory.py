"""Memory of this process as the system counts it."""

import ctypes
import resource
import sys
from collections.abc import Callable
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


def temporaries(run: Callable[[], object]) -> int | None:
    """Bytes by which memory rises at its highest while `run` runs, result included.

    None where the system does not let the high-water mark be reset, and where the C library
    cannot be asked to give back what it kept from earlier runs, which would hide as much.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _read("VmRSS")
    run()
    after = _read("VmHWM")
    return None if before is None or after is None else max(0, after - before)


def _read(name: str) -> int | None:
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
