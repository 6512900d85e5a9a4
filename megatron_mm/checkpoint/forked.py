"""A process that is forked to do one thing while training goes on, and that never outlives the one it was forked from.

It sees the memory of the moment at which it was forked. multiprocessing's would keep the sockets of its rank open: were
the rank killed, its peers would wait for it, and its port would be taken, until the other had ended too.
"""

import ctypes
import gc
import os
import pickle
import signal
from collections.abc import Callable, Collection
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
STANDARD_FILES = 3
"""Descriptors below are stdin, stdout and stderr."""

_libc = ctypes.CDLL(None, use_errno=True)  # before any fork: a forked process loads nothing


class Forked:
    """A forked process that calls `action` and leaves what that returns; of its parent's descriptors it has `keep`.

    The kernel kills it when the thread that has forked it ends: let that be the main one. Raises OSError if there can
    be no process, or nowhere to leave its result.
    """

    def __init__(self, action: Callable[[], Any], *, keep: Collection[int] = ()) -> None:
        self._result = os.memfd_create("result")
        parent = os.getpid()
        try:
            self._pid = os.fork()
        except OSError:
            os.close(self._result)
            raise
        if self._pid == 0:
            _run(action, self._result, {self._result, *keep}, parent)
        self._status: int | None = None

    def is_alive(self) -> bool:
        """Return whether the process still runs."""
        self._wait(os.WNOHANG)
        return self._status is None

    def result(self) -> Any:
        """Wait for the process and return what its action returned. Raises ChildProcessError if that returned nothing.

        It may be called once.
        """
        self._wait(0)
        with open(self._result, "rb") as file:
            file.seek(0)
            try:
                return pickle.load(file)
            except (EOFError, pickle.UnpicklingError) as error:
                raise ChildProcessError(f"the process that was to do it ended with {self._status}") from error

    def join(self) -> None:
        """Wait for the process."""
        self._wait(0)

    def kill(self) -> None:
        """End the process, and forget what it was to do."""
        if self.is_alive():
            os.kill(self._pid, signal.SIGKILL)
            self._wait(0)
        os.close(self._result)

    def _wait(self, options: int) -> None:
        if self._status is None:
            pid, status = os.waitpid(self._pid, options)
            self._status = os.waitstatus_to_exitcode(status) if pid else None


def _run(action: Callable[[], Any], result: int, keep: Collection[int], parent: int) -> NoReturn:
    """Do the work of the forked process."""
    status = 1
    try:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:  # or it had ended before
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides
            gc.disable()  # what it finds may own one of the descriptors
            _let_go(keep=keep)
            content = memoryview(pickle.dumps(action()))
            while content:
                content = content[os.write(result, content) :]
            status = 0
    finally:
        os._exit(status)  # not the exit of the process that it was forked from


def _let_go(*, keep: Collection[int]) -> None:
    """Close the sockets and files of the process that this one was forked from.

    /dev/null takes their place: an object that still believes to own a descriptor must not find another file there.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor >= STANDARD_FILES and descriptor not in (*keep, null):
            os.dup2(null, descriptor, inheritable=False)
