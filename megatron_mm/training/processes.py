"""When a process of this machine began, on the clock that nobody sets: wall clocks step."""

import os
import time
from pathlib import Path


def began(pid: int) -> float | None:
    """Return the seconds from the boot of this machine to the start of a process, None if it has ended."""
    try:
        state, *others = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(others[18]) / os.sysconf("SC_CLK_TCK")


def age() -> float:
    """Return for how many seconds this process has been there."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (began(os.getpid()) or 0.0)
