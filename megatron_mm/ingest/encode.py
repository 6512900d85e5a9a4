"""From documents to what shards store: ids with one run of placeholders for each media item."""

import io
from collections.abc import Sequence

import numpy as np

from megatron_mm.ingest.document import AudioSegment, Document, ImageSegment, Segment, TextSegment
from megatron_mm.modality import IMAGE_TOKENS, SAMPLE_RATE, Media, audio_chunk_frames, audio_tokens
from megatron_mm.shards import EncodedBatch, EncodedDocument, MediaItem
from megatron_mm.tokenizer import TextTokenizer

MAX_AUDIO_SECONDS = 30
"""Longer recordings become several items, cut between one-second chunks, so that packing need not cut a run."""


def encode_document(
    document: Document, tokenizer: TextTokenizer, *, max_audio_seconds: int = MAX_AUDIO_SECONDS
) -> EncodedDocument:
    """Return `document` as ids, ending in end-of-text, with its media items.

    An image is image_start, 196 placeholders, image_end; a recording audio_start, 49 placeholders a second, audio_end.
    """
    tokens: list[int] = []
    media: list[MediaItem] = []
    for segment in document.segments:
        for part in _parts(segment, max_audio_seconds):
            if isinstance(part, TextSegment):
                tokens += tokenizer.encode(part.text)
                continue
            kind, num_tokens = _run(part)
            name = kind.name.lower()
            tokens.append(tokenizer.special_ids[f"{name}_start"])
            media.append(MediaItem(kind, part.data, len(tokens), num_tokens))
            tokens += [tokenizer.special_ids[name]] * num_tokens
            tokens.append(tokenizer.special_ids[f"{name}_end"])
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


def _run(segment: ImageSegment | AudioSegment) -> tuple[Media, int]:
    """Return the kind of a media segment and the placeholders that it fills."""
    if isinstance(segment, ImageSegment):
        return Media.IMAGE, IMAGE_TOKENS
    return Media.AUDIO, audio_tokens(segment.num_samples)


def _parts(segment: Segment, max_audio_seconds: int) -> list[Segment]:
    """Cut a long recording into items of at most `max_audio_seconds`; anything else is one part."""
    limit = max_audio_seconds * SAMPLE_RATE
    if not isinstance(segment, AudioSegment) or segment.num_samples <= limit:
        return [segment]
    # FFmpeg's libraries take a quarter of a second to load, which runs over text are spared.
    import av

    from megatron_mm.ingest.audio import encode_flac

    with av.open(io.BytesIO(segment.data)) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    clips = [samples[start : start + limit].astype(np.float32) / 32768.0 for start in range(0, len(samples), limit)]
    return [AudioSegment(encode_flac(clip), len(clip)) for clip in clips if audio_chunk_frames(len(clip))]
