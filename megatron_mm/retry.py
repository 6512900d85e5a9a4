"""Trying again what storage refuses for a while, as long as guard.retry_minutes says."""

import logging
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from megatron_mm.errors import StorageFailed, is_passing

log = logging.getLogger(__name__)

FIRST_SECONDS, LONGEST_SECONDS = 1.0, 60.0
"""The first wait, which each next one doubles, and the longest."""
_patience = {"minutes": 0.0}


def be_patient(minutes: float) -> None:
    """Let this process try for so long what storage refuses; until then, and with 0, it tries once."""
    _patience["minutes"] = minutes


def retrying[T](action: Callable[[], T], *, what: str | Path, minutes: float | None = None, ours: bool = False) -> T:
    """Return what `action` returns, which reads or writes `what`; try again while storage refuses it for now.

    `ours` if the file is known to be there, since the run has written it or other ranks see it. What is tried again
    must do no harm the second time. Raises StorageFailed with the file when `minutes` (by default the process's own)
    are over, and at once what does not pass by itself.
    """
    began, wait = time.monotonic(), FIRST_SECONDS
    patience = 60 * (_patience["minutes"] if minutes is None else minutes)
    while True:
        try:
            return action()
        except OSError as error:
            if not is_passing(error, ours=ours):
                raise
            file, reason, left = error.filename or what, error.strerror or error, patience - time.monotonic() + began
            if left <= 0:
                tried = f" (tried again for {patience / 60:.3g} minutes)" if patience else ""
                raise StorageFailed(f"{file}: {reason}{tried}. Look at the storage; nothing is changed.") from error
        pause = min(left, wait * random.uniform(0.5, 1.0))  # not all ranks at once
        log.warning(
            "rank %s: %s: %s; trying again in %.1f s, for %.0f s more",
            *(os.environ.get("RANK", "0"), file, reason, pause, left),
        )
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_SECONDS)
