"""Text files and web pages."""

import base64
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lxml import etree

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.beside import file_beside
from megatron_mm.ingest.charset import decode_page, decode_text
from megatron_mm.ingest.document import Rejection, Segment, TextSegment
from megatron_mm.ingest.image import TooSmall, read_image

INVISIBLE = {"script", "style", "noscript", "template", "head", "svg", "iframe", "object", "nav", "form", "button"}
BLOCKS = {
    *("address", "article", "aside", "blockquote", "body", "br", "dd", "div", "dl", "dt", "fieldset", "figcaption"),
    *(
        "figure",
        "footer",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
    ),
    *("table", "td", "th", "tr", "ul"),
}

CELLS = {"td", "th"}
NOT_IN_DATA = (BLOCKS | INVISIBLE | {"img"}) - {"p"}
"""What a row of a table that lays out a page holds, and one of data does not."""


def read_text(path: Path) -> list[Segment]:
    """Return the text of a file as one segment. Raises DataError if it is not text."""
    return [TextSegment(decode_text(path.read_bytes()))]


Fetch = Callable[[str], bytes | None]
"""A function from the address of an image on a page to its bytes, None where it is not to be looked for."""


def read_plain(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return the text of a file as one segment, nothing of it left out. Raises DataError if it is not text."""
    return read_text(path), []


def read_html(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return what a reader of the page sees: its text by blocks, its images in place, and the images left out.

    Images are read from data: addresses and from files beside or below the page; others are not fetched. Raises
    DataError if the page holds nothing to see.
    """
    segments, rejections = read_page(path.read_bytes(), name=str(path), fetch=lambda address: _beside(path, address))
    if not segments:
        raise DataError("the page holds nothing to see")
    return segments, rejections


def read_page(page: bytes | str, *, name: str, fetch: Fetch) -> tuple[list[Segment], list[Rejection]]:
    """Return what a reader of a page sees, and the images left out; `fetch` finds its images.

    Bytes are decoded as the page declares, a string has been. Raises DataError.
    """
    text = page if isinstance(page, str) else decode_page(page)
    visitor = _PageReader(name, fetch)
    try:
        tree = _parse(text)
        body = None if tree is None else tree.find("body")
        if tree is not None:
            visitor.visit(tree if body is None else body)
    except etree.XMLSyntaxError as error:
        raise DataError(f"the page cannot be read: {error}") from error
    except RecursionError:
        raise DataError("the page is nested too deeply") from None
    return visitor.finish(), visitor.rejections


def _parse(text: str) -> etree._Element | None:
    """Return the root of a page without its comments; None of one that holds no element."""
    # Without huge_tree, what follows 10 MB of text in one element or 256 levels is dropped in silence.
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    return etree.fromstring(text.encode(), parser)


def _beside(path: Path, address: str) -> bytes | None:
    parts = urlsplit(address)
    if parts.scheme or parts.netloc or not parts.path:
        return None
    target = file_beside(path.resolve().parent, unquote(parts.path))
    return None if target is None else target.read_bytes()


class _PageReader:
    """Walks a page and collects its segments."""

    def __init__(self, name: str, fetch: Fetch) -> None:
        self.name, self.fetch = name, fetch
        self.rejections: list[Rejection] = []
        self._segments: list[Segment] = []
        self._blocks: list[str] = []
        self._line: list[str] = []
        self._is_row = False
        """Whether the last block is a row of a table, so that the next one follows on the next line."""

    def visit(self, element: etree._Element) -> None:
        tag = element.tag
        if tag not in INVISIBLE:
            is_block = tag in BLOCKS
            if is_block:
                self._end_block()
            if tag == "img":
                self._add_image(element)
            elif tag == "tr" and _is_data(element):
                self._add_row(element)
            elif tag == "pre":
                self._add_block("".join(element.itertext()).strip("\n"))
            else:
                if text := element.text:
                    self._line.append(text)
                for child in element:
                    self.visit(child)
            if is_block:
                self._end_block()
        if tail := element.tail:
            self._line.append(tail)

    def finish(self) -> list[Segment]:
        self._end_text()
        return self._segments

    def _end_block(self) -> None:
        if self._line:
            line = _in_one_line("".join(self._line))
            self._line = []
            if line:
                self._add_block(line)

    def _add_block(self, text: str) -> None:
        self._blocks.append(text)
        self._is_row = False

    def _add_row(self, row: etree._Element) -> None:
        cells = ("".join(cell.itertext()) for cell in row if cell.tag in CELLS)
        text = "\t".join(map(_in_one_line, cells)).rstrip()
        if text and self._is_row and self._blocks:
            self._blocks[-1] += f"\n{text}"
        elif text:
            self._blocks.append(text)
            self._is_row = True

    def _end_text(self) -> None:
        self._end_block()
        if self._blocks:
            self._segments.append(TextSegment("\n\n".join(self._blocks) + "\n"))
        self._blocks = []

    def _add_image(self, element: etree._Element) -> None:
        address = element.get("src", "")
        try:
            inline = address.startswith("data:image/")
            data = base64.b64decode(address.partition(",")[2]) if inline else self.fetch(address)
            if data is None:
                return
            segment = read_image(data)
        except TooSmall:
            account.count(account.NOT_KEPT, "images too small to see")
            return
        except (DataError, OSError, ValueError) as error:
            self.rejections.append(Rejection(f"{self.name}#{address[:80]}", str(error)))
            return
        self._end_text()
        self._segments.append(segment)


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _is_data(row: etree._Element) -> bool:
    """Tell whether the cells of a row are lines of text, and not parts of a page."""
    for cell in row:
        num_paragraphs = 0
        for inner in cell.iterdescendants():
            num_paragraphs += inner.tag == "p"
            if inner.tag in NOT_IN_DATA or num_paragraphs > 1:
                return False
    return True
