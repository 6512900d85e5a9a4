"""From documents to what shards store: ids with one run of placeholders for each media item."""

from collections.abc import Sequence

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import Document, TextSegment
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
    defaults, 196 of an image and 49 of a second of audio. Raises DataError for an item that would have none.
    """
    geometries = geometries or default_geometries()
    tokens: list[int] = []
    media: list[MediaItem] = []
    for segment in document.segments:
        if isinstance(segment, TextSegment):
            tokens += tokenizer.encode(segment.text)
            continue
        modality = BY_NAME[segment.modality]
        start, placeholder, end = (tokenizer.special_ids[role] for role in modality.special_tokens)
        for item in modality.cut(segment, max_seconds=max_audio_seconds):
            num_tokens = modality.num_tokens(item, geometries[modality.name])
            if not num_tokens:
                raise DataError(f"an item of {len(item.data)} bytes is too little {modality.name} for one token")
            tokens.append(start)
            media.append(MediaItem(modality.name, item.data, len(tokens), num_tokens))
            tokens += [placeholder] * num_tokens
            tokens.append(end)
    tokens.append(tokenizer.special_ids["end_of_text"])
    return EncodedDocument(np.asarray(tokens), document.source, media)


def encode_texts(texts: Sequence[str], tokenizer: TextTokenizer) -> EncodedBatch:
    """Return one document for each text: its ids and end-of-text, as `encode_document` makes them."""
    ids = tokenizer.encode_batch(texts)
    end = np.asarray([tokenizer.special_ids["end_of_text"]], np.uint32)
    tokens = np.concatenate([np.zeros(0, np.uint32), *(part for own in ids for part in (own, end))])
    lengths = np.fromiter((len(own) + 1 for own in ids), np.int32, len(ids))
    narrow = np.uint16 if not tokens.size or tokens.max() <= np.iinfo(np.uint16).max else np.uint32
    return EncodedBatch(tokens.astype(narrow), lengths, np.zeros(len(ids), np.uint8))
