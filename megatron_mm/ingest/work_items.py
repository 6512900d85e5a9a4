"""Inputs cut into pieces of work: a file, or a part of one that can be read by itself."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.ingest import kinds
from megatron_mm.ingest.detect import detect
from megatron_mm.ingest.document import Reading, Rejection
from megatron_mm.ingest.encode import MAX_AUDIO_SECONDS
from megatron_mm.ingest.kinds import Kind
from megatron_mm.ingest.workers import Cut
from megatron_mm.modalities import Geometries, default_geometries

NEWLINE = ord("\n")
LINES_BYTES = 4 * 2**20
"""Bytes of a JSON-lines file that one worker takes at a time."""
ARCHIVE_BYTES = 16 * 2**20
"""Bytes of a tar or a Parquet file, the same."""
PARTS_OF_ROWS = 16
"""Parts that a range of rows is cut into when it fails: each of them reads its row group again."""


@dataclass(frozen=True)
class WorkItem:
    """What one worker reads at a time: a file, or a range of one."""

    path: Path
    caption: Path | None = None
    """A file of the same name with the text of an image, a recording or a video."""
    kind: Kind | None = None
    """What the range below is one of: JSON lines and archives count bytes, Parquet files rows; None: the whole file."""
    start: int = 0
    stop: int | None = None
    first_line: int = 1
    marks: tuple[int, ...] = ()
    """Where the samples of a range of a tar start, and last where it stops."""
    size: int | None = None
    """Bytes that this work reads, for the progress bar; None: those of the file."""
    ends: bool = True
    """Whether it is the last part of what it was cut from; true of what was not cut."""
    refusal: str = ""
    """Why it is not opened at all."""

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
    geometries: Geometries = field(default_factory=default_geometries)
    """How media become tokens, by modality: as the model that is to be trained on them has it."""


DEFAULTS = Options()


def cut_file(path: Path, *, caption: Path | None = None) -> Iterator[WorkItem]:
    """Yield the work of reading one file: long JSON-lines files are cut, any other file is one piece."""
    if kinds.by_suffix(path) == kinds.JSONL and path.stat().st_size > LINES_BYTES:
        yield from _line_ranges(path)
    else:
        yield WorkItem(path, caption=caption)


def _line_ranges(path: Path) -> Iterator[WorkItem]:
    """Cut a file at line ends into ranges of about LINES_BYTES."""
    block = bytearray(LINES_BYTES)
    with path.open("rb", buffering=0) as file, path.open("rb") as rest:
        start, line = 0, 1
        while size := file.readinto(block):
            # At least twice as fast as bytearray.count: one process cuts for all workers.
            lines = int(np.count_nonzero(np.frombuffer(block, np.uint8, size) == NEWLINE))
            tail = rest.readline() if rest.seek(start + size) else b""
            stop = start + size + len(tail)
            yield WorkItem(path, kind=kinds.JSONL, start=start, stop=stop, first_line=line, size=stop - start)
            start = file.seek(stop)
            line += lines + tail.endswith(b"\n")


def read_work(work: WorkItem, options: Options) -> Reading | Cut[WorkItem]:
    """Return the documents of a piece of work and what was left out, or the parts to read a large archive in.

    Never raises for what is in the file.
    """
    if work.refusal:
        return [], [Rejection(str(work.path), work.refusal)]
    # The readers of media take half a second to load, which runs over plain text are spared.
    import tarfile

    import pyarrow

    from megatron_mm.ingest.read import read_archive, read_file
    from megatron_mm.ingest.records import read_lines, read_rows

    try:
        if work.kind == kinds.JSONL:
            return read_lines(work.path, start=work.start, stop=work.stop, first_line=work.first_line)
        if work.kind == kinds.PARQUET:
            return read_rows(work.path, start=work.start, stop=work.stop)
        if work.kind == kinds.ARCHIVE:
            trust_content = options.trust_content
            return read_archive(work.path, start=work.start, stop=work.stop, trust_content=trust_content)
        parts = _cut_archive(work, options)
        if len(parts) > 1:
            return Cut(_parts_of(work, parts))
    except (DataError, OSError, tarfile.TarError, pyarrow.ArrowException) as error:
        return [], [Rejection(str(work.path), str(error))]
    return read_file(work.path, caption=work.caption, trust_content=options.trust_content)


def read_all(work: WorkItem, options: Options) -> Iterator[Reading]:
    """Yield the readings of a piece of work, part after part, in this process."""
    reading = read_work(work, options)
    if not isinstance(reading, Cut):
        yield reading
        return
    for part in reading.parts:
        yield from read_all(part, options)


def _cut_archive(work: WorkItem, options: Options) -> list[WorkItem]:
    """Return the ranges in which a large Parquet or tar file is read, nothing for any other file."""
    size = work.path.stat().st_size
    named = kinds.by_suffix(work.path)
    if size <= ARCHIVE_BYTES or named not in (kinds.PARQUET, kinds.ARCHIVE) or work.path.suffix.lower() == ".zip":
        return []
    from megatron_mm.ingest.archive import sample_ranges
    from megatron_mm.ingest.records import row_groups

    kind = detect(work.path, trust_content=options.trust_content)
    if kind == kinds.PARQUET:
        rows = row_groups(work.path)
        whole = WorkItem(work.path, kind=kind, start=0, stop=rows[-1], size=size)
        return _cut_rows(whole, -(-size // ARCHIVE_BYTES))
    if kind != kinds.ARCHIVE:
        return []
    return [
        WorkItem(work.path, kind=kind, start=marks[0], stop=marks[-1], marks=tuple(marks), size=marks[-1] - marks[0])
        for marks in sample_ranges(work.path, num_bytes=ARCHIVE_BYTES)
    ]


def _parts_of(work: WorkItem, parts: Sequence[WorkItem]) -> list[WorkItem]:
    """Return `parts` of `work`, the last of them marked as such if it is the end of the work too."""
    last = len(parts) - 1
    return [replace(part, ends=work.ends and number == last) for number, part in enumerate(parts)]


def cut_work(work: WorkItem) -> list[WorkItem]:
    """Return the parts of `work` to try alone when it fails: lines, samples of a tar, runs of rows; or itself."""
    return _parts_of(work, _cut(work))


def _cut(work: WorkItem) -> list[WorkItem]:
    if work.kind == kinds.ARCHIVE:
        spans = list(pairwise(work.marks))
        return [replace(work, start=start, stop=stop, marks=(start, stop), size=stop - start) for start, stop in spans]
    if work.kind == kinds.PARQUET:
        return _cut_rows(work, PARTS_OF_ROWS)
    if work.kind is None and kinds.by_suffix(work.path) == kinds.JSONL:
        work = replace(work, kind=kinds.JSONL, stop=work.num_bytes)
    if work.kind != kinds.JSONL or work.stop is None:
        return [work]
    parts, start = [], work.start
    with work.path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(io.BytesIO(file.read(work.stop - start)), work.first_line):
            stop = start + len(line)
            parts.append(replace(work, start=start, stop=stop, first_line=number, size=len(line)))
            start = stop
    return parts


def _cut_rows(work: WorkItem, count: int) -> list[WorkItem]:
    """Cut a range of rows into at most `count` parts of about one size; the bytes of the file are dealt out evenly."""
    assert work.stop is not None and work.size is not None
    num_rows = work.stop - work.start
    count = max(1, min(count, num_rows))
    marks = [number * num_rows // count for number in range(count + 1)]
    sizes = [number * work.size // count for number in range(count + 1)]
    return [
        replace(work, start=work.start + begin, stop=work.start + end, size=following - before)
        for (begin, end), (before, following) in zip(pairwise(marks), pairwise(sizes), strict=True)
    ]
