"""One record to one document, by its schema: text, media and conversations in their order."""

import os.path
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.beside import file_beside
from megatron_mm.ingest.conversations import PLACEHOLDER, Turns, plainly, turns_of
from megatron_mm.ingest.document import Document, Origin, Segment, TextSegment
from megatron_mm.ingest.fields import (
    ADDRESS_COLUMNS,
    ADDRESSES_ONLY,
    HOW_TO_NAME,
    IMAGES,
    MEDIA_NAMES,
    MEDIA_SUFFIXES,
    SIZE_COLUMNS,
    Fields,
    Part,
    Schemas,
)
from megatron_mm.ingest.media_values import MEDIA, READERS, decode_base64, is_base64, medium_of
from megatron_mm.ingest.origins import FIELDS as ORIGIN_FIELDS
from megatron_mm.ingest.origins import said_of
from megatron_mm.source import Source

SOURCES = {"image": Source.IMAGE, "audio": Source.AUDIO, "video": Source.VIDEO}
SHOWN = 80
"""Characters of a name that a message shows."""


def read_record(record: Any, folder: Path, schemas: Schemas) -> Document:
    """Return the document of a record; files that it names are looked for in `folder`. Raises DataError."""
    if not isinstance(record, dict):
        raise DataError("it is not an object with text, image, audio, video or segments")
    return _Record(record, folder, schemas).document()


def words_of(record: Mapping[str, Any], schemas: Schemas) -> tuple[str, Origin]:
    """Return the text of a record that lies beside a medium, "" if it has none, and what it says of its origin."""
    reading = _Record(record, Path(), schemas)
    texts = [reading.text(part) for part in schemas.of(record).parts if part.text]
    return "\n".join(text for text in texts if text.strip()), reading.origin()


class _Record:
    """One record that is being read."""

    def __init__(self, record: Mapping[str, Any], folder: Path, schemas: Schemas) -> None:
        self.record, self.folder, self.schemas = record, folder, schemas
        self.media: list[str] = []
        self.used: set[str] = set()

    def document(self) -> Document:
        fields = self.schemas.of(self.record)
        segments = [segment for part in fields.parts for segment in self._part(part)]
        self._refuse_unread_media(fields)
        if not segments:
            there = sorted(name for name, value in self.record.items() if value is not None)
            raise DataError(f"none of its fields {there} holds text or media that is known. {HOW_TO_NAME}")
        for name, value in self.record.items():
            if value is not None:
                is_used = name in self.used or name in ORIGIN_FIELDS
                account.count(account.USED if is_used else account.NOT_USED, name)
        source = next((SOURCES[kind] for kind in MEDIA if kind in self.media), Source.TEXT)
        return Document(segments, source, self.origin())

    def origin(self) -> Origin:
        """Return what the record says of where it comes from."""
        return Origin(*said_of(self.record))

    def _refuse_unread_media(self, fields: Fields) -> None:
        for name, value in self.record.items():
            if value is None or name in self.used or name in fields.ignore:
                continue
            is_file_name = isinstance(value, str) and value.lower().endswith(MEDIA_SUFFIXES) and "://" not in value
            if name in MEDIA_NAMES or _holds_bytes(value) or (is_file_name and not self.media):
                raise DataError(
                    f"its field {name!r} holds media, and as {fields.name!r} it is not read. {HOW_TO_NAME}, or list it "
                    "there under `ignore`"
                )
        has_address = any(isinstance(self.record.get(name), str) for name in ADDRESS_COLUMNS)
        if not self.media and has_address and not SIZE_COLUMNS.isdisjoint(self.record):
            raise DataError(ADDRESSES_ONLY)

    def _take(self, names: Sequence[str]) -> tuple[str, Any]:
        """Return the first of some columns that the record fills, and its value."""
        for name in names:
            if self.record.get(name) is not None:
                self.used.add(name)
                return name, self.record[name]
        return "", None

    def _part(self, part: Part) -> Iterator[Segment]:
        if part.segments:
            yield from self._nested(*self._take(part.segments))
        if part.interleaved:
            yield from self._interleaved(part)
        if part.matched:
            yield from self._matched(part)
        if part.conversation:
            yield from self._conversation(part)
        else:
            for kind in MEDIA:
                for value in self._values(getattr(part, kind)):
                    read = self._read(kind, value, part)
                    yield from self._timed(read, part) if kind == "audio" else read
            for kind, value in self._by_suffix(part.media):
                yield from self._read(kind, value, part)
        if (text := self.text(part)).strip():
            yield TextSegment(text)

    def text(self, part: Part) -> str:
        """Return the text of a part of the record."""
        return _text(*self._take(part.text))

    def _values(self, names: Sequence[str]) -> list[Any]:
        name, value = self._take(names)
        if value is None:
            return []
        self._name = name
        return [one for one in value if one is not None] if isinstance(value, list) else [value]

    def _by_suffix(self, names: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield (kind, name) of each file that some columns name and whose suffix says that it is a medium."""
        for name in names:
            value = self.record.get(name)
            files = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
            named = [(medium_of(file), file) for file in files]
            if any(kind for kind, _ in named):
                self.used.add(name)
                self._name = name
                yield from ((kind, file) for kind, file in named if kind)

    def _timed(self, segments: Sequence[Segment], part: Part) -> Sequence[Segment]:
        """Return a recording cut as the record says, and with the words that it has times for."""
        if not (part.start or part.seconds or part.cues):
            return segments
        from megatron_mm.ingest import timed, transcripts  # reading text takes a while to load

        (_, start), (_, seconds) = self._take(part.start), self._take(part.seconds)
        if start is not None or seconds is not None:
            segments = [timed.cut_out(segments[0], start, seconds)]
        name, said = self._take(part.cues)
        if said is None:
            return segments
        return timed.read_recording(segments[0], transcripts.record_cues(name, said))

    def _nested(self, name: str, records: Any) -> Iterator[Segment]:
        if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
            raise DataError(f"{name} is not a list of objects")
        for record in records:
            inner = _Record(record, self.folder, self.schemas)
            yield from inner.document().segments
            self.media += inner.media

    def _read(self, kind: str, value: Any, part: Part) -> Sequence[Segment]:
        try:
            segments = READERS[kind](self._bytes(value, part))
        except DataError as error:
            shown = f" {_short(value)!r}" if isinstance(value, str) else ""
            raise DataError(f"{self._name}{shown}: {error}") from error
        self.media.append(kind)
        return segments

    def _bytes(self, value: Any, part: Part) -> bytes:
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise DataError(f"it is {type(value).__name__}, neither the name of a file nor its bytes")
        if value.startswith("data:") or is_base64(value):
            return decode_base64(value)
        if "://" in value:
            raise DataError("it is an address, and nothing is fetched. Download the files and name those")
        return self._file(value, part).read_bytes()

    def _file(self, name: str, part: Part) -> Path:
        """Return the file that a record names. Raises DataError if it is not there, or not where it may be."""
        named = os.path.join(part.folder, name + part.suffix)
        places = [file_beside(one, named) for one in (self.folder, self.folder / IMAGES, *self.schemas.also)]
        if places[0] is None:
            raise DataError("it is outside the folder of the record")
        target = next((place for place in places if place is not None and place.exists()), None)
        if target is None:
            raise DataError("it is not there")
        return target

    def _interleaved(self, part: Part) -> Iterator[Segment]:
        (_, texts), (name, images) = self._take(part.interleaved[:1]), self._take(part.interleaved[1:])
        self._name = name
        if not isinstance(texts, list) or not isinstance(images, list):
            raise DataError(f"{part.interleaved} are not lists")
        if any(isinstance(text, dict) for text in texts):
            for image in images:
                yield from self._read("image", image, part)
            yield from self._render(turns_of(texts))
            return
        if len(texts) != len(images):
            raise DataError(f"{len(texts)} texts and {len(images)} images are not places of one document")
        for text, image in zip(texts, images, strict=True):
            if isinstance(image, str) and "://" in image:
                account.count(account.NOT_KEPT, "images that are addresses")
            elif image is not None:
                yield from self._read("image", image, part)
            if text is not None and _text("texts", text).strip():
                yield TextSegment(text if text.endswith("\n") else text + "\n")

    def _matched(self, part: Part) -> Iterator[Segment]:
        (_, texts), (name, images) = self._take(part.matched[:1]), self._take(part.matched[1:])
        self._name = name
        places: dict[int, list[Any]] = {}
        for image in images:
            places.setdefault(image["matched_text_index"], []).append(image["image_name"])
        for number, text in enumerate(texts):
            for image in places.pop(number, []):
                if self._is_there(image, part):
                    yield from self._read("image", image, part)
                else:
                    account.count(account.NOT_KEPT, "images that are not there")
            yield TextSegment(_text("text_list", text) + "\n")
        if places:
            raise DataError(f"its images belong to texts {sorted(places)}, of which there are {len(texts)}")

    def _is_there(self, name: str, part: Part) -> bool:
        try:
            self._file(name, part)
        except DataError:
            return False
        return True

    def _render(self, turns: Turns) -> list[Segment]:
        return (self.schemas.template or plainly)(turns)

    def _conversation(self, part: Part) -> Iterator[Segment]:
        name, turns = self._take(part.conversation)
        media = {kind: deque(self._values(getattr(part, kind))) for kind in MEDIA}
        rendered = self._render(turns_of(turns))
        marks = [mark for one in rendered if isinstance(one, TextSegment) for mark in PLACEHOLDER.findall(one.text)]
        for kind in MEDIA:
            if (expected := marks.count(kind)) and expected != len(media[kind]):
                raise DataError(f"{name} has {expected} <{kind}>, and the record {len(media[kind])} of that kind")
            if not expected:
                for value in media[kind]:
                    yield from self._read(kind, value, part)
        for one in rendered:
            if not isinstance(one, TextSegment):
                yield one
                continue
            for number, piece in enumerate(PLACEHOLDER.split(one.text)):
                if number % 2:
                    yield from self._read(piece, media[piece].popleft(), part)
                elif piece.strip() or self.schemas.template is not None:
                    yield TextSegment(piece)


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        value = next((value[key] for key in ("text", "answer", "value") if key in value), value)
    if isinstance(value, list):
        return "\n".join(_text(name, one) for one in value)
    if not isinstance(value, str):
        raise DataError(f"{name} is {type(value).__name__}, not a string")
    return value


def _holds_bytes(value: Any) -> bool:
    value = value[0] if isinstance(value, list) and value else value
    return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))


def _short(value: str) -> str:
    return value if len(value) <= SHOWN else value[:SHOWN] + "..."
