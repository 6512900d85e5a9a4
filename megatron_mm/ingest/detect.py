"""What a file is, by its content; its name is only compared with that."""

import enum
from pathlib import Path

import magic

from megatron_mm.errors import DataError


class Kind(enum.Enum):
    """How a file is read."""

    TEXT = "text"
    HTML = "web page"
    JSONL = "JSON lines"
    IMAGE = "image"
    AUDIO = "sound"
    PDF = "PDF"


TEXTUAL = {Kind.TEXT, Kind.HTML, Kind.JSONL}
"""Kinds that are all text inside, so that only the name can tell them apart."""
KIND_OF_SUFFIX = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), Kind.TEXT),
    **dict.fromkeys((".html", ".htm", ".xhtml"), Kind.HTML),
    **dict.fromkeys((".jsonl", ".ndjson"), Kind.JSONL),
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"), Kind.IMAGE),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac"), Kind.AUDIO),
    ".pdf": Kind.PDF,
}


def detect(path: Path, *, trust_content: bool = False) -> Kind:
    """Return how to read the file at `path`.

    Raises DataError if it is empty, of a kind that cannot be read, or, unless `trust_content`, named as another kind.
    """
    if path.stat().st_size == 0:
        raise DataError("the file is empty")
    mime = magic.from_file(str(path), mime=True)
    named = KIND_OF_SUFFIX.get(path.suffix.lower())
    found = _kind_of_mime(mime, named)
    if found is None:
        raise DataError(f"its content is {mime}, which is not a kind of file that is read")
    if found in TEXTUAL and named in TEXTUAL:
        return named
    if named is not None and found is not named and not trust_content:
        raise DataError(
            f"it is named {path.suffix} ({named.value}) but its content is {mime} ({found.value}): rename it, or read "
            "it as what it is with --trust-content"
        )
    return found


def _kind_of_mime(mime: str, named: Kind | None) -> Kind | None:
    if mime == "application/pdf":
        return Kind.PDF
    if mime.startswith("image/") and mime != "image/svg+xml":
        return Kind.IMAGE
    # Containers that hold sound or video: libmagic cannot tell which.
    if mime.startswith("audio/") or (named is Kind.AUDIO and mime in ("application/ogg", "video/ogg", "video/mp4")):
        return Kind.AUDIO
    if mime in ("text/html", "application/xhtml+xml"):
        return Kind.HTML
    if mime == "application/x-ndjson" or (mime == "application/json" and named is Kind.JSONL):
        return Kind.JSONL
    if mime.startswith("text/") or mime in ("application/json", "application/xml", "application/javascript"):
        return Kind.TEXT
    return None
