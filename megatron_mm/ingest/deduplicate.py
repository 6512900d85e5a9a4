"""Finished shards without the documents that they hold twice, exactly or nearly, over any number of tasks' shards.

Near duplicates are found as Broder 1997 ("On the resemblance and containment of documents") and Lee et al. 2022
("Deduplicating training data makes language models better") do: MinHash over runs of five tokens, by rensa, and bands
of the signatures; a pair that shares a band counts if its signatures agree in at least `threshold` of their places.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rensa import RMinHash

from megatron_mm.errors import ConfigError
from megatron_mm.shards import Counts, EncodedBatch, EncodedDocument, ShardWriter, open_shards

SHINGLE_TOKENS = 5
PERMUTATIONS, BANDS = 128, 16
"""16 bands of 8: a pair that is alike in 0.8 of its runs is missed with a chance of 5%, one in 0.9 of 0.01%."""
BLOCK_DOCUMENTS = 4096
"""Documents that are read at a time."""
SEED = 1
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def deduplicate(
    prefixes: Sequence[str],
    *,
    output_prefix: str,
    threshold: float | None = None,
    progress: Callable[[int], None] = lambda documents: None,
) -> Counts:
    """Copy shards but for documents that an earlier one equals, or resembles by `threshold` or more; return the counts.

    The first of equal documents stays, and where it came from is kept. What is left out is listed in
    `output_prefix`.rejected.jsonl with the document that stands for it. Documents with media are compared as a whole,
    media included, and never called similar. Held are a digest of each document and, with a `threshold`, half a
    kilobyte for each text.
    """
    shards = open_shards(prefixes)
    if Path(output_prefix).resolve() in [Path(one).resolve() for one in (*prefixes, *(own.prefix for own in shards))]:
        raise ConfigError(f"--output-prefix {output_prefix} is read too: the copy would replace it. Give another.")
    if threshold is not None and not 0.0 < threshold <= 1.0:
        raise ConfigError(f"--near {threshold} is no part of a text: give a number above 0 and up to 1.")
    finder = _Finder(threshold)
    geometries = next((shard for shard in shards if shard.manifest["media"]), shards[0]).geometries
    with ShardWriter(output_prefix, tokenizer=shards[0].tokenizer, geometries=geometries) as writer:
        for shard in shards:
            for start in range(0, shard.num_documents, BLOCK_DOCUMENTS):
                numbers = range(start, min(start + BLOCK_DOCUMENTS, shard.num_documents))
                documents = [shard.document(number) for number in numbers]
                names = [f"{shard.prefix}:{number}" for number in numbers]
                reasons = list(finder.find(names, documents))
                for name, reason in zip(names, reasons, strict=True):
                    if reason:
                        writer.add_rejection({"path": name, "reason": reason})
                kept = np.flatnonzero([not reason for reason in reasons])
                origins = shard.origins(numbers.start, numbers.stop)
                batch = EncodedBatch.of([documents[index] for index in kept.tolist()])
                writer.add_batch(replace(batch, origins=None if origins is None else origins.take(kept)))
                progress(len(documents))
    return writer.counts


class _Finder:
    """What was seen so far: a digest of each document, and signatures of those that are text."""

    def __init__(self, threshold: float | None) -> None:
        self._threshold = threshold
        self._seen: dict[bytes, str] = {}
        self._signatures: list[np.ndarray] = []
        self._names: list[str] = []
        self._bands: list[dict[bytes, int]] = [{} for _ in range(BANDS)]

    def find(self, names: Sequence[str], documents: Sequence[EncodedDocument]) -> Iterator[str]:
        """Yield why each document is left out; "" if it stays."""
        signatures = None if self._threshold is None else _signatures(documents)
        for index, (name, document) in enumerate(zip(names, documents, strict=True)):
            first = self._seen.setdefault(_digest(document), name)
            if first != name:
                yield f"the same as {first}"
            elif signatures is None or document.media:
                yield ""
            else:
                yield self._resembling(name, signatures[index])

    def _resembling(self, name: str, signature: np.ndarray) -> str:
        keys = [band.tobytes() for band in signature.reshape(BANDS, -1)]
        earlier = sorted({band[key] for band, key in zip(self._bands, keys) if key in band})
        for number in earlier:
            alike = float((self._signatures[number] == signature).mean())
            if alike >= self._threshold:
                return f"resembles {self._names[number]} ({alike:.2f})"
        for band, key in zip(self._bands, keys):
            band.setdefault(key, len(self._names))
        self._signatures.append(signature)
        self._names.append(name)
        return ""


def _digest(document: EncodedDocument) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(document.tokens, np.int64), digest_size=16)
    for item in document.media:
        digest.update(b"%d " % len(item.data))
        digest.update(item.data)
    return digest.digest()


def _signatures(documents: Sequence[EncodedDocument]) -> np.ndarray:
    """Return the MinHash signature of each document's tokens: (num_documents, PERMUTATIONS) uint32."""
    hashes = [_shingle_hashes(document.tokens) for document in documents]
    offsets = np.cumsum([0, *map(len, hashes)])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(hashes), offsets.tolist(), PERMUTATIONS, SEED)
    return np.asarray(matrix.to_rows(), np.uint32)


def _shingle_hashes(tokens: np.ndarray) -> np.ndarray:
    """Return a hash of each run of SHINGLE_TOKENS tokens; of all of them if they are fewer: (n,) uint64."""
    width = min(SHINGLE_TOKENS, len(tokens))
    ids = tokens.astype(np.uint64)
    hashes = np.zeros(len(ids) - width + 1, np.uint64)
    for offset in range(width):
        hashes = (hashes ^ ids[offset : offset + len(hashes)]) * MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes
