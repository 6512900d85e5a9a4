"""The on-disk border between ingestion and training: token shards and media shards.

A prefix P names eight files. `P.bin` and `P.idx` are megatron-core's IndexedDataset format, one document a sequence, at
decoder length: a media item is a run of placeholder ids. `P.media.bin` holds the encoded bytes of all media items end
to end, `P.media.idx` says where each lies and which run it fills, `P.tokenizer` is the tokenizer.json that the ids come
from, `P.crc` holds checksums, `P.origin.parquet` says where documents came from (nothing needs it, and where nothing is
known it is not there), and `P.json` is the manifest: counts, tokenizer, sizes and checksums. The manifest is written
last, so a set of shards without one is not finished and is never read.

Nothing is used that was not compared with its checksum: `P.json` ends in the SHA-256 of what it says, and holds that of
`P.tokenizer` and a CRC-32 of every 16 MiB of the other files, which `verify` compares; `P.crc` is a CRC-32 of every
4 KiB of `P.bin`, `P.idx` and `P.media.idx`, uint32 end to end; `P.media.idx` has one of each item of `P.media.bin`.
Shards of version 1 have no `P.crc` and no hash of the manifest: what is read is compared with the checksums of 16 MiB.

Several sets of shards may be one: `P.json` then lists their prefixes as `parts` and there is no other file (`merge`).

Layout of P.media.idx, little-endian: the header (magic, version, documents, items), a record for each document
(`DOCUMENT`), a record for each item (`ITEM`).
"""

from megatron_mm.shards.format import (
    Counts,
    EncodedBatch,
    EncodedDocument,
    MediaItem,
    TokenizerInfo,
)
from megatron_mm.shards.origins import Origins
from megatron_mm.shards.reader import (
    DamagedItem,
    ShardReader,
    check_tokenizers,
    fingerprints,
    manifests,
    merge,
    open_shards,
    stored_tokenizer,
)
from megatron_mm.shards.writer import ShardWriter

__all__ = [
    "Counts",
    "DamagedItem",
    "EncodedBatch",
    "EncodedDocument",
    "MediaItem",
    "Origins",
    "ShardReader",
    "ShardWriter",
    "TokenizerInfo",
    "check_tokenizers",
    "fingerprints",
    "manifests",
    "merge",
    "open_shards",
    "stored_tokenizer",
]
