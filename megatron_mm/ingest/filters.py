"""Which documents a corpus does without, though they can be read: by their language and their length."""

import functools
from collections.abc import Sequence

import numpy as np

from megatron_mm.errors import ConfigError
from megatron_mm.ingest.document import Document, TextSegment
from megatron_mm.ingest.work_items import Options
from megatron_mm.shards import EncodedBatch

LANGUAGE_CHARACTERS = 1_000
"""Characters from the start of a document that its language is told by."""
LANGUAGE_LETTERS = 20
"""The fewest letters of a text whose language can be told."""


def wrong_language(text: str, options: Options) -> str:
    """Return why a text is left out for its language; "" if it stays, as what is too short to tell does."""
    start = text[:LANGUAGE_CHARACTERS]
    if not options.languages or sum(map(str.isalpha, start)) < LANGUAGE_LETTERS:
        return ""
    language, _ = _classifier()(start)
    return "" if language in options.languages else f"filter language: it is {language}"


def wrong_length(num_tokens: int, options: Options) -> str:
    """Return why a document of so many tokens, its end included, is left out; "" if it stays."""
    if num_tokens < options.min_tokens:
        return f"filter length: {num_tokens} tokens are fewer than {options.min_tokens}"
    if options.max_tokens is not None and num_tokens > options.max_tokens:
        return f"filter length: {num_tokens} tokens are more than {options.max_tokens}"
    return ""


def document_text(document: Document) -> str:
    """Return the text of a document."""
    return "\n".join(segment.text for segment in document.segments if isinstance(segment, TextSegment))


def check_languages(languages: Sequence[str]) -> None:
    """Raise ConfigError unless the classifier knows all of `languages`."""
    known = {language for language, _ in _ranking()("")} if languages else set()
    if unknown := [language for language in languages if language not in known]:
        raise ConfigError(f"--languages {' '.join(unknown)}: not known; use some of {' '.join(sorted(known))}.")


def select(batch: EncodedBatch, keep: np.ndarray) -> EncodedBatch:
    """Return the text documents of a batch where `keep`, (num_documents,) bool, is true."""
    assert not batch.media
    tokens = batch.tokens[np.repeat(keep, batch.lengths)]
    origins = None if batch.origins is None else batch.origins.take(np.flatnonzero(keep))
    return EncodedBatch(tokens, batch.lengths[keep], batch.sources[keep], origins=origins)


@functools.cache
def _classifier():
    # It takes a quarter of a second to load, which runs without this filter are spared.
    import py3langid

    return py3langid.classify


@functools.cache
def _ranking():
    import py3langid

    return py3langid.rank
