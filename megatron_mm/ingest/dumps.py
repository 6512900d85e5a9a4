"""Dumps of records in XML, read by pieces: pages of MediaWiki, posts of Stack Exchange; each record is a document."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from lxml import etree

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds, wikitext
from megatron_mm.ingest.document import Document, Origin, Reading, Rejection, Segment, TextSegment, unexpected
from megatron_mm.ingest.kinds import Kind
from megatron_mm.ingest.streams import ENDS, head_of, pieces
from megatron_mm.ingest.text import read_page
from megatron_mm.ingest.workers import restart_limits
from megatron_mm.source import Source

CC_BY_SA_4 = "CC BY-SA 4.0"
SAYS_CC_BY_SA_4 = re.compile(rb"creativecommons\.org/licenses/by-sa/4\.0|CC[ -]BY-SA[ -]4\.0", re.IGNORECASE)
PIECE_BYTES = 4 * 2**20
"""Bytes of a dump within an archive that are read at a time."""
FILE_NAMESPACES, CATEGORY_NAMESPACES = ("-2", "6"), ("14",)
"""Numbers of the namespaces that links which show a file, or file a page, begin with; each wiki has its names."""
QUESTION, ANSWER = "1", "2"
"""Types of posts."""


@dataclass(frozen=True)
class Raw:
    """A record as it lies in its dump."""

    data: bytes
    place: str
    """What a rejection calls it."""
    start: int
    stop: int


def read_records_of_dump(
    kind: Kind, data: bytes, *, path: Path, head: bytes = b"", start: int = 0, first: int = 1
) -> Reading:
    """Return the documents of a piece of a dump, `data`, whose first byte is `start` and whose first record `first`.

    `head` is what stands before the first record of the dump. A record that cannot be read is a rejection of its own;
    one that is no document is counted as what it is.
    """
    documents: list[Document] = []
    rejections: list[Rejection] = []
    read: Callable[[Raw], Document | str] = _Pages(head).read if kind == kinds.WIKI else _read_post
    for raw in RECORDS_OF[kind](data, str(path), start, first):
        account.count(account.INPUTS, kind.words)
        try:
            with account.kept_if_whole():
                made = read(raw)
        except MemoryError:
            raise
        except (DataError, etree.XMLSyntaxError) as error:
            rejections.append(Rejection(raw.place, str(error)))
        except Exception as error:  # libraries raise what they like of damaged text
            rejections.append(Rejection(raw.place, unexpected(error)))
        else:
            if isinstance(made, str):
                account.count(account.OTHERS, made)
            else:
                origin = replace(made.origin, start=raw.start, stop=raw.stop)
                documents.append(replace(made, origin=origin))
    return documents, rejections


def read_dump(path: Path, kind: Kind) -> Reading:
    """Return the documents of a dump that is read as a whole, as within an archive. Raises DataError at damage."""
    documents: list[Document] = []
    rejections: list[Rejection] = []
    head = head_of(path, kind)
    for piece in pieces(path, kind, num_bytes=PIECE_BYTES):
        if piece.damage:
            raise DataError(piece.damage)
        restart_limits()
        how = {"path": path, "head": head, "start": piece.start, "first": piece.first}
        read, rejected = read_records_of_dump(kind, piece.data, **how)
        documents += read
        rejections += rejected
    return documents, rejections


def _pages_of(data: bytes, name: str, start: int, first: int) -> Iterator[Raw]:
    at, end = 0, ENDS[kinds.WIKI]
    number = first
    while (begin := data.find(b"<page>", at)) >= 0:
        stop = data.find(end, begin)
        at = len(data) if stop < 0 else stop + len(end)
        yield Raw(data[begin:at], f"{name}:{number}", start + begin, start + at)
        number += 1


def _rows_of(data: bytes, name: str, start: int, first: int) -> Iterator[Raw]:
    for number, line in enumerate(data.split(b"\n"), first):
        if line.lstrip().startswith(b"<row"):
            yield Raw(line.strip(), f"{name}:{number}", start, start + len(line))
        start += len(line) + 1


RECORDS_OF = {kinds.WIKI: _pages_of, kinds.POSTS: _rows_of}
"""What finds the records of a piece, by the kind of the dump."""


def _parse(data: bytes) -> etree._Element:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=True)
    return etree.fromstring(data, parser)


class _Pages:
    """Reads the pages of a wiki; `head` says where they are and what namespaces are called."""

    def __init__(self, head: bytes) -> None:
        text = head.decode("utf-8", "replace")
        names = dict(re.findall(r'<namespace key="(-?\d+)"[^>]*>([^<]+)</', text))
        base = re.search(r"<base>([^<]+)/[^/<]*</base>", text)
        self.base = "" if base is None else base[1] + "/"
        self.licence = CC_BY_SA_4 if SAYS_CC_BY_SA_4.search(head) else ""
        self.files = wikitext.FILES | {names[key].lower() for key in FILE_NAMESPACES if key in names}
        self.categories = wikitext.CATEGORIES | {names[key].lower() for key in CATEGORY_NAMESPACES if key in names}

    def read(self, raw: Raw) -> Document | str:
        """Return the document of a page, or what else it is."""
        page = _parse(raw.data)
        if page.find("redirect") is not None:
            return "redirects"
        if page.findtext("ns", "0") != "0":
            return "pages outside of the main namespace"
        revisions = page.findall("revision")
        if not revisions:
            raise DataError("the page has no revision")
        account.count(account.NOT_KEPT, "earlier revisions of pages", len(revisions) - 1)
        last = revisions[-1]
        if last.findtext("model", "wikitext") != "wikitext":
            return "pages that are not wikitext"
        title = page.findtext("title") or ""
        written = wikitext.plain_text(last.findtext("text") or "", files=self.files, categories=self.categories)
        if not written:
            return "pages without text"
        url = self.base + quote(title.replace(" ", "_"), safe="/:()',!*@;") if self.base else ""
        origin = Origin(url=url, licence=self.licence, date=last.findtext("timestamp") or "")
        return Document([TextSegment(f"{title}\n\n{written}\n")], Source.TEXT, origin)


def _read_post(raw: Raw) -> Document | str:
    """Return the document of a question, under its title, or of an answer, or what else a row is."""
    said = _parse(raw.data).attrib
    if said.get("PostTypeId") not in (QUESTION, ANSWER):
        return "posts that are neither questions nor answers"
    body = said.get("Body", "")
    segments, rejections = read_page(body, name=raw.place, fetch=_count_image) if body.strip() else ([], [])
    account.count(account.NOT_KEPT, "images that cannot be read", len(rejections))
    title: list[Segment] = [TextSegment(f"{said['Title']}\n\n")] if said.get("Title") else []
    if not segments:
        return "posts without text"
    origin = Origin(licence=said.get("ContentLicense", ""), date=said.get("CreationDate", ""))
    return Document([*title, *segments], Source.TEXT, origin)


def _count_image(address: str) -> None:
    account.count(account.NOT_KEPT, "images that are addresses")
