"""Web archives, as Common Crawl publishes them: pages and other files that were fetched (WARC), or their text (WET)."""

import io
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPException, HTTPResponse, IncompleteRead
from pathlib import Path

from fastwarc.stream_io import BrotliReader, ZstdReader
from fastwarc.warc import HeaderMap

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds
from megatron_mm.ingest.charset import decode_page, decode_text
from megatron_mm.ingest.document import Document, Origin, Reading, Rejection, TextSegment, unexpected
from megatron_mm.ingest.image import TooSmall
from megatron_mm.ingest.kinds import Kind, Parts
from megatron_mm.ingest.text import read_page
from megatron_mm.ingest.warc_file import MAX_RECORD_BYTES, Record, RecordReader, refusal

INPUT = "WARC records"
"""What the account calls an input."""
PAGES = {"text/html", "application/xhtml+xml"}
HTTP_HEADER_ENDS = re.compile(rb"\r?\n\r?\n")
CHARSET = re.compile(r"charset\s*=\s*[\"']?([^\s;\"']+)", re.IGNORECASE)
WITHOUT_MEANING = {"", "application/octet-stream", "unk", "unknown/unknown", "application/x-unknown-content-type"}
"""Media types of servers that do not know."""
MAX_NAME = 60
"""Characters kept of a media type that a page's server made up."""


def read_warc(
    path: Path,
    *,
    start: int = 0,
    stop: int | None = None,
    window: tuple[int, int] | None = None,
    is_bounded: bool = False,
) -> Reading:
    """Return the documents of the records that begin in bytes [start, stop) of a WARC or WET file.

    A response with status 200 that is a page, text, a PDF or an image is a document, and so is the text of a page
    (conversion); a record that is damaged or cannot be read is a rejection; every other one is counted. `window` says
    which of the records to read, counted from 0. Raises LongStream, if `is_bounded`, for what is to be read in parts,
    and DataError for a WAT file.
    """
    if start == 0 and (reason := refusal(path)):
        raise DataError(reason)
    documents: list[Document] = []
    rejections: list[Rejection] = []
    with account.kept_if_whole():  # a stream that proves too long is read again, in parts
        for item in _items(path, start, stop, window, is_bounded):
            account.count(account.INPUTS, INPUT)
            if isinstance(item, Rejection):
                rejections.append(item)
                continue
            document, left_out = _read_record(item, path)
            documents += [] if document is None else [document]
            rejections += left_out
    return documents, rejections


_under_way: dict[tuple[Path, int, int | None], RecordReader] = {}
"""The one reader of a long stream that the next window may go on with; it would inflate all that is before it again."""


def _items(
    path: Path, start: int, stop: int | None, window: tuple[int, int] | None, is_bounded: bool
) -> Iterator[Record | Rejection]:
    if window is None:
        yield from RecordReader(path, start, stop).read(is_bounded=is_bounded)
        return
    key = (path, start, stop)
    reader = _under_way.pop(key, None)
    _under_way.clear()
    if reader is None or reader.position > window[0]:
        reader = RecordReader(path, start, stop)
    yield from reader.read(*window)
    _under_way[key] = reader


def _read_record(record: Record, path: Path) -> tuple[Document | None, list[Rejection]]:
    """Return the document of a record; None of one that is rejected or counted as none."""
    name = f"{path}:{record.start}" + (f", record {record.number + 1} in it" if record.number else "")
    try:
        if record.block is None:
            raise DataError(f"the record has {record.length:,} bytes, and records are read up to {MAX_RECORD_BYTES:,}")
        found = _content(record)
        if isinstance(found, str):
            account.count(account.OTHERS, found)
            return None, []
        kind, body, charset = found
        segments, left_out = _read_body(kind, body, charset, name)
        if kind == kinds.HTML:
            account.count(account.NOT_KEPT, "inline images that cannot be read", len(left_out))
            left_out = []
        if not segments:
            account.count(account.OTHERS, f"{kind.words} with nothing to see")
            return None, []
    except TooSmall:
        account.count(account.OTHERS, f"{kinds.IMAGE.words} with nothing to see")
        return None, []
    except (DataError, OSError) as error:
        return None, [Rejection(name, f"{_url(record)}: {error}")]
    except RecursionError:
        return None, [Rejection(name, f"{_url(record)}: it is nested too deeply")]
    except MemoryError:
        raise
    except Exception as error:  # libraries raise what they like of a damaged file
        return None, [Rejection(name, f"{_url(record)}: {unexpected(error)}")]
    if reason := record.headers.get("WARC-Truncated"):
        account.count(account.NOT_KEPT, f"rest of a record that its crawler cut off ({reason[:MAX_NAME]})")
    member = f"record {record.number + 1}" if record.number else ""
    date = record.headers.get("WARC-Date") or ""
    origin = Origin(url=_url(record), date=date, start=record.start, stop=record.stop, member=member)
    return Document(segments, kind.source, origin), [replace(rejection, is_part=True) for rejection in left_out]


def _url(record: Record) -> str:
    return (record.headers.get("WARC-Target-URI") or "").strip("<>")


def _content(record: Record) -> tuple[Kind, bytes, str | None] | str:
    """Return (kind, body, charset that was declared) of a record, or what the account calls it if it is no document."""
    if record.type == "conversion":
        mime = _mime(record.headers.get("Content-Type"))
        return (kinds.TEXT, record.block, "utf-8") if mime == "text/plain" else _unread(mime)
    if record.type != "response":
        return f"{record.type} records"
    if not record.is_http:
        return "response of another protocol than HTTP"
    http, body = _parse_http(record.block)
    if http.status_code != 200:
        return f"HTTP status {http.status_code or 'unknown'}"
    if not body:
        return "empty body"
    declared = http.get("Content-Type")
    mime = _mime(record.headers.get("WARC-Identified-Payload-Type")) or _mime(declared)
    body = _decoded(body, http)
    kind = _kind(mime, body)
    charset = CHARSET.search(declared or "")
    return _unread(mime) if kind is None else (kind, body, charset[1] if charset else None)


def _mime(value: str | None) -> str:
    mime = (value or "").partition(";")[0].strip().lower()
    return "" if mime in WITHOUT_MEANING else mime


def _unread(mime: str) -> str:
    return f"body of type {mime[:MAX_NAME] or 'unknown'}"


def _kind(mime: str, body: bytes) -> Kind | None:
    """Return what reads a body, None if it is passed over."""
    if mime in PAGES or (not mime and re.match(rb"\s*<(!doctype html|html|head|body)\b", body, re.IGNORECASE)):
        return kinds.HTML
    if mime == "text/plain":
        return kinds.TEXT
    kind = kinds.by_mime(mime) if mime != "image/svg+xml" else None
    return kind if kind in (kinds.PDF, kinds.IMAGE) else None


def _read_body(kind: Kind, body: bytes, charset: str | None, name: str) -> Parts:
    """Return what a body shows, nothing of one that is blank, and what was left out of it. Raises DataError."""
    if kind in (kinds.HTML, kinds.TEXT) and not body.strip(b" \t\r\n\f\0"):
        return [], []
    if kind == kinds.HTML:
        return read_page(decode_page(body, charset), name=name, fetch=_fetch)
    if kind == kinds.TEXT:
        return [TextSegment(decode_text(body, charset))], []
    with tempfile.TemporaryDirectory(prefix="warc-") as folder:
        file = Path(folder) / f"record{kind.suffixes[0]}"
        file.write_bytes(body)
        segments, rejections = kind.read(file)
    return segments, [Rejection(one.path.replace(str(file), name), one.reason) for one in rejections]


def _fetch(address: str) -> None:
    """Count an image that is an address: nothing is fetched."""
    account.count(account.NOT_KEPT, "images that are addresses")


# Body and header of a response


def _parse_http(block: bytes) -> tuple[HeaderMap, bytes]:
    """Return the header and the body of a response."""
    end = HTTP_HEADER_ENDS.search(block)
    header, body = (block, b"") if end is None else (block[: end.start()], block[end.end() :])
    headers = HeaderMap("latin1")
    # FastWARC 2.0.1 takes a header whose lines end in LF alone, as many servers send it, for one line.
    headers.parse(io.BytesIO(re.sub(rb"\r?\n", b"\r\n", header) + b"\r\n\r\n"))
    if "chunked" in (headers.get("Transfer-Encoding") or "").lower():
        body = _without_chunks(block, body)
    return headers, body


class _Block(io.BytesIO):
    """A response as HTTPResponse takes it: from what has a file, as sockets have."""

    def makefile(self, mode: str) -> io.BytesIO:
        """Return itself."""
        return self


def _without_chunks(block: bytes, body: bytes) -> bytes:
    """Return a body that was sent in chunks as one; as it is if it has none: old crawls kept the header without them.

    The standard library does this, since FastWARC 2.0.1 knows no extensions of chunks and gives nothing of a body that
    is cut off.
    """
    response = HTTPResponse(_Block(block))
    try:
        response.begin()
        return response.read()
    except IncompleteRead as error:
        if error.partial:
            account.count(account.NOT_KEPT, "rest of a body that is cut off")
        return error.partial or body
    except (HTTPException, ValueError):
        return body


def _decoded(body: bytes, http: HeaderMap) -> bytes:
    """Undo the content encodings of a body. Raises DataError if it is in one that is not known."""
    codings = [coding.strip().lower() for value in http.get_multiple("Content-Encoding") for coding in value.split(",")]
    for coding in reversed(codings):
        if coding in ("gzip", "x-gzip", "deflate"):
            body = _inflated(body)
        elif coding in ("br", "zstd"):
            reader = BrotliReader if coding == "br" else ZstdReader
            try:
                body = reader(io.BytesIO(body)).read(MAX_RECORD_BYTES)
            except OSError:
                _take_as_it_is(body, coding)
        elif coding not in ("", "identity", "none", "utf-8"):
            raise DataError(f"its content encoding {coding[:MAX_NAME]} is not known")
    return body


def _inflated(body: bytes) -> bytes:
    """Return a gzip or deflate body inflated, as much as there is of one that is cut off.

    zlib does this, since FastWARC 2.0.1 knows no deflate without a header and does not tell what is cut off.
    """
    for wbits in (47, -15):  # with a header of gzip or zlib, and without
        inflate = zlib.decompressobj(wbits=wbits)
        try:
            data = inflate.decompress(body, MAX_RECORD_BYTES)
        except zlib.error:
            continue
        if not inflate.eof:
            account.count(account.NOT_KEPT, "rest of a body that is cut off")
        return data
    _take_as_it_is(body, "gzip")
    return body


def _take_as_it_is(body: bytes, coding: str) -> None:
    """Count a body without the encoding that its header names, as in old crawls. Raises DataError if it is no text."""
    if b"\0" in body or body.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        raise DataError(f"its body cannot be decoded: it is not {coding}")
    account.count(account.GUESSED, f"body without the {coding} of its header")
