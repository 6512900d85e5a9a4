"""A forked process leaves what it has done, holds nothing of its rank open, and never outlives it."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mm.checkpoint.forked import Forked

TIMEOUT_SECONDS = 60


def test_what_an_action_returns_comes_back() -> None:
    values = [bytes(1 << 20), {"step": 7}]
    forked = Forked(lambda: values)
    assert forked.result() == values
    assert not forked.is_alive()


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: 1 / 0], ids=["killed", "raised"])
def test_a_process_that_leaves_nothing_is_named_by_its_end(end) -> None:
    with pytest.raises(ChildProcessError, match="ended with (-9|1)"):
        Forked(end).result()


def test_a_fork_that_is_refused_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(BlockingIOError):
        Forked(lambda: None)
    assert os.listdir("/proc/self/fd") == before


def test_sockets_are_not_held_open(tmp_path: Path) -> None:
    own, peer = socket.socketpair()
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    forked = Forked(lambda: time.sleep(TIMEOUT_SECONDS))
    own.close()
    listening.close()
    peer.settimeout(TIMEOUT_SECONDS / 2)
    assert peer.recv(1) == b""  # the other end is closed, here and there
    assert forked.is_alive()
    assert eventually(lambda: can_listen(port))
    os.kill(forked._pid, signal.SIGKILL)
    with pytest.raises(ChildProcessError):
        forked.result()


RANK = """
import time
from megatron_mm.checkpoint.forked import Forked
print(Forked(lambda: time.sleep(600))._pid, flush=True)
time.sleep(600)
"""


def test_a_process_ends_with_the_one_that_was_killed() -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True)
    forked = int(rank.stdout.readline())
    rank.kill()
    rank.wait()
    assert eventually(lambda: not is_running(forked))


def eventually(is_so: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + TIMEOUT_SECONDS / 2
    while not (found := is_so()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def can_listen(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
