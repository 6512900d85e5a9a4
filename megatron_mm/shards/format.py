"""What shards are made of: the layout of their files, and documents on their way into them."""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
from pydantic import ConfigDict, Field

from megatron_mm.settings import NonNegativeInt
from megatron_mm.shards.origins import Origins
from megatron_mm.source import Source

TOKEN_MAGIC, TOKEN_VERSION = b"MMIDIDX\x00\x00", 1
TOKEN_DTYPES = {
    **{1: np.dtype("<u1"), 2: np.dtype("<i1"), 3: np.dtype("<i2")},
    **{4: np.dtype("<i4"), 5: np.dtype("<i8"), 8: np.dtype("<u2")},
}
"""megatron-core's codes of the types that token ids are stored in: 4 or 8 here, any in shards that were adopted."""
TOKEN_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the type, sequences, document boundaries: then lengths, pointers and boundaries."""
MEDIA_MAGIC, MEDIA_VERSION = b"MMMEDIA\x00", 1
MEDIA_HEADER = struct.Struct("<8sQQQ")
DOCUMENT = np.dtype([("first_item", "<u8"), ("source", "u1"), ("reserved", "u1", 7)])
ITEM = np.dtype(
    [
        ("offset", "<u8"),  # bytes into P.media.bin
        ("num_bytes", "<u4"),
        ("crc32", "<u4"),
        ("kind", "<u2"),  # modalities.Modality.kind
        ("reserved", "<u2"),
        ("token_offset", "<u4"),  # of the first placeholder, in its document
        ("num_tokens", "<u4"),  # placeholders
        ("reserved_2", "<u4"),
    ]
)
TOKENIZER_SUFFIX = ".tokenizer"
"""The suffix of the tokenizer.json that the ids come from; not .json, which stands for manifests in patterns."""
SUFFIXES = (".bin", ".idx", ".media.bin", ".media.idx")
"""The files of every set of shards."""
BLOCK_BYTES = 16 * 2**20
"""Bytes that one checksum of the manifest covers."""
PAGE_BYTES = 4096
"""Bytes that one checksum of P.crc covers: what a disk is read by, so that checking a read makes it no larger."""
PAGES_SUFFIX = ".crc"
PAGED = (".bin", ".idx", ".media.idx")
"""The files that P.crc covers, in its order; items of P.media.bin have their own checksums in P.media.idx."""
MANIFEST_VERSION = 2
"""1 had neither P.crc nor a hash of the manifest itself."""


class ManifestTokenizer(TypedDict):
    """What a manifest says of the tokenizer."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    sha256: str
    vocab_size: NonNegativeInt
    special_ids: dict[str, NonNegativeInt]


class ManifestFile(TypedDict):
    """What a manifest says of a file: its size, and the checksum of each BLOCK_BYTES of it."""

    bytes: NonNegativeInt
    block_crc32: list[NonNegativeInt]


class ManifestOrigins(TypedDict):
    """What a manifest says of where the documents came from."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    files: NonNegativeInt
    documents_by_licence: dict[str, NonNegativeInt]


class Manifest(TypedDict):
    """What the manifest of a set of shards must say."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    documents: NonNegativeInt
    tokens: NonNegativeInt
    tokenizer: ManifestTokenizer
    files: dict[Literal[".bin", ".idx", ".media.bin", ".media.idx", ".tokenizer"], ManifestFile]
    media: dict[str, NonNegativeInt]
    modalities: NotRequired[dict[str, dict[str, Any]]]
    origin: NotRequired[ManifestFile]
    origins: NotRequired[ManifestOrigins]


class MergedManifest(TypedDict):
    """What the manifest of several sets of shards must say: the parts lie where its writer had them."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    documents: NonNegativeInt
    tokens: NonNegativeInt
    tokenizer: ManifestTokenizer
    parts: Annotated[list[str], Field(min_length=1)]
    origins: NotRequired[ManifestOrigins]


@dataclass(frozen=True)
class TokenizerInfo:
    """What shards must agree on with one another and with a model: which ids mean what."""

    sha256: str
    vocab_size: int
    special_ids: dict[str, int]


@dataclass(frozen=True)
class MediaItem:
    """One item of a modality: its encoded bytes, and the run of placeholders that stands for it."""

    modality: str
    """Its name."""
    data: bytes
    token_offset: int
    num_tokens: int


@dataclass(frozen=True)
class EncodedDocument:
    """A document as it is stored: ids with placeholders, ending in end-of-text, and the media behind them."""

    tokens: np.ndarray
    source: Source
    media: Sequence[MediaItem] = ()


@dataclass(frozen=True)
class EncodedBatch:
    """Documents end to end, as a worker hands them to a writer."""

    tokens: np.ndarray
    """(num_tokens,) of any integer type."""
    lengths: np.ndarray
    """(num_documents,) int32: tokens of each document."""
    sources: np.ndarray
    """(num_documents,) uint8, source.Source."""
    media: Sequence[tuple[int, MediaItem]] = ()
    """Document of the batch, and what it holds, in the order of documents and tokens."""
    origins: Origins | None = None
    """Where the documents came from; None if nothing is known of it."""

    @staticmethod
    def of(documents: Sequence[EncodedDocument]) -> "EncodedBatch":
        """Return `documents` as a batch."""
        tokens = np.concatenate([np.zeros(0, np.uint16), *(np.asarray(document.tokens) for document in documents)])
        is_narrow = tokens.size and 0 <= tokens.min() <= tokens.max() <= np.iinfo(np.uint16).max
        return EncodedBatch(
            tokens.astype(np.uint16) if is_narrow else tokens,
            np.asarray([len(document.tokens) for document in documents], np.int32),
            np.asarray([document.source for document in documents], np.uint8),
            [(number, item) for number, document in enumerate(documents) for item in document.media],
        )


@dataclass
class Counts:
    """What a set of shards holds."""

    documents: int = 0
    tokens: int = 0
    by_source: dict[str, int] = field(default_factory=dict)
    media: dict[str, int] = field(default_factory=dict)
    media_bytes: int = 0
    rejected: int = 0
    """Inputs, and parts of inputs, that were left out: P.rejected.jsonl says why."""

    def add(self, batch: EncodedBatch) -> None:
        """Count the documents of one more batch."""
        self.documents += len(batch.lengths)
        self.tokens += len(batch.tokens)
        for source, number in enumerate(np.bincount(batch.sources).tolist()):
            if number:
                name = Source(source).name.lower()
                self.by_source[name] = self.by_source.get(name, 0) + number
        for _, item in batch.media:
            self.media[item.modality] = self.media.get(item.modality, 0) + 1
            self.media_bytes += len(item.data)


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all that a manifest says but its own hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
