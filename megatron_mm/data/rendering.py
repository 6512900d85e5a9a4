"""What the model will see of a document: its tokens as text, its media as they reach the encoders, at their places."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_mm.modalities.decoder import Decoder
from megatron_mm.printable import line
from megatron_mm.shards import EncodedDocument, MediaItem, ShardReader
from megatron_mm.tokenizer import TextTokenizer

MAX_BYTES_OF_CHARACTER = 4
"""How many byte-level tokens may make one character of UTF-8."""
STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h2 { font-size: 1rem; border-bottom: 1px solid #ccc; margin-top: 2.5rem; }
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; }
.a { background: #eef3fb; } .b { background: #f8efe2; }
.special { background: #333; color: #fff; border-radius: 3px; padding: 0 3px; font-size: .8em; }
figure { display: inline-block; margin: .5rem; vertical-align: top; font-size: .8em; color: #555; white-space: normal; }
figure img { display: block; } .bad { color: #b00; }
"""


@dataclass(frozen=True)
class Stretch:
    """A stretch of a document: the text of some tokens, one special token, or a media item."""

    position: int
    """The position of its first token in the document."""
    num_tokens: int
    text: str = ""
    is_special: bool = False
    media: MediaItem | None = None


def cut_document(document: EncodedDocument, start: int, stop: int) -> EncodedDocument:
    """Return tokens [start, stop) of a document with the media that lie in them: a piece of a packed sample."""
    media = [
        MediaItem(item.modality, item.data, item.token_offset - start, item.num_tokens)
        for item in document.media
        if start <= item.token_offset < stop
    ]
    return EncodedDocument(document.tokens[start:stop], document.source, media)


def piece_of(shards: Sequence[ShardReader], piece: np.ndarray) -> EncodedDocument:
    """Return what a PIECE record of a packed sample holds; `shards` are those of its plan, by their numbers."""
    start, length = int(piece["start"]), int(piece["length"])
    document = shards[int(piece["shard"])].document(int(piece["document"]))
    return cut_document(document, start, start + length)


def runs(document: EncodedDocument, tokenizer: TextTokenizer) -> Iterator[Stretch]:
    """Yield the runs of a document in order; tokens that share a character are one run."""
    special = set(tokenizer.special_ids.values())
    at = {item.token_offset: item for item in document.media}
    tokens = document.tokens.tolist()
    position = 0
    while position < len(tokens):
        item = at.get(position)
        if item is not None:
            yield Stretch(position, item.num_tokens, media=item)
            position += item.num_tokens
            continue
        stop = position + 1
        text = tokenizer.decode(tokens[position:stop])
        if tokens[position] not in special:
            while "\ufffd" in text and stop < min(position + MAX_BYTES_OF_CHARACTER, len(tokens)):
                stop += 1
                text = tokenizer.decode(tokens[position:stop])
        yield Stretch(position, stop - position, text, is_special=tokens[position] in special)
        position = stop


def render_text(document: EncodedDocument, tokenizer: TextTokenizer) -> str:
    """Return a document for a terminal: its text, with a line in brackets for each media item."""
    shown = (run.text if run.media is None else f"\n[{_caption(run)}]\n" for run in runs(document, tokenizer))
    return "".join([_summary(document), "\n", *shown, "\n"])


def render_page(
    documents: Sequence[tuple[str, EncodedDocument]], tokenizer: TextTokenizer, *, decoders: Mapping[str, Decoder]
) -> str:
    """Return one HTML page, whole in itself, that shows (title, document) pairs token by token, media included.

    `decoders`, by the name of their modality, show media as the encoder gets them.
    """
    sections = []
    for title, document in documents:
        tokens = "".join(_token(number, run, decoders) for number, run in enumerate(runs(document, tokenizer)))
        heading = f"<h2>{html.escape(line(title))}</h2><p>{html.escape(_summary(document))}</p>"
        sections.append(f'<section>{heading}<div class="tokens">{tokens}</div></section>')
    head = f'<meta charset="utf-8"><title>What the model sees</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(sections)}</body></html>\n"


def _summary(document: EncodedDocument) -> str:
    kinds = [item.modality for item in document.media]
    media = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "no media"
    placeholders = sum(item.num_tokens for item in document.media)
    return (
        f"source {document.source.name.lower()}, {len(document.tokens):,} tokens, of which {placeholders:,} are "
        f"placeholders: {media}"
    )


def _caption(run: Stretch) -> str:
    assert run.media is not None
    stop = run.position + run.num_tokens
    kind = run.media.modality
    return f"{kind}, {len(run.media.data):,} bytes, tokens {run.position:,} to {stop:,} ({run.num_tokens})"


def _token(number: int, run: Stretch, decoders: Mapping[str, Decoder]) -> str:
    if run.media is not None:
        shown = _media(run.media, decoders[run.media.modality])
        return f"<figure>{shown}<figcaption>{_caption(run)}</figcaption></figure>"
    name = "special" if run.is_special else "ab"[number % 2]
    text = html.escape(run.text).replace("\n", "\u21b5\n")
    return f'<span class="{name}" title="{run.position}">{text}</span>'


def _media(item: MediaItem, decoder: Decoder) -> str:
    """Show each unit of an item as the encoder gets it, and let it be played where a browser can."""
    units = decoder.units(item.data)
    if units is None:
        return '<p class="bad">cannot be decoded: the encoder gets a blank</p>'
    pictures = [decoder.show(unit) for unit in units]
    shown = [_picture(pixels) + html.escape(caption) for pixels, caption in pictures]
    if len(shown) > 1 or pictures[0].caption:
        shown = [f"<figure>{one}</figure>" for one in shown]
    player = f'<audio controls src="{_address(item.data, decoder.mime)}"></audio><br>' if decoder.mime else ""
    return player + "".join(shown)


def _picture(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f'<img src="{_address(buffer.getvalue(), "image/png")}">'


def _address(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
