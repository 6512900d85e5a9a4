"""Text files and web pages."""

import base64
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from lxml import etree, html

from megatron_mm.errors import DataError
from megatron_mm.ingest.beside import file_beside
from megatron_mm.ingest.charset import decode_page, decode_text
from megatron_mm.ingest.document import Rejection, Segment, TextSegment
from megatron_mm.ingest.image import read_image

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
    try:
        # Without huge_tree, what follows 10 MB of text in one element or 256 levels is dropped in silence.
        parser = html.HTMLParser(encoding="utf-8", huge_tree=True)
        text = page if isinstance(page, str) else decode_page(page)
        tree = html.document_fromstring(text.encode(), parser=parser)
        body = tree.find("body")
        visitor = _PageReader(name, fetch)
        visitor.visit(tree if body is None else body)
    except etree.ParserError:  # there is no element in it
        return [], []
    except etree.XMLSyntaxError as error:
        raise DataError(f"the page cannot be read: {error}") from error
    except RecursionError:
        raise DataError("the page is nested too deeply") from None
    return visitor.finish(), visitor.rejections


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

    def visit(self, element: html.HtmlElement) -> None:
        tag = element.tag if isinstance(element.tag, str) else "script"  # comments have a function for a tag
        if tag not in INVISIBLE:
            if tag in BLOCKS:
                self._end_block()
            if tag == "img":
                self._add_image(element)
            elif tag == "tr" and _is_data(element):
                self._add_row(element)
            elif tag == "pre":
                self._add_block(element.text_content().strip("\n"))
            else:
                self._line.append(element.text or "")
                for child in element:
                    self.visit(child)
            if tag in BLOCKS:
                self._end_block()
        self._line.append(element.tail or "")

    def finish(self) -> list[Segment]:
        self._end_text()
        return self._segments

    def _end_block(self) -> None:
        line = re.sub(r"\s+", " ", "".join(self._line)).strip()
        self._line = []
        if line:
            self._add_block(line)

    def _add_block(self, text: str) -> None:
        self._blocks.append(text)
        self._is_row = False

    def _add_row(self, row: html.HtmlElement) -> None:
        cells = (cell.text_content() for cell in row if cell.tag in CELLS)
        text = "\t".join(re.sub(r"\s+", " ", cell).strip() for cell in cells).rstrip()
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

    def _add_image(self, element: html.HtmlElement) -> None:
        address = element.get("src", "")
        try:
            inline = address.startswith("data:image/")
            data = base64.b64decode(address.partition(",")[2]) if inline else self.fetch(address)
            if data is None:
                return
            segment = read_image(data)
        except (DataError, OSError, ValueError) as error:
            self.rejections.append(Rejection(f"{self.name}#{address[:80]}", str(error)))
            return
        self._end_text()
        self._segments.append(segment)


def _is_data(row: html.HtmlElement) -> bool:
    """Tell whether the cells of a row are lines of text, and not parts of a page."""
    for cell in row:
        num_paragraphs = 0
        for inner in cell.iterdescendants():
            num_paragraphs += inner.tag == "p"
            if inner.tag in NOT_IN_DATA or num_paragraphs > 1:
                return False
    return True
