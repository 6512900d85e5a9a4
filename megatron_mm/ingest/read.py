"""Any file to documents: the kind decides who reads it, and what cannot be read becomes a rejection."""

import json
from pathlib import Path
from typing import Any

from megatron_mm.errors import DataError
from megatron_mm.ingest.audio import read_audio
from megatron_mm.ingest.detect import Kind, detect
from megatron_mm.ingest.document import Document, Rejection, Segment, TextSegment
from megatron_mm.ingest.image import read_image
from megatron_mm.ingest.pdf import read_pdf
from megatron_mm.ingest.text import PARSE_ERRORS, decode_text, read_html, read_text
from megatron_mm.modality import Source

Reading = tuple[list[Document], list[Rejection]]
"""The documents of an input, and what was left out of it."""

MEDIA_FIELDS = {"image": read_image, "audio": read_audio}
"""Fields of a JSON line that name a file beside it, and who reads that."""


def read_file(path: Path, *, caption: Path | None = None, trust_content: bool = False) -> Reading:
    """Return the documents of the file at `path`; with a `caption`, its text follows the image or recording.

    Never raises for what is in the file: a file that cannot be read is a rejection.
    """
    try:
        kind = detect(path, trust_content=trust_content)
        if kind is Kind.JSONL:
            return read_lines(path)
        segments, source, rejections = _segments(path, kind)
        if caption is not None:
            segments = [*segments, *_caption(caption)]
    except (DataError, OSError, *PARSE_ERRORS) as error:
        return [], [Rejection(str(path), str(error))]
    return [Document(segments, source)], rejections


def _segments(path: Path, kind: Kind) -> tuple[list[Segment], Source, list[Rejection]]:
    if kind is Kind.PDF:
        segments, rejections = read_pdf(path)
        return segments, Source.PDF, rejections
    if kind is Kind.HTML:
        segments, rejections = read_html(path)
        return segments, Source.TEXT, rejections
    if kind is Kind.IMAGE:
        return [read_image(path.read_bytes())], Source.IMAGE, []
    if kind is Kind.AUDIO:
        return [read_audio(path.read_bytes())], Source.AUDIO, []
    return read_text(path), Source.TEXT, []


def _caption(path: Path) -> list[Segment]:
    try:
        return read_text(path)
    except DataError as error:
        raise DataError(f"its text {path.name} cannot be read: {error}") from error


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
        except (DataError, OSError) as error:
            rejections.append(Rejection(f"{path}:{number}", str(error)))
    if not documents and not rejections:
        rejections.append(Rejection(str(path), "it has no lines"))
    return documents, rejections


def _read_line(line: bytes, folder: Path) -> Document:
    try:
        record = json.loads(decode_text(line))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the line is not JSON: {error}") from error
    parts = record.get("segments", [record]) if isinstance(record, dict) else None
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise DataError("the line is not an object with text, image, audio or segments")
    segments = [segment for part in parts for segment in _read_fields(part, folder)]
    if not segments:
        raise DataError("the line has no text, image or audio")
    kinds = {field for part in parts for field in MEDIA_FIELDS if field in part}
    source = Source.IMAGE if "image" in kinds else Source.AUDIO if "audio" in kinds else Source.TEXT
    return Document(segments, source)


def _read_fields(record: dict[str, Any], folder: Path) -> list[Segment]:
    segments: list[Segment] = []
    for field, read in MEDIA_FIELDS.items():
        if field in record:
            target = (folder / str(record[field])).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise DataError(f"{field} {record[field]!r} is outside the folder of the file")
            try:
                segments.append(read(target.read_bytes()))
            except DataError as error:
                raise DataError(f"{field} {record[field]!r}: {error}") from error
    text = record.get("text", "")
    if not isinstance(text, str):
        raise DataError(f"text is {type(text).__name__}, not a string")
    if text.strip():
        segments.append(TextSegment(text))
    return segments
