"""The order in which a reader meets the pieces of a page, from their boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in points from the top left corner of the page as it is shown."""

MIN_PIECES_OF_COLUMNS = 6
MAX_BRIDGING_FRACTION = 0.2
"""A column gap may be bridged by this much of the pieces: titles, wide figures."""
MAX_DEPTH = 4


@dataclass(frozen=True)
class Piece:
    """A line of text, or an image, and where it stands."""

    box: Box
    text: str = ""
    image: Any = None
    """Whatever its finder reads it from; None: a line."""

    @property
    def middle(self) -> tuple[float, float]:
        """Horizontal and vertical centre."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


def reading_order(lines: Sequence[Piece], images: Sequence[Piece]) -> list[Piece]:
    """Return lines and images in reading order.

    Lines come in the order of the file. That order is kept where it keeps to the columns (LaTeX, Word); where it jumps
    between them (scans, writers that go row by row) the columns are found and read one after the other. An image
    comes before the first line below it.
    """
    gap = _column_gap([line.box for line in lines])
    if gap is not None:
        by_columns = _by_columns([*lines, *images])
        if _jumps(lines, gap) > _jumps(by_columns, gap) + max(4, 0.1 * len(lines)):
            return by_columns
    return _place_images(lines, images)


def _place_images(lines: Sequence[Piece], images: Sequence[Piece]) -> list[Piece]:
    """Keep the order of the lines; put each image before the highest line that stands under it."""
    ordered = list(lines)
    for image in sorted(images, key=lambda piece: piece.box[1]):
        left, _, right, bottom = image.box
        below = [
            (piece.box[1], index)
            for index, piece in enumerate(ordered)
            if piece.image is None and min(piece.box[2], right) > max(piece.box[0], left) and piece.box[1] >= bottom - 2
        ]
        ordered.insert(min(below)[1] if below else len(ordered), image)
    return ordered


def _by_columns(pieces: Sequence[Piece], depth: int = 0) -> list[Piece]:
    """Read column after column; pieces that bridge the gap cut the page into bands."""
    gap = _column_gap([piece.box for piece in pieces]) if depth < MAX_DEPTH else None
    if gap is None:
        return sorted(pieces, key=lambda piece: (round(piece.box[1] / 3), piece.box[0]))
    bridging = sorted((piece for piece in pieces if _bridges(piece, gap)), key=lambda piece: piece.box[1])
    rest = [piece for piece in pieces if not _bridges(piece, gap)]
    ordered: list[Piece] = []
    for bridge in bridging:
        above = [piece for piece in rest if piece.middle[1] < bridge.middle[1]]
        rest = [piece for piece in rest if piece.middle[1] >= bridge.middle[1]]
        ordered += [*_columns(above, gap, depth), bridge]
    return ordered + _columns(rest, gap, depth)


def _columns(pieces: Sequence[Piece], gap: float, depth: int) -> list[Piece]:
    left = [piece for piece in pieces if piece.middle[0] < gap]
    right = [piece for piece in pieces if piece.middle[0] >= gap]
    return _by_columns(left, depth + 1) + _by_columns(right, depth + 1)


def _bridges(piece: Piece, gap: float) -> bool:
    return piece.box[0] < gap - 1 and piece.box[2] > gap + 1


def _jumps(pieces: Sequence[Piece], gap: float) -> int:
    """Count the changes between left and right column along `pieces`."""
    sides = [piece.middle[0] < gap for piece in pieces if piece.image is None and not _bridges(piece, gap)]
    return sum(before != after for before, after in pairwise(sides))


def _column_gap(boxes: Sequence[Box]) -> float | None:
    """Return where a vertical line crosses the fewest boxes with some on both sides, None without columns."""
    count = len(boxes)
    if count < MIN_PIECES_OF_COLUMNS:
        return None
    lefts, rights = np.sort([box[0] for box in boxes]), np.sort([box[2] for box in boxes])
    width = rights[-1] - lefts[0]
    if width <= 0:
        return None
    lines = np.linspace(lefts[0] + 0.2 * width, lefts[0] + 0.8 * width, 65)
    on_left = np.searchsorted(rights, lines + 1, "right")
    on_right = count - np.searchsorted(lefts, lines - 1, "left")
    crossed = count - on_left - on_right
    fits = (crossed <= MAX_BRIDGING_FRACTION * count) & (on_left >= 3) & (on_right >= 3)
    if not fits.any():
        return None
    cost = np.where(fits, crossed * (count + 1) - np.minimum(on_left, on_right), np.iinfo(np.int64).max)
    return float(lines[cost == cost.min()].mean())
