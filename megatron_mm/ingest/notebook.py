"""Jupyter notebooks: text, code and what it printed and drew, in the order of the page."""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.charset import NoText, decode_utf8
from megatron_mm.ingest.document import Rejection, Segment, TextSegment
from megatron_mm.ingest.image import read_image
from megatron_mm.ingest.text import read_page

IMAGES = ("image/png", "image/jpeg")
SHOWN = ("text/markdown", "text/latex", "text/plain", "text/html")
"""Of several forms of one output the first counts: a page of a table says what its plain text says."""
OLD_NAMES = {"png": "image/png", "jpeg": "image/jpeg", "text": "text/plain", "html": "text/html", "latex": "text/latex"}
"""What formats before 4 call the forms of an output."""
ATTACHED = re.compile(r"!\[[^\]]*\]\((?:attachment:([^)\s]+)|data:image/(?:png|jpeg);base64,([^)\s]+))[^)]*\)")
"""An image that a cell of text carries."""
TERMINAL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Colours of what is printed."""


def read_notebook(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return a notebook: text as it is, code in fences, what it printed indented, images in place; and images left out.

    Forms of output that are no text or image are counted. Raises DataError if it is no notebook, or an empty one.
    """
    try:
        said = json.loads(decode_utf8(path.read_bytes()))
    except ValueError as error:
        raise DataError(f"it is not JSON: {error}") from error
    cells = said.get("cells", _old_cells(said)) if isinstance(said, dict) else None
    if not isinstance(cells, list):
        raise DataError("it is no notebook: it has no cells")
    metadata = said.get("metadata", {})
    language = metadata.get("language_info", {}).get("name") or metadata.get("kernelspec", {}).get("language") or ""
    reader = _Reader(path, language)
    for number, cell in enumerate(cells, 1):
        reader.read(cell, number)
    segments = reader.segments()
    if not segments:
        raise NoText("the notebook is empty")
    return segments, reader.rejections


def _old_cells(said: Mapping[str, Any]) -> list[Any] | None:
    """Return the cells of formats before 4, which have sheets."""
    sheets = said.get("worksheets")
    return [cell for sheet in sheets for cell in sheet.get("cells", ())] if isinstance(sheets, list) else None


class _Reader:
    """Collects the segments of a notebook."""

    def __init__(self, path: Path, language: str) -> None:
        self.path, self.language = path, language
        self.rejections: list[Rejection] = []
        self._segments: list[Segment] = []
        self._blocks: list[str] = []

    def read(self, cell: Mapping[str, Any], number: int) -> None:
        """Add one cell."""
        self._cell = number
        kind, text = cell.get("cell_type"), _joined(cell.get("source", cell.get("input", "")))
        if kind == "code":
            self._add(f"```{self.language}\n{text.rstrip()}\n```" if text.strip() else "")
            for output in cell.get("outputs", ()):
                self._add_output(output)
        elif kind == "heading":
            self._add(f"{'#' * int(cell.get('level', 1))} {text}")
        else:
            self._add_text(text, cell.get("attachments") or {})

    def segments(self) -> list[Segment]:
        """Return what was read."""
        self._end_text()
        return self._segments

    def _add(self, block: str) -> None:
        if block.strip():
            self._blocks.append(block.rstrip())

    def _add_text(self, text: str, attachments: Mapping[str, Any]) -> None:
        end = 0
        for found in ATTACHED.finditer(text):
            forms = attachments.get(found[1], {}) if found[1] else {"image/png": found[2]}
            data = next((forms[name] for name in IMAGES if name in forms), None)
            if data is not None:
                self._add(text[end : found.start()])
                self._add_image(data)
                end = found.end()
        self._add(text[end:])

    def _add_output(self, output: Mapping[str, Any]) -> None:
        kind = output.get("output_type")
        if kind == "stream":
            self._add_printed(_joined(output.get("text", "")))
        elif kind in ("error", "pyerr"):
            trace = output.get("traceback") or [f"{output.get('ename', '')}: {output.get('evalue', '')}"]
            self._add_printed("\n".join(trace))
        else:
            self._add_forms(output.get("data") or {OLD_NAMES.get(key, key): value for key, value in output.items()})

    def _add_forms(self, forms: Mapping[str, Any]) -> None:
        """Add the one of the forms of an output that says most."""
        image = next((forms[name] for name in IMAGES if name in forms), None)
        if image is not None:
            self._add_image(image)
            return
        name = next((name for name in SHOWN if name in forms), "")
        if not name:
            others = sorted(key for key in forms if "/" in key)
            account.count(account.NOT_KEPT, f"outputs of notebooks that are {', '.join(others) or 'of no known form'}")
        elif name == "text/html":
            self._add_page(_joined(forms[name]))
        elif name == "text/plain":
            self._add_printed(_joined(forms[name]))
        else:
            self._add(_joined(forms[name]))

    def _add_printed(self, text: str) -> None:
        lines = TERMINAL.sub("", text).rstrip().split("\n")
        self._add("\n".join(f"    {line.rpartition(chr(13))[2]}".rstrip() for line in lines))

    def _add_page(self, page: str) -> None:
        segments, rejections = read_page(page, name=self._place, fetch=lambda address: None)
        self.rejections += rejections
        for segment in segments:
            if isinstance(segment, TextSegment):
                self._add(segment.text)
            else:
                self._end_text()
                self._segments.append(segment)

    def _add_image(self, data: Any) -> None:
        try:
            image = read_image(base64.b64decode(_joined(data)))
        except (DataError, binascii.Error) as error:
            self.rejections.append(Rejection(self._place, str(error)))
            return
        self._end_text()
        self._segments.append(image)

    @property
    def _place(self) -> str:
        return f"{self.path}#cell={self._cell}"

    def _end_text(self) -> None:
        if self._blocks:
            self._segments.append(TextSegment("\n\n".join(self._blocks) + "\n"))
        self._blocks = []


def _joined(text: Any) -> str:
    """Return what a notebook writes as one string or as a list of lines."""
    return "".join(text) if isinstance(text, list) else str(text)
