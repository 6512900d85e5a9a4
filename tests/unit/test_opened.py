"""Nothing outside of the folder that was given is opened because a file in it says so, and nothing is waited for."""

import email.message
import io
import json
import os
import socket
import wave
import zipfile
from pathlib import Path

import numpy as np
import pytest
from small import png

from megatron_mm.errors import DataError
from megatron_mm.ingest.audio import decode_mono
from megatron_mm.ingest.document import MediaSegment, Reading, TextSegment
from megatron_mm.ingest.find import find_files
from megatron_mm.ingest.plan import EVERYTHING, WorkPlan
from megatron_mm.ingest.read import read_file
from megatron_mm.ingest.work_items import DEFAULTS, read_all

SECRET = "what nobody was to read"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of inputs, and beside it what does not belong to it: a text, an image, a recording."""
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "secret.png").write_bytes(png(np.random.default_rng(0)))
    (folder / "own.txt").write_text("own text")
    return folder


def read_folder(folder: Path, *, follow_links: bool = False) -> Reading:
    """Return all documents of a folder and all that was left out, as preprocessing would have them."""
    documents, rejections = [], []
    for item in WorkPlan(find_files([str(folder)], follow_links=follow_links), EVERYTHING).work():
        for read, left_out in read_all(item, DEFAULTS):
            documents += read
            rejections += left_out
    return documents, rejections


def texts(reading: Reading) -> list[str]:
    return [part.text for one in reading[0] for part in one.segments if isinstance(part, TextSegment)]


def reasons(reading: Reading) -> dict[str, str]:
    return {Path(one.path).name: one.reason for one in reading[1]}


def test_a_link_out_of_a_folder_is_bad_input_and_named(corpus: Path) -> None:
    (corpus / "out.txt").symlink_to("../secret.txt")
    (corpus / "folder").symlink_to(corpus.parent)
    (corpus / "nothing.txt").symlink_to("gone.txt")
    reading = read_folder(corpus)
    assert texts(reading) == ["own text"]
    found = reasons(reading)
    assert found.keys() == {"out.txt", "folder", "nothing.txt"}
    assert str(corpus.parent / "secret.txt") in found["out.txt"] and "--follow-links" in found["out.txt"]
    assert found["folder"].startswith(f"it is a link to the folder {corpus.parent}")
    assert found["nothing.txt"] == "it is a link to nothing"


def test_links_to_files_are_read_where_that_is_asked_for(corpus: Path) -> None:
    (corpus / "out.txt").symlink_to("../secret.txt")
    reading = read_folder(corpus, follow_links=True)
    assert sorted(texts(reading)) == ["own text", SECRET] and not reading[1]


def test_an_input_that_is_a_link_is_read(corpus: Path) -> None:
    link, file = corpus.parent / "link", corpus.parent / "file.txt"
    link.symlink_to(corpus)
    file.symlink_to(corpus / "own.txt")
    assert texts(read_folder(link)) == texts(read_folder(file)) == ["own text"]


def test_links_within_a_folder_are_read_and_circles_end(corpus: Path) -> None:
    (corpus / "again.txt").symlink_to("own.txt")
    (corpus / "circle").symlink_to(".")
    reading = read_folder(corpus)
    assert texts(reading) == ["own text"] and not reading[1], "a file is read once, whatever its names"


def test_a_caption_that_is_a_link_out_of_the_folder_is_not_read(corpus: Path) -> None:
    (corpus / "photo.png").write_bytes(png(np.random.default_rng(0)))
    (corpus / "photo.txt").symlink_to("../secret.txt")
    reading = read_folder(corpus)
    assert texts(reading) == ["own text"] and reasons(reading).keys() == {"photo.txt"}


def test_a_pipe_and_a_socket_are_bad_input_and_not_waited_for(corpus: Path) -> None:
    os.mkfifo(corpus / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(corpus / "socket.txt"))  # absolute names may be too long for one
        reading = read_folder(corpus)
    assert texts(reading) == ["own text"]
    assert set(reasons(reading).values()) == {"it is a pipe, a socket or a device, not a file"}
    assert reasons(reading).keys() == {"pipe.txt", "socket.txt"}
    assert reasons(read_file(corpus / "pipe.txt")) == {"pipe.txt": "it is not a plain file"}
    with pytest.raises(DataError, match=r"pipe.txt is a pipe, a socket or a device: --input takes files and folders"):
        find_files([str(corpus / "pipe.txt")])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("../secret.png", "outside the folder"),
        ("OUTSIDE", "outside the folder"),  # by its absolute name
        ("link.png", "outside the folder"),
        ("a/../../secret.png", "outside the folder"),
        ("pipe", "not a plain file"),
        (".", "not a plain file"),
        ("a\0b.png", "no name of a file"),
        ("\ud800.png", "no name of a file"),
        ("circle.png", "no name of a file"),
        ([["own.png"]], "it is list, neither"),
        (7, "it is int, neither"),
        ({"path": ["x"]}, "it is list, neither"),
        ({"bytes": "own.png/"}, "it is not there"),
        ("x" * 5000, "too long|not an image"),
        ("file:///etc/hostname", "it is an address"),
        ("https://example.org/x.png", "it is an address"),
    ],
)
def test_a_record_opens_plain_files_of_its_folder_alone(corpus: Path, image: object, reason: str) -> None:
    os.mkfifo(corpus / "pipe")
    (corpus / "a").mkdir()
    (corpus / "link.png").symlink_to("../secret.png")
    (corpus / "circle.png").symlink_to("circle.png")
    image = str(corpus.parent / "secret.png") if image == "OUTSIDE" else image
    lines = [{"text": "before"}, {"image": image}, {"text": "behind"}]
    (corpus / "l.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    documents, rejections = read_file(corpus / "l.jsonl")
    assert texts((documents, [])) == ["before", "behind"]
    assert [one.path for one in rejections] == [f"{corpus}/l.jsonl:2"]
    assert any(part in rejections[0].reason for part in reason.split("|")), rejections[0].reason


def test_a_page_opens_plain_files_of_its_folder_alone(corpus: Path) -> None:
    os.mkfifo(corpus / "pipe")
    (corpus / "link.png").symlink_to("../secret.png")
    (corpus / "own.png").write_bytes((corpus.parent / "secret.png").read_bytes())
    outside = ("../secret.png", f"{corpus.parent}/secret.png", f"file://{corpus.parent}/secret.png", "link.png")
    outside += ("//host/secret.png", "%2e%2e/secret.png", "pipe", "%00", "\x7f:[", "https://[::1/x.png")
    tags = "".join(f'<img src="{address}">' for address in (*outside, "own.png"))
    (corpus / "page.html").write_text(f"<html><body><p>text</p>{tags}</body></html>")
    documents, rejections = read_file(corpus / "page.html")
    assert len([part for part in documents[0].segments if isinstance(part, MediaSegment)]) == 1
    assert {"page.html#pipe", "page.html#%00"} <= reasons(([], rejections)).keys()


@pytest.mark.parametrize("kind", ["docx", "odt", "html"])
def test_an_entity_of_xml_is_not_looked_up(corpus: Path, kind: str) -> None:
    entity = f'<!DOCTYPE x [<!ENTITY secret SYSTEM "file://{corpus.parent}/secret.txt">]>'
    parts = {
        "docx": ("word/document.xml", '<w:d xmlns:w="w"><w:p><w:r><w:t>seen &secret;</w:t></w:r></w:p></w:d>'),
        "odt": ("content.xml", '<o:d xmlns:o="o"><o:p>seen &secret;</o:p></o:d>'),
    }
    path = corpus / f"x.{kind}"
    if kind == "html":
        path.write_text(f"{entity}<html><body><p>seen &secret;</p></body></html>")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(parts[kind][0], f'<?xml version="1.0"?>{entity}{parts[kind][1]}')
    shown = texts(read_file(path))
    assert shown and "seen" in shown[0] and SECRET not in shown[0]


def test_an_attachment_is_unpacked_in_its_own_folder(corpus: Path) -> None:
    message = email.message.EmailMessage()
    message["Subject"] = "x"
    message.set_content("the body\n")
    for name in ("../../../evil.txt", "/tmp/evil.txt", "..", "b.txt"):
        message.add_attachment(b"attached text", maintype="application", subtype="x", filename=name)
    (corpus / "m.eml").write_bytes(message.as_bytes().replace(b'"b.txt"', b'"\x1b[2J\x7f.txt"'))
    reading = read_file(corpus / "m.eml")
    assert "the body\n" in texts(reading)
    assert not list(corpus.parent.rglob("*evil*")) and not Path("/tmp/evil.txt").exists()


def test_a_playlist_that_calls_itself_audio_opens_nothing(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(16_000)
        sound.writeframes(bytes(32_000))
    (corpus / "secret.wav").write_bytes(buffer.getvalue())
    monkeypatch.chdir(corpus)
    assert len(decode_mono(io.BytesIO(buffer.getvalue()))) == 16_000
    with pytest.raises(DataError):
        decode_mono(io.BytesIO(b"ffconcat version 1.0\nfile secret.wav\n"))
