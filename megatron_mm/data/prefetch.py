"""Reading steps ahead of the loop, in a background thread that is replaced when it hangs."""

import logging
import queue
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Protocol

from megatron_mm.batch import MicroBatch
from megatron_mm.errors import StorageFailed

log = logging.getLogger(__name__)

MAX_STALLS = 3
"""Readers in a row that may hang at one step before the run ends."""


class StepReader(Protocol):
    """What a Loader is to a Prefetcher."""

    def step(self, step: int) -> list[MicroBatch]:
        """Return this rank's micro-batches of optimizer step `step`."""

    def renew_decoders(self) -> None:
        """Take a new decoder: a thread that hangs may hold the old one."""


class Prefetcher:
    """Reads steps ahead. Raises what reading raised, at the step concerned.

    A step is a pure function of its number, so what a thread that hangs or dies was reading is read again by another,
    to the same batch. Raises StorageFailed that names the thread and where it stands when MAX_STALLS of them were given
    `stall_seconds` each for one step.
    """

    def __init__(self, loader: StepReader, *, steps: Sequence[int], ahead: int, stall_seconds: float = 240.0) -> None:
        self._loader, self._steps, self._ahead, self._stall_seconds = loader, steps, ahead, stall_seconds

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        if not self._ahead:
            yield from map(self._loader.step, self._steps)
            return
        reader = _Reader(self._loader, steps=self._steps, ahead=self._ahead)
        stalls = 0
        try:
            for place, step in enumerate(self._steps):
                while not reader.wait(self._stall_seconds):
                    stalls += 1
                    what = reader.describe()
                    reader.stop()
                    if stalls == MAX_STALLS:
                        raise StorageFailed(
                            f"step {step} could not be read by {MAX_STALLS} threads, the last of which {what}. Look at "
                            "the storage of data.train, or give more time with data.stall_seconds."
                        )
                    log.warning("%s: step %d is read again by a new thread", what, step)
                    self._loader.renew_decoders()
                    rest, number = self._steps[place:], reader.number + 1
                    reader = _Reader(self._loader, steps=rest, ahead=self._ahead, number=number)
                stalls = 0
                yield reader.take()
        finally:
            reader.stop()


class _Reader:
    """A daemon thread that reads steps into a queue of bounded length; one that hangs is left to itself."""

    def __init__(self, loader: StepReader, *, steps: Sequence[int], ahead: int, number: int = 0) -> None:
        self.number = number
        self._loader, self._steps = loader, steps
        self._queue: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(ahead)
        self._waiting: list[list[MicroBatch] | BaseException] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name=f"loader-{number}", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Return whether a step arrived within `seconds`."""
        try:
            self._waiting.append(self._queue.get(timeout=seconds))
        except queue.Empty:
            return False
        return True

    def take(self) -> list[MicroBatch]:
        """Return the step that `wait` waited for, or raise what reading it raised."""
        outcome = self._waiting.pop()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def describe(self) -> str:
        """Return what became of the thread, for people: where it stands, if it still runs."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if not self._thread.is_alive() or frame is None:
            return f"{self._thread.name} is dead"
        place = traceback.extract_stack(frame)[-1]
        return f"{self._thread.name} hangs in {place.name} ({place.filename}:{place.lineno})"

    def stop(self) -> None:
        """Let the thread end when it can; nobody takes what it still brings."""
        self._stopped.set()
        while not self._queue.empty():
            self._queue.get_nowait()

    def _read(self) -> None:
        for step in self._steps:
            if self._stopped.is_set():
                return
            try:
                outcome: list[MicroBatch] | BaseException = self._loader.step(step)
            except BaseException as error:
                outcome = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(outcome, timeout=0.5)
                    break
                except queue.Full:
                    continue
            if isinstance(outcome, BaseException):
                return
