"""Ending a run early, at a step edge, on all ranks alike: on Ctrl-C, SIGUSR1, a flag file, or a deadline.

SIGTERM ends a rank at once, as it always does: with it SLURM also announces that a node is gone, and a save needs all.
"""

import logging
import math
import os
import signal
import time
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist

from megatron_mm.engine import device
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import ConfigError

log = logging.getLogger(__name__)

STOP_FILE = "MEGATRON_MM_STOP_FILE"
"""Names a file whose existence asks the run to save and end; the batch script makes it before the time limit."""
DEADLINE = "MEGATRON_MM_DEADLINE"
"""Unix time at which the run is to save and end. A clock that is set while the run lasts does not move its end."""


def _deadline() -> float:
    """Return the time.monotonic() at which the run is to end."""
    text = os.environ.get(DEADLINE) or "inf"
    try:
        if math.isnan(deadline := float(text)):
            raise ValueError
        return time.monotonic() + deadline - time.time()
    except ValueError:
        raise ConfigError(f"{DEADLINE}={text} in the environment is no Unix time. Give one, or unset it.") from None


class StopRequest:
    """Knows whether this process was asked to stop, and what all ranks make of it."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._signalled = self.interrupted = False
        self._file = os.environ.get(STOP_FILE)
        self._deadline = _deadline()
        self._before = signal.signal(signal.SIGUSR1, self._on_signal)

    def interrupt(self) -> None:
        """Ask, for Ctrl-C, that the run saves and ends; rank 0 says how it ends at once."""
        self.interrupted = True
        if self._mesh.is_rank_0:
            log.warning("Ctrl-C: the run saves after this step and ends; once more ends it now")

    def _on_signal(self, *_: object) -> None:
        self._signalled = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGUSR1, self._before or signal.SIG_DFL)

    def reason(self) -> str | None:
        """Return why this rank wants to stop, None if it does not; rank 0 looks at the file and the clock."""
        if self.interrupted:
            return "Ctrl-C"
        if self._signalled:
            return "SIGUSR1"
        if self._mesh.is_rank_0 and self._file and Path(self._file).exists():
            return f"{self._file} exists"
        if self._mesh.is_rank_0 and time.monotonic() >= self._deadline:
            return "the deadline is reached"
        return None

    def agreed(self) -> bool:
        """Return whether any rank was asked to stop. Collective over all ranks, after every step."""
        wanted = torch.tensor(int(self.reason() is not None), device=device.current())
        dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return bool(wanted)
