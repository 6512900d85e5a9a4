"""P.origin.parquet: where documents came from, beside the shards, which training never opens.

While shards are written the columns are lines of JSON, one for each batch; at the end they become a Parquet file, in
groups of ROW_GROUP documents, so that one document is found by reading one group.
"""

import io
import itertools
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.retry import retrying
from megatron_mm.shards.checksums import differs
from megatron_mm.shards.format import BLOCK_BYTES
from megatron_mm.shards.origins import COLUMNS, SPANS, WORDS, Column, Origins, shared

if TYPE_CHECKING:
    import pyarrow

ORIGIN_SUFFIX = ".origin.parquet"
ROW_GROUP = 65_536
"""Documents that are written, and read, at a time."""
MAX_LICENCES = 100
"""Licences that a summary names: those of most documents."""
COUNTED_LICENCES = 10_000
"""Licences that are counted by name, the first that come: a field that is no licence must not fill the memory."""
OTHER, NOT_GIVEN = "other", "not given"
DICTIONARY, SORTED = ["file", "licence"], ("member", "url", "date")
"""Columns that repeat themselves, and those whose values begin as the one before."""


class OriginSummary:
    """Counts files and licences while origins pass by."""

    def __init__(self) -> None:
        self.files = 0
        self._licences: Counter[str] = Counter()
        self._last_file = ""

    def add(self, origins: Origins) -> None:
        """Count some more documents. The documents of a file follow one another, so a new name is a new file."""
        names = [origins.file] if isinstance(origins.file, str) else origins.file
        for name, _ in itertools.groupby(names):
            self.files += name not in ("", self._last_file)
            self._last_file = name
        own = Counter({origins.licence: origins.count}) if isinstance(origins.licence, str) else origins.licence
        for name, number in Counter(own).items():
            is_counted = name in self._licences or len(self._licences) < COUNTED_LICENCES
            self._licences[name if is_counted else OTHER] += number

    def said(self) -> dict[str, Any]:
        """Return what a manifest says of them: `files`, and `documents_by_licence`, those of most documents first."""
        return {"files": self.files, "documents_by_licence": by_licence(self._licences)}


def summed(summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the summary of several sets of shards together."""
    files, licences = 0, Counter()
    for summary in summaries:
        files += summary["files"]
        licences.update(summary["documents_by_licence"])
    return {"files": files, "documents_by_licence": by_licence(licences)}


def by_licence(documents: Mapping[str, int]) -> dict[str, int]:
    """Return the documents of each licence, those of most documents first, and of all that are too many to name."""
    counts = Counter({name or NOT_GIVEN: number for name, number in documents.items()})
    rest = counts.pop(OTHER, 0)
    named = dict(counts.most_common(MAX_LICENCES))
    rest += sum(counts.values()) - sum(named.values())
    return named | ({OTHER: rest} if rest else {})


def read_lines(path: str) -> Iterator[Origins]:
    """Yield the batches of origins that were appended to a file."""
    with open(path, "rb") as file:
        for line in file:
            yield Origins.of_line(line)


def write_columns(batches: Iterable[Origins], sink: BinaryIO) -> dict[str, Any]:
    """Write origins as a Parquet file, a group of documents at a time, and return their summary for the manifest."""
    # It takes a tenth of a second to load, which reading shards for training is spared.
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, pyarrow.int64() if name in SPANS else pyarrow.string()) for name in COLUMNS])
    encodings = dict.fromkeys(SPANS, "DELTA_BINARY_PACKED") | dict.fromkeys(SORTED, "DELTA_BYTE_ARRAY")
    how = {"use_dictionary": DICTIONARY, "column_encoding": encodings, "compression": "zstd", "write_statistics": False}
    summary = OriginSummary()
    with pyarrow.parquet.ParquetWriter(sink, schema, **how) as writer:
        for group in _groups(batches, summary):
            spans = {name: np.concatenate([batch.span(name) for batch in group]) for name in SPANS}
            columns = {name: pyarrow.array(values, mask=values < 0) for name, values in spans.items()}
            columns |= {name: _word_column([getattr(batch, name) for batch in group], group) for name in WORDS}
            writer.write_table(pyarrow.table(columns, schema), row_group_size=ROW_GROUP)
    return summary.said()


def _word_column(values: Sequence[Column], group: Sequence[Origins]) -> "Sequence[str] | pyarrow.Array":
    """Return a column of several batches in full; one value that all of them share is repeated at no cost."""
    import pyarrow

    if all(isinstance(value, str) and value == values[0] for value in values):
        return pyarrow.repeat(values[0], sum(batch.count for batch in group))
    parts = ([value] * batch.count if isinstance(value, str) else value for value, batch in zip(values, group))
    return [value for part in parts for value in part]


def _groups(batches: Iterable[Origins], summary: OriginSummary) -> Iterator[list[Origins]]:
    """Yield origins of ROW_GROUP documents at a time, the last of fewer; `summary` counts them."""
    waiting: list[Origins] = []
    room = ROW_GROUP
    for batch in batches:
        summary.add(batch)
        while batch.count >= room:
            yield [*waiting, batch.part(0, room)]
            batch = batch.part(room, batch.count)
            waiting, room = [], ROW_GROUP
        waiting.append(batch)
        room -= batch.count
    if room < ROW_GROUP:
        yield waiting


class OriginReader:
    """Reads the origins of one set of shards, a group of documents at a time, compared with the manifest's checksums.

    Raises DataError if the file is missing, is not of its size, or is damaged where it is read.
    """

    def __init__(self, prefix: str, summary: Mapping[str, Any]) -> None:
        # It takes a tenth of a second to load, which reading shards for training is spared.
        import pyarrow
        import pyarrow.parquet

        self.path = prefix + ORIGIN_SUFFIX
        found = os.path.getsize(self.path) if Path(self.path).exists() else None
        if found != summary["bytes"]:
            raise DataError(
                f"{self.path} has {found if found is not None else 'no'} bytes, its manifest says {summary['bytes']}: "
                "restore it from a copy. Training does without it."
            )
        self._checked = _Checked(self.path, summary)
        self._file = pyarrow.parquet.ParquetFile(pyarrow.PythonFile(self._checked, mode="r"))
        counts = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._stops = np.cumsum(counts, dtype=np.int64)
        self._held: tuple[int, dict[str, list[Any]]] | None = None

    def read(self, start: int, stop: int) -> Origins:
        """Return the origins of documents [start, stop)."""
        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        first, last = (int(np.searchsorted(self._stops, number, side="right")) for number in (start, stop - 1))
        for group in range(first, last + 1 if stop > start else first):
            before = int(self._stops[group - 1]) if group else 0
            for name, values in self._group(group).items():
                columns[name] += values[max(0, start - before) : stop - before]
        spans = {
            name: np.asarray([-1 if number is None else number for number in columns.pop(name)], np.int64)
            for name in SPANS
        }
        return Origins(stop - start, **{name: shared(values) for name, values in columns.items()}, **spans)

    def verify(self, progress: Callable[[int], None]) -> None:
        """Pass if every byte is what was written. Raises DataError."""
        for block in range(self._checked.num_blocks):
            progress(self._checked.compare(block))

    def _group(self, group: int) -> dict[str, list[Any]]:
        if self._held is None or self._held[0] != group:
            self._held = group, self._file.read_row_group(group).to_pydict()
        return self._held[1]


class _Checked(io.RawIOBase):
    """A file of which no byte is given out before its block was compared with the manifest, once."""

    def __init__(self, path: str, summary: Mapping[str, Any]) -> None:
        self._path, self._size, self._expected = path, summary["bytes"], summary["block_crc32"]
        self._passed: set[int] = set()
        self._file = open(path, "rb", buffering=0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        start = self._file.tell()
        for block in range(start // BLOCK_BYTES, -(-min(start + len(buffer), self._size) // BLOCK_BYTES)):
            if block not in self._passed:
                self.compare(block)
        return retrying(lambda: self._file.readinto(buffer), what=self._path)

    def compare(self, block: int) -> int:
        """Pass if a block is what was written, and return its bytes. Raises DataError."""
        data = retrying(lambda: os.pread(self._file.fileno(), BLOCK_BYTES, block * BLOCK_BYTES), what=self._path)
        if zlib.crc32(data) != self._expected[block]:
            raise differs(self._path, block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, self._size))
        self._passed.add(block)
        return len(data)

    @property
    def num_blocks(self) -> int:
        """Blocks that there are checksums of."""
        return len(self._expected)

    def close(self) -> None:
        self._file.close()
        super().close()
