"""Web archives: pages as documents, every record accounted for, and the same documents from any cut."""

import gzip
import io
import os
import signal
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import brotli
import numpy as np
import pyarrow as pa
import pytest
from fastwarc.warc import ArchiveIterator
from small import png, save_tokenizer, sentence

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, pipeline, warc, warc_file, work_items
from megatron_mm.ingest.document import Document, ImageSegment, Origin, TextSegment
from megatron_mm.ingest.layouts import Entry
from megatron_mm.ingest.pipeline import preprocess
from megatron_mm.ingest.read import read_file
from megatron_mm.ingest.warc import read_warc
from megatron_mm.ingest.warc_file import RecordReader
from megatron_mm.ingest.work_items import DEFAULTS, WorkItem, cut_entry, cut_work, read_all, read_work
from megatron_mm.ingest.workers import Cut
from megatron_mm.source import Source

DATE = "2026-11-27T18:10:43Z"
HTML = "Content-Type: text/html; charset=utf-8"
PIXEL = b64decode("R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==")
INFO = ("warcinfo", {"Content-Type": "application/warc-fields"}, b"software: test\r\n")


def record(kind: str, headers: dict[str, str], block: bytes) -> bytes:
    lines = ["WARC/1.0", f"WARC-Type: {kind}", f"WARC-Date: {DATE}"]
    lines += [f"{name}: {value}" for name, value in headers.items()] + [f"Content-Length: {len(block)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + block + b"\r\n\r\n"


def response(
    url: str, body: bytes, *headers: str, status: str = "HTTP/1.1 200 OK", end: str = "\r\n", **warc_headers: str
) -> bytes:
    http = end.join([status, *(headers or [HTML]), "", ""]).encode()
    own = {name.replace("_", "-"): value for name, value in warc_headers.items()}
    fields = {"WARC-Target-URI": url, "Content-Type": "application/http; msgtype=response", **own}
    return record("response", fields, http + body)


def page(text: str) -> bytes:
    head = "<title>no</title></head><body><nav>no</nav><script>no()</script>"
    return f"<!DOCTYPE html><html><head>{head}<article><h1>Title</h1><p>{text}</p></article></body></html>".encode()


def write(path: Path, records: Sequence[bytes], *, compress=gzip.compress) -> Path:
    path.write_bytes(b"".join(compress(record) for record in records))
    return path


def counted(path: Path) -> tuple[list[Document], list, account.Account]:
    with account.collected() as numbers:
        documents, rejections = read_file(path)
    assert not account.imbalance(
        numbers, documents=len(documents), rejected=sum(not rejection.is_part for rejection in rejections)
    )
    return documents, rejections, numbers


def only(tmp_path: Path, body: bytes, *headers: str, **others: str) -> Document:
    """The one document of a response, behind which another one stands that must not be lost."""
    path = write(
        tmp_path / "a.warc.gz", [response("http://x/1", body, *headers, **others), response("", page("after"))]
    )
    documents, rejections, _ = counted(path)
    assert not rejections
    assert texts(documents)[-1] == "Title\n\nafter\n"
    assert len(documents) == 2
    return documents[0]


def texts(documents: Sequence[Document]) -> list[str]:
    return ["".join(part.text for part in document.segments if isinstance(part, TextSegment)) for document in documents]


# What records become


@pytest.mark.parametrize("name", ["a.warc.gz", "x.gz", "no_name"])
def test_pages_are_documents_with_their_origin(tmp_path: Path, name: str) -> None:
    records = [record(*INFO), response("http://x/1", page("first ä")), response("http://x/2", page("second"))]
    documents, rejections, numbers = counted(write(tmp_path / name, records))
    assert not rejections
    assert texts(documents) == ["Title\n\nfirst ä\n", "Title\n\nsecond\n"]
    sizes = np.cumsum([0, *(len(gzip.compress(one)) for one in records)]).tolist()
    assert [document.origin for document in documents] == [
        Origin(url=f"http://x/{number}", date=DATE, start=sizes[number], stop=sizes[number + 1]) for number in (1, 2)
    ]
    assert numbers == {
        account.INPUTS: {"WARC records": 3},
        account.OTHERS: {"warcinfo records": 1},
        "charsets declared": {"utf-8": 2},
    }


def test_the_text_of_pages_is_read_from_wet_files(tmp_path: Path) -> None:
    def conversion(number: int, text: str) -> bytes:
        return record(
            "conversion", {"WARC-Target-URI": f"http://x/{number}", "Content-Type": "text/plain"}, text.encode()
        )

    path = write(tmp_path / "a.warc.wet.gz", [record(*INFO), conversion(1, "Erste Seite ä\n"), conversion(2, "二\n")])
    documents, rejections, numbers = counted(path)
    assert not rejections
    assert texts(documents) == ["Erste Seite ä\n", "二\n"]
    assert documents[1].origin.url == "http://x/2"
    assert numbers[account.OTHERS] == {"warcinfo records": 1}


def test_metadata_of_pages_is_refused(tmp_path: Path) -> None:
    envelope = {"WARC-Target-URI": "http://x/", "Content-Type": "application/json"}
    records = [record(*INFO), record("metadata", envelope, b'{"Container":{},"Envelope":{"Format":"WARC"}}')]
    path = write(tmp_path / "a.warc.wat.gz", records)
    (item,) = cut_entry(Entry(path, "files"))
    for documents, rejections in (read_file(path), read_work(item, DEFAULTS)):
        assert not documents
        assert "give the WARC or the WET file" in rejections[0].reason


def test_every_record_is_a_document_rejected_or_counted(tmp_path: Path) -> None:
    picture = png(np.random.default_rng(0))
    records = [
        record(*INFO),
        record("request", {"Content-Type": "application/http; msgtype=request"}, b"GET / HTTP/1.1\r\n\r\n"),
        response("http://x/moved", b"", status="HTTP/1.1 301 Moved"),
        response("http://x/gone", page("gone"), status="HTTP/1.0 404 Not Found"),
        response("http://x/empty", b""),
        response("http://x/blank", b" \r\n\0"),
        response("http://x/scripts", b"<html><body><script>x()</script></body></html>"),
        response("http://x/comment", b"<!-- nothing -->"),
        response("http://x/json", b"{}", "Content-Type: application/json"),
        response("http://x/js", b"x()", "Content-Type: Text/JavaScript; charset=utf-8"),
        response("http://x/none", b"\x00\x01\x02", "Server: x"),
        record("response", {"Content-Type": "text/dns"}, b"1.2.3.4"),
        record("revisit", {"Content-Type": "application/http"}, b"HTTP/1.1 200 OK\r\n\r\n"),
        response("http://x/picture", picture, "Content-Type: image/png"),
        response("http://x/bad", b"\x89PNG no", "Content-Type: image/png"),
        response("http://x/dot.gif", PIXEL, "Content-Type: image/gif"),
        response("http://x/text", "später\r\n".encode("cp1252"), "Content-Type: text/plain; charset=iso-8859-1"),
        response("http://x/lies", page("a page"), "Content-Type: text/plain", WARC_Identified_Payload_Type="text/html"),
        response("http://x/silent", page("no type"), "Server: x"),
        response("http://x/cut", page("cut")[:-14], WARC_Truncated="length"),
        response("http://x/images", page("see <img src='a.png'> <img src='http://y/b.png'>")),
        response("http://x/inline", page(f"see <img src='data:image/gif;base64,{b64encode(PIXEL).decode()}'>")),
        response("http://x/svg", page("see <img src='data:image/svg+xml;utf8,<svg></svg>'>")),
        record("metadata", {"Content-Type": "application/warc-fields"}, b"fetchTimeMs: 1\r\n"),
    ]
    documents, rejections, numbers = counted(write(tmp_path / "a.warc.gz", records))
    urls = [document.origin.url.rpartition("/")[2] for document in documents]
    assert urls == ["picture", "text", "lies", "silent", "cut", "images", "inline", "svg"]
    assert isinstance(documents[0].segments[0], ImageSegment)
    assert [document.source for document in documents] == [Source.IMAGE, *[Source.TEXT] * 7]
    assert texts(documents[1:2]) == ["später\n"]
    (rejection,) = rejections
    assert "http://x/bad: it is not an image" in rejection.reason
    assert numbers[account.INPUTS] == {"WARC records": len(records)}
    assert numbers[account.OTHERS] == {
        "warcinfo records": 1,
        "request records": 1,
        "HTTP status 301": 1,
        "HTTP status 404": 1,
        "empty body": 1,
        "image with nothing to see": 1,
        "web page with nothing to see": 3,
        "body of type application/json": 1,
        "body of type text/javascript": 1,
        "body of type unknown": 1,
        "response of another protocol than HTTP": 1,
        "revisit records": 1,
        "metadata records": 1,
    }
    assert numbers[account.NOT_KEPT] == {
        "rest of a record that its crawler cut off (length)": 1,
        "images that are addresses": 2,
        "images too small to see": 1,
        "inline images that cannot be read": 1,
    }


def pdf(text: str) -> bytes:
    stream = f"BT /F1 24 Tf 72 700 Td ({text}) Tj ET".encode()
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>"
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>", page]
    objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
    objects.append(b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>")
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, content) for number, content in enumerate(objects, start=1))
    return b"%PDF-1.7\n" + body + b"trailer<</Root 1 0 R>>\n%%EOF\n"


def test_a_pdf_is_read_and_a_damaged_one_is_named_by_its_record(tmp_path: Path) -> None:
    header = "Content-Type: application/pdf"
    records = [response("http://x/1.pdf", pdf("a heron"), header), response("http://x/2.pdf", pdf("")[:60], header)]
    path = write(tmp_path / "a.warc.gz", records)
    documents, rejections, _ = counted(path)
    assert [(document.source, *texts([document])) for document in documents] == [(Source.PDF, "a heron\n")]
    assert rejections[0].path == f"{path}:{len(gzip.compress(records[0]))}"
    assert rejections[0].reason.startswith("http://x/2.pdf: the PDF cannot be read")


def chunked(data: bytes, size: int = 7, extension: bytes = b"") -> bytes:
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    return b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in [*parts, b""])


def raw_deflate(data: bytes) -> bytes:
    deflate = zlib.compressobj(wbits=-15)
    return deflate.compress(data) + deflate.flush()


BODY = page("the body")
ENCODED = {
    "chunked": (chunked(BODY), "Transfer-Encoding: chunked"),
    "with extensions": (chunked(BODY, extension=b";a=b"), "Transfer-Encoding: chunked"),
    "gzip": (gzip.compress(BODY), "Content-Encoding: gzip"),
    "x-gzip": (gzip.compress(BODY), "Content-Encoding: X-Gzip"),
    "deflate": (zlib.compress(BODY), "Content-Encoding: deflate"),
    "raw deflate": (raw_deflate(BODY), "Content-Encoding: deflate"),
    "brotli": (brotli.compress(BODY), "Content-Encoding: br"),
    "zstd": (pa.compress(BODY, codec="zstd", asbytes=True), "Content-Encoding: zstd"),
    "twice": (brotli.compress(gzip.compress(BODY)), "Content-Encoding: gzip, br"),
    "gzip in chunks": (chunked(gzip.compress(BODY)), "Content-Encoding: gzip\r\nTransfer-Encoding: chunked"),
    "not in chunks": (BODY, "Transfer-Encoding: chunked"),
    "not gzip": (BODY, "Content-Encoding: gzip"),
    "not brotli": (BODY, "Content-Encoding: br"),
}


@pytest.mark.parametrize("name", ENCODED)
def test_bodies_are_decoded_and_cost_no_record_behind_them(tmp_path: Path, name: str) -> None:
    body, header = ENCODED[name]
    assert texts([only(tmp_path, body, HTML, header)]) == ["Title\n\nthe body\n"]


def test_what_is_there_of_a_body_that_is_cut_off_is_read(tmp_path: Path) -> None:
    long = b"<html><body>" + b"".join(b"<p>paragraph %d</p>" % number for number in range(999))
    for body, header in (
        (chunked(long, 900)[:9000], "Transfer-Encoding: chunked"),
        (gzip.compress(long, 0)[:9000], "Content-Encoding: gzip"),
    ):
        path = write(tmp_path / "a.warc.gz", [response("http://x/", body, HTML, header)])
        documents, _, numbers = counted(path)
        assert "paragraph 399" in texts(documents)[0]
        assert numbers[account.NOT_KEPT] == {"rest of a body that is cut off": 1}


@pytest.mark.parametrize(
    ("text", "codec", "header", "end"),
    [
        ("größer €", "cp1252", "Content-Type: text/html; charset=ISO-8859-1", "\r\n"),
        ("苍鹭站在水中", "gb18030", 'Content-Type: TEXT/HTML;charset="gb2312"', "\r\n"),
        ("şğı", "cp1254", "content-type: text/html;charset=iso-8859-9", "\n"),
        ("Серая цапля стоит в воде неподвижно целый час", "koi8-r", "Content-Type: text/html", "\r\n"),
        ("日本語の文章です", "iso2022_jp", "Content-Type: text/html;\r\n charset='iso-2022-jp'", "\r\n"),
    ],
)
def test_the_header_says_the_charset(tmp_path: Path, text: str, codec: str, header: str, end: str) -> None:
    body = f"<html><body><p>{text}</p></body></html>".encode(codec)
    assert texts([only(tmp_path, body, header, end=end)]) == [f"{text}\n"]


# Ranges


def corpus(count: int = 40) -> list[bytes]:
    rng = np.random.default_rng(0)
    records = [record(*INFO)]
    for number in range(count):
        url = f"http://x/{number}"
        records.append(record("request", {"WARC-Target-URI": url}, b"GET / HTTP/1.1\r\n\r\n"))
        body = page(sentence(rng, int(rng.integers(5, 300))))
        if number % 7 == 3:
            body += rng.bytes(2000).hex().encode() + b"\r\n\r\nWARC/1.0 is written like this\r\n"
        records.append(response(url, body, HTML if number % 5 else "Content-Type: application/json"))
    return records


def one_pass(path: Path) -> list[tuple[str, str | None, bytes]]:
    """Every record as FastWARC gives it from the whole file in order: the reference."""
    iterator = ArchiveIterator(io.BytesIO(path.read_bytes()), parse_http=False)
    return [(str(one.record_type), one.headers.get("WARC-Target-URI"), one.reader.read()) for one in iterator]


def in_ranges(path: Path, marks: Sequence[int]) -> list[tuple[str, str | None, bytes]]:
    records = [one for start, stop in pairwise(marks) for one in RecordReader(path, start, stop).read()]
    return [(one.type, one.headers.get("WARC-Target-URI"), one.block) for one in records]


def groups(records: Sequence[bytes], size: int) -> list[bytes]:
    return [b"".join(records[start : start + size]) for start in range(0, len(records), size)]


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


FORMS = {
    "a member a record": lambda path, records: write(path, records),
    "stored": lambda path, records: write(path, records, compress=lambda data: gzip.compress(data, 0)),
    "three records a member": lambda path, records: write(path, groups(records, 3)),
    "records over two members": lambda path, records: write(
        path, [part for one in records for part in (one[:99], one[99:])]
    ),
    "one member": lambda path, records: write(path, [b"".join(records)]),
    "plain": lambda path, records: write(path, records, compress=bytes),
}


@pytest.mark.parametrize("form", FORMS)
def test_ranges_at_every_cut_give_the_records_of_one_pass(tmp_path: Path, form: str) -> None:
    path = FORMS[form](tmp_path / "a", corpus(12))
    expected, size = one_pass(path), path.stat().st_size
    assert len(expected) == 25
    step = max(1, size // 300)
    for cut in (*range(0, size, step), *range(250)):
        assert in_ranges(path, [0, cut, size]) == expected, cut
    for length in (97, 1000, 5000):
        assert in_ranges(path, [*range(0, size, length), size]) == expected


def documents_of(items: Sequence[work_items.WorkItem]) -> Iterator[Document]:
    for item in items:
        for documents, rejections in read_all(item, DEFAULTS):
            assert not rejections
            yield from documents


@pytest.mark.parametrize("form", [*FORMS, "zstd"])
def test_files_are_cut_to_the_same_documents(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a.warc" if form == "plain" else "a.gz"
    path = FORMS[form](tmp_path / name, corpus()) if form in FORMS else write(tmp_path / name, corpus(), compress=zstd)
    whole = read_warc(path)[0]
    assert len(whole) == 32
    assert all(document.origin.start is not None for document in whole)
    monkeypatch.setattr(work_items, "ARCHIVE_BYTES", 3_000)
    items = list(cut_entry(Entry(path, "files")))
    assert len(items) > 2 or form == "zstd"
    assert list(documents_of(items)) == whole
    looked_at = read_work(WorkItem(path), DEFAULTS)
    parts = looked_at.parts if isinstance(looked_at, Cut) else items
    assert len(parts) == len(items), "also where one file is looked at"
    assert list(documents_of(parts)) == whole
    singles = [part for item in items for part in cut_work(item)]
    singles = [part for item in singles for part in cut_work(item)]
    assert list(documents_of(singles)) == whole
    assert max(len(list(documents_of([item]))) for item in singles) == 1


@pytest.mark.parametrize("form", ["one member", "three records a member", "zstd", "zstd frames"])
def test_a_long_stream_is_read_in_parts(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gz"
    if form in FORMS:
        FORMS[form](path, corpus())
    else:
        write(path, groups(corpus(), 99 if form == "zstd" else 1), compress=zstd)
    whole = read_warc(path)[0]
    assert len(whole) == 32
    monkeypatch.setattr(warc_file, "STREAM_BYTES", 3_000)
    (item,) = cut_entry(Entry(path, "files"))
    with account.collected() as numbers:
        reading = read_work(item, DEFAULTS)
    assert isinstance(reading, Cut)
    assert numbers == {}, "what is read again is counted once"
    assert len(reading.parts) > 5
    read = [read_work(part, DEFAULTS) for part in reading.parts]
    assert [document for documents, _ in read for document in documents] == whole
    assert read_work(reading.parts[1], DEFAULTS) == read[1], "also when the stream has been read beyond it"
    singles = [single for part in reading.parts for single in cut_work(part)]
    assert list(documents_of(singles)) == whole


# Damage


def damaged(records: list[bytes], number: int) -> tuple[bytes, int]:
    members = [gzip.compress(one) for one in records]
    start = sum(map(len, members[:number]))
    member = members[number]
    members[number] = member[:40] + bytes(8) + member[48:]
    return b"".join(members), start


def test_a_damaged_member_costs_itself(tmp_path: Path) -> None:
    records = [response(f"http://x/{number}", page(f"page {number} " * 20)) for number in range(5)]
    data, start = damaged(records, 2)
    path = tmp_path / "a.warc.gz"
    path.write_bytes(data)
    documents, rejections, _ = counted(path)
    assert [document.origin.url[-1] for document in documents] == list("0134")
    assert [rejection.path for rejection in rejections] == [f"{path}:{start}"]
    for cut in range(len(data)):
        read = [read_warc(path, start=first, stop=stop) for first, stop in ((0, cut), (cut, len(data)))]
        assert [document for own, _ in read for document in own] == documents
        assert [rejection for _, own in read for rejection in own] == rejections


@pytest.mark.parametrize(
    ("tail", "reason"), [(bytes(512), ""), (b"junk behind it", "no gzip"), (None, "ends in the middle")]
)
def test_how_a_file_ends_is_said(tmp_path: Path, tail: bytes | None, reason: str) -> None:
    for compress in (gzip.compress, bytes):
        if compress is bytes and tail is not None:
            continue
        path = write(tmp_path / "a.warc", [response("", page("one")), response("", page("two"))], compress=compress)
        data = path.read_bytes()
        path.write_bytes(data[:-60] if tail is None else data + tail)
        documents, rejections = read_warc(path)
        assert len(documents) == (1 if tail is None else 2)
        assert [reason in rejection.reason for rejection in rejections] == [True] * bool(reason)


def test_a_wrong_length_costs_no_record_behind_it(tmp_path: Path) -> None:
    records = [response(f"http://x/{number}", page(f"page {number}")) for number in range(4)]
    for wrong in (b"Content-Length: 9", b"Content-Length: 1\r\nX: ", b"Content-Width: "):
        broken = [*records[:1], records[1].replace(b"Content-Length: ", wrong), *records[2:]]
        path = write(tmp_path / "a.warc", broken, compress=bytes)
        documents, rejections, _ = counted(path)
        assert [document.origin.url[-1] for document in documents if document.segments][-2:] == ["2", "3"]
        assert rejections


def test_a_record_that_is_too_large_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warc_file, "MAX_RECORD_BYTES", 1_000)
    records = [response("http://x/1", page("long " * 500)), response("http://x/2", page("short"))]
    documents, rejections, _ = counted(write(tmp_path / "a.warc.gz", records))
    assert texts(documents) == ["Title\n\nshort\n"]
    assert "records are read up to" in rejections[0].reason


# Whole runs


class DyingOptions(work_items.Options):
    """Options whose arrival in a worker makes it die at a page that says so."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        real = warc.read_page

        def read(page: str, **options):
            if "die here" in page:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(page, **options)

        warc.read_page = read


@pytest.mark.parametrize("form", ["a member a record", "one member"])
def test_a_record_that_kills_its_reader_costs_itself(tmp_path: Path, form: str) -> None:
    records = corpus(20)
    records.insert(9, response("http://x/bad", page("die here")))
    save_tokenizer(tmp_path / "tokenizer.json")
    path = FORMS[form](tmp_path / "a.warc.gz", records)
    with pytest.raises(DataError, match=r"the process that read it died"):
        run(path, tmp_path / "fail" / "p", options=DyingOptions())
    report = run(path, tmp_path / "out" / "p", options=DyingOptions(), skip_bad=True)
    assert report.counts.documents == 16
    (rejection,) = report.rejections
    start = sum(len(gzip.compress(one)) for one in records[:9]) if form == "a member a record" else 0
    assert rejection.path.startswith(f"{path}:{start}")


def run(path: Path, prefix: Path, **options) -> pipeline.Report:
    tokenizer = path.parent / "tokenizer.json"
    return preprocess([str(path)], output_prefix=str(prefix), tokenizer_path=str(tokenizer), **options)


def test_shares_and_workers_read_a_file_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_items, "ARCHIVE_BYTES", 2_000)
    save_tokenizer(tmp_path / "tokenizer.json")
    path = write(tmp_path / "a.warc.gz", corpus())
    alone = run(path, tmp_path / "1" / "p")
    assert run(path, tmp_path / "2" / "p", workers=2) == alone
    assert alone.num_inputs > 5
    assert (tmp_path / "1" / "p.bin").read_bytes() == (tmp_path / "2" / "p.bin").read_bytes()
    shares = [run(path, tmp_path / "3" / "p", share=pipeline.Share(task, 3)) for task in range(3)]
    assert min(share.counts.documents for share in shares) > 5
    assert sum(share.counts.documents for share in shares) == alone.counts.documents == 32
