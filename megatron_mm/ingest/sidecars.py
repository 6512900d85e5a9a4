"""Media and what lies beside them: a caption behind an image, words beside the seconds in which they are said."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.charset import decode_text
from megatron_mm.ingest.document import Origin, Segment, TextSegment
from megatron_mm.ingest.fields import Schemas
from megatron_mm.ingest.record import words_of
from megatron_mm.ingest.transcripts import Cue, read_cues

ORDER = (".vtt", ".srt", ".stm", ".tsv", ".txt", ".caption", ".cap", ".json", ".cls")
"""Which of several texts counts, if they are alike: words with times, a conversation, words."""
PREFERRED = ("", "original", "caption", "en")
"""Of NAME.WORD.txt and the like, the word that counts; others come by the alphabet."""


@dataclass(frozen=True)
class Beside:
    """What the files beside a medium say of it."""

    cues: Sequence[Cue] = ()
    """Words with times."""
    segments: Sequence[Segment] = ()
    """Words without."""
    record: Any = None
    """A JSON object that a schema reads together with the medium: a conversation about it."""
    origin: Origin | None = None

    @property
    def rank(self) -> int:
        """How much it says: 0 for no words."""
        return 3 if self.cues else 2 if self.record is not None else 1 if self.segments else 0

    def repeats(self, other: "Beside") -> bool:
        """Tell whether it says the words of another one: img2dataset writes each caption in two files."""
        return self._words() == other._words()

    def _words(self) -> list[str]:
        said = [cue.text for cue in self.cues] or [part.text for part in self.segments if isinstance(part, TextSegment)]
        return " ".join(said).split()


def read_beside(media: Path, files: Sequence[Path], schemas: Schemas) -> Beside:
    """Return what the first of `files` that holds words says of a medium; the others are counted.

    Raises DataError if a file that should hold words cannot be read.
    """
    read = [(file, _read(file, schemas)) for file in sorted(files, key=lambda file: _rank(media, file))]
    with_words = [(file, one) for file, one in read if one.rank]
    for file, _ in [pair for pair in read if not pair[1].rank]:
        what = "metadata" if file.suffix.lower() == ".json" else "nothing"
        account.count(account.NOT_KEPT, f"files beside media that hold {what} ({file.suffix.lower()})")
    if not with_words:
        return Beside(origin=next((one.origin for _, one in read if one.origin is not None), None))
    best = max(one.rank for _, one in with_words)
    taken = next(one for _, one in with_words if one.rank == best)
    for file, one in with_words:
        if one is not taken and not one.repeats(taken):
            account.count(account.NOT_KEPT, f"another text of the same medium ({file.suffix.lower()})")
    return replace(taken, origin=next((one.origin for _, one in read if one.origin is not None), None))


def _rank(media: Path, file: Path) -> tuple[int, int, str]:
    word = file.stem.removeprefix(media.stem).lstrip(".")
    order = ORDER.index(file.suffix.lower()) if file.suffix.lower() in ORDER else len(ORDER)
    return order, PREFERRED.index(word) if word in PREFERRED else len(PREFERRED), word


def _read(file: Path, schemas: Schemas) -> Beside:
    try:
        if not file.read_bytes().strip(b"\0 \t\r\n\xef\xbb\xbf"):
            return Beside()
        cues = read_cues(file)
        if cues is not None:
            return Beside(cues=cues)
        if file.suffix.lower() == ".json":
            return _read_json(file, schemas)
        text = decode_text(file.read_bytes())
        if file.suffix.lower() == ".cls" and text.strip().isdigit():
            account.count(account.NOT_KEPT, "numbers of classes, which have no names (.cls)")
            return Beside()
        return Beside(segments=[TextSegment(text)])
    except (DataError, ValueError) as error:
        raise DataError(f"its text {file.name} cannot be read: {error}") from error


def _read_json(file: Path, schemas: Schemas) -> Beside:
    record = json.loads(decode_text(file.read_bytes()))
    if not isinstance(record, dict):
        return Beside()
    fields = schemas.of(record)
    if any(part.conversation for part in fields.parts):
        return Beside(record=record)
    text, origin = words_of(record, schemas)
    return Beside(segments=[TextSegment(text)] if text.strip() else (), origin=origin)
