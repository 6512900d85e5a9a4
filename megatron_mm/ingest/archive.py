"""Archives, unpacked within limits into a folder of their own, and tar files cut into ranges of samples."""

import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.compression import Blocks
from megatron_mm.ingest.document import Rejection

MAX_UNPACKED_BYTES = 2 * 2**30
"""An archive that holds more is refused; what it declares is not trusted."""
MAX_MEMBERS = 200_000
MAX_SAMPLES = 1000
"""The most samples of a range of a tar, so that the list of where they start stays short."""
MAX_DEPTH = 4
"""Archives within archives, compressed files included."""
ARXIV = re.compile(r"\d{4}\.\d{4,5}(?=\.(?:gz|pdf|tar)$)")
"""The number of a paper of arXiv, whose sources or print a member is."""
ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError)
"""What the standard library raises on a damaged archive."""


@dataclass(frozen=True)
class Member:
    """One entry of an archive."""

    name: str
    is_file: bool
    open: Callable[[], IO[bytes]]
    refusal: str = ""
    """Why it is left out, if it is."""


def unpack(path: Path, folder: Path, *, start: int = 0, stop: int | None = None) -> tuple[list[Path], list[Rejection]]:
    """Write the files of a zip or tar archive below `folder`; of a tar only the members that start in [start, stop).

    Returns the files in the order of the archive, and what was left out: members that are links or devices, are
    encrypted, or whose name leads outside. Hidden members are passed over. Raises DataError if the archive is damaged
    or holds too much.
    """
    files: list[Path] = []
    rejections: list[Rejection] = []
    left = MAX_UNPACKED_BYTES
    try:
        members = _zip_members(path) if _is_zip(path) else _tar_members(path, start, stop)
        for count, member in enumerate(members):
            if count == MAX_MEMBERS:
                raise DataError(f"the archive has more than {MAX_MEMBERS:,} members")
            name = PurePosixPath(member.name.replace("\\", "/"))
            if any((part.startswith(".") and part != "..") or part == "__MACOSX" for part in name.parts):
                account.count(account.SET_ASIDE, "hidden members of archives", int(member.is_file))
                continue
            if not name.parts:  # "./", the folder itself
                continue
            target = folder / name
            refusal = member.refusal or _refuse_name(name, target)
            if refusal:
                rejections.append(Rejection(f"{folder}/{member.name}", refusal))
            elif member.is_file:
                target.parent.mkdir(parents=True, exist_ok=True)
                left -= _copy(member.open(), target, left)
                files.append(target)
    except DataError:
        raise
    except (*ERRORS, OSError, ValueError) as error:
        raise DataError(f"the archive is damaged: {error}") from error
    return files, rejections


def decompress(path: Path, target: Path) -> None:
    """Write what a compressed file holds to `target`. Raises DataError if it is damaged or holds too much."""
    with target.open("wb") as file:
        for block in Blocks(path):
            if file.tell() + len(block) > MAX_UNPACKED_BYTES:
                raise DataError(
                    f"it unpacks to more than {MAX_UNPACKED_BYTES / 2**30:g} GiB, and what is in it is not read as a "
                    "stream: unpack it, and give what comes of it to --input"
                )
            file.write(block)


def sample_key(name: str) -> str:
    """Return what the members of a sample share: their name up to its first dot; in numbers of arXiv is one."""
    found = ARXIV.match(name)
    return found[0] if found else name.partition(".")[0]


def sample_ranges(path: Path, *, num_bytes: int) -> Iterator[list[int]]:
    """Yield, for each stretch of about `num_bytes` of a tar, where its samples start, and last where the stretch ends.

    A sample is a run of members that share their name up to its first dot (WebDataset's convention).
    """
    marks: list[int] = []
    key, end = None, 0
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            folder, _, name = member.name.rpartition("/")
            if (folder, sample_key(name)) != key:
                key, start = (folder, sample_key(name)), end
                if marks and (start - marks[0] >= num_bytes or len(marks) == MAX_SAMPLES):
                    yield [*marks, start]
                    marks = []
                marks.append(start)
            end = tar.offset
            tar.members.clear()  # tarfile keeps every member otherwise
        _check_end(tar)
    if marks:
        yield [*marks, path.stat().st_size]


def _is_zip(path: Path) -> bool:
    """Tell a zip from a tar; zipfile.is_zipfile takes a tar for one whose last member is a zip."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _refuse_name(name: PurePosixPath, target: Path) -> str:
    if name.is_absolute() or ".." in name.parts or ":" in name.parts[0] or "\0" in str(name):
        return "its name leads outside the archive"
    return "another member has the same name" if target.is_file() else ""


def _copy(source: IO[bytes], target: Path, limit: int) -> int:
    """Copy at most `limit` bytes and return how many."""
    with source, target.open("wb") as file:
        while block := source.read(2**20):
            if file.tell() + len(block) > limit:
                raise DataError(f"it unpacks to more than {MAX_UNPACKED_BYTES / 2**30:g} GiB")
            file.write(block)
        return file.tell()


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        declared = sum(entry.file_size for entry in archive.infolist())
        if declared > MAX_UNPACKED_BYTES:
            raise DataError(f"it unpacks to {declared:,} bytes, more than {MAX_UNPACKED_BYTES / 2**30:g} GiB")
        for entry in archive.infolist():
            is_link = (entry.external_attr >> 16) & 0o170000 == 0o120000
            refusal = "it is a link" if is_link else "it is encrypted" if entry.flag_bits & 1 else ""
            yield Member(entry.filename, not entry.is_dir(), lambda entry=entry: archive.open(entry), refusal)


def _tar_members(path: Path, start: int, stop: int | None) -> Iterator[Member]:
    with path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (entry := archive.next()) is not None:
                if stop is not None and entry.offset >= stop:
                    return
                refusal = "" if entry.isfile() or entry.isdir() else "it is a link or a device"
                yield Member(entry.name, entry.isfile(), lambda entry=entry: archive.extractfile(entry), refusal)
                archive.members.clear()
            _check_end(archive)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise if the last member is not followed by the end: tarfile takes a damaged header for it without a word."""
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):
        raise tarfile.ReadError(f"there is no header at byte {tar.offset:,}")
