"""Office files, spreadsheets and e-books: zipped XML, walked in reading order, images where they stand."""

import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

from lxml import etree

from megatron_mm.errors import DataError
from megatron_mm.ingest.archive import ERRORS
from megatron_mm.ingest.document import Rejection, Segment, TextSegment
from megatron_mm.ingest.image import read_image
from megatron_mm.ingest.text import read_page

MAX_BYTES = 2**30
"""A document whose parts unpack to more is refused."""
MAX_SPACES = 100
PARSER = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False, load_dtd=False)
UNSEEN = {"instrText", "delText", "Fallback", "pPr", "rPr", "tblPr", "sectPr", "del", "moveFrom"}
"""Parts of WordprocessingML and DrawingML that are not text on the page: field codes, deletions, formats."""
UNSEEN_ODF = {"tracked-changes", "automatic-styles", "font-face-decls", "scripts", "annotation", "covered-table-cell"}
CELLS, ROWS = ("tc", "table-cell"), ("tr", "table-row")
PARTS = {
    "word/document.xml": "word",
    "ppt/presentation.xml": "slides",
    "xl/workbook.xml": "sheets",
    "META-INF/container.xml": "book",
    "content.xml": "open document",
}
"""The part that tells what a zip file is."""

Walk = Callable[["_Package", "_Page"], None]


def is_office(path: Path) -> bool:
    """Tell whether a zip file is a document that is read here."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not PARTS.keys().isdisjoint(archive.namelist())
    except (*ERRORS, OSError):
        return False


def read_office(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return the text and images of a docx, pptx, xlsx, odt, ods, odp or epub file in order, and what was left out.

    Cells of a table are separated by tabs, rows by line ends. Raises DataError if it is damaged, unpacks to too much
    or shows nothing.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            package = _Package(archive)
            page = _Page(path)
            part = next(part for part in PARTS if part in package.names)
            WALKS[PARTS[part]](package, page)
    except DataError:
        raise
    except (*ERRORS, OSError, etree.XMLSyntaxError, LookupError, ValueError, StopIteration) as error:
        raise DataError(f"the document is damaged: {error!r}") from error
    segments = page.finish()
    if not segments:
        raise DataError("the document shows neither text nor images")
    return segments, page.rejections


class _Package:
    """The parts of a zipped document, and what they refer to."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive, self._left = archive, MAX_BYTES
        self.names = set(archive.namelist())

    def read(self, name: str) -> bytes:
        """Return one part. Raises DataError when the parts that were read come to too much."""
        self._left -= self._archive.getinfo(name).file_size
        if self._left < 0:
            raise DataError(f"the document unpacks to more than {MAX_BYTES / 2**30:g} GiB")
        return self._archive.read(name)

    def xml(self, name: str) -> etree._Element:
        """Return the root of one part."""
        return etree.fromstring(self.read(name), PARSER)

    def relations(self, name: str) -> dict[str, str]:
        """Return the parts that a part refers to, by its ids for them; those outside the document are left out."""
        folder, base = posixpath.split(name)
        file = posixpath.join(folder, "_rels", f"{base}.rels")
        if file not in self.names:
            return {}
        targets = {}
        for element in self.xml(file):
            target = element.get("Target", "")
            path = target[1:] if target.startswith("/") else posixpath.normpath(posixpath.join(folder, target))
            if element.get("TargetMode") != "External" and path in self.names:
                targets[element.get("Id", "")] = path
        return targets


class _Page:
    """Collects text and images in the order in which they are met."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rejections: list[Rejection] = []
        self._segments: list[Segment] = []
        self._text: list[str] = []

    def write(self, text: str | None) -> None:
        self._text.append(text or "")

    def end(self, tag: str, element: etree._Element) -> None:
        """Write what follows a paragraph, a cell or a row; the paragraphs of a cell stay on its line."""
        in_cell = element.getparent() is not None and _local(element.getparent()) in CELLS
        if tag in ("p", "h"):
            is_last = element.getnext() is None
            self.write(("" if is_last else " ") if in_cell else "\n")
        elif tag in CELLS or tag in ROWS:
            self.write("\t" if tag in CELLS else "\n")

    def add_image(self, package: _Package, name: str | None) -> None:
        """Lay an image of the package here; one that cannot be read is a rejection."""
        if name is None or name not in package.names:
            return
        data = package.read(name)
        try:
            segment = read_image(data)
        except DataError as error:
            self.rejections.append(Rejection(f"{self.path}#{name}", str(error)))
            return
        self._end_text()
        self._segments.append(segment)

    def add(self, segments: list[Segment]) -> None:
        self._end_text()
        self._segments += segments

    def finish(self) -> list[Segment]:
        self._end_text()
        return self._segments

    def _end_text(self) -> None:
        text = re.sub(r"[ \t]+\n", "\n", "".join(self._text))
        text = re.sub(r"\n{3,}", "\n\n", text).strip("\n")
        if text.strip():
            self._segments.append(TextSegment(text + "\n"))
        self._text = []


def _local(element: etree._Element) -> str:
    """Return a tag without its namespace, nothing for comments."""
    return etree.QName(element).localname if isinstance(element.tag, str) else ""


def _attribute(element: etree._Element, name: str) -> str | None:
    """Return an attribute by its name without its namespace; a namespaced one goes before a plain one."""
    found = [value for key, value in sorted(element.attrib.items()) if key.rpartition("}")[2] == name]
    return found[-1] if found else None


def _relation(element: etree._Element) -> str:
    """Return the id by which an element refers to another part; its own id has no namespace."""
    return next((value for key, value in element.attrib.items() if key.endswith("}id")), "")


def _find(root: etree._Element, name: str) -> Iterator[etree._Element]:
    return (element for element in root.iter() if _local(element) == name)


def _walk_runs(package: _Package, page: _Page, root: etree._Element, relations: dict[str, str]) -> None:
    """Write WordprocessingML or DrawingML: runs of text, line ends, tables and pictures."""
    before = {"tab": "\t", "br": "\n", "cr": "\n"}

    def visit(element: etree._Element) -> None:
        tag = _local(element)
        if tag in UNSEEN:
            return
        if tag == "t":
            page.write(element.text)
        elif tag in ("blip", "imagedata"):
            target = _attribute(element, "embed") or _relation(element)
            page.add_image(package, relations.get(target))
        else:
            page.write(before.get(tag))
            for child in element:
                visit(child)
            page.end(tag, element)

    visit(root)


def _read_word(package: _Package, page: _Page) -> None:
    name = "word/document.xml"
    _walk_runs(package, page, package.xml(name), package.relations(name))


def _read_slides(package: _Package, page: _Page) -> None:
    name = "ppt/presentation.xml"
    slides = package.relations(name)
    for entry in _find(package.xml(name), "sldId"):
        slide = slides.get(_relation(entry))
        if slide is None:
            continue
        relations = package.relations(slide)
        _walk_runs(package, page, package.xml(slide), relations)
        page.write("\n")
        for notes in (part for part in relations.values() if part.startswith("ppt/notesSlides/")):
            _walk_runs(package, page, package.xml(notes), {})
            page.write("\n")


def _read_sheets(package: _Package, page: _Page) -> None:
    name = "xl/workbook.xml"
    sheets, strings = package.relations(name), []
    if "xl/sharedStrings.xml" in package.names:
        shared = _find(package.xml("xl/sharedStrings.xml"), "si")
        strings = ["".join(text.text or "" for text in _find(entry, "t")) for entry in shared]
    for entry in _find(package.xml(name), "sheet"):
        sheet = sheets.get(_relation(entry))
        if sheet is None:
            continue
        page.write(f"{entry.get('name', '')}\n")
        pictures = _pictures(package, sheet)
        for row in _find(package.xml(sheet), "row"):
            while pictures and pictures[0][0] < int(row.get("r") or 0):
                page.add_image(package, pictures.pop(0)[1])
            page.write("\t".join(_cell(cell, strings) for cell in row).rstrip("\t") + "\n")
        for _, picture in pictures:
            page.add_image(package, picture)
        page.write("\n")


def _pictures(package: _Package, sheet: str) -> list[tuple[int, str]]:
    """Return (row that it hangs at, part) of the pictures on a sheet, from the top."""
    found = []
    for drawing in (part for part in package.relations(sheet).values() if part.startswith("xl/drawings/")):
        relations = package.relations(drawing)
        for anchor in package.xml(drawing) if drawing.endswith(".xml") else ():
            row = next((int(element.text or 0) for element in _find(anchor, "row")), 0)
            targets = (relations.get(_attribute(blip, "embed") or "") for blip in _find(anchor, "blip"))
            found += [(row, target) for target in targets if target is not None]
    return sorted(found)


def _cell(cell: etree._Element, strings: list[str]) -> str:
    value = next((child for child in cell if _local(child) in ("v", "is")), None)
    if value is None:
        return ""
    if cell.get("t") == "inlineStr":
        return "".join(text.text or "" for text in _find(value, "t"))
    if cell.get("t") == "s":
        return strings[int(value.text or -1)]
    return value.text or ""


def _read_open_document(package: _Package, page: _Page) -> None:
    """Write OpenDocument text, sheets and slides."""
    before = {"tab": "\t", "line-break": "\n"}

    def visit(element: etree._Element) -> None:
        tag = _local(element)
        if tag in UNSEEN_ODF or tag in ("", "object"):
            return
        holds_text = tag in ("p", "h", "span", "a", "title")
        if tag == "image":
            page.add_image(package, (_attribute(element, "href") or "").removeprefix("./"))
            return
        page.write(" " * min(int(_attribute(element, "c") or 1), MAX_SPACES) if tag == "s" else before.get(tag))
        page.write(element.text if holds_text else None)
        for child in element:
            visit(child)
            page.write(child.tail if holds_text else None)
        page.end(tag, element)

    visit(package.xml("content.xml"))


def _read_book(package: _Package, page: _Page) -> None:
    """Write the pages of an EPUB in the order of its spine."""
    container = package.xml("META-INF/container.xml")
    name = next(file.get("full-path", "") for file in _find(container, "rootfile"))
    root = package.xml(name)
    items = {item.get("id"): item for item in _find(root, "item")}
    for entry in _find(root, "itemref"):
        item = items.get(entry.get("idref"))
        if item is None or item.get("properties") == "nav":
            continue
        chapter = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(item.get("href", ""))))
        if chapter in package.names:
            page.add(_read_chapter(package, page, chapter))


def _read_chapter(package: _Package, page: _Page, chapter: str) -> list[Segment]:
    def fetch(address: str) -> bytes | None:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(chapter), unquote(address)))
        return package.read(target) if target in package.names else None

    try:
        segments, rejections = read_page(package.read(chapter), name=f"{page.path}#{chapter}", fetch=fetch)
    except DataError as error:
        segments, rejections = [], [Rejection(f"{page.path}#{chapter}", str(error))]
    page.rejections += rejections
    return segments


WALKS: dict[str, Walk] = {
    "word": _read_word,
    "slides": _read_slides,
    "sheets": _read_sheets,
    "book": _read_book,
    "open document": _read_open_document,
}
