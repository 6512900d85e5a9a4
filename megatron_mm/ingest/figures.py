"""Figures that a page draws by lines and areas, told from rules, tables, underlines and boxes around text."""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from megatron_mm.ingest.reading_order import Box, Piece

MAX_SHAPES = 20_000
"""Lines and areas of a page that are looked at: more of them lie close, and change no figure's box."""
MAX_SEGMENTS, MAX_CLIP_SEGMENTS = 64, 16
"""Segments of a path that are looked at for one that no rule or box has; the most of a path to clip to."""
RULE_WIDTH = 3.0
"""Points below which a shape is a rule: an underline, a border, an axis, a tick."""
MIN_LENGTH, MIN_BREADTH = 36.0, 12.0
"""Points that what is drawn measures at least, one way and the other: bullets and arrows in text are smaller."""
MIN_FIGURE = 24.0
"""Points that a figure measures at least, both ways."""
MAX_FIGURES = 20
"""More figures of a page are one picture."""
MIN_AREAS = 4
"""Filled rectangles without text in them that make a figure (a bar chart) though nothing else is drawn."""
BACKGROUND_FRACTION = 0.8
"""A shape that covers more of the page is its background or frame."""
FRAME_TEXT, OUTLINE_TEXT = 0.2, 0.02
"""A shape that is covered by more text is a box around it; the second is for rectangles, rounded ones and ellipses."""
FIGURE_TEXT, AREAS_TEXT = 0.4, 0.05
"""What is covered by more text is no figure; the second is for filled rectangles alone."""
CELL, MAX_CELLS = 3.0, 1_000
"""Points of the grid on which shapes that lie close are found; it is coarser on pages of more cells a side."""
REACH = 6.0
"""Points by which shapes are widened before those that touch are one figure; rules and frames are not."""
HEADING_SIZE, HEADING_RULES = 4.0, 3
"""A figure that so few rules and boxes make so much larger than what is drawn is a logo in a heading."""
LABEL_LETTERS, LABEL_GAP, LABEL_WIDTH = 40, 0.7, 0.6
"""The letters of a label of a figure, how many of its heights it is away, and its width in those of the figure."""
TICK_LETTERS, TICK_GAP = 15, 1.3
"""The same of what has few letters: numbers at ticks. It may be as wide as the figure."""
INSIDE = 0.7
"""How much of a line or an image is inside a figure that shows it."""


@dataclass(frozen=True)
class Figure:
    """A part of a page that only a picture of it shows."""

    box: Box


@dataclass(frozen=True)
class Shape:
    """One line or area that a page draws."""

    box: Box
    is_rule: bool = False
    """It is too thin to show anything alone."""
    is_drawn: bool = False
    """It has curves, slanted lines or shading: more than rules and boxes have."""
    is_area: bool = False
    """It is filled."""
    is_outline: bool = False
    """It is a rectangle, a rounded one or an ellipse, so that text may stand in it."""


def shape_of(item: pdfium.PdfObject, to_screen: Callable[..., Box], page: tuple[float, float]) -> Shape | None:
    """Return what a path or shading is on a page of (width, height); None: it is not seen, or it is a background."""
    box = _seen_box(item)
    if box is None:
        return None
    left, top, right, bottom = to_screen(*box)
    left, top, right, bottom = box = max(left, 0.0), max(top, 0.0), min(right, page[0]), min(bottom, page[1])
    if not (left <= right and top <= bottom) or _area(box) > BACKGROUND_FRACTION * page[0] * page[1]:
        return None
    if min(right - left, bottom - top) < RULE_WIDTH:
        return Shape(box, is_rule=True)
    if item.type == pdfium_c.FPDF_PAGEOBJ_SHADING:
        is_large = min(right - left, bottom - top) >= MIN_BREADTH  # smaller: the shadow of a box
        return Shape(box, is_drawn=is_large, is_area=True, is_outline=True)
    is_filled, is_stroked = _paint(item)
    if not is_filled and not is_stroked:
        return None
    is_slanted, is_outline = _form(item)
    return Shape(box, is_drawn=is_slanted, is_area=is_filled, is_outline=is_outline)


def _seen_box(item: pdfium.PdfObject) -> Box | None:
    """Return the (left, bottom, right, top) box of what clipping leaves of a shape, in the page's own coordinates."""
    left, bottom, right, top = item.get_bounds()
    while True:
        for clip in _clip_boxes(item):
            left, bottom, right, top = max(left, clip[0]), max(bottom, clip[1]), min(right, clip[2]), min(top, clip[3])
            if right < left or top < bottom:
                return None
        item = item.container
        if item is None:
            return left, bottom, right, top
        left, bottom, right, top = item.get_matrix().on_rect(left, bottom, right, top)


def _clip_boxes(item: pdfium.PdfObject) -> Iterator[Box]:
    """Yield the boxes of the paths that an object is clipped to; those of many segments are not looked at."""
    clip = pdfium_c.FPDFPageObj_GetClipPath(item)
    x, y = ctypes.c_float(), ctypes.c_float()
    for number in range(pdfium_c.FPDFClipPath_CountPaths(clip) if clip else 0):
        count = pdfium_c.FPDFClipPath_CountPathSegments(clip, number)
        if not 0 < count <= MAX_CLIP_SEGMENTS:
            continue
        points = []
        for segment in range(count):
            pdfium_c.FPDFPathSegment_GetPoint(pdfium_c.FPDFClipPath_GetPathSegment(clip, number, segment), x, y)
            points.append((x.value, y.value, x.value, y.value))
        yield _around(points)


def _paint(path: pdfium.PdfObject) -> tuple[bool, bool]:
    """Return whether a path is filled, and whether it is stroked, with anything but white."""
    fill, stroke = ctypes.c_int(), ctypes.c_int()
    pdfium_c.FPDFPath_GetDrawMode(path, fill, stroke)
    is_filled = bool(fill.value) and _is_seen(pdfium_c.FPDFPageObj_GetFillColor, path)
    return is_filled, bool(stroke.value) and _is_seen(pdfium_c.FPDFPageObj_GetStrokeColor, path)


def _is_seen(get_color, path: pdfium.PdfObject) -> bool:
    red, green, blue, alpha = (ctypes.c_uint(255) for _ in range(4))
    get_color(path, red, green, blue, alpha)
    return alpha.value > 0 and min(red.value, green.value, blue.value) < 250


def _form(path: pdfium.PdfObject) -> tuple[bool, bool]:
    """Return whether a path has a curve or a slanted line, and whether it keeps to the border of its box."""
    x, y = ctypes.c_float(), ctypes.c_float()
    points, is_slanted = [], False
    for number in range(min(pdfium_c.FPDFPath_CountSegments(path), MAX_SEGMENTS)):
        segment = pdfium_c.FPDFPath_GetPathSegment(path, number)
        pdfium_c.FPDFPathSegment_GetPoint(segment, x, y)
        kind = pdfium_c.FPDFPathSegment_GetType(segment)
        is_slanted |= kind == pdfium_c.FPDF_SEGMENT_BEZIERTO
        if kind == pdfium_c.FPDF_SEGMENT_LINETO and points:
            is_slanted |= min(abs(x.value - points[-1][0]), abs(y.value - points[-1][1])) > 0.5
        points.append((x.value, y.value))
    if not is_slanted:
        return False, True
    xs, ys = np.array(points).T
    from_border = [np.minimum(values - values.min(), values.max() - values) for values in (xs, ys)]
    reach = 0.2 * min(np.ptp(xs), np.ptp(ys))
    return True, bool((np.minimum(*from_border) <= reach).all())


def find_figures(
    shapes: Sequence[Shape], *, lines: Sequence[Piece], images: Sequence[Piece], page: tuple[float, float]
) -> list[Box]:
    """Return the boxes of the figures that `shapes` draw on a page of (width, height), their labels included.

    Shapes that lie close are one figure, if they show more than rules and boxes around text do. An embedded image with
    a drawn frame around it is no figure.
    """
    text = np.array([line.box for line in lines], float).reshape(-1, 4)
    marks = [_without_text(shape, text) for shape in shapes]
    if not _shows_something(marks, coverage=0.0):
        return []
    found = []
    for members in _clusters(marks, page):
        box = _box_of(members)
        is_framed_image = any(_shared(box, image.box) > 0.8 * _area(box) for image in images)
        if not is_framed_image and _shows_something(members, coverage=_coverage(box, text)):
            found.append(_with_labels(box, lines))
    figures = [box for box in _merge(found) if min(box[2] - box[0], box[3] - box[1]) >= MIN_FIGURE]
    return figures if len(figures) <= MAX_FIGURES else [_around(figures)]


def without_figures(pieces: Sequence[Piece], figures: Sequence[Box]) -> list[Piece]:
    """Leave out the labels and images that the pictures of figures show; running text stays beside its picture."""
    shown: set[int] = set()
    for figure in figures:
        inside = [piece for piece in pieces if _shared(piece.box, figure) > INSIDE * _area(piece.box)]
        is_running = any(piece.image is None and not _label_gap(piece, figure) for piece in inside)
        shown |= {id(piece) for piece in inside if piece.image is not None or not is_running}
    return [piece for piece in pieces if id(piece) not in shown]


def _without_text(shape: Shape, text: np.ndarray) -> Shape:
    """Return a box around text as a shape that makes no figure."""
    most = OUTLINE_TEXT if shape.is_outline else FRAME_TEXT
    if not (shape.is_drawn or shape.is_area) or _coverage(shape.box, text) < most:
        return shape
    return replace(shape, is_drawn=False, is_area=False)


def _coverage(box: Box, text: np.ndarray) -> float:
    """Return the fraction of a box that lines of text, (num_lines, 4), cover."""
    width = np.minimum(text[:, 2], box[2]) - np.maximum(text[:, 0], box[0])
    height = np.minimum(text[:, 3], box[3]) - np.maximum(text[:, 1], box[1])
    return float((width.clip(0) * height.clip(0)).sum()) / max(_area(box), 1.0)


def _shows_something(shapes: Sequence[Shape], *, coverage: float) -> bool:
    """Tell whether shapes, covered by so much text, are more than rules and boxes around text."""
    drawn = [shape.box for shape in shapes if shape.is_drawn]
    areas = [shape.box for shape in shapes if shape.is_area]
    has_areas = len(areas) >= MIN_AREAS and coverage < AREAS_TEXT and _is_large(areas)
    return has_areas or (coverage < FIGURE_TEXT and _is_large(drawn))


def _is_large(boxes: Sequence[Box]) -> bool:
    if not boxes:
        return False
    left, top, right, bottom = _around(boxes)
    breadth, length = sorted((right - left, bottom - top))
    return length >= MIN_LENGTH and breadth >= MIN_BREADTH


def _clusters(shapes: Sequence[Shape], page: tuple[float, float]) -> Iterator[list[Shape]]:
    """Yield the shapes that touch one another when each, but for rules and frames, is widened by REACH."""
    cell = max(CELL, *(side / MAX_CELLS for side in page))
    grid = np.zeros((int(page[1] / cell) + 2, int(page[0] / cell) + 2), bool)
    corners = []
    for shape in shapes:
        reach = REACH if shape.is_drawn or shape.is_area else 0.0
        left, top = (int(max(edge - reach, 0.0) / cell) for edge in shape.box[:2])
        right, bottom = (int((edge + reach) / cell) + 1 for edge in shape.box[2:])
        grid[top:bottom, left:right] = True
        corners.append((top, left))
    labels = _label(grid)
    members: dict[int, list[Shape]] = {}
    for corner, shape in zip(corners, shapes):
        members.setdefault(int(labels[corner]), []).append(shape)
    yield from members.values()


def _label(grid: np.ndarray) -> np.ndarray:
    """Number the connected parts of a boolean grid: cells that share an edge or a corner have one number."""
    labels = np.zeros(grid.shape, np.int64)
    parent = [0]

    def root(label: int) -> int:
        while parent[label] != label:
            parent[label] = label = parent[parent[label]]
        return label

    above: list[tuple[int, int, int]] = []
    rows, edges = np.nonzero(np.diff(grid, axis=1, prepend=False, append=False))
    bounds = np.searchsorted(rows, np.arange(len(grid) + 1)).tolist()
    for row, (begin, end) in enumerate(pairwise(bounds)):
        runs = []
        for start, stop in edges[begin:end].reshape(-1, 2).tolist():
            touched = [root(label) for first, last, label in above if first <= stop and last >= start]
            label = min(touched, default=len(parent))
            if not touched:
                parent.append(label)
            for other in touched:
                parent[other] = label
            labels[row, start:stop] = label
            runs.append((start, stop, label))
        above = runs
    return np.array([root(label) for label in range(len(parent))])[labels]


def _box_of(members: Sequence[Shape]) -> Box:
    """Return the box of a figure, without a few rules that go far beyond what is drawn: those of a heading."""
    whole = _around([shape.box for shape in members])
    drawn = [shape.box for shape in members if shape.is_drawn]
    if not drawn or _area(whole) < HEADING_SIZE * _area(inner := _around(drawn)):
        return whole
    outside = sum(_shared(shape.box, inner) < _area(shape.box) for shape in members)
    return inner if outside <= HEADING_RULES else whole


def _with_labels(box: Box, lines: Sequence[Piece]) -> Box:
    """Widen a figure by the short lines of text right beside it: those of its axes and of its parts."""
    for _ in range(2):  # numbers at the ticks, then what they are of
        near = []
        for line in lines:
            gap = _label_gap(line, box)
            around = (box[0] - gap, box[1] - gap, box[2] + gap, box[3] + gap)
            if gap and _shared(around, line.box) > 0.0:
                near.append(line.box)
        box = _around([box, *near])
    return box


def _label_gap(line: Piece, figure: Box) -> float:
    """Return how far from a figure a line is a label of it, in points; 0: it is running text."""
    width, height = line.box[2] - line.box[0], line.box[3] - line.box[1]
    height = height if len(line.text) < 4 else min(width, height)  # a label may stand upright
    num_letters = sum(map(str.isalpha, line.text))
    if num_letters <= TICK_LETTERS:
        return TICK_GAP * height
    return LABEL_GAP * height if num_letters <= LABEL_LETTERS and width < LABEL_WIDTH * (figure[2] - figure[0]) else 0.0


def _merge(boxes: Sequence[Box]) -> list[Box]:
    """Join boxes that overlap."""
    merged: list[Box] = []
    for box in boxes:
        while overlapping := [other for other in merged if _shared(box, other) > 0.0]:
            merged = [other for other in merged if other not in overlapping]
            box = _around([box, *overlapping])
        merged.append(box)
    return merged


def _around(boxes: Sequence[Box]) -> Box:
    lefts, tops, rights, bottoms = zip(*boxes)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _shared(box: Box, other: Box) -> float:
    """Return the area that two boxes share."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
