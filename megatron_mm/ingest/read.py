"""Any file to documents: the kind decides who reads it, and what cannot be read becomes a rejection."""

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest import kinds
from megatron_mm.ingest.archive import MAX_DEPTH, decompress, unpack
from megatron_mm.ingest.captions import is_captioned, pair_captions
from megatron_mm.ingest.detect import detect, mime_of
from megatron_mm.ingest.document import Document, Reading, Rejection, Segment, TextSegment, unexpected
from megatron_mm.ingest.kinds import Parts
from megatron_mm.ingest.mail import read_mail
from megatron_mm.ingest.records import TEXT_FIELDS, read_lines, read_rows
from megatron_mm.ingest.text import decode_text, read_text

MAX_FILE_BYTES = 2**30
"""Larger files are refused where a file is read whole: all kinds but JSON lines, Parquet and archives."""
BESIDE_MEDIA = (".txt", ".json", ".cls")
"""Files that say something of media of the same name."""


def read_file(path: Path, *, caption: Path | None = None, trust_content: bool = False, depth: int = 0) -> Reading:
    """Return the documents of the file at `path`; with a `caption`, its text follows the image, recording or video.

    Never raises for what is in the file: a file that cannot be read is a rejection. `depth` counts the archives that
    it was unpacked from.
    """
    try:
        kind = detect(path, trust_content=trust_content)
        if not kind.unbounded and path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"it has {path.stat().st_size:,} bytes, and {kind.words} files are read up to 1 GiB")
        if kind == kinds.JSONL:
            return read_lines(path)
        if kind == kinds.PARQUET:
            return read_rows(path)
        if kind == kinds.ARCHIVE:
            return read_archive(path, trust_content=trust_content, depth=depth + 1)
        if kind == kinds.COMPRESSED:
            return _read_compressed(path, trust_content=trust_content, depth=depth + 1)
        if kind == kinds.MAIL:
            segments, rejections = _read_mail(path, trust_content=trust_content, depth=depth + 1)
            return [Document(segments, kind.source)], rejections
        segments, rejections = kind.read(path)
        if caption is not None:
            segments = [*segments, *_caption(caption)]
    except (DataError, OSError) as error:
        return [], [Rejection(str(path), str(error))]
    except RecursionError:
        return [], [Rejection(str(path), "it is nested too deeply")]
    except MemoryError:
        raise
    except Exception as error:  # libraries raise what they like of a damaged file
        return [], [Rejection(str(path), unexpected(error))]
    return [Document(segments, kind.source)], rejections


def describe(path: Path) -> Parts:
    """Return what can be said of a file that cannot be read: its metadata."""
    return [TextSegment(f"{path.name}: {mime_of(path)}, {path.stat().st_size:,} bytes\n")], []


def _caption(path: Path) -> list[Segment]:
    try:
        if path.suffix.lower() != ".json":
            return read_text(path)
        record = json.loads(decode_text(path.read_bytes()))
        text = next((record[field] for field in TEXT_FIELDS if record.get(field)), "")
        return [TextSegment(text)] if text.strip() else []
    except (DataError, ValueError, AttributeError) as error:
        raise DataError(f"its text {path.name} cannot be read: {error}") from error


def _beside_media(files: Sequence[Path]) -> set[Path]:
    """Return the files that say something of media of the same name, so that they are no documents of their own."""
    media = {file.with_suffix("") for file in files if is_captioned(file)}
    return {file for file in files if file.suffix.lower() in BESIDE_MEDIA and file.with_suffix("") in media}


def read_archive(
    path: Path, *, start: int = 0, stop: int | None = None, trust_content: bool = False, depth: int = 1
) -> Reading:
    """Return the documents of the files in an archive; of a tar, of those whose header lies in bytes [start, stop).

    Raises DataError if it is damaged, holds too much or is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise DataError(f"archives are nested more than {MAX_DEPTH} deep")
    with tempfile.TemporaryDirectory(prefix="archive-") as folder:
        files, rejections = unpack(path, Path(folder), start=start, stop=stop)
        captions = pair_captions(files)
        shown = _beside_media(files)
        documents: list[Document] = []
        for file in files:
            if file not in shown:
                read, rejected = read_file(file, caption=captions.get(file), trust_content=trust_content, depth=depth)
                documents += read
                rejections += rejected
    if not files and not rejections and stop is None:
        raise DataError("the archive is empty")
    return documents, _within(path, folder, rejections)


def _read_compressed(path: Path, *, trust_content: bool, depth: int) -> Reading:
    if depth > MAX_DEPTH:
        raise DataError(f"archives are nested more than {MAX_DEPTH} deep")
    with tempfile.TemporaryDirectory(prefix="archive-") as folder:
        target = Path(folder) / (path.stem if path.suffix.lower() != ".tgz" else f"{path.stem}.tar")
        decompress(path, target, mime=mime_of(path))
        documents, rejections = read_file(target, trust_content=trust_content, depth=depth)
    return documents, _within(path, folder, rejections)


def _read_mail(path: Path, *, trust_content: bool, depth: int) -> Parts:
    if depth > MAX_DEPTH:
        raise DataError(f"messages and archives are nested more than {MAX_DEPTH} deep")
    with tempfile.TemporaryDirectory(prefix="mail-") as folder:
        read_attached = functools.partial(read_file, trust_content=trust_content, depth=depth)
        return read_mail(path, folder=Path(folder), read_attached=read_attached)


def _within(path: Path, folder: str, rejections: list[Rejection]) -> list[Rejection]:
    """Name what was unpacked to `folder` by the archive that it came from."""
    return [Rejection(entry.path.replace(folder, str(path), 1), entry.reason) for entry in rejections]
