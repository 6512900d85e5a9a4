"""Inputs cut into pieces of work: a file, or a part of one that can be read by itself."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mm.ingest.detect import KIND_OF_SUFFIX, Kind
from megatron_mm.ingest.encode import MAX_AUDIO_SECONDS

if TYPE_CHECKING:
    from megatron_mm.ingest.read import Reading

LINES_BYTES = 4 * 2**20
"""Bytes of a JSON-lines file that one worker takes at a time."""


@dataclass(frozen=True)
class Work:
    """What one worker reads at a time: a file, or a range of lines of one."""

    path: Path
    caption: Path | None = None
    """A text file of the same name that belongs to an image or a recording."""
    start: int = 0
    stop: int | None = None
    first_line: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes that this work reads, for the progress bar."""
        return (self.path.stat().st_size if self.stop is None else self.stop) - self.start


@dataclass(frozen=True)
class Options:
    """How inputs are read."""

    trust_content: bool = False
    """Read a file whose name says another kind as what its content is, instead of rejecting it."""
    max_audio_seconds: int = MAX_AUDIO_SECONDS
    """Longer recordings become several items."""


DEFAULTS = Options()


def cut_file(path: Path, *, caption: Path | None = None) -> Iterator[Work]:
    """Yield the work of reading one file: long JSON-lines files are cut, any other file is one piece."""
    if KIND_OF_SUFFIX.get(path.suffix.lower()) is Kind.JSONL and path.stat().st_size > LINES_BYTES:
        yield from _line_ranges(path)
    else:
        yield Work(path, caption=caption)


def _line_ranges(path: Path) -> Iterator[Work]:
    """Cut a file at line ends into ranges of about LINES_BYTES."""
    block = bytearray(LINES_BYTES)
    with path.open("rb", buffering=0) as file, path.open("rb") as rest:
        start, line = 0, 1
        while size := file.readinto(block):
            lines = block.count(b"\n", 0, size)
            tail = rest.readline() if rest.seek(start + size) else b""
            yield Work(path, start=start, stop=start + size + len(tail), first_line=line)
            start = file.seek(start + size + len(tail))
            line += lines + tail.endswith(b"\n")


def cut_work(work: Work) -> list[Work]:
    """Return the parts of `work` that fail alone when it fails: single lines of a range, otherwise itself."""
    if work.stop is None:
        return [work]
    parts, start = [], work.start
    with work.path.open("rb") as file:
        file.seek(start)
        for number, line in enumerate(io.BytesIO(file.read(work.stop - start)), work.first_line):
            parts.append(Work(work.path, start=start, stop=start + len(line), first_line=number))
            start += len(line)
    return parts


def read_work(work: Work, options: Options) -> "Reading":
    """Return the documents of a piece of work, and what was left out. Never raises for what is in the file."""
    # The readers of media take half a second to load, which runs over plain text are spared.
    from megatron_mm.ingest.read import read_file, read_lines

    if work.stop is not None:
        return read_lines(work.path, start=work.start, stop=work.stop, first_line=work.first_line)
    return read_file(work.path, caption=work.caption, trust_content=options.trust_content)
