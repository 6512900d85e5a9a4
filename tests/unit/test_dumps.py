"""Dumps of wikis and of posts: a document a record, whatever else is in them counted."""

import bz2
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest

from megatron_mm.ingest import account, kinds, work_items
from megatron_mm.ingest.account import Account
from megatron_mm.ingest.document import Document, TextSegment
from megatron_mm.ingest.layouts import Entry
from megatron_mm.ingest.read import read_file
from megatron_mm.ingest.streams import kind_of_stream
from megatron_mm.ingest.wikitext import plain_text
from megatron_mm.ingest.work_items import DEFAULTS, cut_entry, cut_work, read_work

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <base>https://de.wikipedia.org/wiki/Wikipedia:Hauptseite</base>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""


def page(title: str, text: str, *, ns: int = 0, extra: str = "", model: str = "wikitext") -> str:
    return f"""  <page>
    <title>{escape(title)}</title>
    <ns>{ns}</ns>
    <id>7</id>{extra}
    <revision>
      <id>9</id>
      <timestamp>2024-01-02T03:04:05Z</timestamp>
      <model>{model}</model>
      <text bytes="{len(text)}" xml:space="preserve">{escape(text)}</text>
    </revision>
  </page>
"""


HERON = """{{Kurz}}
'''Reiher''' sind [[Vogel|Vögel]].<ref>A</ref>
[[Datei:A.jpg|mini|Ein Bild]]
[[Kategorie:B]]"""
PAGES = [
    page("Reiher", HERON),
    page("Fischreiher", "#WEITERLEITUNG [[Reiher]]", extra='<redirect title="Reiher" />'),
    page("Diskussion:Reiher", "chat", ns=1),
    page("Silberreiher & Co.", "Weiß. </page> steht nicht im Weg."),
    page("Vorlage", "{{nur}}"),
    page("Daten", "{}", model="json"),
]


def dump(pages: list[str] = PAGES) -> bytes:
    return (HEAD + "".join(pages) + "</mediawiki>\n").encode()


def read(path: Path) -> tuple[list[Document], list[str], Account]:
    """The documents of a file by its pieces, the places that are rejected, and the account."""
    documents: list[Document] = []
    places: list[str] = []
    with account.collected() as counted:
        for item in cut_entry(Entry(path, "files")):
            reading = read_work(item, DEFAULTS)
            documents += reading[0]
            places += [one.path for one in reading[1]]
    assert not account.imbalance(counted, documents=len(documents), rejected=len(places))
    return documents, places, counted


def texts(documents: list[Document]) -> list[str]:
    return ["".join(one.text for one in document.segments if isinstance(one, TextSegment)) for document in documents]


@pytest.mark.parametrize("lines_bytes", [1, 700, 2**20])
@pytest.mark.parametrize("name", ["dewiki-pages-articles.xml.bz2", "dewiki.xml"])
def test_a_page_is_a_document(tmp_path: Path, name: str, lines_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_items, "LINES_BYTES", lines_bytes)
    data = dump()
    # As Wikipedia's own: a member for the head, and one for every few pages.
    members = [bz2.compress(part) for part in (data[:400], data[400:900], data[900:])]
    (tmp_path / name).write_bytes(b"".join(members) if name.endswith("bz2") else data)
    documents, places, counted = read(tmp_path / name)
    assert texts(documents) == [
        "Reiher\n\nReiher sind Vögel.\n",
        "Silberreiher & Co.\n\nWeiß. </page> steht nicht im Weg.\n",
    ]
    assert not places
    assert counted[account.OTHERS] == {
        "redirects": 1,
        "pages outside of the main namespace": 1,
        "pages without text": 1,
        "pages that are not wikitext": 1,
    }
    assert counted[account.NOT_KEPT] == {"templates": 2, "references": 1, "files": 1, "categories": 1}
    origin = documents[1].origin
    assert origin.url == "https://de.wikipedia.org/wiki/Silberreiher_%26_Co."
    assert (origin.date, origin.licence) == ("2024-01-02T03:04:05Z", "")
    assert data[origin.start : origin.stop].decode() == PAGES[3].strip()


def test_a_licence_is_said_only_if_the_dump_says_it(tmp_path: Path) -> None:
    licence = '<rights href="https://creativecommons.org/licenses/by-sa/4.0/" />\n  </siteinfo>'
    (tmp_path / "x.xml").write_bytes(dump(PAGES[:1]).replace(b"</siteinfo>", licence.encode()))
    documents, _, _ = read(tmp_path / "x.xml")
    assert documents[0].origin.licence == "CC BY-SA 4.0"


def test_a_page_that_is_damaged_costs_itself(tmp_path: Path) -> None:
    pages = [page(f"Seite {number}", f"Text {number}.") for number in range(5)]
    pages[2] = pages[2].replace("<title>", "<titel>")
    (tmp_path / "x.xml").write_bytes(dump(pages).replace(b"</mediawiki>\n", b"<page><title>cut off</title"))
    documents, places, _ = read(tmp_path / "x.xml")
    assert texts(documents) == [f"Seite {number}\n\nText {number}.\n" for number in (0, 1, 3, 4)]
    assert places == [f"{tmp_path}/x.xml:3", f"{tmp_path}/x.xml:6"]


def test_pages_are_tried_alone_when_their_piece_fails(tmp_path: Path) -> None:
    (tmp_path / "x.xml.bz2").write_bytes(bz2.compress(dump()))
    (item,) = cut_entry(Entry(tmp_path / "x.xml.bz2", "files"))
    parts = cut_work(item)
    assert len(parts) == len(PAGES) + 1, "and the end"
    assert [one.place.rpartition(":")[2] for one in parts[:3]] == ["1", "2", "3"]
    whole, alone = read_work(item, DEFAULTS), [read_work(part, DEFAULTS) for part in parts]
    assert [document for documents, _ in alone for document in documents] == whole[0]


def test_a_dump_in_an_archive_is_read_too(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("wiki/pages.xml", dump())
        archive.writestr("wiki/more.xml.bz2", bz2.compress(dump(PAGES[:1])))
    documents, rejections = read_file(tmp_path / "x.zip")
    assert not rejections
    assert [text.partition("\n")[0] for text in texts(documents)] == ["Reiher", "Silberreiher & Co.", "Reiher"]


# Wikitext


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("'''a''' ''b'' '''''c'''''", "a b c"),
        ("== A ==\nb\n=== ''C'' ===\nd", "A\n\nb\n\nC\n\nd"),
        ("* a\n* '''b'''\n# c\n: d\n; e", "* a\n* b\n# c\nd\ne"),
        ("{|\n! a !! b\n|-\n| c || [[d|e]]\n|-\n| f || g\nh\n|}", "a\tb\nc\te\nf\tg h"),
        ("{|\n|+ Title\n|-\n| a\n|}", "Title\na"),
        ("[http://a.org b] [http://a.org] http://c.org", "b http://c.org"),
        ("a<br>b<!-- no -->&nbsp;c &ndash; <nowiki>'''d'''</nowiki>", "a\nb c \u2013 '''d'''"),
        ("H<sub>2</sub>O <math>x^2</math>", "H2O x^2"),
        ("{{a|{{b}}}} x {{{1|y}}} <ref name=a/><gallery>\nFile:A.jpg|z\n</gallery>", "x y"),
        ("[[:Category:A]] [[Talk:B|c]] [[category:D]][[image:E.png|thumb|[[f]]]]", ":Category:A c"),
        ("a '''b [[c", "a '''b [[c"),
    ],
)
def test_wikitext_becomes_what_a_reader_sees(wikitext: str, text: str) -> None:
    assert plain_text(wikitext) == text


def test_what_is_lost_of_a_page_is_counted() -> None:
    with account.collected() as counted:
        plain_text("{{a|{{b}}}}<ref>c</ref>[[File:D.png]][http://e.org]<timeline>f</timeline>[[Category:G]]")
    names = ("templates", "references", "files", "addresses", "drawn parts", "categories")
    assert counted == {account.NOT_KEPT: dict.fromkeys(names, 1)}


# Posts


def posts(rows: list[dict[str, str]]) -> bytes:
    lines = ["  <row " + " ".join(f"{key}={quoteattr(value)}" for key, value in row.items()) + " />" for row in rows]
    return "\n".join(['\ufeff<?xml version="1.0" encoding="utf-8"?>', "<posts>", *lines, "</posts>"]).encode()


def test_questions_and_answers_are_documents(tmp_path: Path) -> None:
    asked = '<p>I <b>ask</b>.</p><img src="https://i.stack.imgur.com/a.png">'
    rows = [
        {"Id": "1", "PostTypeId": "1", "CreationDate": "2020-01-01T00:00:00.000", "Title": "Why < and &?"},
        {"Id": "2", "PostTypeId": "2", "ParentId": "1", "Body": "<p>Because.</p>\n<pre><code>a &lt; b\n</code></pre>"},
        {"Id": "3", "PostTypeId": "5", "Body": "<p>about a tag</p>"},
        {"Id": "4", "PostTypeId": "1", "Body": "<p>damaged</p>"},
        {"Id": "5", "PostTypeId": "1", "Body": ""},
    ]
    rows[0] |= {"Body": asked, "ContentLicense": "CC BY-SA 4.0"}
    (tmp_path / "Posts.xml").write_bytes(posts(rows).replace(b'Id="4" ', b'Id="4 '))
    assert kind_of_stream(tmp_path / "Posts.xml") == kinds.POSTS
    documents, places, counted = read(tmp_path / "Posts.xml")
    assert [text.rstrip() for text in texts(documents)] == ["Why < and &?\n\nI ask.", "Because.\n\na < b"]
    assert places == [f"{tmp_path}/Posts.xml:6"]
    assert counted[account.OTHERS] == {"posts that are neither questions nor answers": 1, "posts without text": 1}
    assert counted[account.NOT_KEPT] == {"images that are addresses": 1}
    assert (documents[0].origin.licence, documents[0].origin.date) == ("CC BY-SA 4.0", "2020-01-01T00:00:00.000")
    assert documents[1].origin.licence == ""


def test_other_tables_of_a_dump_of_posts_are_refused(tmp_path: Path) -> None:
    table = '<?xml version="1.0"?>\n<users>\n  <row Id="1" DisplayName="A" />\n</users>'
    (tmp_path / "Users.xml").write_text(table)
    _, places, _ = read(tmp_path / "Users.xml")
    assert places == [f"{tmp_path}/Users.xml"]
    _, (rejection,) = read_file(tmp_path / "Users.xml")
    assert "the table users of a dump of Stack Exchange" in rejection.reason


def test_other_xml_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<notes><page>a</page></notes>\n")
    assert kind_of_stream(tmp_path / "a.xml") is None
    documents, _ = read_file(tmp_path / "a.xml")
    assert texts(documents) == ["<notes><page>a</page></notes>\n"]
