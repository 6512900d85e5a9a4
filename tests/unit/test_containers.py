"""Files that hold others: archives, record files, office documents, e-books, e-mail and video."""

import gzip
import io
import json
import lzma
import tarfile
import zipfile
from email.message import EmailMessage
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from small import png

from megatron_mm.errors import DataError
from megatron_mm.ingest import archive, legacy, work_items
from megatron_mm.ingest.document import AudioSegment, Document, ImageSegment, TextSegment
from megatron_mm.ingest.image import read_image
from megatron_mm.ingest.read import read_file
from megatron_mm.ingest.work_items import DEFAULTS, WorkItem, cut_work, read_all, read_work
from megatron_mm.ingest.workers import Cut
from megatron_mm.modalities.audio.spec import decode_flac
from megatron_mm.source import Source

LEGACY = Path(__file__).parent / "legacy_office"
PICTURE = png(np.random.default_rng(0))


def shape(document: Document) -> list[str]:
    """The text of a document, and the kinds of its other segments, in order."""
    return [part.text if isinstance(part, TextSegment) else type(part).__name__ for part in document.segments]


def zip_of(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as output:
        for name, data in files.items():
            output.writestr(name, data)
    return path


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as output:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            output.addfile(entry, io.BytesIO(data))
    return path


def one(path: Path) -> Document:
    documents, rejections = read_file(path)
    assert not rejections
    assert len(documents) == 1
    return documents[0]


def reason_of(path: Path) -> str:
    documents, rejections = read_file(path)
    assert not documents
    assert rejections[0].path.startswith(str(path))
    return rejections[0].reason


# Archives


def test_an_archive_gives_the_documents_of_its_files(tmp_path: Path) -> None:
    inner = zip_of(tmp_path / "inner.zip", {"deep.txt": "deep text\n"}).read_bytes()
    files = {
        "a/page.html": "<html><body><p>see</p><img src='b/p.png'></body></html>",
        "a/b/p.png": PICTURE,
        "a/b/p.txt": "a caption\n",
        "inner.zip": inner,
        "notes.jsonl.gz": gzip.compress(b'{"text": "first line"}\n{"text": "second line"}\n'),
        "story.txt.xz": lzma.compress(b"a story\n"),
        ".hidden": "no",
    }
    documents, rejections = read_file(zip_of(tmp_path / "all.zip", files))
    assert not rejections
    shapes = [shape(document) for document in documents]
    expected = [["see\n", "ImageSegment"], ["ImageSegment", "a caption\n"], ["deep text\n"]]
    assert shapes == [*expected, ["first line"], ["second line"], ["a story\n"]]


def test_a_bad_member_is_named_and_costs_only_itself(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", {"x/bad.png": b"\x89PNG no", "good.txt": "good text\n"})
    documents, rejections = read_file(path)
    assert [shape(document) for document in documents] == [["good text\n"]]
    assert [rejection.path for rejection in rejections] == [f"{path}/x/bad.png"]


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "c:/evil.txt", "..\\evil.txt"])
def test_a_member_cannot_leave_the_archive(tmp_path: Path, name: str) -> None:
    for path in (
        zip_of(tmp_path / "a.zip", {name: "evil", "good.txt": "good text\n"}),
        tar_of(tmp_path / "a.tar", {name: b"evil", "good.txt": b"good text\n"}),
    ):
        documents, rejections = read_file(path)
        assert [shape(document) for document in documents] == [["good text\n"]]
        assert [rejection.reason for rejection in rejections] == ["its name leads outside the archive"]
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_tar_of_a_folder_that_ends_in_a_zip_is_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as output:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        output.addfile(folder)
        for name, data in (
            ("./a.txt", b"a text\n"),
            ("./z.zip", zip_of(tmp_path / "z", {"b.txt": "b\n"}).read_bytes()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            output.addfile(entry, io.BytesIO(data))
    documents, rejections = read_file(tmp_path / "a.tar")
    assert not rejections
    assert [shape(document) for document in documents] == [["a text\n"], ["b\n"]]


def test_links_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as output:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo(f"link{kind.decode()}.txt")
            entry.type, entry.linkname = kind, str(tmp_path / "secret.txt")
            output.addfile(entry)
    documents, rejections = read_file(tmp_path / "a.tar")
    assert not documents
    assert [rejection.reason for rejection in rejections] == ["it is a link or a device"] * 3


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_UNPACKED_BYTES", 1_000_000)
    assert "unpacks to" in reason_of(zip_of(tmp_path / "a.zip", {f"{n}.txt": bytes(600_000) for n in range(2)}))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(2_000_000)))
    assert "unpacks to" in reason_of(tmp_path / "a.txt.gz")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    assert "more than 3 members" in reason_of(zip_of(tmp_path / "b.zip", {f"{n}.txt": "x" for n in range(4)}))


def test_an_archive_within_itself_ends(tmp_path: Path) -> None:
    data = b"text\n"
    for _ in range(archive.MAX_DEPTH + 1):
        data = gzip.compress(data)
    (tmp_path / "a.gz").write_bytes(data)
    assert f"nested more than {archive.MAX_DEPTH} deep" in reason_of(tmp_path / "a.gz")


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_a_truncated_archive_is_rejected(tmp_path: Path, make) -> None:
    rng = np.random.default_rng(0)
    path = make(tmp_path / f"a.{make.__name__[:3]}", {f"{n}.txt": rng.bytes(3_000).hex().encode() for n in range(3)})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "damaged" in reason_of(path)


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", {f"{n}.txt": b"some text\n" for n in range(3)})
    data = bytearray(path.read_bytes())
    data[1024 + 10] ^= 0xFF  # in the second member's name
    path.write_bytes(data)
    assert "no header at byte 1,024" in reason_of(path)


# WebDataset, JSON lines and Parquet: large files are cut


def samples(count: int) -> dict[str, bytes]:
    """A WebDataset tar with captions in either form."""
    files: dict[str, bytes] = {}
    for number in range(count):
        files[f"{number:04d}.png"] = PICTURE
        files[f"{number:04d}.json"] = json.dumps({"caption": f"picture {number}", "width": 3}).encode()
        files[f"{number:04d}.cls"] = b"7"
    return files


def test_a_webdataset_is_read_in_ranges_of_whole_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar_of(tmp_path / "a.tar", samples(12))
    whole = list(read_all(WorkItem(path), DEFAULTS))
    assert len(whole) == 1
    expected = [["ImageSegment", f"picture {number}"] for number in range(12)]
    assert [shape(document) for document in whole[0][0]] == expected
    monkeypatch.setattr(work_items, "ARCHIVE_BYTES", 20_000)
    cut = read_work(WorkItem(path), DEFAULTS)
    assert isinstance(cut, Cut)
    assert len(cut.parts) > 2
    assert sum(part.num_bytes for part in cut.parts) == path.stat().st_size
    singles = [single for part in cut.parts for single in cut_work(part)]
    assert len(singles) == 12
    for parts in (cut.parts, singles):
        readings = [reading for part in parts for reading in read_all(part, DEFAULTS)]
        assert [shape(document) for documents, _ in readings for document in documents] == expected
        assert not [rejection for _, rejections in readings for rejection in rejections]


def test_parquet_rows_are_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f"row {number}", "image": None, "other": 1} for number in range(30)]
    rows[4] = {"text": "a caption", "image": {"bytes": PICTURE, "path": None}, "other": 1}
    rows[9] = {"text": "bad", "image": {"bytes": b"\x89PNG no", "path": None}, "other": 1}
    rows[11] = {"text": None, "image": None, "other": 1}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    documents, rejections = read_file(path)
    shapes = [shape(document) for document in documents]
    assert len(shapes) == 28
    assert shapes[4] == ["ImageSegment", "a caption"]
    assert documents[4].source == Source.IMAGE
    assert [rejection.path for rejection in rejections] == [f"{path}:10", f"{path}:12"]
    monkeypatch.setattr(work_items, "ARCHIVE_BYTES", path.stat().st_size // 3)
    cut = read_work(WorkItem(path), DEFAULTS)
    assert isinstance(cut, Cut)
    assert sum(part.num_bytes for part in cut.parts) == path.stat().st_size
    for parts in (cut.parts, [single for part in cut.parts for single in cut_work(part)]):
        readings = [reading for part in parts for reading in read_all(part, DEFAULTS)]
        assert [shape(document) for documents, _ in readings for document in documents] == shapes
        assert [entry for _, entries in readings for entry in entries] == rejections


def test_a_bad_parquet_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"number": [1, 2]}), path)
    assert "none is known to be text or media. Say which columns are what with --fields" in reason_of(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert "damaged" in reason_of(path)


def test_lines_of_a_failed_range_are_tried_alone(tmp_path: Path) -> None:
    lines = [b'{"text": "one"}\r\n', b'{"text": "two"}\n', b"\n", b'{"text": "last"}']
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    (whole,) = work_items._line_ranges(tmp_path / "a.jsonl")
    parts = cut_work(whole)
    assert cut_work(WorkItem(tmp_path / "a.jsonl")) == parts
    assert [(part.first_line, part.stop - part.start) for part in parts] == [(1, 17), (2, 16), (3, 1), (4, 16)]
    texts = [shape(document) for part in parts for document in read_work(part, DEFAULTS)[0]]
    assert texts == [["one"], ["two"], ["last"]]


# Office documents, e-books and e-mail

W = 'xmlns:w="w" xmlns:a="a" xmlns:r="r"'
RELATIONS = '<Relationships><Relationship Id="i" Type="t" Target="{}"/></Relationships>'


def test_a_word_file_shows_text_tables_and_images_in_place(tmp_path: Path) -> None:
    body = (
        "<w:p><w:pPr><w:t>style</w:t></w:pPr><w:r><w:t>Before </w:t><w:tab/><w:t>tab</w:t></w:r>"
        "<w:del><w:t>gone</w:t></w:del></w:p>"
        '<w:p><w:drawing><a:blip r:embed="i"/></w:drawing></w:p>'
        "<w:tbl><w:tr><w:tc><w:p><w:t>a</w:t></w:p></w:tc><w:tc><w:p><w:t>b</w:t></w:p></w:tc></w:tr></w:tbl>"
        "<w:p><w:t>After</w:t></w:p>"
    )
    files = {
        "word/document.xml": f"<w:document {W}><w:body>{body}</w:body></w:document>",
        "word/_rels/document.xml.rels": RELATIONS.format("media/p.png"),
        "word/media/p.png": PICTURE,
    }
    document = one(zip_of(tmp_path / "a.docx", files))
    assert shape(document) == ["Before \ttab\n", "ImageSegment", "a\tb\nAfter\n"]
    assert document.source == Source.OFFICE
    files["word/media/p.png"] = b"no picture"
    documents, rejections = read_file(zip_of(tmp_path / "b.docx", files))
    assert shape(documents[0]) == ["Before \ttab\n\na\tb\nAfter\n"]
    assert rejections[0].path == f"{tmp_path}/b.docx#word/media/p.png"


def test_slides_come_in_the_order_of_the_show(tmp_path: Path) -> None:
    relations = f"<R>{'<R Id={!r} Target={!r}/>' * 2}</R>"
    slide = f'<p:sld xmlns:p="p" {W}><a:p><a:r><a:t>{{}}</a:t></a:r></a:p>{{}}</p:sld>'
    order = '<p:sldId id="1" r:id="i2"/><p:sldId id="2" r:id="i1"/>'
    files = {
        "ppt/presentation.xml": f'<p:presentation xmlns:p="p" {W}>{order}</p:presentation>',
        "ppt/_rels/presentation.xml.rels": relations.format("i1", "slides/s1.xml", "i2", "slides/s2.xml"),
        "ppt/slides/s1.xml": slide.format("shown last", ""),
        "ppt/slides/s2.xml": slide.format("shown first", '<a:blip r:embed="i"/>'),
        "ppt/slides/_rels/s2.xml.rels": relations.format("i", "../media/p.png", "n", "../notesSlides/n.xml"),
        "ppt/notesSlides/n.xml": slide.format("a note", ""),
        "ppt/media/p.png": PICTURE,
    }
    assert shape(one(zip_of(tmp_path / "a.pptx", files))) == ["shown first\n", "ImageSegment", "a note\n\nshown last\n"]


def test_a_spreadsheet_is_read_by_rows(tmp_path: Path) -> None:
    rows = (
        '<row r="1"><c t="s"><v>1</v></c><c><v>2.5</v></c></row>'
        '<row r="3"><c t="inlineStr"><is><t>in place</t></is></c><c/></row>'
    )
    files = {
        "xl/workbook.xml": f'<workbook {W}><sheet name="Costs" r:id="i"/></workbook>',
        "xl/_rels/workbook.xml.rels": RELATIONS.format("worksheets/s.xml"),
        "xl/sharedStrings.xml": "<sst><si><t>no</t></si><si><r><t>sha</t></r><r><t>red</t></r></si></sst>",
        "xl/worksheets/s.xml": f"<worksheet>{rows}</worksheet>",
        "xl/worksheets/_rels/s.xml.rels": RELATIONS.format("../drawings/d.xml"),
        "xl/drawings/d.xml": f'<d {W}><anchor><from><row>1</row></from><a:blip r:embed="i"/></anchor></d>',
        "xl/drawings/_rels/d.xml.rels": RELATIONS.format("../media/p.png"),
        "xl/media/p.png": PICTURE,
    }
    assert shape(one(zip_of(tmp_path / "a.xlsx", files))) == ["Costs\nshared\t2.5\n", "ImageSegment", "in place\n"]


def test_open_documents_are_read(tmp_path: Path) -> None:
    content = (
        '<o xmlns:t="t" xmlns:d="d" xmlns:x="x"><t:tracked-changes><t:p>gone</t:p></t:tracked-changes>'
        '<t:h>Title</t:h><t:p>one<t:s t:c="3"/><t:span>two</t:span> end<t:tab/></t:p>'
        '<t:p><d:frame><d:image x:href="Pictures/p.png"/></d:frame></t:p>'
        "<t:table-row><t:table-cell><t:p>a</t:p></t:table-cell></t:table-row></o>"
    )
    files = {"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": content, "Pictures/p.png": PICTURE}
    assert shape(one(zip_of(tmp_path / "a.odt", files))) == ["Title\none   two end\n", "ImageSegment", "a\n"]


def test_a_book_is_read_along_its_spine(tmp_path: Path) -> None:
    package = (
        '<package><manifest><item id="b" href="t/b%20c.xhtml"/><item id="a" href="a.xhtml"/>'
        '<item id="n" href="n.xhtml" properties="nav"/></manifest>'
        '<spine><itemref idref="n"/><itemref idref="b"/><itemref idref="a"/></spine></package>'
    )
    files = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<c><rootfile full-path="OPS/p.opf"/></c>',
        "OPS/p.opf": package,
        "OPS/t/b c.xhtml": "<html><body><p>Chapter one</p><img src='../p.png'/></body></html>",
        "OPS/a.xhtml": "<html><body><p>Chapter two</p></body></html>",
        "OPS/n.xhtml": "<html><body>contents</body></html>",
        "OPS/p.png": PICTURE,
    }
    assert shape(one(zip_of(tmp_path / "a.epub", files))) == ["Chapter one\n", "ImageSegment", "Chapter two\n"]


def test_hostile_office_files_are_rejected(tmp_path: Path) -> None:
    entities = '<!DOCTYPE d [<!ENTITY a "xxxxxxxxxx"><!ENTITY b "&a;&a;&a;&a;">]>'
    document = f"{entities}<w:document {W}><w:p><w:t>&b;</w:t></w:p></w:document>"
    assert "neither text nor images" in reason_of(zip_of(tmp_path / "a.docx", {"word/document.xml": document}))
    deep = f"<w:document {W}>{'<w:p>' * 5_000}{'</w:p>' * 5_000}</w:document>"
    assert reason_of(zip_of(tmp_path / "b.docx", {"word/document.xml": deep}))
    assert "damaged" in reason_of(zip_of(tmp_path / "c.docx", {"word/document.xml": "<w:p>"}))
    assert "damaged" in reason_of(zip_of(tmp_path / "d.epub", {"META-INF/container.xml": "<c/>"}))


def test_office_files_of_before_2007_show_text_and_tables(tmp_path: Path) -> None:
    """The files were made for this test with LibreOffice 7.4, from the texts below."""
    memo = "A gauge stands in the open, away from walls — at least twice their height.\n\nIt is read at nine o’clock."
    expected = {
        "memo.doc": f"Measuring rain\n\n{memo}\n\nmonth\tmm\nJune\t71\n\nZürich, 東京, Ελλάδα\n",
        "sheet.xls": "sheet\n\nmonth\tmm\tnote\nJune\t71\tdry\nJuly\t104.5\t東京\n",
        "slides.ppt.gz": "Measuring rain\n\nRead it at nine.\n\nZürich, 東京\n\nThe second slide\n",
    }
    for name, text in expected.items():
        assert shape(one(LEGACY / name)) == [text]
    (tmp_path / "a.rtf").write_bytes(rb"{\rtf1\ansi Gr\'fc\'dfe \b all\b0\par two}")
    assert shape(one(tmp_path / "a.rtf")) == ["Grüße all\n\ntwo\n"]
    (tmp_path / "text.doc").write_text("text in a file of that name\n")
    assert shape(one(tmp_path / "text.doc")) == ["text in a file of that name\n"]
    for name in ("memo.doc", "sheet.xls"):
        (tmp_path / name).write_bytes((LEGACY / name).read_bytes()[:3000])
        assert "damaged or encrypted" in reason_of(tmp_path / name)


def test_a_legacy_document_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legacy, "MAX_CHARACTERS", 50)
    legacy._extractor.cache_clear()
    with pytest.raises(DataError, match="more than 50 characters"):
        legacy.read_legacy(LEGACY / "memo.doc")
    legacy._extractor.cache_clear()


def test_a_message_shows_header_body_and_attachments(tmp_path: Path) -> None:
    inner = EmailMessage()
    inner["Subject"] = "forwarded"
    inner.set_content("inner text\n")
    message = EmailMessage()
    message["Subject"], message["From"] = "Grüße", "a@example.org"
    message.set_content("plain form\n")
    message.add_alternative("<html><body><p>Look:</p><img src='cid:p'><p>Done</p></body></html>", subtype="html")
    message.get_payload()[1].add_related(PICTURE, "image", "png", cid="<p>")
    message.add_attachment(
        zip_of(tmp_path / "z.zip", {"n.txt": "zipped text\n"}).read_bytes(), "application", "zip", filename="../z.zip"
    )
    message.add_attachment(b"\x89PNG no", "image", "png", filename="bad.png")
    message.add_attachment(inner)
    path = tmp_path / "a.eml"
    path.write_bytes(message.as_bytes())
    documents, rejections = read_file(path)
    header = "From: a@example.org\nSubject: Grüße\n\n"
    expected = [header, "Look:\n", "ImageSegment", "Done\n", "zipped text\n", "Subject: forwarded\n\n", "inner text\n"]
    assert shape(documents[0]) == expected
    assert [rejection.path for rejection in rejections] == [f"{path}#bad.png"]


def test_what_is_nothing_else_is_text_if_it_decodes_and_else_described(tmp_path: Path) -> None:
    (tmp_path / "table.dat").write_bytes(b"\x1a\x1b some odd text \x07\n")
    assert shape(one(tmp_path / "table.dat")) == ["\x1a\x1b some odd text \x07\n"]
    (tmp_path / "blob.bin").write_bytes(b"\xfe\x01\x80\x00" * 250)
    assert shape(one(tmp_path / "blob.bin")) == ["blob.bin: application/octet-stream, 1,000 bytes\n"]


# Images


def test_heic_is_read() -> None:
    grey = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (48, 1, 3))
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "HEIF", quality=95)
    pixels = np.asarray(Image.open(io.BytesIO(read_image(buffer.getvalue()).data))).astype(int)
    assert np.abs(pixels - grey).max() <= 12


# Video


def film(path: Path, *, seconds: float, sound: bool = True, rate: int = 10) -> Path:
    """Write a film whose brightness is 20 times the second, with a tone of 200 Hz times the second plus one."""
    with av.open(str(path), "w") as output:
        pictures = output.add_stream("mpeg4", rate=rate)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        track = output.add_stream("pcm_s16le", rate=16_000, layout="mono") if sound else None
        for number in range(round(seconds * rate)):
            pixels = np.full((48, 64, 3), 20 * (number // rate), np.uint8)
            output.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        output.mux(pictures.encode(None))
        if track is not None:
            time = np.arange(round(seconds * 16_000)) / 16_000
            wave = (0.3 * np.sin(2 * np.pi * 200 * (np.floor(time) + 1) * time) * 32767).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
            frame.sample_rate = 16_000
            output.mux([*track.encode(frame), *track.encode(None)])
    return path


def test_a_film_is_read_second_by_second(tmp_path: Path) -> None:
    document = one(film(tmp_path / "a.mkv", seconds=3.5))
    assert document.source == Source.VIDEO
    assert shape(document) == ["ImageSegment", "AudioSegment"] * 4
    images = [part for part in document.segments if isinstance(part, ImageSegment)]
    means = [np.asarray(Image.open(io.BytesIO(image.data))).mean() for image in images]
    np.testing.assert_allclose(means, [0, 20, 40, 60], atol=4)
    sounds = [part for part in document.segments if isinstance(part, AudioSegment)]
    assert [sound.num_samples for sound in sounds] == [16_000, 16_000, 16_000, 8_000]
    peaks = [np.argmax(np.abs(np.fft.rfft(decode_flac(sound.data)[:8_000]))) * 2 for sound in sounds]
    assert peaks == [200, 400, 600, 800]


def test_a_film_may_be_silent_or_cut_off(tmp_path: Path) -> None:
    assert shape(one(film(tmp_path / "a.mp4", seconds=2, sound=False))) == ["ImageSegment"] * 2
    path = film(tmp_path / "b.mkv", seconds=2)
    path.write_bytes(path.read_bytes()[:200])
    assert "damaged" in reason_of(path) or "no frames" in reason_of(path)
