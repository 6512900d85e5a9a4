"""What stands under its name is whole and on the disk, whenever the program or the machine ends."""

import hashlib
import os
import shutil
import stat
from pathlib import Path

import pytest

from megatron_mm import storage
from megatron_mm.errors import StorageFailed
from megatron_mm.storage import give_name, hash_file, publish_folder, replacing, require_space


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is brought to the disk, and renamed, in order: (call, name of the file or folder)."""
    seen: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def record_sync(descriptor: int) -> None:
        seen.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_rename(move, source: Path, target: Path) -> None:
        seen.append(("rename", Path(source).name))
        move(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", lambda *paths: record_rename(replace, *paths))
    monkeypatch.setattr(os, "rename", lambda *paths: record_rename(rename, *paths))
    return seen


def test_a_file_is_on_the_disk_before_its_name_and_its_name_after(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert calls == [("fsync", "file.partial"), ("rename", "file.partial"), ("fsync", tmp_path.name)]
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()], ids=repr)
def test_nothing_of_the_old_file_is_lost_if_writing_raises(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), replacing(path) as file:
        file.write(b"ne")
        raise error
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_refuses_at_the_last_moment_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError("the disk is full")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_soon_written_again_waits_for_no_disk(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    with replacing(tmp_path / "file", sync=False, aside=".mine") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert calls == [("rename", "file.mine")]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002], ids=oct)
def test_a_file_has_the_mode_of_any_new_file(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_a_name_is_brought_to_the_disk(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    give_name(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert calls == [("rename", "a"), ("fsync", tmp_path.name)]


def folder_in(path: Path) -> Path:
    (path / "out.partial" / "inner").mkdir(parents=True)
    for name in ("weights", "settings", "inner/weights"):
        (path / "out.partial" / name).write_text(name)
    return path / "out.partial"


def test_a_folder_is_on_the_disk_before_its_name_with_all_that_its_writers_have_not_brought_there(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    publish_folder(folder_in(tmp_path), tmp_path / "out", synced=["weights"], check=lambda: calls.append(("check", "")))
    assert calls == [
        *(("fsync", "weights"), ("fsync", "inner"), ("fsync", "settings"), ("fsync", "out.partial")),
        *(("check", ""), ("rename", "out.partial"), ("fsync", tmp_path.name)),
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["inner", "settings", "weights"]


def test_a_folder_that_may_not_be_published_keeps_its_own_name(tmp_path: Path) -> None:
    partial = folder_in(tmp_path)

    def refuse() -> None:
        raise RuntimeError("another job has taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        publish_folder(partial, tmp_path / "out", check=refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


@pytest.mark.parametrize("content", [None, b"weights of before"], ids=["empty", "full"])
def test_a_folder_is_never_overwritten(content: bytes | None, tmp_path: Path) -> None:
    partial = folder_in(tmp_path)
    (tmp_path / "out").mkdir()
    if content is not None:
        (tmp_path / "out" / "weights").write_bytes(content)
    with pytest.raises(FileExistsError, match="out exists"):
        publish_folder(partial, tmp_path / "out")
    assert sum(1 for _ in partial.rglob("*")) == 4
    assert [file.read_bytes() for file in (tmp_path / "out").iterdir()] == ([content] if content else [])


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 40])
@pytest.mark.parametrize("keep_cached", [True, False])
def test_the_hash_of_a_file_is_that_of_its_bytes(
    size: int, keep_cached: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "READ_BYTES", 16)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert hash_file(tmp_path / "file", keep_cached=keep_cached) == hashlib.sha256(data).hexdigest()


def test_what_does_not_fit_is_refused_before_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    require_space(tmp_path, 1000)
    with pytest.raises(StorageFailed, match="are to be written to"):
        require_space(tmp_path, 1001)
