"""Where documents came from, in columns, as workers hand it to a writer and a reader gives it back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import orjson

SPANS, WORDS = ("start", "stop"), ("file", "member", "url", "licence", "date")
COLUMNS = (*SPANS, *WORDS)
Column = str | Sequence[str]
"""A value for each document, or the one that all of them share; "" where nothing is known."""


@dataclass(frozen=True)
class Origins:
    """Where `count` documents came from, as far as it is known."""

    count: int
    file: Column = ""
    """The file, by the path that led to it."""
    start: np.ndarray | None = None
    """(count,) int64: the first byte of each document in its file or member, or the number of its row; -1 where it is
    all of the file, None if they all are."""
    stop: np.ndarray | None = None
    """(count,) int64: where its bytes end; -1, or None, of a row and of all of a file."""
    member: Column = ""
    """What it is called within an archive, members of archives in archives after a slash."""
    url: Column = ""
    licence: Column = ""
    date: Column = ""

    def column(self, name: str) -> Sequence[Any]:
        """Return a column in full: strings, or for `start` and `stop` integers with None where there is none."""
        value = getattr(self, name)
        if isinstance(value, str) or value is None:
            return [value] * self.count
        return value if name in WORDS else [None if number < 0 else number for number in value.tolist()]

    def span(self, name: str) -> np.ndarray:
        """Return `start` or `stop` in full: (count,) int64, -1 where there is none."""
        value = getattr(self, name)
        return np.full(self.count, -1) if value is None else value

    def take(self, numbers: np.ndarray) -> "Origins":
        """Return those of some documents: `numbers` is of integers."""
        return self._with_columns(len(numbers), lambda column: [column[number] for number in numbers.tolist()])

    def part(self, start: int, stop: int) -> "Origins":
        """Return those of documents [start, stop)."""
        return self._with_columns(stop - start, lambda column: column[start:stop])

    def _with_columns(self, count: int, change: Callable[[Any], Any]) -> "Origins":
        """Return `count` of them: `change` is given each column that is not of one value."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        full = {name: column for name, column in columns.items() if column is not None and not isinstance(column, str)}
        spans = {name: np.asarray(change(full.pop(name)), np.int64) for name in SPANS if name in full}
        return replace(self, count=count, **spans, **{name: change(column) for name, column in full.items()})

    @property
    def is_known(self) -> bool:
        """Whether anything is said of any of them."""
        return any(value is not None and len(value) for value in (getattr(self, name) for name in COLUMNS))

    def to_line(self) -> bytes:
        """Return the columns as a line of JSON."""
        said: dict[str, Any] = {"count": self.count}
        said |= {name: None if (span := getattr(self, name)) is None else np.ascontiguousarray(span) for name in SPANS}
        said |= {name: _as_unicode(getattr(self, name)) for name in WORDS}
        return orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"

    @staticmethod
    def of_line(line: bytes) -> "Origins":
        """Return what `to_line` was made of."""
        said = orjson.loads(line)
        spans = {name: np.asarray(said[name], np.int64) for name in SPANS if said[name] is not None}
        return Origins(**said | spans)


def shared(values: Sequence[str]) -> Column:
    """Return a column as short as it can be: the one value of all, or all values."""
    first = values[0] if values else ""
    return first if all(value == first for value in values) else values


def _as_unicode(column: Column) -> Column:
    """Return a column that any encoding can hold: what is no UTF-8 in the name of a file is shown as \\udcff."""
    if not isinstance(column, str):
        return [_as_unicode(text) for text in column]
    return column.encode("utf-8", "backslashreplace").decode()
