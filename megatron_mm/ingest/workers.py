"""Processes that read files: a file that kills its reader costs itself and nothing else."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

AHEAD_PER_WORKER = 4
"""Work items that wait for a worker, each: enough to keep it busy, few enough to bound memory."""


@dataclass(frozen=True)
class Failure:
    """Stands for the result of work whose process did not end it, and says why."""

    reason: str


class Workers[Item, Result]:
    """`count` processes that do work: each calls `make_task` once, and the task that it returns on every item.

    Use as a context; `make_task` is pickled. A process that dies takes only its own item with it.
    """

    def __init__(self, count: int, make_task: Callable[[], Callable[[Item], Result]]) -> None:
        self.count, self.make_task = max(1, count), make_task

    def __enter__(self) -> "Workers[Item, Result]":
        self._pool = self._start(self.count)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, count: int) -> ProcessPoolExecutor:
        # Spawned, not forked: PDFium and FFmpeg keep state that a fork would copy half-way.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(count, context, initializer=_set_up, initargs=(self.make_task,))

    def run(self, work: Sequence[Item]) -> Iterator[tuple[Item, Result | Failure]]:
        """Yield the result of each piece of work, in the order of `work`."""
        waiting: deque[tuple[Item, Future]] = deque()
        remaining = iter(work)
        while True:
            while len(waiting) < AHEAD_PER_WORKER * self.count and (item := next(remaining, None)) is not None:
                waiting.append((item, self._pool.submit(_do, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                # Whose input it was is not known: everything under way is done again, this item alone.
                result = self._do_alone(item)
                self._pool.shutdown(wait=False)
                self._pool = self._start(self.count)
                waiting = deque((other, self._pool.submit(_do, other)) for other, _ in waiting)
            yield item, result

    def _do_alone(self, item: Item) -> Result | Failure:
        with self._start(1) as single:
            try:
                return single.submit(_do, item).result()
            except BrokenProcessPool:
                return Failure("the process that read it died")


_task: Callable[[Any], Any]


def _set_up(make_task: Callable[[], Callable[[Any], Any]]) -> None:
    """Make a new worker ready."""
    global _task
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    _task = make_task()


def _leave_with_parent() -> None:
    """End this worker when the run that it works for is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _do(item: Any) -> Any:
    return _task(item)
