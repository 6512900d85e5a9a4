"""What was written is read back from the disk, on another host than wrote it where there is one."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from megatron_mm.checkpoint import read_back
from megatron_mm.checkpoint.read_back import ReadBack, readers, shares
from megatron_mm.storage import hash_file


@pytest.mark.parametrize("hosts", ["a", "aa", "aaa", "aabb", "abab", "aaaabbbb", "aabbcc", "aaabbc", "aaab", "abcdefg"])
def test_each_rank_reads_for_one_other_on_another_host_where_there_is_one(hosts: str) -> None:
    found = readers(list(hosts))
    assert sorted(found) == list(range(len(hosts)))
    most = max(map(hosts.count, hosts))
    for rank, reader in enumerate(found):
        assert reader != rank or len(hosts) == 1
        assert hosts[reader] != hosts[rank] or 2 * most > len(hosts)


def test_a_rank_reads_what_its_own_was_given() -> None:
    assert shares([{"a": "1"}, {"b": "2"}, {"c": "3"}, {}], ["x", "x", "y", "y"]) == [
        *({"c": "3"}, {}, {"a": "1"}, {"b": "2"}),
    ]


@pytest.fixture
def written(tmp_path: Path) -> dict[str, str]:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(os.urandom(1000))
    return {name: hash_file(tmp_path / name) for name in ("a", "b")}


def test_what_is_as_it_was_written_passes(tmp_path: Path, written: dict[str, str]) -> None:
    found = ReadBack(tmp_path, written).result()
    assert (found.damaged, found.unread) == ([], [])


def test_other_bytes_are_damage(tmp_path: Path, written: dict[str, str]) -> None:
    (tmp_path / "b").write_bytes(bytes(1000))
    found = ReadBack(tmp_path, written).result()
    assert found.damaged == [f"{tmp_path / 'b'} has other bytes on the disk than were written"]
    assert found.unread == []


def test_bytes_that_are_right_at_the_second_reading_are_no_damage(
    tmp_path: Path, written: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = iter([hashlib.sha256(b"flipped in memory").hexdigest()])
    monkeypatch.setattr(read_back, "hash_file", lambda path, **how: next(wrong, None) or hash_file(path, **how))
    found = ReadBack(tmp_path, written).result()
    assert (found.damaged, found.unread) == ([], [])


@pytest.mark.parametrize("times", [1, 3])
def test_a_file_that_cannot_be_read_is_tried_again_and_is_no_damage(
    times: int, tmp_path: Path, written: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, left = [0.0], [times]

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    def refuse_first(path: Path, **how: bool) -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return hash_file(path, **how)

    monkeypatch.setattr(read_back.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(read_back.time, "sleep", sleep)
    monkeypatch.setattr(read_back, "PATIENCE_SECONDS", 0.5)  # for two more attempts
    monkeypatch.setattr(read_back, "hash_file", refuse_first)
    found = ReadBack(tmp_path, written).result()
    assert found.damaged == []
    assert len(found.unread) == (times == 3)
    assert all("cannot be read back: OSError: [Errno 116] Stale" in line for line in found.unread)
