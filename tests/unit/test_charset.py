"""Charsets: what pages declare, as browsers take it; what declares none; and nothing lost in silence."""

import codecs
from pathlib import Path

import pytest
import webencodings

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.charset import CODECS, DECLARED, NO_CHARSETS, decode_page, decode_text
from megatron_mm.ingest.document import TextSegment
from megatron_mm.ingest.read import read_file

RUSSIAN = "Серая цапля стоит в воде неподвижно целый час и ждёт рыбу или лягушку."
GERMAN = "Der Graureiher steht eine Stunde lang still im Wasser und wartet auf größere Fische, natürlich auch Frösche."
JAPANESE = "アオサギは浅い水の中に一時間じっと立って、魚や蛙を待っています。日本語の文章です。"
CHINESE = "苍鹭在浅水中一动不动地站了一个小时，等待鱼和青蛙。这是中文的文章。"
TURKISH = "Balıkçıl sığ suda bir saat boyunca kımıldamadan durur, balık ve kurbağa bekler, şöyle böyle güzel."


def page(text: str, charset: str, declaration: str = "") -> bytes:
    return f"<html><head>{declaration}<title>t</title></head><body><p>{text}</p></body></html>".encode(charset)


def read(data: bytes, declared: str | None = None) -> tuple[str, account.Account]:
    with account.collected() as counted:
        text = decode_page(data, declared)
    return text, counted


@pytest.mark.parametrize(
    ("label", "codec", "text"),
    [
        ("iso-8859-1", "cp1252", "“mööse” € café"),
        ("us-ascii", "cp1252", "naïve"),
        ("ISO-8859-9", "cp1254", TURKISH),
        ("gb2312", "gb18030", "朱镕基 𠮷"),
        ("gbk", "gb18030", CHINESE),
        ("iso-2022-jp", "iso2022_jp", JAPANESE),
        ("x-sjis", "cp932", "①" + JAPANESE),
        ("ks_c_5601-1987", "cp949", "똠방각하 왜가리"),
        ("big5", "big5hkscs", "蒼鷺站在淺水中"),
        ("koi8-u", "koi8-u", "Сіра чапля їсть"),
        ("iso-2022-kr", "iso2022_kr", "왜가리"),
        ("windows-874", "cp874", "นกกระสา"),
    ],
)
def test_a_declared_charset_is_what_browsers_take_it_for(label: str, codec: str, text: str) -> None:
    for declaration in (
        f"<meta charset={label}>",
        f"<META HTTP-EQUIV='Content-Type' CONTENT='text/html; charset={label}'>",
        f"<!-- <meta charset=utf-8> --><script>'<meta charset=koi8-r>'</script><meta charset='{label}'>",
    ):
        assert text in read(page(text, codec, declaration))[0]
    assert text in read(page(text, codec), label)[0]
    assert text in read(f'<?xml version="1.0" encoding="{label}"?>'.encode() + page(text, codec))[0]


def test_a_mark_counts_before_the_header_and_that_before_the_page() -> None:
    meta = "<meta charset=koi8-r>"
    assert RUSSIAN in read(page(RUSSIAN, "cp1251", meta), "windows-1251")[0]
    assert RUSSIAN in read(codecs.BOM_UTF8 + page(RUSSIAN, "utf-8", meta), "windows-1251")[0]
    assert RUSSIAN in read(codecs.BOM_UTF16_BE + page(RUSSIAN, "utf-16-be", meta), "windows-1251")[0]
    text, counted = read(page(RUSSIAN, "koi8-r", meta), "no-such-charset")
    assert RUSSIAN in text
    assert counted == {DECLARED: {"koi8-r": 1}}
    assert RUSSIAN in read(page(RUSSIAN, "utf-8", "<meta charset=utf-16>"))[0], "no page in UTF-16 shows a <meta>"


def test_every_label_of_the_standard_has_a_codec() -> None:
    for label, name in webencodings.LABELS.items():
        if name in NO_CHARSETS and label not in CODECS:
            assert read(b"<p>text", label)[1] == {}
        else:
            assert read("<p>text".encode("utf-16-le" if "utf-16" in name else "ascii"), label)[1][DECLARED]


@pytest.mark.parametrize(
    ("text", "codec", "label"),
    [
        (RUSSIAN, "cp1251", "windows-1251"),
        (RUSSIAN, "koi8-r", "koi8-r"),
        (GERMAN, "cp1252", "windows-1252"),
        (JAPANESE, "cp932", "shift_jis"),
        (JAPANESE, "euc_jp", "euc-jp"),
        (JAPANESE, "iso2022_jp", "iso-2022-jp"),
        (CHINESE, "gb18030", "gb18030"),
        (TURKISH, "cp1254", "windows-1254"),
    ],
)
def test_what_declares_nothing_is_guessed_and_counted(text: str, codec: str, label: str) -> None:
    decoded, counted = read(page(text, codec))
    assert text in decoded
    assert counted == {account.GUESSED: {f"charset {label}": 1}}
    with account.collected() as counted:
        assert decode_text(text.encode(codec)) == text
    assert counted == {account.GUESSED: {f"charset {label}": 1}}
    assert read(page(text, "utf-8")) == (page(text, "utf-8").decode(), {})


@pytest.mark.parametrize(("text", "codec"), [(RUSSIAN, "koi8-r"), (GERMAN, "cp1252"), (CHINESE, "gb18030")])
def test_markup_does_not_hide_a_charset(text: str, codec: str) -> None:
    markup = "<script>function foo(){return 'bar'}</script>\n<div class='a b'><a href='/x/y'>Home</a></div>" * 300
    assert text in read(markup.encode() + page(text, codec) + markup.encode())[0]


def test_a_bad_byte_or_a_zero_costs_no_page() -> None:
    text, counted = read(b"<meta charset=utf-8><p>good \xef\xbf\xbd one</p><p>bad \xe9 byte\0s\0</p>")
    assert text == "<meta charset=utf-8><p>good \ufffd one</p><p>bad \ufffd bytes</p>"
    replaced = {account.REPLACED: {"utf-8": 1}, account.NOT_KEPT: {"zero bytes": 2}}
    assert counted == {DECLARED: {"utf-8": 1}, **replaced}
    text, counted = read("<p>größere \0Fi\0sche".encode() + b"\xff")
    assert (text, counted) == ("<p>größere Fische\ufffd", replaced)
    assert "größere" in read("<p>viel größere Fi\0sche sind natürlich schöner".encode("cp1252"))[0]


def test_text_with_a_few_bad_bytes_keeps_the_rest() -> None:
    with account.collected() as counted:
        assert decode_text("café ok, then one bad ".encode() + b"\xff byte") == "café ok, then one bad \ufffd byte"
    assert counted == {account.REPLACED: {"utf-8": 1}}
    assert decode_text(b"old mac\rline two\r\n\rline four\n") == "old mac\nline two\n\nline four\n"
    assert decode_text(codecs.BOM_UTF16_LE + "naïve\r\n".encode("utf-16-le")) == "naïve\n"


@pytest.mark.parametrize("data", [b"\xff\xff\xff", bytes(range(1, 256)) * 4, b"GIF89a\0\0\xf0\x01", b"a\0b", b" \n"])
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="no text|zero bytes"):
        decode_text(data)


def test_a_page_with_zero_bytes_is_a_page(tmp_path: Path) -> None:
    for name in ("page.html", "page"):
        (tmp_path / name).write_bytes(b"<!DOCTYPE html><html><body><p>has a \0 zero \0 byte</p></body></html>")
        assert read_file(tmp_path / name)[0][0].segments == [TextSegment("has a zero byte\n")]
