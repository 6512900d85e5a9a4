"""Bytes to text: pages in the charset that they declare, and text that declares none."""

import codecs
import re

import chardet
import webencodings

from megatron_mm.errors import DataError
from megatron_mm.ingest import account

DECLARED = "charsets declared"
MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16le"), (codecs.BOM_UTF16_BE, "utf-16be"))
META_BYTES = 65_536
"""How far into a page its <meta> is looked for; browsers also follow one that stands behind the first 1,024 bytes."""
UNSEEN = ((b"<!--", b"-->"), (b"<script", b"</script"))
"""What a <meta> does not count in."""
META = re.compile(rb"<meta\b[^>]*?\bcharset\s*=\s*[\"']?\s*([^\s\"'/>;]+)")
XML = re.compile(rb"<\?xml\b[^>]*?\bencoding\s*=\s*[\"']\s*([\w.:-]+)")
CODECS = {"gbk": "gb18030", "iso-2022-kr": "iso2022_kr", "hz-gb-2312": "hz"}
"""Python's codecs for charsets that webencodings has none or a narrower one for: the Encoding standard decodes GBK as
GB18030, and has browsers refuse two of seven bits, which hide scripts."""
NO_CHARSETS = {"replacement", "x-user-defined"}
"""What the standard names and what says nothing of a text."""
DETECTED = frozenset(webencodings.LABELS.values()) - {"utf-8", "utf-16le", "utf-16be", *NO_CHARSETS}
"""What chardet chooses from. Of 742 texts of 60 to 2,000 bytes in 28 languages and 22 charsets (translations of Django)
it was right about 731, chardetng about 721, resiliparse 664, cchardet 652, charset-normalizer three in four."""
LOOKED_AT_WHOLE = 1_024
"""Longer data is looked at only where it is not ASCII. Of 84 texts of 2,000 bytes in 36 kB of markup and scripts, all
were told by what stands between tags and line ends and is not ASCII, and 23 by the whole."""
PIECES = re.compile(rb"[\n<>]")
"""What no charset has within a character."""
DETECT_BYTES = 2**14
MIN_CONFIDENCE = 0.005
"""Below, chardet sees no text: it says 0.002 of three bytes 0xFF, 0.04 of four words with two typographic quotes."""
ESCAPES = (b"\x1b$", b"\x1b(")
"""What Japanese in seven bits switches its alphabets with."""
MAX_BAD_FRACTION = 0.1
"""Bytes of a text that may be neither UTF-8 nor in a charset that is known."""
REPLACEMENT = "\ufffd"


class NoText(DataError):
    """A file of text holds none, but white space."""


def decode_page(data: bytes, declared: str | None = None) -> str:
    """Return the text of a page as browsers decode it; `declared` is the charset of its HTTP header.

    A byte-order mark counts first, then the header, then <meta> or the XML declaration; a page that declares nothing is
    UTF-8 if it is valid, or what chardet takes it for. What cannot be decoded is replaced, zero bytes are left out, and
    both are counted. Raises DataError for what declares nothing and is no text.
    """
    mark, label = _marked(data)
    label = label or _known(declared) or _known(_meta(data))
    if label is None:
        text = _decode_undeclared(_without_zeros(data, b"\0", b""))
    else:
        account.count(DECLARED, label)
        text = _decode(data[mark:], label)
    return _without_zeros(text, "\0", "")


def decode_text(data: bytes, declared: str | None = None) -> str:
    """Return the text of a plain file, with line ends as "\\n"; `declared` is the charset of its HTTP header.

    Without one it is UTF-8, also with a few bytes that are not, UTF-16 with a byte-order mark, or what chardet takes it
    for. Raises DataError if it is no text or holds none.
    """
    mark, label = _marked(data)
    if label is None and (label := _known(declared)) is not None:
        account.count(DECLARED, label)
        return _checked(_without_zeros(_decode(data, label), "\0", ""))
    return _checked(_decode_undeclared(data) if label is None else _decode(data[mark:], label))


def decode_utf8(data: bytes) -> str:
    """Return the text of `data`: UTF-8, or UTF-16 with a byte-order mark. Raises DataError if it is neither."""
    mark, label = _marked(data)
    try:
        text = data[mark:].decode(label or "utf-8")
    except UnicodeDecodeError as error:
        where = mark + error.start
        raise DataError(f"it is not {(label or 'utf-8').upper()} text: byte {where} cannot be decoded") from error
    return _checked(text)


def _checked(text: str) -> str:
    if not text.strip():
        raise NoText("it holds no text")
    if "\0" in text:
        raise DataError("it holds zero bytes, which text does not have")
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _without_zeros[Chars: (str, bytes)](data: Chars, zero: Chars, nothing: Chars) -> Chars:
    if zero not in data:
        return data
    account.count(account.NOT_KEPT, "zero bytes", data.count(zero))
    return data.replace(zero, nothing)


def _marked(data: bytes) -> tuple[int, str | None]:
    """Return the length of a byte-order mark and the charset that it stands for; (0, None) if there is none."""
    return next(((len(mark), label) for mark, label in MARKS if data.startswith(mark)), (0, None))


def _known(label: str | None) -> str | None:
    """Return the name that a charset has in the Encoding standard; None if it has none, or no meaning."""
    if not label or not label.isascii():
        return None
    label = label.strip(" \t\r\n\f\"';").lower()
    encoding = webencodings.lookup(label)
    name = label if encoding is None or label in CODECS else encoding.name
    return name if name in CODECS or (encoding is not None and name not in NO_CHARSETS) else None


def _meta(data: bytes) -> str | None:
    """Return the charset that a page itself declares."""
    head = data[:META_BYTES].lower()
    if found := XML.match(head.lstrip()):
        return found[1].decode("ascii")
    found = next((one for one in META.finditer(head) if not _is_unseen(head, one.start())), None)
    if found is None:
        return None
    label = _known(found[1].decode("ascii", "replace"))
    # A page whose <meta> can be read is not in UTF-16 (HTML standard, "prescan a byte stream").
    return "utf-8" if label and label.startswith("utf-16") else label


def _is_unseen(head: bytes, place: int) -> bool:
    return any(head.rfind(start, 0, place) > head.rfind(stop, 0, place) for start, stop in UNSEEN)


def _decode_undeclared(data: bytes) -> str:
    if not (data.isascii() and any(escape in data for escape in ESCAPES)):
        try:
            return data.decode()
        except UnicodeDecodeError:
            pass
    text = data.decode(errors="replace")
    bad = _num_replaced(text, data)
    beyond_ascii = len(text) - len(text.encode("ascii", "ignore"))
    is_utf8 = beyond_ascii >= 2 * bad > 0  # at least as many characters are UTF-8 as are not
    found = None if is_utf8 else chardet.detect(_telling(data), include_encodings=DETECTED)
    label = _known(found["encoding"]) if found and found["confidence"] >= MIN_CONFIDENCE else None
    if label is not None:
        account.count(account.GUESSED, f"charset {label}")
        return _decode(data, label)
    if not is_utf8 and bad > MAX_BAD_FRACTION * len(data):
        raise DataError("it is no text: it is neither UTF-8 nor in another charset that is known")
    account.count(account.REPLACED, "utf-8", bad)
    return text


def _telling(data: bytes) -> bytes:
    """Return what the charset of `data` is told by."""
    if len(data) > LOOKED_AT_WHOLE and not data.isascii():
        data = b"\n".join(piece for piece in PIECES.split(data) if not piece.isascii())
    return data[:DETECT_BYTES]


def _decode(data: bytes, label: str) -> str:
    """Decode `data`, and count what cannot be."""
    codec = CODECS.get(label) or webencodings.lookup(label).codec_info.name
    try:
        return data.decode(codec)
    except UnicodeDecodeError:
        text = data.decode(codec, "replace")
        account.count(account.REPLACED, label, _num_replaced(text, data))
        return text


def _num_replaced(text: str, data: bytes) -> int:
    """Return how many characters of a text stand for bytes that are none, and not for themselves in UTF-8."""
    return text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
