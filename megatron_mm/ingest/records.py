"""Records: JSON lines and Parquet rows, each a document of its own, each accounted for."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_mm.errors import DataError
from megatron_mm.ingest.audio import read_audio
from megatron_mm.ingest.beside import file_beside
from megatron_mm.ingest.document import Document, Reading, Rejection, Segment, TextSegment, unexpected
from megatron_mm.ingest.image import read_image
from megatron_mm.ingest.text import decode_text
from megatron_mm.source import Source

MEDIA_FIELDS = {"image": read_image, "audio": read_audio}
"""Fields that hold the bytes of a file, or name one beside the records, and who reads that."""
TEXT_FIELDS = ("text", "content", "caption")
"""Fields of a record's text; the first that is there counts."""


def read_lines(path: Path, *, start: int = 0, stop: int | None = None, first_line: int = 1) -> Reading:
    """Return the documents of the JSON lines in bytes [start, stop) of a file; a bad line is a rejection of its own.

    A line is an object with `text`, with `image` or `audio` naming a file beside this one (the text follows it), or
    with `segments`, a list of such objects in reading order.
    """
    documents: list[Document] = []
    rejections: list[Rejection] = []
    with path.open("rb") as file:
        file.seek(start)
        lines = file.read() if stop is None else file.read(stop - start)
    for number, line in enumerate(lines.split(b"\n"), start=first_line):
        if not line.strip():
            continue
        try:
            documents.append(_read_line(line, path.parent))
        except MemoryError:
            raise
        except Exception as error:  # of a damaged file, libraries raise what they like
            rejections.append(Rejection(f"{path}:{number}", _reason(error)))
    if not documents and not rejections:
        rejections.append(Rejection(str(path), "it has no lines"))
    return documents, rejections


def read_rows(path: Path, *, start: int = 0, stop: int | None = None) -> Reading:
    """Return the documents of rows [start, stop) of a Parquet file; a bad row is a rejection of its own.

    A row has the fields of a JSON line; `image` and `audio` may also hold the file itself, or, as Hugging Face's
    datasets do, a struct of `bytes` and `path`. Raises DataError if the file is damaged or has none of the fields.
    """
    documents: list[Document] = []
    rejections: list[Rejection] = []
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = [*MEDIA_FIELDS, *TEXT_FIELDS, "segments"]
            columns = [name for name in file.schema_arrow.names if name in known]
            if not columns:
                raise DataError(f"its columns are {file.schema_arrow.names}, none of which is one of {known}")
            for first, table in _row_groups(file, columns, start, stop):
                for number, record in enumerate(_records(table), start=first):
                    try:
                        documents.append(read_record(record, path.parent))
                    except MemoryError:
                        raise
                    except Exception as error:  # the same
                        rejections.append(Rejection(f"{path}:{number + 1}", _reason(error)))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the Parquet file is damaged: {error}") from error
    return documents, rejections


def row_groups(path: Path) -> list[int]:
    """Return where each row group of a Parquet file starts, and last the number of rows."""
    with pyarrow.parquet.ParquetFile(path) as file:
        marks = [0]
        for group in range(file.num_row_groups):
            marks.append(marks[-1] + file.metadata.row_group(group).num_rows)
    return marks


def _row_groups(
    file: pyarrow.parquet.ParquetFile, columns: list[str], start: int, stop: int | None
) -> Iterator[tuple[int, pyarrow.Table]]:
    """Yield (number of the first row, table) of the row groups that overlap [start, stop), cut to it."""
    first = 0
    for group in range(file.num_row_groups):
        following = first + file.metadata.row_group(group).num_rows
        begin, end = max(first, start), following if stop is None else min(following, stop)
        if begin < end:
            yield begin, file.read_row_group(group, columns=columns).slice(begin - first, end - begin)
        first = following


def _records(table: pyarrow.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DataError | OSError) else unexpected(error)


def _read_line(line: bytes, folder: Path) -> Document:
    try:
        record = json.loads(decode_text(line))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the line is not JSON: {error}") from error
    return read_record(record, folder)


def read_record(record: Any, folder: Path) -> Document:
    """Return the document of one record; files that it names are looked for in `folder`. Raises DataError."""
    parts = (record.get("segments") or [record]) if isinstance(record, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise DataError("the line is not an object with text, image, audio or segments")
    segments = [segment for part in parts for segment in _read_fields(part, folder)]
    if not segments:
        raise DataError("the line has no text, image or audio")
    kinds = {field for part in parts for field in MEDIA_FIELDS if part.get(field) is not None}
    source = Source.IMAGE if "image" in kinds else Source.AUDIO if "audio" in kinds else Source.TEXT
    return Document(segments, source)


def _read_fields(record: Mapping[str, Any], folder: Path) -> list[Segment]:
    segments: list[Segment] = []
    for field, read in MEDIA_FIELDS.items():
        value = record.get(field)
        if value is not None:
            try:
                segments.append(read(_media_bytes(value, field, folder)))
            except DataError as error:
                named = f" {value!r}" if isinstance(value, str) else ""
                raise DataError(f"{field}{named}: {error}") from error
    text = next((record[field] for field in TEXT_FIELDS if record.get(field) is not None), "")
    if not isinstance(text, str):
        raise DataError(f"text is {type(text).__name__}, not a string")
    if text.strip():
        segments.append(TextSegment(text))
    return segments


def _media_bytes(value: Any, field: str, folder: Path) -> bytes:
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(f"it is {type(value).__name__}, neither the name of a file nor its bytes")
    target = file_beside(folder, value)
    if target is None:
        raise DataError(f"it is outside the folder of the {field}'s record")
    return target.read_bytes()
