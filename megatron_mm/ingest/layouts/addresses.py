"""Tables of the addresses of images, as Conceptual Captions (CC3M, CC12M) and SBU are shipped: there are no images.

Two columns or more, with or without a header, one of them addresses of which most end as images do.
"""

import csv
from pathlib import Path
from urllib.parse import urlsplit

from megatron_mm.ingest.fields import ADDRESS_COLUMNS, ADDRESSES_ONLY
from megatron_mm.ingest.layouts.tables import LOOKED_AT, is_text
from megatron_mm.ingest.layouts.tree import Tree, head
from megatron_mm.ingest.media_values import medium_of

DELIMITERS = {".tsv": "\t", ".csv": ",", ".txt": "\t"}
LEAST_ADDRESSES, LEAST_MEDIA = 0.9, 0.5
"""The part of the cells of a column that are addresses, and of these that name an image, recording or video."""


def arrange(tree: Tree) -> None:
    """Refuse each such table: captions without their images are no text."""
    for path in tree.all():
        if path.suffix.lower() in DELIMITERS and _holds_addresses(path):
            tree.refuse(path, ADDRESSES_ONLY)


def _holds_addresses(path: Path) -> bool:
    lines = head(path).splitlines()[: LOOKED_AT + 1]
    delimiter = DELIMITERS[path.suffix.lower()]
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    rows = [row for row in csv.reader(lines, delimiter=delimiter, quoting=quoting) if len(row) > 1]
    if len(rows) < len(lines) / 2 or not rows:
        return False
    has_header = not any("://" in cell for cell in rows[0])
    names = rows[0] if has_header else [""] * len(rows[0])
    body = rows[1:] if has_header else rows
    for column, name in enumerate(names):
        cells = [row[column].strip() for row in body if len(row) > column]
        addresses = [cell for cell in cells if cell.startswith(("http://", "https://")) and " " not in cell]
        if not cells or len(addresses) < LEAST_ADDRESSES * len(cells):
            continue
        media = sum(bool(medium_of(urlsplit(address).path)) for address in addresses)
        is_media = media >= LEAST_MEDIA * len(addresses) or name in ADDRESS_COLUMNS[2:]
        if is_media and any(is_text(body, other) for other in range(len(names)) if other != column):
            return True
    return False
