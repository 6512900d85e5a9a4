"""PDF: text, embedded images and drawn figures by their place on the page. PDFium reads, the order is ours."""

import ctypes
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
from PIL import Image

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import ImageSegment, Rejection, Segment, TextSegment
from megatron_mm.ingest.figures import MAX_SHAPES, Figure, find_figures, shape_of, without_figures
from megatron_mm.ingest.image import MAX_PIXELS, MIN_SIDE, encode_pixels, read_image
from megatron_mm.ingest.reading_order import Box, Piece, reading_order

MAX_PAGES = 10_000
MAX_IMAGES_PER_PAGE = 500
SCAN_FRACTION = 0.8
"""Images that cover more of a page without text are the page."""
RENDERED_SIDE = 1024
"""Longer side, in pixels, of the picture of a whole page, and the most of a figure's."""
FIGURE_SCALE = 3.0
"""Pixels a point of a figure: 216 dpi."""
FIGURE_MARGIN = 2.0
"""Points around a figure: lines are drawn half outside their box."""
DRAWN = (pdfium_c.FPDF_PAGEOBJ_PATH, pdfium_c.FPDF_PAGEOBJ_SHADING)
MAX_FORMS = 8
"""Levels of nested forms in which images and drawings are looked for."""
TURNS = {90: Image.Transpose.ROTATE_270, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_90}
"""Pillow's rotation, counter-clockwise, for a page's, clockwise."""
COLUMN_GAP = 1.2
"""Line heights of white space at which one baseline is two columns."""
PARAGRAPH_GAP = 0.6
"""Line heights of white space above which the next line starts a paragraph."""


def read_pdf(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return the text and images of a PDF in reading order, and the images that were left out.

    A figure that is drawn on a page of text is an image where it stands, its labels in it. An image that repeats (a
    logo on every page) is kept once. A page without text that is more than a few pictures (a scan, a drawing) is one
    image of it all. Raises DataError if the file cannot be opened or shows neither.
    """
    reader = _Reader(path)
    try:
        with pdfium.PdfDocument(path) as document:
            for number, page in enumerate(document, start=1):
                if number > MAX_PAGES:
                    reason = f"it has {len(document):,} pages: those after {MAX_PAGES:,} are left out"
                    reader.rejections.append(Rejection(f"{path}#page={number}", reason))
                    break
                reader.read_page(page, number)
                page.close()
    except pdfium.PdfiumError as error:
        raise DataError(f"the PDF cannot be read: {error}") from error
    segments = reader.segments()
    if not segments:
        raise DataError("the PDF shows neither text nor images")
    return segments, reader.rejections


def render_first_page(path: Path) -> ImageSegment:
    """Return a picture of the first page of a PDF, as of a figure that a paper shows. Raises DataError."""
    try:
        with pdfium.PdfDocument(path) as document:
            if not len(document):
                raise DataError("the PDF has no page")
            return _render(document[0])
    except pdfium.PdfiumError as error:
        raise DataError(f"the PDF cannot be read: {error}") from error


def page_pieces(page: pdfium.PdfPage) -> list[Piece]:
    """Return the lines, images and drawn figures of a page in reading order; pictures are found, not made.

    The labels of a figure are in its picture alone. Figures are looked for on pages with text: without, the page may
    be one.
    """
    to_screen = _Screen(page)
    lines, images, shapes = list(_lines(page, to_screen)), [], []
    for item in page.get_objects(filter=(pdfium_c.FPDF_PAGEOBJ_IMAGE, *DRAWN), max_depth=MAX_FORMS):
        if item.type == pdfium_c.FPDF_PAGEOBJ_IMAGE:
            if len(images) <= MAX_IMAGES_PER_PAGE:
                images.append(Piece(to_screen(*_matrix_on_page(item).on_rect(0, 0, 1, 1)), image=item))
        elif lines and len(shapes) < MAX_SHAPES:
            shape = shape_of(item, to_screen, to_screen.size)
            if shape is not None:
                shapes.append(shape)
    figures = find_figures(shapes, lines=lines, images=images, page=to_screen.size)
    if figures:
        lines, images = (without_figures(pieces, figures) for pieces in (lines, images))
    return reading_order(lines, [*images, *(Piece(box, image=Figure(box)) for box in figures)])


class _Reader:
    """Collects the segments of all pages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rejections: list[Rejection] = []
        self._seen: set[bytes] = set()
        self._segments: list[Segment] = []
        self._lines: list[Piece] = []

    def read_page(self, page: pdfium.PdfPage, number: int) -> None:
        pieces = page_pieces(page)
        if _is_drawn(page, pieces):
            self._add_image(functools.partial(_render, page), number)
            return
        num_images = 0
        for piece in pieces:
            if piece.image is None:
                self._lines.append(piece)
                continue
            num_images += 1
            if num_images > MAX_IMAGES_PER_PAGE:
                reason = f"page {number} has more than {MAX_IMAGES_PER_PAGE} images: the others are left out"
                self.rejections.append(Rejection(f"{self.path}#page={number}", reason))
                continue
            if isinstance(piece.image, Figure):
                self._add_image(functools.partial(_render_figure, page, piece.image.box), number)
            else:
                self._add_image(functools.partial(_image_segment, piece.image, page.get_rotation()), number)

    def _add_image(self, read: Callable[[], ImageSegment | None], number: int) -> None:
        try:
            segment = read()
        except (DataError, pdfium.PdfiumError) as error:
            self.rejections.append(Rejection(f"{self.path}#page={number}", str(error)))
            return
        if segment is None or (digest := hashlib.sha256(segment.data).digest()) in self._seen:
            return
        self._seen.add(digest)
        self._end_text()
        self._segments.append(segment)

    def segments(self) -> list[Segment]:
        """Return the segments: lines joined to paragraphs, pages following one another."""
        self._end_text()
        return self._segments

    def _end_text(self) -> None:
        self._segments += _text_segment(self._lines)
        self._lines = []


def _is_drawn(page: pdfium.PdfPage, pieces: Sequence[Piece]) -> bool:
    """Tell whether a page without text is a scan or a drawing, so that only a picture of it all shows what it shows."""
    if any(piece.image is None for piece in pieces):
        return False
    width, height = page.get_size()
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in (piece.box for piece in pieces))
    if covered > SCAN_FRACTION * width * height:
        return True
    return next(iter(page.get_objects(filter=DRAWN, max_depth=MAX_FORMS)), None) is not None


def _render(page: pdfium.PdfPage) -> ImageSegment:
    scale = RENDERED_SIDE / max(*page.get_size(), 1.0)
    return encode_pixels(page.render(scale=scale).to_pil())


def _render_figure(page: pdfium.PdfPage, box: Box) -> ImageSegment | None:
    """Return a picture of a box of the page as it is shown, None if it is too long and thin to show anything."""
    width, height = _Screen(page).size
    left, top = max(box[0] - FIGURE_MARGIN, 0.0), max(box[1] - FIGURE_MARGIN, 0.0)
    right, bottom = min(box[2] + FIGURE_MARGIN, width), min(box[3] + FIGURE_MARGIN, height)
    scale = min(FIGURE_SCALE, RENDERED_SIDE / max(right - left, bottom - top))
    if scale * min(right - left, bottom - top) < MIN_SIDE:
        return None
    return encode_pixels(page.render(scale=scale, crop=(left, height - bottom, width - right, top)).to_pil())


class _Screen:
    """Turns boxes in a page's own coordinates into those of the page as it is shown: cropped, rotated, from the top."""

    def __init__(self, page: pdfium.PdfPage) -> None:
        self.left, self.bottom, right, top = page.get_bbox()
        self.width, self.height = right - self.left, top - self.bottom
        self.rotation = page.get_rotation()
        is_turned = self.rotation in (90, 270)
        self.size = (self.height, self.width) if is_turned else (self.width, self.height)
        """Width and height as shown."""

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


def _image_segment(image: pdfium.PdfImage, rotation: int) -> ImageSegment | None:
    """Return one embedded image as the page, turned by `rotation`, shows it; None if it is too small to show anything.

    The bytes of a JPEG that stands upright are kept.
    """
    width, height = image.get_px_size()
    if min(width, height) < MIN_SIDE:
        return None
    if width * height > MAX_PIXELS:
        raise DataError(f"an image has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are decoded")
    a, b, c, d, _, _ = image.get_matrix().get()
    is_upright = not rotation and a > 0 and d > 0 and abs(b) < 1e-3 * a and abs(c) < 1e-3 * d
    if is_upright and image.get_filters(skip_simple=True) == ["DCTDecode"]:
        return read_image(bytes(image.get_data(decode_simple=True)))
    shown = image.get_bitmap(render=True).to_pil()
    return encode_pixels(shown.transpose(TURNS[rotation]) if rotation else shown)


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
