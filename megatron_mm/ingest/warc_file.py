"""WARC files by their records, from any byte on: a range of a file is read without what stands before it."""

import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from fastwarc.warc import ArchiveIterator, HeaderMap, WarcRecord

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import Rejection

VERSION = re.compile(rb"WARC/1\.[01]\r\n")
AFTER_A_RECORD = re.compile(rb"\r\n\r\n" + VERSION.pattern)
WARC_TYPE = re.compile(rb"^WARC-Type: *(\w+)", re.MULTILINE | re.IGNORECASE)
WAT = "it is a WAT file, which holds metadata of pages and not the pages: give the WARC or the WET file of its segment"
SNIFFED_BYTES = 2**16
GZIP, ZSTD = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
BLOCK_BYTES = 2**16
SCAN_BYTES = 2**20
HEAD_BYTES = 2**12
"""Bytes of a gzip member in which its header, which may hold a name, and the first line of a record lie."""
MAX_HEADER_BYTES = 2**15
"""The most bytes of a record's header that FastWARC reads."""
MAX_RECORD_BYTES = 2**28
"""Larger records are refused."""
STREAM_BYTES = 2**26
"""Bytes that several records in one gzip member, or a zstd file, may hold before they are read in parts."""


class LongStream(Exception):
    """More than STREAM_BYTES of records lie in one compressed stream: `windows` says how to read them in parts."""


class _Damaged(DataError):
    """The record that is being read cannot be, nor what follows it in its stream."""


@dataclass(frozen=True)
class Record:
    """One record of a WARC file."""

    type: str
    """response, request, ..., in the words of the standard."""
    headers: HeaderMap
    is_http: bool
    length: int
    block: bytes | None
    """What stands behind its header; None if that was not asked for or is more than MAX_RECORD_BYTES."""
    start: int
    """First byte in the file of the record, or of the gzip member or zstd frame that it begins in."""
    stop: int | None
    """Where those bytes end, if that is known."""
    number: int
    """Which record it is of those that begin there, from 0."""


def is_warc(path: Path) -> bool:
    """Tell by its first bytes, decompressed, whether a file is a WARC, WET or WAT file."""
    return bool(VERSION.match(_first_bytes(path, len(b"WARC/1.0\r\n"))))


def refusal(path: Path) -> str:
    """Return why a WARC file is not read, "" if it is: WAT files are not."""
    head = _first_bytes(path, SNIFFED_BYTES)
    types = [kind for kind in WARC_TYPE.findall(head) if kind.lower() != b"warcinfo"]
    return WAT if types[:1] == [b"metadata"] and b'"Envelope"' in head else ""


def is_seekable(path: Path) -> bool:
    """Tell whether a WARC file can be read in ranges of its bytes: all but those in zstd."""
    with path.open("rb") as file:
        return file.read(len(ZSTD)) != ZSTD


def _first_bytes(path: Path, size: int) -> bytes:
    """Return what a file begins with, decompressed if it is in gzip or zstd; less of it if it is damaged."""
    with path.open("rb") as file:
        data = file.read(max(size, HEAD_BYTES))
    if data.startswith(ZSTD):
        import pyarrow

        try:
            with path.open("rb") as file:  # pyarrow opens no names that are not UTF-8
                return pyarrow.input_stream(file, compression="zstd").read(size)
        except OSError:
            return b""
    if not data.startswith(GZIP):
        return data[:size]
    found = b""
    while data.startswith(GZIP) and len(found) < size:
        inflate = zlib.decompressobj(wbits=31)
        try:
            found += inflate.decompress(data, size - len(found))
        except zlib.error:
            break
        data = inflate.unused_data
    return found


class RecordReader:
    """The records that begin in bytes [start, stop) of a WARC file, and what is damaged there, in order.

    A range begins at the first record at or after its start and ends with the last one that begins before its stop, so
    ranges that adjoin give each record once. In gzip, a record begins where a member does whose first line is that of a
    record; elsewhere, where such a line follows two line ends. (A page that is itself a WARC file looks alike: where a
    range begins within one, its records are read for those of the file.) A zstd file has one range alone.
    """

    def __init__(self, path: Path, start: int = 0, stop: int | None = None) -> None:
        self.path, self._start = path, start
        self._stop = path.stat().st_size if stop is None else stop
        self._keep = self._is_bounded = True
        self._num_bytes = 0
        self.position = 0
        """How many records have been read or passed over."""
        with path.open("rb") as file:
            mark = file.read(4)
        walk = self._walk_zstd if mark == ZSTD else self._walk_gzip if mark.startswith(GZIP) else self._walk_plain
        self._items = walk()

    def read(self, first: int = 0, last: int | None = None, *, is_bounded: bool = True) -> Iterator[Record | Rejection]:
        """Yield the records from the `first` to before the `last`, and for each that is damaged why.

        Those before `first` are passed over. Raises LongStream, unless `last` is given or not `is_bounded`.
        """
        self._is_bounded = is_bounded and last is None
        self._keep = False
        while self.position < first and next(self._items, None) is not None:
            self.position += 1
        self._keep = True
        while (last is None or self.position < last) and (item := next(self._items, None)) is not None:
            self.position += 1
            yield item

    def windows(self) -> list[tuple[int, int]]:
        """Return which records, from which to before which, to read together: about STREAM_BYTES at a time."""
        self._keep = self._is_bounded = False
        marks, size = [0], 0
        for number, item in enumerate(self._items, start=1):
            size += item.length if isinstance(item, Record) else 0
            if size >= STREAM_BYTES:
                marks.append(number)
                size = 0
            self.position = number
        return [*pairwise(marks), (marks[-1], self.position)]

    def _damage(self, start: int, reason: str) -> Rejection:
        return Rejection(f"{self.path}:{start}", f"the WARC record that begins at byte {start:,} is damaged: {reason}")

    def _record(self, entry: WarcRecord, start: int, number: int) -> Record:
        """Read a record to its end; its stop is not known yet. Raises _Damaged."""
        length = entry.content_length
        if entry.headers.get("Content-Length") is None:
            raise _Damaged("its header has no length")
        block = entry.reader.read() if self._keep and length <= MAX_RECORD_BYTES else None
        if (entry.reader.consume() if block is None else len(block)) < length:
            raise _Damaged("the file ends in the middle of it")
        return Record(str(entry.record_type), entry.headers, entry.is_http, length, block, start, None, number)

    def _check_length(self, number: int, num_bytes: int) -> None:
        if self._is_bounded and number and num_bytes > STREAM_BYTES:
            raise LongStream

    def _walk_gzip(self) -> Iterator[Record | Rejection]:
        with self.path.open("rb") as file:
            members = _GzipMembers(file)
            start = members.find(self._start, self._stop)
            while start is not None and start < self._stop:
                members.open(start)
                number = 0
                try:
                    for entry in ArchiveIterator(members, parse_http=False, stream_detect=False):
                        record = self._record(entry, start, number)
                        yield replace(record, stop=members.end())
                        self._check_length(number, members.num_bytes)
                        number += 1
                except (_Damaged, OSError) as error:
                    yield self._damage(members.member, str(error))
                    start = members.find(members.member + 1, self._stop)
                    continue
                if members.junk is not None:
                    reason = "these bytes are no gzip, and what follows is read from the next record on"
                    yield Rejection(f"{self.path}:{members.junk}", reason)
                    start = members.find(members.junk + 1, self._stop)
                else:
                    start = members.following

    def _walk_plain(self) -> Iterator[Record | Rejection]:
        with self.path.open("rb") as file:
            start = _find_plain(file, self._start, self._stop)
            while start is not None and start < self._stop:
                file.seek(start)
                try:
                    for entry in ArchiveIterator(file, parse_http=False, stream_detect=False):
                        start = entry.stream_pos
                        if start >= self._stop:
                            return
                        record = self._record(entry, start, 0)
                        end = _end_of_plain(file, start, record.length)
                        yield replace(record, stop=end)
                        start = end
                    return
                except (_Damaged, OSError) as error:
                    yield self._damage(start, str(error))
                    start = _find_plain(file, start + 1, self._stop)

    def _walk_zstd(self) -> Iterator[Record | Rejection]:
        start, number, num_bytes = 0, 0, 0
        try:
            with self.path.open("rb") as file:
                for entry in ArchiveIterator(file, parse_http=False):
                    number = number + 1 if entry.stream_pos == start else 0
                    start = entry.stream_pos
                    record = self._record(entry, start, number)
                    num_bytes += record.length
                    yield record
                    self._check_length(1, num_bytes)
        except (_Damaged, OSError) as error:
            yield self._damage(start, f"{error}, and what follows it cannot be read")


def record_marks(path: Path, start: int, stop: int) -> tuple[list[int], int]:
    """Return where records of a range begin, as far as members of gzip or lines show it, and how many there may be.

    No record is parsed: this is for ranges that a parser has died of.
    """
    with path.open("rb") as file:
        mark = os.pread(file.fileno(), len(ZSTD), 0)
        if mark == ZSTD:
            import pyarrow

            with pyarrow.input_stream(str(path), compression="zstd") as stream:
                return [start], 1 + _num_starts(stream)
        if mark.startswith(GZIP):
            return _gzip_marks(_GzipMembers(file), start, stop)
        marks = []
        position = _find_plain(file, start, stop)
        while position is not None:
            marks.append(position)
            position = _find_plain(file, position + 1, stop)
        return marks, len(marks)


def _gzip_marks(members: "_GzipMembers", start: int, stop: int) -> tuple[list[int], int]:
    marks: list[int] = []
    count = 0
    position = members.find(start, stop)
    while position is not None and position < stop:
        marks.append(position)
        members.open(position)
        try:
            count += 1 + _num_starts(members)
            position = members.following
        except _Damaged:
            position = members.find(position + 1, stop)
    return marks, count


def _num_starts(stream: BinaryIO) -> int:
    """Return how often what is left of a stream shows a record behind another."""
    count, tail = 0, b""
    while data := stream.read(BLOCK_BYTES):
        count += len(AFTER_A_RECORD.findall(tail + data))
        tail = (tail + data)[1 - len(b"\r\n\r\nWARC/1.0\r\n") :]
    return count


class _GzipMembers:
    """A gzip file as FastWARC reads it: from a member that begins a record to the next one that does."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def open(self, start: int) -> None:
        """Begin at the member at byte `start`."""
        self._begin_member(start)
        self._ahead = b""
        self._is_over = False
        self._damage: _Damaged | None = None
        self.num_bytes = 0
        self.following: int | None = None
        """Where the next member that begins a record is, once all before it is read."""
        self.junk: int | None = None
        """Where there is something else than gzip instead."""

    def read(self, size: int = BLOCK_BYTES) -> bytes:
        """Return the next bytes, up to `size` of one member. Raises _Damaged when all before the damage is read."""
        while len(self._ahead) < size and not self._is_over and not (self._ahead and self._inflate.eof):
            try:
                self._advance()
            except _Damaged as error:
                self._damage, self._is_over = error, True
        if self._damage is not None and not self._ahead:
            raise self._damage
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        self.num_bytes += len(data)
        return data

    def tell(self) -> int:
        """Return how many bytes have been read, which FastWARC asks for."""
        return self.num_bytes

    def end(self) -> int | None:
        """Return where the member ends that was read last, None if there is more in it."""
        while not self._inflate.eof and not self._is_over and len(self._ahead) < len(b"\r\n\r\n") + 1:
            self._advance()
        return self._position() if self._inflate.eof else None

    def find(self, position: int, stop: int) -> int | None:
        """Return where the first member at or after `position` and before `stop` is that begins a record."""
        while position < stop:
            self._file.seek(position)
            data = self._file.read(SCAN_BYTES)
            at = data.find(GZIP)
            while at >= 0 and position + at < stop:
                if VERSION.match(self._head(position + at)):
                    return position + at
                at = data.find(GZIP, at + 1)
            if len(data) < SCAN_BYTES:
                return None
            position += len(data) - len(GZIP) + 1
        return None

    def _head(self, position: int) -> bytes:
        """Return the first bytes of what would be the member at `position`."""
        data = os.pread(self._file.fileno(), HEAD_BYTES, position)
        try:
            return zlib.decompressobj(wbits=31).decompress(data, len(b"WARC/1.0\r\n"))
        except zlib.error:
            return b""

    def _begin_member(self, start: int) -> None:
        self._file.seek(start)
        self._inflate = zlib.decompressobj(wbits=31)
        self.member = start
        """Where the member begins that is being read."""

    def _position(self) -> int:
        """Return where the member ends that has been read to its end."""
        return self._file.tell() - len(self._inflate.unused_data)

    def _advance(self) -> None:
        """Inflate some more of the member, or begin with the next one if that goes on with the record."""
        if self._inflate.eof:
            position = self._skip_zeros(self._position())
            if position is None:
                self._is_over = True
                return
            if os.pread(self._file.fileno(), len(GZIP), position) != GZIP:
                self._is_over, self.junk = True, position
                return
            if VERSION.match(self._head(position)):
                self._is_over, self.following = True, position
                return
            self._begin_member(position)
        data = self._inflate.unconsumed_tail or self._file.read(BLOCK_BYTES)
        if not data:
            raise _Damaged("the file ends in the middle of it")
        try:
            self._ahead += self._inflate.decompress(data, BLOCK_BYTES)
        except zlib.error as error:
            raise _Damaged(str(error)) from error

    def _skip_zeros(self, position: int) -> int | None:
        """Return where something else than the zeros of a tape's last block begins, None at the end of the file."""
        while data := os.pread(self._file.fileno(), BLOCK_BYTES, position):
            if rest := len(data.lstrip(b"\0")):
                return position + len(data) - rest
            position += len(data)
        return None


def _find_plain(file: BinaryIO, position: int, stop: int) -> int | None:
    """Return where the first record at or after `position` and before `stop` of a file without compression is."""
    before = len(b"\r\n\r\n")
    if position == 0 and VERSION.match(os.pread(file.fileno(), HEAD_BYTES, 0)):
        return 0
    position = max(0, position - before)
    while position + before < stop:
        data = os.pread(file.fileno(), SCAN_BYTES, position)
        if found := AFTER_A_RECORD.search(data):
            return position + found.start() + before if position + found.start() + before < stop else None
        if len(data) < SCAN_BYTES:
            return None
        position += len(data) - len(b"\r\n\r\nWARC/1.0\r\n") + 1
    return None


def _end_of_plain(file: BinaryIO, start: int, length: int) -> int:
    """Return where the record at `start` ends: its header, `length` bytes, and two line ends."""
    header = os.pread(file.fileno(), MAX_HEADER_BYTES + 4, start).find(b"\r\n\r\n") + 4
    return start + header + length + 4
