"""What a file becomes before it is tokenized: an ordered list of text and media."""

import os.path
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from megatron_mm.source import Source


@dataclass(frozen=True)
class TextSegment:
    """Some text."""

    text: str


@dataclass(frozen=True)
class SpecialToken:
    """One token of the tokenizer that is no text, by its spelling: the marks of a chat template."""

    spelling: str


@dataclass(frozen=True)
class MediaSegment:
    """An item of a modality, as its decode reads it."""

    data: bytes
    modality: ClassVar[str]


@dataclass(frozen=True)
class ImageSegment(MediaSegment):
    """An image in a plain encoding: upright, 8-bit RGB or grey, without transparency; any decoder reads it alike."""

    modality = "image"


@dataclass(frozen=True)
class AudioSegment(MediaSegment):
    """A recording as 16 kHz mono FLAC."""

    num_samples: int
    modality = "audio"


Segment = TextSegment | SpecialToken | MediaSegment


@dataclass(frozen=True)
class Origin:
    """Where in its file a document came from, and what the file says of it: only what is known."""

    url: str = ""
    licence: str = ""
    date: str = ""
    """As the source writes it."""
    start: int | None = None
    """Its first byte in the file, or the number of its row, counted from 0."""
    stop: int | None = None
    """Where its bytes end."""
    member: str = ""
    """Which member of an archive it is."""


NOWHERE = Origin()
"""What is known of a document that is a whole file."""


@dataclass(frozen=True)
class Document:
    """One document: its segments in reading order, what kind of file it came from, and where in it."""

    segments: Sequence[Segment]
    source: Source
    origin: Origin = NOWHERE


@dataclass(frozen=True)
class Rejection:
    """Something that was left out, and why: a file, a line of one ('notes.jsonl:12'), or a part of one."""

    path: str
    reason: str
    is_part: bool = False
    """Whether the rest of the document is kept."""

    @property
    def is_filtered(self) -> bool:
        """Whether it could be read, and a filter left it out: that ends no run."""
        return self.reason.startswith("filter ")


def unexpected(error: Exception) -> str:
    """Return what to say of a file whose reader raised what it should not: libraries do, of files that are damaged."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"reading it raised {type(error).__name__} at {os.path.basename(frame.filename)}:{frame.lineno}: {error}"


Reading = tuple[list[Document], list[Rejection]]
"""The documents of an input, and what was left out of it."""
