"""Notebooks, books of Project Gutenberg and mailboxes."""

import base64
import json
import mailbox
from email.message import EmailMessage
from pathlib import Path

import numpy as np
import pytest
from corpora import Corpus, read_corpus, tar, write
from small import png

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, work_items
from megatron_mm.ingest.gutenberg import LICENCE, NOT_FREE
from megatron_mm.ingest.mailbox import message_ranges, messages
from megatron_mm.ingest.work_items import DEFAULTS, WorkItem, cut_work, read_all, read_work
from megatron_mm.ingest.workers import Cut

PICTURE = png(np.random.default_rng(0))
BASE64 = base64.b64encode(PICTURE).decode()


def read(folder: Path, name: str, data: bytes | str) -> Corpus:
    return read_corpus(write(folder, {name: data}))


# Notebooks


def notebook(*cells: dict) -> str:
    return json.dumps({"cells": cells, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4})


def code(source: str, *outputs: dict) -> dict:
    return {"cell_type": "code", "source": source.splitlines(keepends=True), "outputs": list(outputs)}


def shown(**forms: str) -> dict:
    return {"output_type": "display_data", "data": {name.replace("_", "/", 1): text for name, text in forms.items()}}


def test_a_notebook_is_its_text_code_and_what_it_drew_in_order(tmp_path: Path) -> None:
    printed = {"output_type": "stream", "name": "stdout", "text": ["42\n", "10%\r100%\n"]}
    cells = [
        {"cell_type": "markdown", "source": ["# Birds\n", "text"]},
        code("print(42)\nplot()", shown(image_png=BASE64, text_plain="<Figure>"), printed),
        {"cell_type": "raw", "source": "the end"},
    ]
    corpus = read(tmp_path, "a.ipynb", notebook(*cells))
    before, after = "# Birds\ntext\n\n```python\nprint(42)\nplot()\n```\n", "    42\n    100%\n\nthe end\n"
    assert corpus.shapes == [[before, "<image>", after]]


def test_of_several_forms_of_an_output_one_is_kept(tmp_path: Path) -> None:
    table = "<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>"
    error = {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[0;31mE\x1b[0m: v", "line 2"]}
    cells = [
        code("", shown(text_html=table, text_plain="   a  b\n0  1  2")),
        code("", shown(text_html=table)),
        code("", shown(text_latex="$x^2$", text_plain="x**2")),
        code("", error),
        code("", shown(**{"application_vnd.plotly.v1+json": "{}"})),
    ]
    corpus = read(tmp_path, "a.ipynb", notebook(*cells))
    assert corpus.shapes == [["       a  b\n    0  1  2\n\na\tb\n1\t2\n\n$x^2$\n\n    E: v\n    line 2\n"]]
    assert corpus.account[account.NOT_KEPT] == {"outputs of notebooks that are application/vnd.plotly.v1+json": 1}


def test_images_attached_to_text_stand_in_their_places(tmp_path: Path) -> None:
    attached = {"a.png": {"image/png": BASE64}}
    text = f"see ![a](attachment:a.png) and\n![b](data:image/png;base64,{BASE64}) and ![c](attachment:gone.png)"
    corpus = read(tmp_path, "a.ipynb", notebook({"cell_type": "markdown", "source": text, "attachments": attached}))
    assert corpus.shapes == [["see\n", "<image>", " and\n", "<image>", " and ![c](attachment:gone.png)\n"]]


def test_notebooks_of_before_format_4_are_read(tmp_path: Path) -> None:
    output = {"output_type": "pyout", "prompt_number": 1, "text": ["3"], "metadata": {}}
    picture = {"output_type": "display_data", "png": BASE64, "text": ["<Figure>"]}
    cells = [
        {"cell_type": "heading", "level": 2, "source": ["Old"]},
        {"cell_type": "code", "language": "python", "input": ["1 + 2"], "outputs": [output, picture]},
    ]
    said = {"metadata": {"name": "old"}, "nbformat": 3, "worksheets": [{"cells": cells}]}
    assert read(tmp_path, "a.ipynb", json.dumps(said)).shapes == [["## Old\n\n```\n1 + 2\n```\n\n    3\n", "<image>"]]


def test_a_damaged_image_of_a_notebook_is_listed(tmp_path: Path) -> None:
    broken = shown(image_png=base64.b64encode(PICTURE[:60]).decode())
    corpus = read(tmp_path, "a.ipynb", notebook(code("plot()", broken)))
    assert corpus.shapes == [["```python\nplot()\n```\n"]]
    assert corpus.rejections[0].path == f"{tmp_path}/a.ipynb#cell=1"
    assert corpus.rejections[0].is_part


@pytest.mark.parametrize(
    ("data", "reason"),
    [('{"a": 1}', "it has no cells"), ('{"cells": [', "it is not JSON")],
)
def test_what_is_named_a_notebook_and_is_none_is_rejected(tmp_path: Path, data: str, reason: str) -> None:
    assert reason in read(tmp_path, "a.ipynb", data).reasons[0]


def test_an_empty_notebook_is_no_mistake(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "source": [], "outputs": []}
    corpus = read(tmp_path, "Untitled.ipynb", notebook(cell))
    assert not corpus.documents
    assert not corpus.rejections
    assert corpus.account[account.OTHERS] == {"notebooks that hold nothing": 1}


# Project Gutenberg

HEADER = """\ufeffThe Project Gutenberg eBook of Herons

This ebook is for the use of anyone anywhere in the United States and most other parts of the world at no cost and with
almost no restrictions whatsoever.

Title: Herons,
       or the Reeds

Author: A. Bird

Release date: March 1, 2001 [eBook #1]

Language: English

"""
LICENSE = "\n\nThe Project Gutenberg License: updated editions will replace the previous one.\n"
BOOK = "CHAPTER I\n\nThe heron stood.\n\n*** A line of stars.\n\nTHE END"


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("*** START OF THE PROJECT GUTENBERG EBOOK HERONS ***", "*** END OF THE PROJECT GUTENBERG EBOOK HERONS ***"),
        (
            "*** START OF THIS PROJECT GUTENBERG EBOOK HERONS, OR\nTHE REEDS ***",
            "End of the Project Gutenberg EBook of Herons\n\n*** END OF THIS PROJECT GUTENBERG EBOOK HERONS ***",
        ),
        (
            "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
            "End of Project Gutenberg's Herons, by A. Bird",
        ),
    ],
)
def test_of_a_book_the_header_and_the_licence_are_not_kept(tmp_path: Path, start: str, end: str) -> None:
    corpus = read(tmp_path, "pg1.txt", f"{HEADER}{start}\n\n{BOOK}\n\n\n{end}\n{LICENSE}".replace("\n", "\r\n"))
    assert corpus.shapes == [[f"Title: Herons, or the Reeds\nAuthor: A. Bird\n\n{BOOK}\n"]]
    assert corpus.documents[0].origin.licence == LICENCE
    assert corpus.documents[0].origin.date == "March 1, 2001"
    counted = corpus.account[account.NOT_KEPT]["characters of Project Gutenberg's headers and licences"]
    assert counted >= len(f"{HEADER}{start}{end}{LICENSE}") - 1


def test_books_in_the_charset_that_they_declare_are_read(tmp_path: Path) -> None:
    start = "Character set encoding: ISO-8859-1\n\n*** START OF THE PROJECT GUTENBERG EBOOK X ***\n"
    text = f"Title: X\n{start}Der Kranich flög über den Fluß.\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\n"
    corpus = read(tmp_path, "x.txt", text.encode("latin-1"))
    assert corpus.shapes == [["Title: X\n\nDer Kranich flög über den Fluß.\n"]]


def test_a_book_that_is_copyrighted_says_so(tmp_path: Path) -> None:
    text = "This is a COPYRIGHTED Project Gutenberg eBook\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\nwords\n"
    assert read(tmp_path, "x.txt", text).documents[0].origin.licence == NOT_FREE


def test_text_about_project_gutenberg_is_text(tmp_path: Path) -> None:
    text = "Books begin with the words START OF THIS PROJECT GUTENBERG EBOOK, and end so.\n"
    corpus = read(tmp_path, "x.txt", text)
    assert corpus.shapes == [[text]]
    assert corpus.documents[0].origin.licence == ""


def test_a_book_of_nothing_is_rejected(tmp_path: Path) -> None:
    text = f"*** START OF THE PROJECT GUTENBERG EBOOK X ***\n\n*** END OF THE PROJECT GUTENBERG EBOOK X ***\n{LICENSE}"
    assert "nothing stands between" in read(tmp_path, "x.txt", text).reasons[0]


# Mailboxes


def mail(number: int, body: str, picture: bytes | None = None) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["Subject"] = "a@example.com", f"number {number}"
    message.set_content(body)
    if picture is not None:
        message.add_attachment(picture, maintype="image", subtype="png", filename="a.png")
    return message


def save(path: Path, sent: list[EmailMessage]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    box = mailbox.mbox(path)
    for message in sent:
        box.add(message)
    box.close()
    return path


@pytest.mark.parametrize("name", ["list.mbox", "2001-January.txt", "Inbox"])
def test_a_mailbox_gives_a_document_a_message(tmp_path: Path, name: str) -> None:
    save(tmp_path / name, [mail(0, "hello\n\nFrom here on.\n"), mail(1, "see\n", PICTURE), mail(2, "bye\n")])
    corpus = read_corpus(tmp_path)
    first = ["From: a@example.com\nSubject: number 0\n\n", "hello\n\nFrom here on.\n"]
    assert corpus.shapes[0][:2] == first
    assert [shape[2:] for shape in corpus.shapes] == [[], ["<image>"], []]
    assert corpus.account[account.INPUTS] == {"e-mail": 3}
    data = (tmp_path / name).read_bytes()
    starts = [document.origin.start for document in corpus.documents]
    assert [data[start : start + 5] for start in starts] == [b"From "] * 3


def test_messages_are_those_that_pythons_mailbox_finds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["word\n", "\n", "From: x\n", ">From y\n", "From the hill at 10:30 in 1999\n", "\n\n", "no end"]
    sent = [mail(number, "".join(rng.choice(words, rng.integers(1, 9))) + "\n") for number in range(60)]
    path = save(tmp_path / "a.mbox", sent)
    expected = [message.get("Subject") for message in mailbox.mbox(path)]
    found = [message for _, _, message in messages(path)]
    assert [message.partition(b"Subject: ")[2].partition(b"\n")[0].decode() for message in found] == expected
    marks = list(message_ranges(path, num_bytes=2_000))
    assert len(marks) > 2
    in_ranges = [one for own in marks for one in messages(path, start=own[0], stop=own[-1])]
    assert in_ranges == list(messages(path))


def test_a_large_mailbox_is_read_in_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.mbox", [mail(number, f"text {number}\n") for number in range(40)])
    whole = [document for documents, _ in read_all(WorkItem(path), DEFAULTS) for document in documents]
    monkeypatch.setattr(work_items, "ARCHIVE_BYTES", 2_000)
    cut = read_work(WorkItem(path), DEFAULTS)
    assert isinstance(cut, Cut)
    assert len(cut.parts) > 2
    assert [document for part in cut.parts for document in read_work(part, DEFAULTS)[0]] == whole
    alone = [one for part in cut.parts for one in cut_work(part)]
    assert [document for one in alone for document in read_work(one, DEFAULTS)[0]] == whole


def test_a_message_that_cannot_be_read_costs_itself_only(tmp_path: Path) -> None:
    empty = EmailMessage()
    empty["X-Nothing"] = "at all"
    path = save(tmp_path / "a.mbox", [mail(0, "one\n"), empty, mail(1, "two\n")])
    corpus = read_corpus(tmp_path)
    assert [shape[1] for shape in corpus.shapes] == ["one\n", "two\n"]
    assert corpus.reasons == ["the message is empty"]
    data = path.read_bytes()
    begin = data.rindex(b"From ", 0, data.index(b"X-Nothing"))
    assert corpus.rejections[0].path == f"{path}, message at byte {begin}"


def test_a_mailbox_by_name_without_messages_is_rejected(tmp_path: Path) -> None:
    assert "holds no message" in read(tmp_path, "a.mbox", "From the hill we came.\n").reasons[0]


def test_messages_in_a_maildir_are_read_by_their_content(tmp_path: Path) -> None:
    write(tmp_path, {"cur/1234.M5.host:2,S": b"Received: by x\n" + mail(0, "hello\n").as_bytes()})
    assert read_corpus(tmp_path).shapes == [["From: a@example.com\nSubject: number 0\n\n", "hello\n"]]


def test_mailboxes_in_archives_are_read(tmp_path: Path) -> None:
    box = save(tmp_path / "x" / "a.mbox", [mail(0, "one\n"), mail(1, "two\n")]).read_bytes()
    (tmp_path / "x" / "a.mbox").unlink()
    (tmp_path / "a.tar").write_bytes(tar({"lists/a.mbox": box}))
    corpus = read_corpus(tmp_path)
    assert len(corpus.documents) == 2
    assert corpus.documents[1].origin.member == "lists/a.mbox"


def test_text_that_begins_like_a_mailbox_is_text(tmp_path: Path) -> None:
    text = "From Monday 10:30 on in 2001 it rained.\nNothing else.\n"
    assert read(tmp_path, "a.txt", text).shapes == [[text]]
    with pytest.raises(DataError, match="it is no mailbox"):
        list(messages(tmp_path / "a.txt"))
