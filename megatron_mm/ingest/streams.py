"""Streams of records: long files, most of them compressed, that the main process reads once from start to end.

They are cut at ends of records into pieces that workers read, without being unpacked to the disk and whatever their
size. The pieces depend on nothing but the bytes, so a run that goes on drops those that it had.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.ingest import kinds
from megatron_mm.ingest.compression import Blocks, is_compressed
from megatron_mm.ingest.detect import RECORD_HEAD, records_of
from megatron_mm.ingest.kinds import Kind

MAX_RECORD_BYTES = 256 * 2**20
"""A longer record is rejected: what it becomes must fit into memory several times."""
PIECES_AHEAD = 2
"""Pieces that are unpacked before they are asked for."""
HEAD_BYTES = 2**20
"""The most bytes before the first record of a dump."""
ENDS = {kinds.JSONL: b"\n", kinds.WIKI: b"</page>", kinds.POSTS: b"\n"}
"""What a record of each kind ends with, which stands nowhere else in one."""
STARTS = {kinds.WIKI: b"<page>"}
"""What the first record begins with; what is before it says something of all."""


@dataclass(frozen=True)
class Piece:
    """Whole records of a stream, or one thing in it that is not read."""

    data: bytes
    start: int
    """Its first byte in the stream."""
    first: int
    """The number of its first record, counted from 1."""
    num_read: int = 0
    """Bytes of the file that were read to come to its end."""
    length: int = 0
    """Bytes of the stream that it takes."""
    too_long: bool = False
    """Whether it stands for a record that is longer than MAX_RECORD_BYTES."""
    damage: str = ""
    """Why nothing can be read from here on."""


def kind_of_stream(path: Path) -> Kind | None:
    """Return what records a file is a stream of, by its first bytes; None if it is read as a whole."""
    named = kinds.by_suffix(path)
    is_dump = path.suffix.lower() == ".xml"
    if not is_dump and named not in (kinds.COMPRESSED, None):
        return None
    name = path.with_suffix("") if named == kinds.COMPRESSED else path
    try:
        if is_compressed(path) == is_dump:
            return None
        head = read_head(path, RECORD_HEAD)
        kind = records_of(head[:RECORD_HEAD], name, is_whole=len(head) < RECORD_HEAD)
    except (DataError, OSError):  # its reader says so
        return None
    return kind if kind in ENDS else None


def read_head(path: Path, num_bytes: int) -> bytes:
    """Return the first bytes of a stream, `num_bytes` or a few more. Raises DataError if it is damaged before any."""
    head = b""
    try:
        for block in Blocks(path):
            head += block
            if len(head) >= num_bytes:
                break
    except DataError:
        if not head:
            raise
    return head


def head_of(path: Path, kind: Kind) -> bytes:
    """Return what stands before the first record of a stream; b"" if nothing of the kind does."""
    if kind not in STARTS:
        return b""
    head, found, _ = read_head(path, HEAD_BYTES).partition(STARTS[kind])
    return head if found else b""


def pieces(path: Path, kind: Kind, *, num_bytes: int) -> Iterator[Piece]:
    """Yield a stream in pieces that end with the first record that ends behind `num_bytes`, read ahead in a thread."""
    blocks = Blocks(path)
    yield from _ahead(_Cutter(blocks, ENDS[kind], num_bytes).pieces())


def _ahead(made: Iterator[Piece]) -> Iterator[Piece]:
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as thread:
        coming = deque(thread.submit(next, made, None) for _ in range(PIECES_AHEAD))
        while (piece := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, made, None))
            yield piece


class _Cutter:
    """Cuts blocks of bytes behind ends of records."""

    def __init__(self, blocks: Blocks, end: bytes, num_bytes: int) -> None:
        self.blocks, self.end, self.num_bytes = blocks, end, num_bytes
        self._held = bytearray()
        self._start, self._first, self._num_read = 0, 1, 0
        self._search_from = self._least = max(0, num_bytes - len(end))

    def pieces(self) -> Iterator[Piece]:
        damage = ""
        try:
            for block in self.blocks:
                self._held += block
                yield from self._whole()
                if len(self._held) > self.num_bytes + MAX_RECORD_BYTES:
                    yield from self._pass_over()
        except (DataError, OSError) as error:
            damage = str(error)
        last = self._held.rfind(self.end)
        whole = last + len(self.end) if last >= 0 else 0
        if length := whole if damage else len(self._held):
            yield self._take(length)
        if damage:
            yield self._piece(damage=damage)

    def _whole(self) -> Iterator[Piece]:
        """Yield the pieces that what is held has, and note how far it was looked through."""
        while (found := self._held.find(self.end, self._search_from)) >= 0:
            yield self._take(found + len(self.end))
        self._search_from = max(self._least, len(self._held) - len(self.end) + 1)

    def _pass_over(self) -> Iterator[Piece]:
        """Yield the records before one that is too long, and that one as such; read on to its end."""
        if (last := self._held.rfind(self.end, 0, self.num_bytes)) >= 0:
            yield self._take(last + len(self.end))
        length, found = 0, -1
        while found < 0 and (block := next(self.blocks, b"")):
            passed = len(self._held) - len(self.end) + 1
            del self._held[:passed]
            length += passed
            self._held += block
            found = self._held.find(self.end)
        passed = found + len(self.end) if found >= 0 else len(self._held)
        del self._held[:passed]
        yield self._piece(length=length + passed, too_long=True)
        self._search_from = self._least
        yield from self._whole()

    def _take(self, length: int) -> Piece:
        with memoryview(self._held) as held:
            data = bytes(held[:length])
        del self._held[:length]
        self._search_from = self._least
        return self._piece(data, length=length, records=count_of(self.end, data))

    def _piece(self, data: bytes = b"", *, length: int = 0, records: int = 1, **what: Any) -> Piece:
        num_read = self.blocks.num_read
        piece = Piece(data, self._start, self._first, num_read - self._num_read, length, **what)
        self._start, self._first, self._num_read = self._start + length, self._first + records, num_read
        return piece


def records_in(data: bytes, kind: Kind) -> Iterator[bytes]:
    """Yield each record of a piece, and last what stands behind the end of the last one."""
    end, start = ENDS[kind], 0
    while start < len(data):
        found = data.find(end, start)
        stop = len(data) if found < 0 else found + len(end)
        yield data[start:stop]
        start = stop


def count_of(end: bytes, data: "bytes | memoryview") -> int:
    """Return how often `end` stands in `data`."""
    if len(end) > 1:
        return data.count(end)
    # At least twice as fast as bytes.count: one process cuts for all workers.
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) == end[0]))
