"""Inputs cut into pieces of work: a file, or a part of one that can be read by itself."""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds
from megatron_mm.ingest.detect import detect
from megatron_mm.ingest.document import Reading, Rejection
from megatron_mm.ingest.encode import MAX_AUDIO_SECONDS
from megatron_mm.ingest.fields import DEFAULTS as AS_KNOWN
from megatron_mm.ingest.fields import Schemas
from megatron_mm.ingest.kinds import Kind
from megatron_mm.ingest.layouts import Entry
from megatron_mm.ingest.streams import (
    ENDS,
    MAX_RECORD_BYTES,
    count_of,
    head_of,
    kind_of_stream,
    pieces,
    records_in,
)
from megatron_mm.ingest.table_rows import Table
from megatron_mm.ingest.workers import Cut
from megatron_mm.modalities import Geometries, default_geometries

if TYPE_CHECKING:
    from megatron_mm.ingest.read import Reader

LINES_BYTES = 4 * 2**20
"""Bytes of a JSON-lines file that one worker takes at a time."""
ARCHIVE_BYTES = 16 * 2**20
"""Bytes of a tar or a Parquet file, the same."""
TAIL_BYTES = 64 * 2**10
"""Bytes that are read at a time to find the end of a line."""
TOO_LONG = f"it is longer than {MAX_RECORD_BYTES / 2**20:g} MiB, and a record is read into memory"
MAY_BE_WARC = (kinds.COMPRESSED, kinds.WARC, None)
"""What files are named as whose first bytes are looked at, for they may be web archives."""
PARTS_OF_ROWS = 16
"""Parts that a range of rows is cut into when it fails: each of them reads its row group again."""


@dataclass(frozen=True)
class WorkItem:
    """What one worker reads at a time: a file, or a range of one."""

    path: Path
    layout: str = ""
    """The layout that took it."""
    beside: tuple[Path, ...] = ()
    """Files that are read with it: the words of an image, a recording or a video, or more media of one sample."""
    table: Table | None = None
    """How its rows are read, if they name other files."""
    kind: Kind | None = None
    """What the range below is one of: JSON lines, arrays and archives count bytes, Parquet, Arrow and tables rows;
    None: the whole file."""
    start: int = 0
    stop: int | None = None
    first_line: int = 1
    window: tuple[int, int] | None = None
    """Of a range of a web archive, which records to read, counted from 0; None: all."""
    marks: tuple[int, ...] = ()
    """Where the samples of a range of a tar, or the messages of one of a mailbox, start, and last where it stops."""
    size: int | None = None
    """Bytes that this work reads, for the progress bar; None: those of the file."""
    position: int = 0
    """Bytes of its file, and of the files that it names, that come before: it belongs to the task that has these."""
    ends: bool = True
    """Whether it is the last part of what it was cut from; true of what was not cut."""
    refusal: str = ""
    """Why it is not read at all."""
    data: bytes | None = field(default=None, repr=False)
    """The bytes of the range, which of a stream is one of what it unpacks to; None: they are read from the file."""
    head: bytes = field(default=b"", repr=False)
    """What stands before the first record of a stream and says something of all."""

    @property
    def is_streamed(self) -> bool:
        """Whether it is a piece of a file that is read from its start to its end."""
        return self.data is not None

    @property
    def place(self) -> str:
        """What a rejection calls it."""
        if self.stop is None:
            return str(self.path)
        return f"{self.path}:{self.start if self.kind == kinds.WARC else self.first_line}"

    def read(self) -> bytes:
        """Return the bytes of the range."""
        if self.data is not None:
            return self.data
        assert self.stop is not None
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)

    @property
    def num_bytes(self) -> int:
        """Bytes that this work reads, for the progress bar."""
        return self.path.stat().st_size if self.size is None else self.size


@dataclass(frozen=True)
class Options:
    """How inputs are read."""

    trust_content: bool = False
    """Read a file whose name says another kind as what its content is, instead of rejecting it."""
    max_audio_seconds: int = MAX_AUDIO_SECONDS
    """Longer recordings become several items."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages whose texts are taken; none: all."""
    min_tokens: int = 1
    """Shorter documents are left out, their end-of-text counted."""
    max_tokens: int | None = None
    """Longer documents are left out."""
    layout: str = ""
    """The one layout that inputs are read by; none: each is asked in turn."""
    schemas: Schemas = AS_KNOWN
    """Which fields of records are what."""
    geometries: Geometries = field(default_factory=default_geometries)
    """How media become tokens, by modality: as the model that is to be trained on them has it."""

    def fingerprint(self) -> dict[str, Any]:
        """Return, as JSON, what differs if documents may."""
        names = {one.name for one in fields(self)} - {"schemas", "geometries"}
        said = {name: getattr(self, name) for name in sorted(names)}
        geometries = {name: own.model_dump() for name, own in self.geometries.items()}
        return {**said, "geometries": geometries, "schemas": self.schemas.fingerprint()}


DEFAULTS = Options()


def cut_entry(entry: Entry) -> Iterator[WorkItem]:
    """Yield the work of reading one file: JSON lines, tables and web archives are cut when they are long."""
    if entry.refusal:
        yield WorkItem(entry.path, refusal=entry.refusal, size=0)
        return
    size = entry.path.stat().st_size
    if entry.table is not None:
        whole = WorkItem(entry.path, entry.layout, table=entry.table, start=0, stop=entry.table.num_rows)
        size += entry.more_bytes
        yield from _cut_rows(replace(whole, size=size), -(-size // ARCHIVE_BYTES))
    elif kinds.by_suffix(entry.path) == kinds.JSONL and size > LINES_BYTES:
        yield from (replace(item, layout=entry.layout) for item in _line_ranges(entry.path))
    elif kinds.by_suffix(entry.path) in MAY_BE_WARC and _is_warc(entry.path):
        yield from (replace(item, layout=entry.layout) for item in _warc_ranges(entry.path))
    elif not entry.beside and (kind := kind_of_stream(entry.path)) is not None:
        yield from (replace(item, layout=entry.layout) for item in _stream_pieces(entry.path, kind))
    else:
        yield WorkItem(entry.path, entry.layout, entry.beside)


def _is_warc(path: Path) -> bool:
    from megatron_mm.ingest.warc_file import is_warc

    try:
        return is_warc(path)
    except OSError:  # its reader will say so
        return False


def _warc_ranges(path: Path) -> Iterator[WorkItem]:
    """Cut a web archive into ranges of bytes: a range begins with the first record in it, whoever reads it."""
    from megatron_mm.ingest.warc_file import is_seekable, refusal

    size = path.stat().st_size
    if reason := refusal(path):
        yield WorkItem(path, refusal=reason)
        return
    step = ARCHIVE_BYTES if is_seekable(path) else size
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield WorkItem(path, kind=kinds.WARC, start=start, stop=stop, size=stop - start, position=start)


def _stream_pieces(path: Path, kind: Kind) -> Iterator[WorkItem]:
    """Cut a stream into pieces of about LINES_BYTES that carry their bytes."""
    head = head_of(path, kind)
    for piece in pieces(path, kind, num_bytes=LINES_BYTES):
        stop = piece.start + piece.length
        item = WorkItem(path, kind=kind, start=piece.start, stop=stop, first_line=piece.first, size=piece.num_read)
        item = replace(item, data=piece.data, head=head)
        if piece.damage:
            yield replace(item, stop=None, refusal=f"{piece.damage}. The {piece.first - 1:,} records before are read")
        else:
            yield replace(item, refusal=TOO_LONG if piece.too_long else "")


def _line_ranges(path: Path) -> Iterator[WorkItem]:
    """Cut a file at line ends into ranges of about LINES_BYTES."""
    block = bytearray(LINES_BYTES)
    with path.open("rb", buffering=0) as file:
        start, line = 0, 1
        while size := file.readinto(block):
            whole = WorkItem(path, kind=kinds.JSONL, start=start, first_line=line, position=start)
            lines = count_of(b"\n", memoryview(block)[:size])
            stop, is_ended = _end_of_line(file, start + size)
            if stop - start - size > MAX_RECORD_BYTES:
                last = block.rfind(b"\n", 0, size) + 1
                if last:
                    yield replace(whole, stop=start + last, size=last)
                begin = start + last
                long = replace(whole, start=begin, position=begin, stop=stop, size=stop - begin)
                yield replace(long, first_line=line + lines, refusal=TOO_LONG)
            else:
                yield replace(whole, stop=stop, size=stop - start)
            start = file.seek(stop)
            line += lines + is_ended


def _end_of_line(file: IO[bytes], start: int) -> tuple[int, bool]:
    """Return where the line that byte `start` of a file is in ends, and whether with a line end."""
    file.seek(start)
    while block := file.read(TAIL_BYTES):
        if (found := block.find(b"\n")) >= 0:
            return start + found + 1, True
        start += len(block)
    return start, False


def read_work(work: WorkItem, options: Options) -> Reading | Cut[WorkItem]:
    """Return the documents of a piece of work and what was left out, or the parts to read a large archive in.

    Never raises for what is in the file.
    """
    if work.refusal:
        return _rejected(work, work.refusal)
    # The readers of media take half a second to load, which runs over plain text are spared.
    import tarfile

    import pyarrow

    try:
        if work.kind == kinds.WARC:
            return _read_warc(work)
        with account.kept_if_whole():
            if work.kind is not None or work.table is not None:
                return _read_part(work, options)
            parts = _cut_archive(work, options)
            if len(parts) > 1:
                return Cut(_parts_of(work, parts))
    except (DataError, OSError, tarfile.TarError, pyarrow.ArrowException) as error:
        return _rejected(work, str(error))
    return _reader(options).read(work.path, beside=work.beside)


def _rejected(work: WorkItem, reason: str) -> Reading:
    is_whole = work.kind is None and work.refusal
    account.count(account.INPUTS, "files that are not opened" if is_whole else "parts of files")
    return [], [Rejection(work.place if work.refusal else str(work.path), reason)]


def _reader(options: Options) -> "Reader":
    from megatron_mm.ingest.read import Reader

    return Reader(trust_content=options.trust_content, schemas=options.schemas, layout=options.layout)


def _read_part(work: WorkItem, options: Options) -> Reading:
    from megatron_mm.ingest.records import read_elements, read_lines, read_rows, read_table

    start, stop, schemas = work.start, work.stop, options.schemas
    if work.table is not None:
        return read_table(work.path, work.table, schemas, start=start, stop=stop)
    if work.kind == kinds.JSONL:
        return read_lines(work.path, start=start, data=work.read(), first_line=work.first_line, schemas=schemas)
    if work.kind in (kinds.WIKI, kinds.POSTS):
        from megatron_mm.ingest.dumps import read_records_of_dump

        how = {"head": work.head, "start": start, "first": work.first_line}
        return read_records_of_dump(work.kind, work.read(), path=work.path, **how)
    if work.kind == kinds.JSON_ARRAY:
        return read_elements(work.path, start=start, stop=stop, first_element=work.first_line, schemas=schemas)
    if work.kind == kinds.ARCHIVE:
        return _reader(options).read_archive(work.path, start=start, stop=stop)
    if work.kind == kinds.MAILBOX:
        return _reader(options).read_mailbox(work.path, start=start, stop=stop)
    return read_rows(work.path, start=start, stop=stop, schemas=schemas)


def _read_warc(work: WorkItem) -> Reading | Cut[WorkItem]:
    from megatron_mm.ingest.warc import read_warc
    from megatron_mm.ingest.warc_file import LongStream, RecordReader

    try:
        return read_warc(work.path, start=work.start, stop=work.stop, window=work.window, is_bounded=True)
    except LongStream:
        windows = RecordReader(work.path, work.start, work.stop).windows()
        return Cut(_parts_of(work, [replace(work, window=window) for window in windows]))


def read_all(work: WorkItem, options: Options) -> Iterator[Reading]:
    """Yield the readings of a piece of work, part after part, in this process."""
    reading = read_work(work, options)
    if not isinstance(reading, Cut):
        yield reading
        return
    for part in reading.parts:
        yield from read_all(part, options)


def _cut_archive(work: WorkItem, options: Options) -> list[WorkItem]:
    """Return the ranges in which a large file of many documents is read, nothing for any other file."""
    size = work.path.stat().st_size
    named = kinds.by_suffix(work.path)
    is_cut = named in (kinds.PARQUET, kinds.ARROW, kinds.ARCHIVE) or (named is not None and named.textual)
    if size > ARCHIVE_BYTES and named in MAY_BE_WARC and _is_warc(work.path):
        return [replace(one, layout=work.layout) for one in _warc_ranges(work.path)]
    if size <= ARCHIVE_BYTES or not is_cut or work.path.suffix.lower() == ".zip":
        return []
    from megatron_mm.ingest.archive import sample_ranges
    from megatron_mm.ingest.mailbox import message_ranges
    from megatron_mm.ingest.records import element_ranges, row_groups

    kind = detect(work.path, trust_content=options.trust_content)
    part = replace(work, kind=kind)
    if kind in (kinds.PARQUET, kinds.ARROW):
        groups = row_groups(work.path)
        return _cut_rows(replace(part, stop=groups[-1], size=size), -(-size // ARCHIVE_BYTES), groups=groups)
    if kind == kinds.JSONL:
        return [replace(one, layout=work.layout) for one in _line_ranges(work.path)]
    if kind == kinds.JSON_ARRAY:
        ranges = element_ranges(work.path, num_bytes=LINES_BYTES)
        return [
            replace(part, start=start, stop=stop, first_line=first, size=stop - start) for start, stop, first in ranges
        ]
    if kind not in (kinds.ARCHIVE, kinds.MAILBOX):
        return []
    ranges_of = sample_ranges if kind == kinds.ARCHIVE else message_ranges
    return [
        replace(part, start=marks[0], stop=marks[-1], marks=tuple(marks), size=marks[-1] - marks[0])
        for marks in ranges_of(work.path, num_bytes=ARCHIVE_BYTES)
    ]


def _parts_of(work: WorkItem, parts: Sequence[WorkItem]) -> list[WorkItem]:
    """Return `parts` of `work`, the last of them marked as such if it is the end of the work too."""
    last = len(parts) - 1
    return [replace(part, ends=work.ends and number == last) for number, part in enumerate(parts)]


def cut_work(work: WorkItem) -> list[WorkItem]:
    """Return the parts of `work` to try alone when it fails: lines, records, samples, runs of rows; or itself."""
    return _parts_of(work, _cut(work))


def _cut(work: WorkItem) -> list[WorkItem]:
    if work.kind in (kinds.ARCHIVE, kinds.MAILBOX):
        spans = list(pairwise(work.marks))
        return [replace(work, start=start, stop=stop, marks=(start, stop), size=stop - start) for start, stop in spans]
    if work.kind in (kinds.PARQUET, kinds.ARROW) or work.table is not None:
        return _cut_rows(work, PARTS_OF_ROWS)
    if work.kind == kinds.JSON_ARRAY:
        from megatron_mm.ingest.records import element_ranges_of

        return [
            replace(work, start=start, stop=stop, first_line=number, size=stop - start)
            for start, stop, number in element_ranges_of(work.path, work.start, work.stop, work.first_line)
        ]
    if work.kind == kinds.WARC:
        return _cut_records(work)
    if work.kind is None and kinds.by_suffix(work.path) == kinds.JSONL:
        work = replace(work, kind=kinds.JSONL, stop=work.num_bytes)
    if work.kind not in ENDS or work.stop is None:
        return [work]
    parts, start = [], work.start
    for number, record in enumerate(records_in(work.read(), work.kind), work.first_line):
        own = replace(work, start=start, stop=start + len(record), first_line=number, size=len(record))
        parts.append(replace(own, data=record) if work.is_streamed else own)
        start += len(record)
    return parts


def _cut_records(work: WorkItem) -> list[WorkItem]:
    """Cut a range of a web archive into records, by where they begin or, if many begin in one stream, by number."""
    if work.window is None:
        from megatron_mm.ingest.warc_file import record_marks

        try:
            marks, count = record_marks(work.path, work.start, work.stop)
        except OSError:
            return [work]
        if len(marks) > 1:
            spans = pairwise([*marks, work.stop])
            return [replace(work, start=start, stop=stop, size=stop - start) for start, stop in spans]
        return [replace(work, window=(number, number + 1)) for number in range(count)] if count > 1 else [work]
    first, last = work.window
    return [replace(work, window=(number, number + 1)) for number in range(first, last)]


def _cut_rows(work: WorkItem, count: int, *, groups: Sequence[int] = ()) -> list[WorkItem]:
    """Cut a range of rows into at most `count` parts of about one size; the bytes of the file are dealt out evenly.

    Where `groups`, which are read as wholes, begin not far from a cut, it is there.
    """
    assert work.stop is not None and work.size is not None
    num_rows = work.stop - work.start
    if not num_rows:
        return [work]
    count = min(count, num_rows)
    marks = [number * num_rows // count for number in range(count + 1)]
    marks = sorted({_snapped(mark, groups, within=num_rows // (2 * count)) for mark in marks})
    sizes = [mark * work.size // num_rows for mark in marks]
    return [
        replace(
            work,
            start=work.start + begin,
            stop=work.start + end,
            size=following - before,
            position=work.position + before,
        )
        for (begin, end), (before, following) in zip(pairwise(marks), pairwise(sizes), strict=True)
    ]


def _snapped(mark: int, groups: Sequence[int], *, within: int) -> int:
    """Return the start of the group that is nearest to a mark, or the mark if it is farther than `within`."""
    place = bisect.bisect_left(groups, mark)
    nearest = min(groups[max(0, place - 1) : place + 1], key=lambda start: abs(start - mark), default=mark)
    return nearest if abs(nearest - mark) <= within else mark
