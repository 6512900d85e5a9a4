"""Books of Project Gutenberg: the text between the header and the licence that every file carries."""

import re
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds
from megatron_mm.ingest.charset import decode_text, decode_utf8
from megatron_mm.ingest.document import Document, Origin, TextSegment

EBOOK = r"(?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)"
START = re.compile(
    rf"^\*\*\* ?START OF {EBOOK}(?:[^*\n]*\n?){{0,4}}?\*\*\*.*$"
    r"|^\*+ ?END\*? ?THE SMALL PRINT!.*$"
    rf"|^\*\*\* ?START OF {EBOOK}.*$",
    re.IGNORECASE | re.MULTILINE,
)
"""The line, or the two of a long title, above which the header stands; until 2001 the end of the "small print"."""
END = re.compile(rf"^\*\*\* ?END OF {EBOOK}|^\W*End of (?:the |this )?Project Gutenberg", re.IGNORECASE | re.MULTILINE)
NAME = re.compile(r"^(Title|Author): *(\S.*(?:\n[ \t]+\S.*)*)", re.MULTILINE)
DATE = re.compile(r"^Release Date: *([^\[\n]+)", re.IGNORECASE | re.MULTILINE)
CHARSET = re.compile(rb"^Character set encoding: *([\w-]+)", re.IGNORECASE | re.MULTILINE)
FREE = re.compile(r"Project Gutenberg(?:-tm|™)? License|no restrictions\s+whatsoever|PUBLIC\s+DOMAIN", re.IGNORECASE)
COPYRIGHTED = re.compile(r"COPYRIGHTED\s+Project\s+Gutenberg", re.IGNORECASE)
LICENCE = "Project Gutenberg License / public domain in the USA"
NOT_FREE = "Project Gutenberg License / copyrighted"
HEAD_BYTES = 2**16


def is_book(head: bytes) -> bool:
    """Tell whether a file of text is a book of Project Gutenberg, by its first bytes."""
    return b"gutenberg" in head[:HEAD_BYTES].lower() and START.search(head[:HEAD_BYTES].decode("latin-1")) is not None


def read_book(path: Path) -> Document:
    """Return the text of a book behind its title and author; the rest of the header and the licence are counted.

    Raises DataError if nothing stands between them.
    """
    data = path.read_bytes()
    text = _decode(data)
    start = START.search(text)
    if start is None:
        raise DataError("the header of Project Gutenberg has no end")
    end = END.search(text, start.end())
    stop = len(text) if end is None else end.start()
    header, body = text[: start.start()], text[start.end() : stop].strip("\n")
    around = text[: start.end()] + text[stop:]
    if not body.strip():
        raise DataError("nothing stands between the header and the licence of Project Gutenberg")
    names = "".join(f"{found[1]}: {' '.join(found[2].split())}\n" for found in NAME.finditer(header))
    account.count(account.NOT_KEPT, "characters of Project Gutenberg's headers and licences", len(around))
    licence = NOT_FREE if COPYRIGHTED.search(around) else LICENCE if FREE.search(around) else ""
    date = found[1].strip() if (found := DATE.search(header)) else ""
    text = f"{names}\n{body}\n" if names else f"{body}\n"
    return Document([TextSegment(text)], kinds.GUTENBERG.source, Origin(licence=licence, date=date))


def _decode(data: bytes) -> str:
    try:
        return decode_utf8(data)
    except DataError:  # books of before 2004 say which charset they are in
        declared = CHARSET.search(data[:HEAD_BYTES])
        return decode_text(data, declared[1].decode() if declared else None)
