"""From documents to what shards store: ids with one run of placeholders for each media item."""

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import Document, SpecialToken, TextSegment
from megatron_mm.modalities import BY_NAME, Geometries, default_geometries
from megatron_mm.shards import EncodedBatch, EncodedDocument, MediaItem
from megatron_mm.tokenizer import TextTokenizer

MAX_AUDIO_SECONDS = 30
"""Longer recordings become several items, cut between one-second chunks, so that packing need not cut a run."""


def encode_document(
    document: Document,
    tokenizer: TextTokenizer,
    *,
    geometries: Geometries | None = None,
    max_audio_seconds: int = MAX_AUDIO_SECONDS,
) -> EncodedDocument:
    """Return `document` as ids, ending in end-of-text, with its media items.

    An item is its modality's start token, as many placeholders as `geometries` make of it, and its end token: by their
    defaults, 196 of an image and 49 of a second of audio. Raises DataError for an item that would have none, and for
    text that is not Unicode.
    """
    (made,) = encode_together([document], tokenizer, geometries=geometries, max_audio_seconds=max_audio_seconds)
    if isinstance(made, DataError):
        raise made
    return made


def encode_together(
    documents: Sequence[Document],
    tokenizer: TextTokenizer,
    *,
    geometries: Geometries | None = None,
    max_audio_seconds: int = MAX_AUDIO_SECONDS,
) -> list[EncodedDocument | DataError]:
    """Return each document as `encode_document` does, or what it would raise; their texts are encoded as one batch."""
    good = [all(map(is_unicode, _texts(document))) for document in documents]
    texts = [text for document, is_good in zip(documents, good, strict=True) if is_good for text in _texts(document)]
    ids = iter(tokenizer.encode_batch(texts))
    made: list[EncodedDocument | DataError] = []
    for document, is_good in zip(documents, good, strict=True):
        if not is_good:
            made.append(DataError("the text holds half of a surrogate pair, which no Unicode text does"))
            continue
        own = [next(ids) for _ in _texts(document)]  # before anything of the document can raise
        try:
            made.append(_assemble(document, own, tokenizer, geometries or default_geometries(), max_audio_seconds))
        except DataError as refusal:
            made.append(refusal)
    return made


def _texts(document: Document) -> Iterator[str]:
    return (segment.text for segment in document.segments if isinstance(segment, TextSegment))


def is_unicode(text: str) -> bool:
    """Tell whether a text can be encoded: one from JSON may hold half of a surrogate pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _assemble(
    document: Document,
    texts: Sequence[np.ndarray],
    tokenizer: TextTokenizer,
    geometries: Geometries,
    max_audio_seconds: int,
) -> EncodedDocument:
    """Return a document whose texts have the ids `texts`."""
    parts: list[Sequence[int] | np.ndarray] = []
    media: list[MediaItem] = []
    following, num_tokens = iter(texts), 0
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            parts.append(next(following))
            num_tokens += len(parts[-1])
            continue
        if isinstance(segment, SpecialToken):
            parts.append([tokenizer.special_id(segment.spelling)])
            num_tokens += 1
            continue
        modality = BY_NAME[segment.modality]
        start, placeholder, end = (tokenizer.special_ids[role] for role in modality.special_tokens)
        for item in modality.cut(segment, max_seconds=max_audio_seconds):
            length = modality.num_tokens(item, geometries[modality.name])
            if not length:
                raise DataError(f"an item of {len(item.data)} bytes is too little {modality.name} for one token")
            media.append(MediaItem(modality.name, item.data, num_tokens + 1, length))
            parts.append([start, *[placeholder] * length, end])
            num_tokens += length + 2
    parts.append([tokenizer.special_ids["end_of_text"]])
    return EncodedDocument(np.concatenate(parts, dtype=np.uint32, casting="unsafe"), document.source, media)


def encode_texts(texts: Sequence[str], tokenizer: TextTokenizer) -> EncodedBatch:
    """Return one document for each text: its ids and end-of-text, as `encode_document` makes them."""
    ids = tokenizer.encode_batch(texts)
    end = np.asarray([tokenizer.special_ids["end_of_text"]], np.uint32)
    tokens = np.concatenate([np.zeros(0, np.uint32), *(part for own in ids for part in (own, end))])
    lengths = np.fromiter((len(own) + 1 for own in ids), np.int32, len(ids))
    narrow = np.uint16 if not tokens.size or tokens.max() <= np.iinfo(np.uint16).max else np.uint32
    return EncodedBatch(tokens.astype(narrow), lengths, np.zeros(len(ids), np.uint8))
