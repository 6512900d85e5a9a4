"""What a file is, by its content; its name is only compared with that."""

import json
import os
import re
from pathlib import Path
from typing import Any

import magic

from megatron_mm.errors import DataError
from megatron_mm.ingest import kinds
from megatron_mm.ingest.fields import is_known
from megatron_mm.ingest.kinds import Kind
from megatron_mm.ingest.mailbox import is_mailbox

LEGACY_SUFFIXES = (".doc", ".dot", ".xls", ".xlt", ".ppt", ".pps", ".pot")
OLE_MARK = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
"""What files of these names begin with, also where they are too damaged for libmagic."""
MAX_FILE_BYTES = 2**30
"""Larger files are refused where a file is read whole: all kinds but JSON lines, Parquet and archives."""
SPHERE = b"NIST_1A\n"
"""What NIST's SPHERE recordings begin with."""
ARROW_FILE = b"ARROW1"
ARROW_STREAM = b"\xff\xff\xff\xff"
"""What Arrow's two forms of file begin with."""
CONTAINERS = {"application/ogg", "video/x-ms-asf", "application/vnd.rn-realmedia", "audio/x-m4a", "application/mxf"}
"""What may hold audio alone or pictures too, beside every kind of video."""
MAY_BE_RECORDS = ("", ".json", ".txt", ".text", ".xml")
"""Suffixes of text that may be records: of .json alone nobody knows, and JSON lines go by any name."""
DUMP_HEAD = 4096
"""Bytes in which a dump in XML says what it is."""
WIKI_ROOT = re.compile(rb"\A\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>\s*)?<mediawiki\s[^>]*mediawiki\.org/xml/export-")
STACK_EXCHANGE_ROOT = re.compile(
    rb"\A\s*(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>\s*)?"
    rb"<(posts|comments|users|votes|badges|tags|posthistory|postlinks)>\s*<row\s+Id="
)
RECORD_HEAD = 2**20
"""Bytes by which records are told from other text: a first one that is longer is not found."""
LOOKED_AT = 5
"""Lines that must be objects."""
PROSE_BYTES = 64 * 2**10
"""The most bytes of a file that is taken for text by its characters alone."""
PROSE = re.compile(r"\s*(?!P[1-7]\s|WARC/\d)[^\W_]")
"""How words begin, but no portable bitmap or web archive, which may be letters and digits alone."""
BOOKS = (b"Gutenberg", b"GUTENBERG")
"""What is in text that may be a book of Project Gutenberg."""
NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")
PDF_HEAD = 1024
"""Bytes in which %PDF- may stand: readers skip junk before it, libmagic does not."""
PAGE = re.compile(rb"<(?:!doctype\s+html|html)\b", re.IGNORECASE)
"""What libmagic does not see in a page with zero bytes."""


def detect(path: Path, *, trust_content: bool = False) -> Kind:
    """Return how to read the file at `path`, UNKNOWN if there is no way.

    Raises DataError if it is empty or, unless `trust_content`, named as a kind that its content is not.
    """
    if not path.is_file():
        raise DataError("it is not a plain file" if path.exists() else "it does not exist")
    if path.stat().st_size == 0:
        raise DataError("the file is empty")
    named = kinds.by_suffix(path)
    if named == kinds.TEXT and _is_prose(path):
        return named
    mime = mime_of(path)
    found = _kind_of(path, mime)
    if found.textual and (named is None or named == kinds.TEXT) and path.suffix.lower() in MAY_BE_RECORDS:
        with path.open("rb") as file:
            head = file.read(RECORD_HEAD)
        by_content = _kind_of_text(head, is_whole=len(head) < RECORD_HEAD)
        if by_content is not None:
            return by_content
    if named is not None and found.textual and named.textual:
        return named
    if {found, named} == {kinds.AUDIO, kinds.VIDEO} or (found, named) == (kinds.WARC, kinds.COMPRESSED):
        return found  # containers of both go by either name, and WARC files by that of their compression
    if named is not None and found != named and not trust_content:
        if found == kinds.UNKNOWN:
            raise DataError(f"its content is {mime}, which is not a kind of file that is read")
        raise DataError(
            f"it is named {path.suffix} ({named.words}) but its content is {mime} ({found.words}): rename it, or read "
            "it as what it is with --trust-content"
        )
    return found


def _is_prose(path: Path) -> bool:
    """Tell whether a short file is nothing but words, which libmagic takes 0.8 ms to find, most of a small file's time.

    What begins as markup, records, programs or pictures written in letters do is for libmagic to tell.
    """
    if path.stat().st_size > PROSE_BYTES:
        return False
    data = path.read_bytes()
    if is_mailbox(data) or any(name in data for name in BOOKS):
        return False
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return False
    return PROSE.match(text) is not None and NO_TEXT.search(text) is None


def mime_of(path: Path) -> str:
    """Return what libmagic takes the file for; it is given the whole file, without which it misses old formats."""
    return magic.from_file(os.path.realpath(path), mime=True)


# Readers are imported where they are asked: they take half a second, which runs over plain text are spared.
def _kind_of(path: Path, mime: str) -> Kind:
    found = kinds.by_mime(mime)
    if found == kinds.VIDEO or mime in CONTAINERS:
        from megatron_mm.ingest.video import has_pictures

        return kinds.VIDEO if has_pictures(path) else kinds.AUDIO
    if found == kinds.COMPRESSED:
        from megatron_mm.ingest.warc_file import is_warc

        return kinds.WARC if is_warc(path) else found
    if found is not None:
        return found
    return _kind_by_marks(path)


def _kind_by_marks(path: Path) -> Kind:
    """Look for what libmagic has no name for, or names by what the file is wrapped in."""
    with path.open("rb") as file:
        head = file.read(PDF_HEAD)
    if head.startswith(SPHERE):
        return kinds.AUDIO
    if is_mailbox(head):
        return kinds.MAILBOX
    if head.startswith(b"PAR1"):
        return kinds.PARQUET
    if head.startswith(ARROW_FILE) or (head.startswith(ARROW_STREAM) and path.suffix.lower() in kinds.ARROW.suffixes):
        return kinds.ARROW
    if head.startswith(b"PK"):
        from megatron_mm.ingest.office import is_office

        return kinds.OFFICE if is_office(path) else kinds.ARCHIVE
    if b"%PDF-" in head:
        return kinds.PDF
    if PAGE.search(head):
        return kinds.HTML
    if head.startswith(OLE_MARK) and path.suffix.lower() in LEGACY_SUFFIXES:
        return kinds.LEGACY
    from megatron_mm.ingest.charset import decode_utf8

    if path.stat().st_size > MAX_FILE_BYTES:
        return kinds.UNKNOWN
    try:
        decode_utf8(path.read_bytes())
    except DataError:
        return kinds.UNKNOWN
    return kinds.TEXT


def records_of(head: bytes, path: Path, *, is_whole: bool) -> Kind | None:
    """Return what records a file is made of by its first bytes and its name, None if it is not text, or not of records.

    `is_whole` says that `head` is all of it.
    """
    found, named = kinds.by_mime(magic.from_buffer(head, mime=True)), kinds.by_suffix(path)
    if found is None or not found.textual:
        return None
    if named == kinds.JSONL:
        return named
    is_open = named in (None, kinds.TEXT) and path.suffix.lower() in MAY_BE_RECORDS
    return _kind_of_records(head, is_whole=is_whole) if is_open else None


def _kind_of_text(head: bytes, *, is_whole: bool) -> Kind | None:
    """Return what a file of text is by its first bytes, None if it is nothing but text."""
    if is_mailbox(head):
        return kinds.MAILBOX
    from megatron_mm.ingest.gutenberg import is_book

    return kinds.GUTENBERG if is_book(head) else _kind_of_records(head, is_whole=is_whole)


def _kind_of_records(head: bytes, *, is_whole: bool) -> Kind | None:
    """Return what records a text is made of, by its first bytes: objects on lines or in an array, pages, posts."""
    if (kind := _dump_of(head)) is not None:
        return kind
    text = head.decode("utf-8-sig", "ignore").lstrip()
    if text[:1] not in ("{", "["):
        return None
    if text.startswith("["):
        record = _first_object(text[1:].lstrip())
        return kinds.JSON_ARRAY if record is not None and is_known(record) else None
    lines = [line for line in text.split("\n") if line.strip()]
    whole_lines = lines if is_whole else lines[:-1]
    are_objects = len(whole_lines) > 1 and all(_first_object(line) is not None for line in whole_lines[:LOOKED_AT])
    return kinds.JSONL if are_objects else None


def _dump_of(head: bytes) -> Kind | None:
    start = head[:DUMP_HEAD]
    if WIKI_ROOT.match(start):
        return kinds.WIKI
    root = STACK_EXCHANGE_ROOT.match(start)
    if root is not None and root[1] != b"posts":
        raise DataError(f"it is the table {root[1].decode()} of a dump of Stack Exchange, of which Posts.xml is read")
    return None if root is None else kinds.POSTS


def _first_object(text: str) -> dict[str, Any] | None:
    """Return the object that a text begins with, None if it does not, or it is not whole."""
    try:
        value, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
