"""What a file is, by its content; its name is only compared with that."""

import enum
from pathlib import Path

import magic

from megatron_mm.errors import DataError
from megatron_mm.ingest.archive import COMPRESSIONS


class Kind(enum.Enum):
    """How a file is read."""

    TEXT = "text"
    HTML = "web page"
    JSONL = "JSON lines"
    MAIL = "e-mail"
    IMAGE = "image"
    AUDIO = "sound"
    VIDEO = "video"
    PDF = "PDF"
    OFFICE = "office document"
    LEGACY = "office document of before 2007"
    PARQUET = "Parquet"
    ARCHIVE = "archive"
    COMPRESSED = "compressed file"
    UNKNOWN = "unknown"


TEXTUAL = {Kind.TEXT, Kind.HTML, Kind.JSONL, Kind.MAIL}
"""Kinds that are all text inside, so that only the name can tell them apart."""
KIND_OF_SUFFIX = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".csv", ".tsv", ".json", ".xml"), Kind.TEXT),
    **dict.fromkeys((".html", ".htm", ".xhtml"), Kind.HTML),
    **dict.fromkeys((".jsonl", ".ndjson"), Kind.JSONL),
    ".eml": Kind.MAIL,
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"), Kind.IMAGE),
    **dict.fromkeys((".heic", ".heif", ".avif", ".jp2"), Kind.IMAGE),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma"), Kind.AUDIO),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ogv"), Kind.VIDEO),
    ".pdf": Kind.PDF,
    **dict.fromkeys((".docx", ".pptx", ".xlsx", ".odt", ".ods", ".odp", ".epub"), Kind.OFFICE),
    ".parquet": Kind.PARQUET,
    **dict.fromkeys((".tar", ".zip"), Kind.ARCHIVE),
    **dict.fromkeys((".gz", ".tgz", ".bz2", ".xz", ".zst"), Kind.COMPRESSED),
}
LEGACY_MIMES = ("application/msword", "application/vnd.ms-excel", "application/vnd.ms-powerpoint", "text/rtf")
"""What libmagic takes doc, xls, ppt and rtf files for; those names are often given to text and web pages too."""
LEGACY_SUFFIXES = (".doc", ".dot", ".xls", ".xlt", ".ppt", ".pps", ".pot")
OLE_MARK = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
"""What files of these names begin with, also where they are too damaged for libmagic."""
CONTAINERS = {"application/ogg", "video/x-ms-asf", "application/vnd.rn-realmedia", "audio/x-m4a", "application/mxf"}
"""What may hold sound alone or pictures too, beside every kind of video."""
PDF_HEAD = 1024
"""Bytes in which %PDF- may stand: readers skip junk before it, libmagic does not."""


def detect(path: Path, *, trust_content: bool = False) -> Kind:
    """Return how to read the file at `path`, UNKNOWN if there is no way.

    Raises DataError if it is empty or, unless `trust_content`, named as a kind that its content is not.
    """
    if path.stat().st_size == 0:
        raise DataError("the file is empty")
    mime = mime_of(path)
    named = KIND_OF_SUFFIX.get(path.suffix.lower())
    found = _kind_of(path, mime)
    if found in TEXTUAL and named in TEXTUAL:
        return named
    if {found, named} == {Kind.AUDIO, Kind.VIDEO}:
        return found  # containers of both go by either name
    if named is not None and found is not named and not trust_content:
        if found is Kind.UNKNOWN:
            raise DataError(f"its content is {mime}, which is not a kind of file that is read")
        raise DataError(
            f"it is named {path.suffix} ({named.value}) but its content is {mime} ({found.value}): rename it, or read "
            "it as what it is with --trust-content"
        )
    return found


def mime_of(path: Path) -> str:
    """Return what libmagic takes the file for; it is given the whole file, without which it misses old formats."""
    return magic.from_file(str(path), mime=True)


# Readers are imported where they are asked: they take half a second, which runs over plain text are spared.
def _kind_of(path: Path, mime: str) -> Kind:
    fixed = {
        "application/pdf": Kind.PDF,
        "text/html": Kind.HTML,
        "application/xhtml+xml": Kind.HTML,
        "application/x-ndjson": Kind.JSONL,
        "message/rfc822": Kind.MAIL,
        "application/x-tar": Kind.ARCHIVE,
        "application/x-xz": Kind.COMPRESSED,
        **dict.fromkeys(COMPRESSIONS, Kind.COMPRESSED),
        "application/vnd.apache.parquet": Kind.PARQUET,
        "image/svg+xml": Kind.TEXT,
        **dict.fromkeys(LEGACY_MIMES, Kind.LEGACY),
    }
    if mime in fixed:
        return fixed[mime]
    if mime.startswith("image/"):
        return Kind.IMAGE
    if mime.startswith("video/") or mime in CONTAINERS:
        from megatron_mm.ingest.video import has_pictures

        return Kind.VIDEO if has_pictures(path) else Kind.AUDIO
    if mime.startswith("audio/"):
        return Kind.AUDIO
    if mime.startswith("text/") or mime in ("application/json", "application/xml", "application/javascript"):
        return Kind.TEXT
    return _kind_by_marks(path)


def _kind_by_marks(path: Path) -> Kind:
    """Look for what libmagic has no name for, or names by what the file is wrapped in."""
    with path.open("rb") as file:
        head = file.read(PDF_HEAD)
    if head.startswith(b"PAR1"):
        return Kind.PARQUET
    if head.startswith(b"PK"):
        from megatron_mm.ingest.office import is_office

        return Kind.OFFICE if is_office(path) else Kind.ARCHIVE
    if b"%PDF-" in head:
        return Kind.PDF
    if head.startswith(OLE_MARK) and path.suffix.lower() in LEGACY_SUFFIXES:
        return Kind.LEGACY
    from megatron_mm.ingest.text import decode_text

    try:
        decode_text(path.read_bytes())
    except DataError:
        return Kind.UNKNOWN
    return Kind.TEXT
