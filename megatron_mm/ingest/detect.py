"""What a file is, by its content; its name is only compared with that."""

from pathlib import Path

import magic

from megatron_mm.errors import DataError
from megatron_mm.ingest import kinds
from megatron_mm.ingest.kinds import Kind

LEGACY_SUFFIXES = (".doc", ".dot", ".xls", ".xlt", ".ppt", ".pps", ".pot")
OLE_MARK = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
"""What files of these names begin with, also where they are too damaged for libmagic."""
CONTAINERS = {"application/ogg", "video/x-ms-asf", "application/vnd.rn-realmedia", "audio/x-m4a", "application/mxf"}
"""What may hold audio alone or pictures too, beside every kind of video."""
PDF_HEAD = 1024
"""Bytes in which %PDF- may stand: readers skip junk before it, libmagic does not."""


def detect(path: Path, *, trust_content: bool = False) -> Kind:
    """Return how to read the file at `path`, UNKNOWN if there is no way.

    Raises DataError if it is empty or, unless `trust_content`, named as a kind that its content is not.
    """
    if not path.is_file():
        raise DataError("it is not a plain file" if path.exists() else "it does not exist")
    if path.stat().st_size == 0:
        raise DataError("the file is empty")
    mime = mime_of(path)
    named, found = kinds.by_suffix(path), _kind_of(path, mime)
    if named is not None and found.textual and named.textual:
        return named
    if {found, named} == {kinds.AUDIO, kinds.VIDEO}:
        return found  # containers of both go by either name
    if named is not None and found != named and not trust_content:
        if found == kinds.UNKNOWN:
            raise DataError(f"its content is {mime}, which is not a kind of file that is read")
        raise DataError(
            f"it is named {path.suffix} ({named.words}) but its content is {mime} ({found.words}): rename it, or read "
            "it as what it is with --trust-content"
        )
    return found


def mime_of(path: Path) -> str:
    """Return what libmagic takes the file for; it is given the whole file, without which it misses old formats."""
    return magic.from_file(str(path), mime=True)


# Readers are imported where they are asked: they take half a second, which runs over plain text are spared.
def _kind_of(path: Path, mime: str) -> Kind:
    found = kinds.by_mime(mime)
    if found == kinds.VIDEO or mime in CONTAINERS:
        from megatron_mm.ingest.video import has_pictures

        return kinds.VIDEO if has_pictures(path) else kinds.AUDIO
    if found is not None:
        return found
    return _kind_by_marks(path)


def _kind_by_marks(path: Path) -> Kind:
    """Look for what libmagic has no name for, or names by what the file is wrapped in."""
    with path.open("rb") as file:
        head = file.read(PDF_HEAD)
    if head.startswith(b"PAR1"):
        return kinds.PARQUET
    if head.startswith(b"PK"):
        from megatron_mm.ingest.office import is_office

        return kinds.OFFICE if is_office(path) else kinds.ARCHIVE
    if b"%PDF-" in head:
        return kinds.PDF
    if head.startswith(OLE_MARK) and path.suffix.lower() in LEGACY_SUFFIXES:
        return kinds.LEGACY
    from megatron_mm.ingest.text import decode_text

    try:
        decode_text(path.read_bytes())
    except DataError:
        return kinds.UNKNOWN
    return kinds.TEXT
