"""The rows of a table whose cells name files: separated by commas, tabs or bars, names and texts, or COCO's JSON."""

import csv
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import orjson

from megatron_mm.errors import DataError
from megatron_mm.ingest.fields import Fields
from megatron_mm.ingest.media_values import medium_of

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
    joined_by: str = ""
    """A column of names: rows that name one file are one, with the texts of all."""
    num_rows: int = 0
    """How many there are after joining."""
    skipped: frozenset[int] = frozenset()
    """Which of them are about a file that an earlier table has, counted from 0."""

    @classmethod
    def of(cls, path: Path, fields: Fields, *, delimiter: str, columns: tuple[str, ...] = ()) -> Self:
        """Return how to read a table whose files lie in or below its own folder."""
        return cls(fields, path.parent, delimiter, columns, has_quotes=delimiter == ",")

    def counted(self, num_rows: int, skipped: frozenset[int]) -> Self:
        """Return this with what is known after the table was read."""
        return replace(self, num_rows=num_rows, skipped=skipped)


@dataclass
class Row:
    """A row of a table."""

    number: int
    """Its place in the table, from 0."""
    cells: dict[str, Any]
    """What it says, by the names of columns."""
    joined: int = 0
    """How many later rows were joined to it."""


def read_rows(path: Path, table: Table) -> list[Row]:
    """Return the rows of a table. Raises DataError if it is damaged or too large."""
    if table.read is None and path.stat().st_size > MAX_BYTES:
        raise DataError(f"the table has {path.stat().st_size:,} bytes, and tables are read up to 1 GiB")
    cells = _rows(path, table) if table.read is None else table.read(path)
    rows = [Row(number, one) for number, one in enumerate(cells)]
    if table.anywhere:
        places = _places(table.base)
        for row in rows:
            if table.anywhere in row.cells:
                row.cells[table.anywhere] = places.get(row.cells[table.anywhere]) or row.cells[table.anywhere]
    return _join(rows, table) if table.joined_by else rows


def _join(rows: list[Row], table: Table) -> list[Row]:
    """Return rows of which no two name one file: each with all texts that are said of its file, in their order."""
    names = {name for part in table.fields.parts for name in part.text}
    first: dict[Any, Row] = {}
    for row in rows:
        key = row.cells.get(table.joined_by, ("no file", row.number))
        one = first.setdefault(key, row)
        if one is not row:
            one.joined += 1
            for name in names & row.cells.keys():
                said = one.cells.get(name, [])
                said = said if isinstance(said, list) else [said]
                one.cells[name] = said if row.cells[name] in said else [*said, row.cells[name]]
    return list(first.values())


def _places(base: Path) -> dict[str, str]:
    """Return where the media below a folder lie, by their names and their stems; "" for what several have."""
    places: dict[str, str] = {}
    for folder, folders, names in os.walk(base):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in names:
            if medium_of(file) and not file.startswith("."):
                place = os.path.relpath(os.path.join(folder, file), base)
                for name in {file, os.path.splitext(file)[0]}:
                    places[name] = "" if name in places else place
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
        if table.delimiter == "|":  # Flickr30k writes a space behind each
            row = [cell.strip() for cell in row]
        if not columns:
            columns = [name.strip() for name in row]
            continue
        yield {name: cell for name, cell in zip(columns, row) if cell != ""}


def _coco(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield {file_name, captions} of each image of COCO's captions, in the order of `images`. Raises DataError."""
    try:
        said = orjson.loads(data)
        captions: dict[Any, list[str]] = {}
        for one in said["annotations"]:
            captions.setdefault(one["image_id"], []).append(one["caption"].strip())
        for image in said["images"]:
            yield {"file_name": image["file_name"], "captions": captions.get(image["id"])}
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"its captions are not those of COCO: {type(error).__name__} {error}") from error
