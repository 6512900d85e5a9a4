"""Whether a tokenizer can spell every text, and what it changes of one."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

NEVER_IN_UTF8 = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))
LETTERS = "LMN"
"""Unicode's categories of letters, of the marks on them, and of numbers."""
PROBES = (
    "The Quick BROWN fox, O'Brien",
    "naïve Ünïcödé e\u0301 Ελληνικά Кириллица ŉ ﬁ ½ ²",
    "中文字符。日本語 がぎ 한국어 العَرَبِيَّة עִבְרִית हिन्दी ภาษาไทย",
    "two  spaces\tand a tab",
    " at the start",
    "at the end  ",
    "lines\nand\r\nlines\n\n",
    "def f(x):\n    return {'k': [1, 2]}\n",
    "👩‍👩‍👧‍👦 🇨🇭 ☃ “quotes” — …",
    "\u200b\u2028\u00a0\u3000 \x01\x7f",
)
"""Texts that each of the known ways to lose some of a text changes."""
SPELLED = ("a ▁ b", "<0x41> <s> </s>")
"""Texts that spell what stands for something else in vocabularies: they are rare, and may be changed."""


def byte_characters() -> dict[str, int]:
    """Return the byte that each character of the byte-level alphabet stands for (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def why_not_every_text(state: Mapping[str, Any]) -> str:
    """Return why the tokenizer of a tokenizer.json cannot spell every text, "" if it can."""
    model = state.get("model") or {}
    kind, vocab = model.get("type") or "BPE", model.get("vocab") or {}
    if kind not in ("BPE", "Unigram"):
        return f"it is {kind}, which turns words that are not in its vocabulary into {model.get('unk_token', '[UNK]')}"
    pieces = vocab if isinstance(vocab, dict) else {piece for piece, _ in vocab}
    if model.get("byte_fallback"):
        there = {byte for byte in range(0x100) if f"<0x{byte:02X}>" in pieces}
    elif "ByteLevel" in {*_types(state.get("pre_tokenizer")), *_types(state.get("normalizer"))}:
        there = {byte for character, byte in byte_characters().items() if character in pieces}
    else:
        return (
            f"it is {kind} over characters without byte fallback, so characters that are not in its vocabulary are lost"
        )
    lacking = sorted(set(range(0x100)) - there - NEVER_IN_UTF8)
    shown = ", ".join(f"0x{byte:02X}" for byte in lacking[:4])
    return f"its vocabulary lacks {len(lacking)} of the 256 bytes ({shown} ...)" if lacking else ""


def _types(part: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the types of a step of a tokenizer and of the steps that it is a sequence of."""
    if part is not None:
        yield part["type"]
        for inner in (*part.get("pretokenizers", ()), *part.get("normalizers", ())):
            yield from _types(inner)


def lost_letters(texts: Sequence[str], read_back: Callable[[str], str]) -> tuple[str, str] | None:
    """Return the first of `texts` that is read back with other letters, and as what; None if there is none.

    Letters that Unicode calls compatible (ﬁ and fi) are the same here.
    """
    return next(((text, back) for text in texts if _letters(text) != _letters(back := read_back(text))), None)


def _letters(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text)
    return "".join(character for character in plain if unicodedata.category(character)[0] in LETTERS)


def changed(texts: Sequence[str], read_back: Callable[[str], str]) -> list[tuple[str, str]]:
    """Return those of `texts` that are not read back as they are, and as what."""
    return [(text, back) for text in texts if (back := read_back(text)) != text]
