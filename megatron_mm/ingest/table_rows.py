"""The rows of a table whose cells name files: separated by commas, tabs or bars, names and texts, or COCO's JSON."""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import orjson

from megatron_mm.errors import DataError
from megatron_mm.ingest.fields import Fields, medium_of

MAX_BYTES = 2**30
"""A table is held in memory."""


@dataclass(frozen=True)
class Table:
    """How to read a table, and what becomes of its rows."""

    fields: Fields
    base: Path
    """The folder that the folders of `fields` count from."""
    delimiter: str
    """What stands between cells; " " where each line is a name, a space and a text, "coco" for COCO's JSON."""
    columns: tuple[str, ...] = ()
    """Names of the columns; none if the first row has them."""
    has_quotes: bool = False
    """Whether cells may be quoted, as in CSV; if not, quotes are text."""
    read: Callable[[Path], Iterator[dict[str, Any]]] | None = None
    """Who reads it, if it is no table of cells."""
    anywhere: str = ""
    """A column of names or stems without folders: each of the only file below `base` that has it."""
    num_rows: int = 0
    skipped: frozenset[int] = frozenset()
    """Rows whose file an earlier table has, counted from 0."""

    @classmethod
    def of(cls, path: Path, fields: Fields, *, delimiter: str, columns: tuple[str, ...] = ()) -> Self:
        """Return how to read a table whose files lie in or below its own folder."""
        return cls(fields, path.parent, delimiter, columns, has_quotes=delimiter == ",")

    def counted(self, num_rows: int, skipped: frozenset[int]) -> Self:
        """Return this with what is known after the table was read."""
        return replace(self, num_rows=num_rows, skipped=skipped)


def read_rows(path: Path, table: Table) -> list[dict[str, Any]]:
    """Return the rows of a table by the names of its columns. Raises DataError if it is damaged or too large."""
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"the table has {path.stat().st_size:,} bytes, and tables are read up to 1 GiB")
    rows = list(_rows(path, table) if table.read is None else table.read(path))
    if table.anywhere:
        places = _places(table.base)
        for row in rows:
            if table.anywhere in row:
                row[table.anywhere] = places.get(row[table.anywhere]) or row[table.anywhere]
    return rows


def _places(base: Path) -> dict[str, str]:
    """Return where the media below a folder lie, by their names and their stems; "" for what several have."""
    places: dict[str, str] = {}
    for path in sorted(base.rglob("*")):
        place = path.relative_to(base)
        if medium_of(path.name) and not any(part.startswith(".") for part in place.parts):
            for name in {path.name, path.stem}:
                places[name] = "" if name in places else str(place)
    return places


def _rows(path: Path, table: Table) -> Iterator[dict[str, Any]]:
    data = path.read_bytes()
    if table.delimiter == "coco":
        yield from _coco(data)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 text: byte {error.start} cannot be decoded") from error
    if table.delimiter == " ":
        cells: Iterator[list[str]] = (line.split(maxsplit=1) for line in text.splitlines())
    else:
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if table.has_quotes else csv.QUOTE_NONE
        csv.field_size_limit(MAX_BYTES)
        cells = csv.reader(io.StringIO(text, newline=""), delimiter=table.delimiter, quoting=quoting)
    columns = list(table.columns)
    for row in cells:
        if not row:
            continue
        if not columns:
            columns = row
            continue
        yield {name: cell for name, cell in zip(columns, row) if cell != ""}


def _coco(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield {file_name, captions} of each image of COCO's captions, in the order of `images`."""
    said = orjson.loads(data)
    captions: dict[Any, list[str]] = {}
    for one in said["annotations"]:
        captions.setdefault(one["image_id"], []).append(one["caption"].strip())
    for image in said["images"]:
        yield {"file_name": image["file_name"], "captions": captions.get(image["id"])}
