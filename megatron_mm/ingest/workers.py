"""Processes that read files, within limits: a file that hangs, explodes or crashes its reader costs itself only."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import resource
import signal
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from megatron_mm import endings, printable
from megatron_mm.ingest.document import unexpected

AHEAD_PER_WORKER = 4
"""Work items under way or done and waiting for their turn, for each worker: few enough to bound memory."""
GIVEN_PER_WORKER = 2
"""Items that a worker holds, so that it need not wait for the next."""
START_SECONDS = 120.0
"""What a process may take to import its libraries and to load its tokenizer."""


@dataclass(frozen=True)
class Limits:
    """What one item may cost before its process is killed; of one that calls `restart_limits`, each part of it."""

    wall_seconds: float = 300.0
    """The most seconds that a task takes from its start to its result."""
    cpu_seconds: int = 300
    """The most CPU seconds of a task, over all threads."""
    memory_gib: float = 4.0
    """The most bytes of data (heap and private mappings) that the process may hold."""


DEFAULTS = Limits()


@dataclass(frozen=True)
class Failure:
    """Stands for the result of an item that gave none, and says why."""

    reason: str


@dataclass(frozen=True)
class Cut[Item]:
    """What a task returns instead of a result when it finds its item too large: the parts to be done in its place."""

    parts: Sequence[Item]


@dataclass(eq=False)
class _Slot[Item]:
    """An item under way, and its result when there is one."""

    item: Item
    result: Any = None
    done: bool = False


class Workers[Item, Result]:
    """`count` processes that do work: each calls `make_task` once, and the task that it returns on every item.

    Use as a context; `make_task` is pickled. An item whose process dies or passes a limit is cut by `split` and its
    parts are tried one by one; what cannot be cut further gives a Failure. A task may itself return a Cut. Raises
    RuntimeError if a process cannot be started.
    """

    def __init__(
        self,
        count: int,
        make_task: Callable[[], Callable[[Item], "Result | Cut[Item]"]],
        *,
        limits: Limits = DEFAULTS,
        split: Callable[[Item], Sequence[Item]] = lambda item: [item],
    ) -> None:
        self.count, self.make_task, self.limits, self.split = max(1, count), make_task, limits, split

    def __enter__(self) -> "Workers[Item, Result]":
        self._folder = tempfile.TemporaryDirectory(prefix="workers-")
        self._workers = [self._start() for _ in range(self.count)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        self._folder.cleanup()

    def _start(self) -> "_Worker":
        return _Worker(self.make_task, self.limits, self._folder.name)

    def run(self, work: Iterable[Item]) -> Iterator[tuple[Item, Result | Failure]]:
        """Yield each item of `work`, or the parts that it had to be cut into, with its result, in the order of `work`.

        A task that raises gives a Failure too.
        """
        remaining = iter(work)
        self._waiting: deque[_Slot[Item]] = deque()
        self._unassigned: deque[_Slot[Item]] = deque()
        while True:
            while len(self._waiting) < AHEAD_PER_WORKER * self.count and (item := next(remaining, None)) is not None:
                slot = _Slot(item)
                self._waiting.append(slot)
                self._unassigned.append(slot)
            if not self._waiting:
                return
            self._hand_out()
            self._collect()
            while self._waiting and self._waiting[0].done:
                if isinstance(self._waiting[0].result, Cut):
                    self._replace(self._waiting[0], self._waiting[0].result.parts)
                    continue
                slot = self._waiting.popleft()
                yield slot.item, slot.result

    def _hand_out(self) -> None:
        for _ in range(GIVEN_PER_WORKER):
            for worker in sorted(self._workers, key=lambda worker: len(worker.given)):
                if self._unassigned and len(worker.given) < GIVEN_PER_WORKER:
                    worker.give(self._unassigned.popleft())

    def _collect(self) -> None:
        """Take in what is there, waiting for the first message or the first deadline."""
        busy = {worker.connection: worker for worker in self._workers if worker.given}
        until = min(worker.deadline for worker in busy.values())
        readable = multiprocessing.connection.wait(list(busy), max(0.0, until - time.monotonic()))
        for connection, worker in busy.items():
            if connection in readable:
                failure = worker.receive()
            elif time.monotonic() > worker.deadline:
                failure = Failure(f"reading it took more than {self.limits.wall_seconds:g} seconds")
            else:
                continue
            if failure is not None:
                self._give_up(worker, failure)

    def _give_up(self, worker: "_Worker", failure: Failure) -> None:
        """Replace a process that failed at the first item that it was given; the others are given out again."""
        worker.kill()
        slot, *others = worker.given
        self._unassigned.extendleft(reversed(others))
        parts = self.split(slot.item)
        if len(parts) > 1:
            self._replace(slot, parts)
        else:
            slot.result, slot.done = failure, True
        self._workers[self._workers.index(worker)] = self._start()

    def _replace(self, slot: _Slot[Item], parts: Sequence[Item]) -> None:
        """Put parts where their item stood, to be done first."""
        slots = [_Slot(part) for part in parts]
        place = self._waiting.index(slot)
        del self._waiting[place]
        for offset, part in enumerate(slots):
            self._waiting.insert(place + offset, part)
        self._unassigned.extendleft(reversed(slots))


@dataclass
class _Message:
    """What a process sends: that it is ready, that it could not be, or a result."""

    result: Any = None
    broken: str = ""
    """Why the process could not start."""
    spoilt: str = ""
    """Why the process must not go on, with the item that it was doing."""
    more_seconds: int | None = None
    """How much longer than by the limits the rest of an item may take from now on; None: nothing is said of it."""


@dataclass(eq=False)
class _Worker:
    """One process, and the items that it was given."""

    make_task: Callable[[], Callable[[Any], Any]]
    limits: Limits
    folder: str
    """Where it leaves temporary files, so that those of a killed one go with the others."""
    given: deque[_Slot] = field(default_factory=deque)
    ready: bool = False

    def __post_init__(self) -> None:
        # Spawned, not forked: PDFium and FFmpeg keep state that a fork would copy half-way.
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, self.make_task, self.limits, self.folder), daemon=True
        )
        with endings.out_of_reach_of_ctrl_c():
            self.process.start()
        other.close()
        # A process that is at work does not receive: whoever sends it more than the pipe holds would wait for it, and
        # it, with its result, for him.
        self._outbox: queue.SimpleQueue[_Slot | None] = queue.SimpleQueue()
        self._sender = threading.Thread(target=self._send, daemon=True)
        self._sender.start()
        self.deadline = time.monotonic() + START_SECONDS

    def give(self, slot: _Slot) -> None:
        """Send one more item."""
        self.given.append(slot)
        if self.ready and len(self.given) == 1:
            self.deadline = time.monotonic() + self.limits.wall_seconds
        self._outbox.put(slot)

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # it is dead: receive() will find out
            while (slot := self._outbox.get()) is not None:
                self.connection.send(slot.item)

    def receive(self) -> Failure | None:
        """Take in one message; return why the process failed, if it did. Raises RuntimeError if it did not start."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            message = None
        if not self.ready and (message is None or message.broken):
            raise RuntimeError(f"a worker cannot start: {self._death() if message is None else message.broken}")
        if message is None or message.spoilt:
            return Failure(self._death() if message is None else message.spoilt)
        if message.more_seconds is not None:
            self.deadline = time.monotonic() + self.limits.wall_seconds + message.more_seconds
            return None
        if self.ready:
            slot = self.given.popleft()
            slot.result, slot.done = message.result, True
        self.ready = True
        self.deadline = time.monotonic() + self.limits.wall_seconds
        return None

    def _death(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        if code == -signal.SIGXCPU:
            return f"reading it took more than {self.limits.cpu_seconds} seconds of CPU time"
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return f"the process that read it died ({how})"

    def kill(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self._outbox.put(None)
        self._sender.join()
        self.connection.close()


_restart: Callable[[int], None] | None = None
"""What a process that is a worker does to start its limits again."""


def restart_limits(more_seconds: int = 0) -> None:
    """Let the item that this process does take its limits of time again from now on, and `more_seconds`.

    For an item of many documents, before each, and for one that is known to be long. Does nothing outside of workers.
    """
    if _restart is not None:
        _restart(more_seconds)


def _serve(connection: Connection, make_task: Callable[[], Callable[[Any], Any]], limits: Limits, folder: str) -> None:
    """Be a worker: do every item that arrives, within the limits that the system keeps."""
    with printable.guarded_streams():
        printable.set_up_logging()
        _work(connection, make_task, limits, folder)


def _work(connection: Connection, make_task: Callable[[], Callable[[Any], Any]], limits: Limits, folder: str) -> None:
    tempfile.tempdir = folder
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    try:
        task = make_task()
    except BaseException:
        connection.send(_Message(broken=traceback.format_exc()))
        raise
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # RLIMIT_DATA and not RLIMIT_AS: libraries reserve address space that they never touch.
    num_bytes = int(limits.memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))

    def restart(more_seconds: int) -> None:
        _allow_cpu(limits.cpu_seconds + more_seconds)
        connection.send(_Message(more_seconds=more_seconds))

    global _restart
    _restart = restart
    connection.send(_Message())
    with contextlib.suppress(EOFError):
        while True:
            item = connection.recv()
            _allow_cpu(limits.cpu_seconds)
            connection.send(_attempt(task, item, limits))


def _allow_cpu(seconds: int) -> None:
    """Let the process run for `seconds` more before the system kills it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    # The system counts whole seconds.
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + seconds + 1, hard))


def _attempt(task: Callable[[Any], Any], item: Any, limits: Limits) -> _Message:
    try:
        return _Message(task(item))
    except MemoryError:
        return _Message(spoilt=f"reading it took more than {limits.memory_gib:g} GiB of memory")
    except Exception as error:
        return _Message(Failure(unexpected(error)))


def _leave_with_parent() -> None:
    """End this process when the run that it works for is killed; it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
