"""Mailboxes: files of messages one after another, each behind a line "From ADDRESS DATE" (mbox, RFC 4155)."""

import mmap
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import Document, Reading, Rejection

FROM = re.compile(rb"(?:\A|(?<=\n)\r?\n)From [^\n]*\d:\d\d[^\n]*\d{4}[^\n]*\n(?=[!-9;-~]+:)")
"""Such a line at the beginning or behind an empty one, with its date, and a header after it: text has "From " too."""
QUOTED = re.compile(rb"^>(>*From )", re.MULTILINE)
"""What "From " at the beginning of a line of a message was turned into."""
EMPTY_LINE = re.compile(rb"(\n)\r?\n\Z")
"""What stands between a message and the next one."""
MAX_MESSAGES = 1_000
"""The most messages of a range."""


def is_mailbox(head: bytes) -> bool:
    """Tell a mailbox by its first bytes."""
    return FROM.match(head) is not None


def read_messages(path: Path, *, read: Callable[[Path], Reading], start: int = 0, stop: int | None = None) -> Reading:
    """Return the documents that `read` makes of the messages that begin in bytes [start, stop) of a mailbox.

    Raises DataError if none does.
    """
    documents: list[Document] = []
    rejections: list[Rejection] = []
    with tempfile.TemporaryDirectory(prefix="mailbox-") as folder:
        target = Path(folder, "message.eml")
        for begin, end, message in messages(path, start=start, stop=stop):
            target.write_bytes(message)
            found, rejected = read(target)
            documents += [replace(one, origin=replace(one.origin, start=begin, stop=end)) for one in found]
            where = f"{path}, message at byte {begin}"
            rejections += [replace(one, path=one.path.replace(str(target), where, 1)) for one in rejected]
    return documents, rejections


def messages(path: Path, *, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Yield (first byte, end, message) of those that begin in bytes [start, stop). Raises DataError if none does."""
    with _mapped(path) as data:
        begins = [*_begins(data, start, stop), len(data)]
        if len(begins) == 1:
            raise DataError("it is no mailbox: it holds no message behind a line 'From ADDRESS DATE'")
        if stop is not None and stop < len(data):
            begins[-1] = stop
        for begin, end in pairwise(begins):
            _, _, message = data[begin:end].partition(b"\n")
            message = EMPTY_LINE.sub(rb"\1", message)
            yield begin, end, QUOTED.sub(rb"\1", message)


def message_ranges(path: Path, *, num_bytes: int) -> Iterator[list[int]]:
    """Yield, for each stretch of about `num_bytes`, where its messages begin, and last where it ends."""
    with _mapped(path) as data:
        marks: list[int] = []
        for begin in _begins(data, 0, None):
            if marks and (begin - marks[0] >= num_bytes or len(marks) == MAX_MESSAGES):
                yield [*marks, begin]
                marks = []
            marks.append(begin)
        if marks:
            yield [*marks, len(data)]


def _begins(data: mmap.mmap, start: int, stop: int | None) -> Iterator[int]:
    """Yield where each message of a stretch begins: at its "From "."""
    for found in FROM.finditer(data, max(0, start - 2)):
        begin = data.find(b"From ", found.start())
        if stop is not None and begin >= stop:
            return
        if begin >= start:
            yield begin


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data
