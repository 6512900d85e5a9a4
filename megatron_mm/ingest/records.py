"""Records: JSON lines, JSON arrays, rows of Parquet and Arrow files and of tables, each a document of its own."""

import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pyarrow
import pyarrow.parquet

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, table_rows
from megatron_mm.ingest.charset import decode_utf8
from megatron_mm.ingest.detect import ARROW_FILE
from megatron_mm.ingest.document import Document, Origin, Reading, Rejection, TextSegment, unexpected
from megatron_mm.ingest.features import declared_media
from megatron_mm.ingest.fields import DEFAULTS, Schemas, is_plain
from megatron_mm.ingest.origins import KEPT, said_of
from megatron_mm.ingest.record import read_record
from megatron_mm.ingest.table_rows import Row, Table
from megatron_mm.source import Source

ROWS_AT_ONCE = 64
"""Rows that are Python objects at a time."""


@dataclass(frozen=True)
class Raw:
    """One record as it lies in its file."""

    place: str
    """What a rejection calls it: 'notes.jsonl:12'."""
    value: Any
    start: int | None = None
    stop: int | None = None


def read_records(
    raws: Iterable[Raw],
    folder: Path,
    schemas: Schemas,
    *,
    kind: str,
    parse: Callable[[Any], Any] = lambda value: value,
    short: bool = False,
) -> Reading:
    """Return the documents of records, which are of `kind`; a bad one is a rejection of its own.

    `parse` makes of the value of each what `schemas` read; files that it names are looked for in `folder`. `short`
    takes plain text a short way, to the same documents.
    """
    short = short and not schemas.own and not schemas.declared
    documents: list[Document] = []
    rejections: list[Rejection] = []
    for raw in raws:
        account.count(account.INPUTS, kind)
        try:
            value = parse(raw.value)
            document = _plain_document(value) if short and _is_text(value) else read_record(value, folder, schemas)
            said = document.origin
            origin = Origin(said.url, said.licence, said.date, raw.start, raw.stop)
            documents.append(Document(document.segments, document.source, origin))
        except MemoryError:
            raise
        except Exception as error:  # of a damaged file, libraries raise what they like
            rejections.append(Rejection(raw.place, _reason(error)))
    return documents, rejections


def _is_text(record: Any) -> bool:
    """Tell whether a row is plain text and has no column that could hold media."""
    return is_plain(record) and not any(type(value) in (bytes, dict, list) for value in record.values())


def _plain_document(record: Mapping[str, Any]) -> Document:
    for name, value in record.items():
        if value is not None:
            account.count(account.USED if name in KEPT else account.NOT_USED, name)
    return Document([TextSegment(record["text"])], Source.TEXT, Origin(*said_of(record)))


def read_lines(
    path: Path,
    *,
    start: int = 0,
    stop: int | None = None,
    data: bytes | None = None,
    first_line: int = 1,
    schemas: Schemas = DEFAULTS,
) -> Reading:
    """Return the documents of the JSON lines in bytes [start, stop) of a file; a bad line is a rejection of its own.

    The bytes are `data`, if they have been read before.

    A line is an object with `text`, with `image` or `audio` naming a file beside this one (the text follows it), with
    `segments`, a list of such objects in reading order, or of another of the `schemas`.
    """
    if data is None:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read() if stop is None else file.read(stop - start)
    documents, rejections = read_records(
        _lines(data, str(path), start, first_line), path.parent, schemas, kind="JSON lines", parse=_parse
    )
    if not documents and not rejections:
        account.count(account.INPUTS, "JSON lines")
        rejections.append(Rejection(str(path), "it has no lines"))
    return documents, rejections


def _lines(data: bytes, name: str, start: int, first_line: int) -> Iterator[Raw]:
    for number, line in enumerate(data.split(b"\n"), start=first_line):
        if line.strip():
            yield Raw(f"{name}:{number}", line, start, start + len(line))
        start += len(line) + 1


def element_ranges(path: Path, *, num_bytes: int) -> list[tuple[int, int, int]]:
    """Return the ranges of about `num_bytes` that a JSON array is read in: (first byte, last byte, first element).

    Raises DataError if it is not whole.
    """
    data = path.read_bytes()
    try:
        elements = msgspec.json.decode(data.removeprefix(b"\xef\xbb\xbf"), type=list[msgspec.Raw])
    except msgspec.DecodeError as error:
        raise DataError(f"the JSON array is damaged: {error}") from error
    ranges: list[tuple[int, int, int]] = []
    start, at, first = None, 0, 0
    for number, element in enumerate(elements):
        begin = data.index(element, at)
        at = begin + len(element)
        if start is None:
            start, first = begin, number
        if at - start >= num_bytes:
            ranges.append((start, at, first))
            start = None
    if start is not None:
        ranges.append((start, at, first))
    return ranges


def element_ranges_of(path: Path, start: int, stop: int, first: int) -> list[tuple[int, int, int]]:
    """Return each element in bytes [start, stop) of a JSON array, which are whole: (first byte, end, number)."""
    with path.open("rb") as file:
        file.seek(start)
        data = b"[" + file.read(stop - start) + b"]"
    return [(raw.start, raw.stop, number) for number, raw in enumerate(_elements(data, path, start, first), first)]


def read_elements(path: Path, *, start: int, stop: int, first_element: int, schemas: Schemas = DEFAULTS) -> Reading:
    """Return the documents of the elements in bytes [start, stop) of a JSON array, which are whole."""
    with path.open("rb") as file:
        file.seek(start)
        data = b"[" + file.read(stop - start) + b"]"
    return read_records(
        _elements(data, path, start, first_element), path.parent, schemas, kind="JSON array", parse=_parse
    )


def _elements(data: bytes, path: Path, start: int, first: int) -> Iterator[Raw]:
    at = 0
    for number, element in enumerate(msgspec.json.decode(data, type=list[msgspec.Raw]), first):
        at = data.index(element, at)
        yield Raw(f"{path}[{number}]", bytes(element), start + at - 1, start + at - 1 + len(element))
        at += len(element)


def read_rows(path: Path, *, start: int = 0, stop: int | None = None, schemas: Schemas = DEFAULTS) -> Reading:
    """Return the documents of rows [start, stop) of a Parquet or Arrow file; a bad row is a rejection of its own.

    A row has the fields of a JSON line; media may also be the file itself, or, as Hugging Face's datasets do, a struct
    of `bytes` and `path`. Raises DataError if the file is damaged or has none of the fields.
    """
    try:
        with open_rows(path) as rows:
            schemas = replace(schemas, declared=declared_media(rows.metadata))
            schemas.check_columns(rows.names)
            return read_records(_rows(rows, path, start, stop), path.parent, schemas, kind=rows.kind, short=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the {kind_of_rows(path)} file is damaged: {error}") from error


def row_groups(path: Path) -> list[int]:
    """Return where each row group of a Parquet file, or batch of an Arrow file, starts, and last the number of rows."""
    with open_rows(path) as rows:
        return rows.marks


def _rows(rows: "ParquetRows | ArrowRows", path: Path, start: int, stop: int | None) -> Iterator[Raw]:
    for group, (first, following) in enumerate(pairwise(rows.marks)):
        begin, end = max(first, start), following if stop is None else min(following, stop)
        if begin < end:
            table = rows.group(group).slice(begin - first, end - begin)
            for number, record in enumerate(_records(table), start=begin):
                yield Raw(f"{path}:{number + 1}", record, number)


class _Kept:
    """The rows of the table that was read last, for the next range of the same one."""

    key: tuple[Path, int] | None = None
    rows: list[Row]

    def of(self, path: Path, table: Table) -> list[Row]:
        key = (path, path.stat().st_mtime_ns)
        if self.key != key:
            self.rows, self.key = table_rows.read_rows(path, table), key
        return self.rows


_kept = _Kept()


def read_table(path: Path, table: Table, schemas: Schemas, *, start: int, stop: int) -> Reading:
    """Return the documents of rows [start, stop) of a table; a bad row is a rejection of its own."""
    rows = _kept.of(path, table)
    numbers = [number for number in range(start, stop) if number not in table.skipped]
    skipped = stop - start - len(numbers)
    account.count(account.INPUTS, "rows of tables", skipped)
    account.count(account.OTHERS, "rows of tables about a file that an earlier row has", skipped)
    joined = sum(rows[number].joined for number in numbers)
    account.count(account.INPUTS, "rows of tables", joined)
    account.count(account.OTHERS, "rows of tables that were joined to an earlier one of the same file", joined)
    raws = (Raw(f"{path}, row {rows[one].number + 1}", rows[one].cells, rows[one].number) for one in numbers)
    own = replace(schemas, own=(*schemas.own, table.fields))
    return read_records(raws, table.base, own, kind="rows of tables")


class ParquetRows:
    """A Parquet file, by row groups."""

    kind = "Parquet"

    def __init__(self, path: Path) -> None:
        self._source = path.open("rb")  # pyarrow opens no names that are not UTF-8
        self._file = pyarrow.parquet.ParquetFile(self._source)
        self.names: list[str] = self._file.schema_arrow.names
        self.metadata = self._file.schema_arrow.metadata
        counts = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self.marks = _marks(counts)

    def group(self, number: int) -> pyarrow.Table:
        """Return a row group."""
        return self._file.read_row_group(number)

    def __enter__(self) -> "ParquetRows":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._source.close()


class ArrowRows:
    """An Arrow file or stream, by record batches; it is mapped, not read."""

    kind = "Arrow"

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        buffer = pyarrow.py_buffer(self._map)
        if self._map[: len(ARROW_FILE)] == ARROW_FILE:
            reader = pyarrow.ipc.open_file(buffer)
            self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        else:
            reader = pyarrow.ipc.open_stream(buffer)
            self._batches = list(reader)
        self.names, self.metadata = reader.schema.names, reader.schema.metadata
        self.marks = _marks(batch.num_rows for batch in self._batches)

    def group(self, number: int) -> pyarrow.Table:
        """Return a batch."""
        return pyarrow.Table.from_batches([self._batches[number]])

    def __enter__(self) -> "ArrowRows":
        return self

    def __exit__(self, *_: object) -> None:
        self._batches.clear()  # the map goes with the last of them


def kind_of_rows(path: Path) -> str:
    """Return "Parquet" or "Arrow", by the first bytes of a file."""
    with path.open("rb") as file:
        return "Parquet" if file.read(4) == b"PAR1" else "Arrow"


def open_rows(path: Path) -> ParquetRows | ArrowRows:
    """Open a Parquet or Arrow file."""
    return ParquetRows(path) if kind_of_rows(path) == "Parquet" else ArrowRows(path)


def _marks(counts: Iterable[int]) -> list[int]:
    marks = [0]
    for count in counts:
        marks.append(marks[-1] + count)
    return marks


def _records(table: pyarrow.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _placed(document: Document, start: int, stop: int | None = None) -> Document:
    """Return a document of a record with the bytes, or the row, that it takes."""
    return replace(document, origin=replace(document.origin, start=start, stop=stop))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DataError | OSError) else unexpected(error)


def _parse(text: bytes) -> Any:
    try:
        return json.loads(decode_utf8(text))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"it is not JSON: {error}") from error
