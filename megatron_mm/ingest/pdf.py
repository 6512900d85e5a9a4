"""PDF: text and embedded images, interleaved by their place on the page. PDFium reads, the order is ours."""

import ctypes
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import ImageSegment, Rejection, Segment, TextSegment
from megatron_mm.ingest.image import MAX_PIXELS, MIN_SIDE, encode_pixels, read_image
from megatron_mm.ingest.reading_order import Box, Piece, reading_order

MAX_IMAGES_PER_PAGE = 500
COLUMN_GAP = 1.2
"""Line heights of white space at which one baseline is two columns."""
PARAGRAPH_GAP = 0.6
"""Line heights of white space above which the next line starts a paragraph."""


def read_pdf(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return the text and images of a PDF in reading order, and the images that were left out.

    An image that repeats (a logo on every page) is kept once. Raises DataError if the file cannot be opened or shows
    neither text nor images.
    """
    try:
        document = pdfium.PdfDocument(path)
        reader = _Reader(path)
        for number, page in enumerate(document, start=1):
            reader.read_page(page, number)
            page.close()
    except pdfium.PdfiumError as error:
        raise DataError(f"the PDF cannot be read: {error}") from error
    segments = reader.segments()
    if not segments:
        raise DataError("the PDF shows neither text nor images")
    return segments, reader.rejections


class _Reader:
    """Collects the pieces of all pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rejections: list[Rejection] = []
        self._seen: set[bytes] = set()
        self._pages: list[list[Piece]] = []

    def read_page(self, page: pdfium.PdfPage, number: int) -> None:
        to_screen = _Screen(page)
        lines = list(_lines(page, to_screen))
        images = list(self._images(page, number, to_screen))
        self._pages.append(reading_order(lines, images))

    def segments(self) -> list[Segment]:
        """Return the pieces as segments: lines joined to paragraphs, pages following one another."""
        segments: list[Segment] = []
        lines: list[Piece] = []
        for piece in (piece for pieces in self._pages for piece in pieces):
            if piece.image is None:
                lines.append(piece)
                continue
            segments += _text_segment(lines)
            segments.append(piece.image)
            lines = []
        return segments + _text_segment(lines)

    def _images(self, page: pdfium.PdfPage, number: int, to_screen: "_Screen") -> Iterator[Piece]:
        objects = page.get_objects(filter=[pdfium_c.FPDF_PAGEOBJ_IMAGE], max_depth=8)
        for count, image in enumerate(objects):
            if count == MAX_IMAGES_PER_PAGE:
                reason = f"page {number} has more than {MAX_IMAGES_PER_PAGE} images: the others are left out"
                self.rejections.append(Rejection(f"{self.path}#page={number}", reason))
                return
            try:
                segment = _image_segment(image)
            except (DataError, pdfium.PdfiumError) as error:
                self.rejections.append(Rejection(f"{self.path}#page={number}", str(error)))
                continue
            if segment is not None and (digest := hashlib.sha256(segment.data).digest()) not in self._seen:
                self._seen.add(digest)
                yield Piece(to_screen(*_matrix_on_page(image).on_rect(0, 0, 1, 1)), image=segment)


class _Screen:
    """Turns boxes in a page's own coordinates into those of the page as it is shown: cropped, rotated, from the top."""

    def __init__(self, page: pdfium.PdfPage) -> None:
        self.left, self.bottom, right, top = page.get_bbox()
        self.width, self.height = right - self.left, top - self.bottom
        self.rotation = page.get_rotation()

    def __call__(self, left: float, bottom: float, right: float, top: float) -> Box:
        left, right, bottom, top = left - self.left, right - self.left, bottom - self.bottom, top - self.bottom
        if self.rotation == 90:
            return bottom, left, top, right
        if self.rotation == 180:
            return self.width - right, bottom, self.width - left, top
        if self.rotation == 270:
            return self.height - top, self.width - right, self.height - bottom, self.width - left
        return left, self.height - top, right, self.height - bottom


def _matrix_on_page(image: pdfium.PdfImage) -> pdfium.PdfMatrix:
    """Return the matrix from the image's unit square to the page, through the forms that it is nested in."""
    matrix = image.get_matrix()
    container = image.container
    while container is not None:
        matrix = matrix.multiply(container.get_matrix())
        container = container.container
    return matrix


def _image_segment(image: pdfium.PdfImage) -> ImageSegment | None:
    """Return one embedded image, None if it is too small to show anything."""
    width, height = image.get_px_size()
    if min(width, height) < MIN_SIDE:
        return None
    if width * height > MAX_PIXELS:
        raise DataError(f"an image has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded")
    if image.get_filters(skip_simple=True) == ["DCTDecode"]:
        return read_image(bytes(image.get_data(decode_simple=True)))
    return encode_pixels(image.get_bitmap(render=True).to_pil())


def _lines(page: pdfium.PdfPage, to_screen: _Screen) -> Iterator[Piece]:
    """Yield the lines of text of a page in the order of the file; a line across two columns is cut at the gap."""
    textpage = page.get_textpage()
    count = textpage.count_chars()
    if not count:
        return
    buffer = (ctypes.c_ushort * (count + 1))()
    written = pdfium_c.FPDFText_GetText(textpage, 0, count, buffer)
    text = bytes(buffer)[: max(0, written - 1) * 2].decode("utf-16-le", "replace")
    if len(text) != count:  # the text and the characters do not line up: ask for the text of each box
        for box in _rectangles(textpage, 0, -1):
            yield from _bounded_line(textpage, box, to_screen)
        return
    position = 0
    for line, ending in re.findall(r"([^\r\n]*)(\r\n|\n|\r|$)", text):
        if line.strip():
            boxes = _merge(_rectangles(textpage, position, len(line)))
            if len(boxes) == 1:
                yield Piece(to_screen(*boxes[0]), _clean(line))
            for box in boxes if len(boxes) > 1 else ():
                yield from _bounded_line(textpage, box, to_screen)
        position += len(line) + len(ending)


def _bounded_line(textpage: pdfium.PdfTextPage, box: Box, to_screen: _Screen) -> Iterator[Piece]:
    text = _clean(textpage.get_text_bounded(*box))
    if text:
        yield Piece(to_screen(*box), text)


def _rectangles(textpage: pdfium.PdfTextPage, start: int, count: int) -> list[Box]:
    """Return the (left, bottom, right, top) boxes that PDFium draws around a range of characters."""
    return [textpage.get_rect(index) for index in range(textpage.count_rects(start, count))]


def _merge(boxes: list[Box]) -> list[Box]:
    """Join the boxes of one line, except across a gap as wide as that between columns."""
    if not boxes:
        return []
    height = max(top - bottom for _, bottom, _, top in boxes)
    _, first_bottom, _, first_top = boxes[0]
    stacked = any(top < first_bottom - height or bottom > first_top + height for _, bottom, _, top in boxes)
    gap = float("inf") if height > 60 or stacked else COLUMN_GAP * height  # rotated or stacked text is one box
    merged: list[Box] = []
    for left, bottom, right, top in sorted(boxes):
        if merged and left - merged[-1][2] <= gap:
            last = merged[-1]
            merged[-1] = (last[0], min(last[1], bottom), max(last[2], right), max(last[3], top))
        else:
            merged.append((left, bottom, right, top))
    return merged


def _clean(text: str) -> str:
    """Drop control characters. PDFium joins a word that a line's end divides, and marks the place."""
    text = re.sub("[\ufffe\x02][\r\n]*", "", text)
    return re.sub(r"[\x00-\x1f]+", " ", text).strip()


def _text_segment(lines: list[Piece]) -> list[Segment]:
    """Join lines to paragraphs; an empty list gives no segment."""
    paragraphs: list[str] = []
    previous: Piece | None = None
    for line in lines:
        if previous is not None and _continues(previous, line):
            before = paragraphs[-1]
            hyphenated = re.search(r"[a-z]-$", before) and line.text[:1].islower()
            paragraphs[-1] = before[:-1] + line.text if hyphenated else f"{before} {line.text}"
        else:
            paragraphs.append(line.text)
        previous = line
    return [TextSegment("\n".join(paragraphs) + "\n")] if paragraphs else []


def _continues(line: Piece, following: Piece) -> bool:
    """Tell whether the next line belongs to the same paragraph: right below, and under it."""
    height = line.box[3] - line.box[1]
    gap = following.box[1] - line.box[3]
    overlaps = min(line.box[2], following.box[2]) > max(line.box[0], following.box[0])
    return overlaps and -height < gap < PARAGRAPH_GAP * height and following.box[1] > line.box[1]
