"""Office files of before 2007 and rich text: text and tables, read by Apache Tika compiled to native code."""

import functools
from pathlib import Path

from iscc_tika import Extractor

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import Rejection, Segment
from megatron_mm.ingest.text import read_page

MAX_CHARACTERS = 2**28
"""Longer documents are refused."""


def read_legacy(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return the text of a doc, xls, ppt or rtf file in order; its pictures are not read.

    Cells of a table are separated by tabs, rows by line ends (not in rtf, whose tables come cell by cell). Raises
    DataError if it is damaged, encrypted, too long or holds no text.
    """
    try:
        page, _ = _extractor().extract_bytes_to_string(bytearray(path.read_bytes()))
    except TypeError as error:  # iscc-tika 0.6.0 raises it for whatever stops Tika
        raise DataError(f"the document is damaged or encrypted: {error}") from error
    if not page.rstrip().endswith("</html>"):
        raise DataError(f"the document has more than {MAX_CHARACTERS:,} characters")
    segments, rejections = read_page(page, name=str(path), fetch=lambda address: None)
    if not segments:
        raise DataError("the document holds no text")
    return segments, rejections


@functools.cache
def _extractor() -> Extractor:
    return Extractor().set_xml_output(True).set_extract_string_max_length(MAX_CHARACTERS)
