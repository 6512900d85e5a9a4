"""Files and folders that have their name only when they are whole and on the disk; hashes of files; room on a disk."""

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_mm.errors import StorageFailed

PARTIAL = ".partial"
"""Follows the name of what is not whole yet."""
READ_BYTES = 8 << 20
"""Bytes that are read and hashed at a time."""
SYNC_BYTES = 256 << 20
"""Bytes after which what was written is pushed to the disk and read back: unwritten pages stall the machine."""


@contextmanager
def replacing(path: Path, *, sync: bool = True, aside: str = PARTIAL) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` once it is written: whole, and on the disk with its name.

    If writing raises, `path` is as it was, and nothing else is left. The file may be read back; it is written under its
    name with `aside` behind it, which nobody else may write at the time, and has the mode that any new file has.
    `sync=False` does not wait for the disk: for what is written again before anyone could miss it after a crash.
    """
    partial = path.with_name(path.name + aside)
    try:
        with partial.open("wb+") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if sync:
            give_name(partial, path)
        else:
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def give_name(partial: Path, final: Path) -> None:
    """Rename what is on the disk, in place of a file that had its name, and bring the name to the disk.

    Nothing else in the package gives a name to what is read after a crash: a test keeps it so.
    """
    os.replace(partial, final)
    sync_folder(final.parent)
    if partial.parent != final.parent:
        sync_folder(partial.parent)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there, so that it does not come back after a crash."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder, with those above it that are missing, and bring their names to the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def publish_folder(
    partial: Path, final: Path, *, synced: Collection[str] = (), check: Callable[[], None] = lambda: None
) -> None:
    """Bring all that is in `partial` to the disk, and rename it to `final`, which must not exist.

    `synced` are files right in it that their writers have brought to the disk. `check` is called when all is there but
    the name, and may still raise. What raises leaves `partial` under its own name.
    """
    for folder, _, names in os.walk(partial, topdown=False):
        for name in names:
            if Path(folder) != partial or name not in synced:
                sync_file(Path(folder, name))
        sync_folder(Path(folder))
    check()
    if final.exists():  # an empty folder would be replaced in silence
        raise FileExistsError(f"{final} exists: a folder is never overwritten")
    give_name(partial, final)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: what was written under them is there already."""
    sync_file(folder)


def sync_file(path: Path) -> None:
    """Bring what was written to a file to the disk, whoever wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path, *, keep_cached: bool = True, from_disk: bool = False) -> str:
    """Return the SHA-256 of a file, in hexadecimal; `keep_cached=False` leaves nothing of it in the page cache.

    With `from_disk`, nor is anything read from there: what counts is what the disk has.
    """
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        if from_disk or not keep_cached:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def require_space(folder: Path, num_bytes: int) -> None:
    """Pass if `num_bytes` fit on the disk of `folder`. Raises StorageFailed otherwise."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise StorageFailed(
            f"{num_bytes / 1e9:.3f} GB are to be written to {folder}, but {free / 1e9:.3f} GB are free."
        )
