"""Storage that refuses for a while is tried again; what does not pass by itself is said at once."""

import errno
import logging
from pathlib import Path

import pytest

from megatron_mm import retry
from megatron_mm.errors import ConfigError, StorageFailed, of_system
from megatron_mm.retry import retrying

A_MOMENT = 1e-3


class Failing:
    """Fails so many times with an error of the system, then returns 7."""

    def __init__(self, number: int, *, times: int) -> None:
        self.number, self.times, self.calls = number, times, 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self.number, errno.errorcode[self.number], "/data/a")
        return 7


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_SECONDS", A_MOMENT)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSPC, errno.ENOLCK, errno.EMFILE])
def test_what_passes_is_tried_again_and_said(number: int, caplog: pytest.LogCaptureFixture) -> None:
    action = Failing(number, times=3)
    with caplog.at_level(logging.WARNING):
        assert retrying(action, what="a file", minutes=1.0) == 7
    assert action.calls == 4 and len(caplog.records) == 3
    assert all("/data/a" in record.message and "trying again in" in record.message for record in caplog.records)


def test_after_its_time_it_is_the_worlds_error_with_the_file() -> None:
    action = Failing(errno.EIO, times=10**9)
    with pytest.raises(StorageFailed, match="/data/a: EIO .tried again for"):
        retrying(action, what="a file", minutes=0.1 / 60)
    assert action.calls > 2
    once = Failing(errno.EIO, times=1)
    with pytest.raises(StorageFailed, match="/data/a"):
        retrying(once, what="a file", minutes=0)
    assert once.calls == 1


def test_what_stays_is_not_tried_again_but_for_files_that_are_known_to_be_there() -> None:
    for number in (errno.EACCES, errno.ENOENT, errno.EPERM):
        action = Failing(number, times=1)
        with pytest.raises(OSError, match="/data/a"):
            retrying(action, what="a file", minutes=1.0)
        assert action.calls == 1
        assert retrying(Failing(number, times=1), what="a file", minutes=1.0, ours=True) == 7
    with pytest.raises(OSError, match="/data/a"):
        retrying(Failing(errno.EROFS, times=1), what="a file", minutes=1.0, ours=True)


def test_one_place_says_whose_error_it_is() -> None:
    assert isinstance(of_system(OSError(errno.EIO, "Input/output error", Path("/a"))), StorageFailed)
    assert isinstance(of_system(OSError(errno.EACCES, "Permission denied", "/a")), ConfigError)
