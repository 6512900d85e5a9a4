"""The on-disk border between ingestion and training: token shards and media shards.

A prefix P names five files. `P.bin` and `P.idx` are megatron-core's IndexedDataset format, one document a sequence, at
decoder length: a media item is a run of placeholder ids. `P.media.bin` holds the encoded bytes of all media items end
to end, `P.media.idx` says where each lies and which run it fills, and `P.json` is the manifest: counts, tokenizer,
sizes and checksums. The manifest is written last, so a set of shards without one is not finished and is never read.

Layout of P.media.idx, little-endian: the header (magic, version, documents, items), a record for each document
(`DOCUMENT`), a record for each item (`ITEM`).
"""

import array
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.modality import Media, Source

TOKEN_MAGIC, TOKEN_VERSION = b"MMIDIDX\x00\x00", 1
TOKEN_DTYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
"""megatron-core's codes of the two types that token ids are stored in."""
MEDIA_MAGIC, MEDIA_VERSION = b"MMMEDIA\x00", 1
MEDIA_HEADER = struct.Struct("<8sQQQ")
DOCUMENT = np.dtype([("first_item", "<u8"), ("source", "u1"), ("reserved", "u1", 7)])
ITEM = np.dtype(
    [
        ("offset", "<u8"),  # bytes into P.media.bin
        ("num_bytes", "<u4"),
        ("crc32", "<u4"),
        ("kind", "<u2"),  # modality.Media
        ("reserved", "<u2"),
        ("token_offset", "<u4"),  # of the first placeholder, in its document
        ("num_tokens", "<u4"),  # placeholders
        ("reserved_2", "<u4"),
    ]
)
SUFFIXES = (".bin", ".idx", ".media.bin", ".media.idx")
BLOCK_BYTES = 16 * 2**20
"""Bytes that one checksum of the manifest covers."""


@dataclass(frozen=True)
class TokenizerInfo:
    """What shards must agree on with one another and with a model: which ids mean what."""

    sha256: str
    vocab_size: int
    special_ids: dict[str, int]


@dataclass(frozen=True)
class MediaItem:
    """One image or clip: its encoded bytes, and the run of placeholders that stands for it."""

    kind: Media
    data: bytes
    token_offset: int
    num_tokens: int


@dataclass(frozen=True)
class EncodedDocument:
    """A document as it is stored: ids with placeholders, ending in end-of-text, and the media behind them."""

    tokens: np.ndarray
    source: Source
    media: Sequence[MediaItem] = ()


@dataclass
class Counts:
    """What a set of shards holds."""

    documents: int = 0
    tokens: int = 0
    by_source: dict[str, int] = field(default_factory=dict)
    media: dict[str, int] = field(default_factory=dict)
    media_bytes: int = 0

    def add(self, document: EncodedDocument) -> None:
        """Count one more document."""
        self.documents += 1
        self.tokens += len(document.tokens)
        source = document.source.name.lower()
        self.by_source[source] = self.by_source.get(source, 0) + 1
        for item in document.media:
            kind = item.kind.name.lower()
            self.media[kind] = self.media.get(kind, 0) + 1
            self.media_bytes += len(item.data)


class ShardWriter:
    """Writes one set of shards; nothing appears under its final name before all of it is on disk.

    Use as a context manager: leaving it publishes the shards, leaving it by an exception removes what was begun. Raises
    DataError if another process is writing the same prefix.
    """

    def __init__(self, prefix: str | Path, *, tokenizer: TokenizerInfo) -> None:
        self.prefix = str(prefix)
        self.tokenizer = tokenizer
        self.counts = Counts()
        code = 8 if tokenizer.vocab_size <= np.iinfo(np.uint16).max else 4
        self._dtype_code, self._dtype = code, TOKEN_DTYPES[code]
        self._lengths = array.array("i")
        self._documents: list[tuple[int, int]] = []  # (first item, source)
        self._items: list[np.ndarray] = []
        self._num_items = 0

    def __enter__(self) -> Self:
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._tokens = self._open(".bin")
        self._media = self._open(".media.bin")
        return self

    def add(self, document: EncodedDocument) -> None:
        """Append one document.

        Raises DataError if an id is outside the vocabulary, or a media run does not lie on its placeholders.
        """
        tokens = np.asarray(document.tokens)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            raise DataError(f"{self.prefix}: a token id is outside the vocabulary of {self.tokenizer.vocab_size}.")
        self._documents.append((self._num_items, document.source))
        self._items.append(self._write_media(tokens, document.media))
        self._num_items += len(document.media)
        self._tokens.write(tokens.astype(self._dtype).tobytes())
        self._lengths.append(len(tokens))
        self.counts.add(document)

    def _write_media(self, tokens: np.ndarray, media: Sequence[MediaItem]) -> np.ndarray:
        records = np.zeros(len(media), ITEM)
        for record, item in zip(records, media):
            placeholder = self.tokenizer.special_ids[item.kind.name.lower()]
            run = tokens[item.token_offset : item.token_offset + item.num_tokens]
            if len(run) != item.num_tokens or (run != placeholder).any():
                raise DataError(
                    f"{self.prefix}: document {len(self._lengths)} has a media run at {item.token_offset} that is not "
                    f"{item.num_tokens} placeholders."
                )
            record["offset"], record["num_bytes"] = self._media.tell(), len(item.data)
            record["crc32"], record["kind"] = zlib.crc32(item.data), item.kind
            record["token_offset"], record["num_tokens"] = item.token_offset, item.num_tokens
            self._media.write(item.data)
        return records

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._publish()
        else:
            for file in (self._tokens, self._media):
                file.close()
            for suffix in SUFFIXES:
                Path(_partial(self.prefix + suffix)).unlink(missing_ok=True)

    def _open(self, suffix: str) -> BinaryIO:
        file = open(_partial(self.prefix + suffix), "ab")  # closed by _publish or __exit__
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.prefix}: another process is writing these shards. Wait for it.") from None
        file.truncate(0)  # left by a run that was killed
        return file

    def _publish(self) -> None:
        """Make the shards appear whole: data to disk, old manifest away, names in place, new manifest last."""
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.zeros(0, np.int32)
        with self._open(".idx") as index:
            index.write(_token_index(lengths, self._dtype_code))
        with self._open(".media.idx") as index:
            items = np.concatenate([np.zeros(0, ITEM), *self._items])
            index.write(MEDIA_HEADER.pack(MEDIA_MAGIC, MEDIA_VERSION, len(lengths), len(items)))
            documents = np.zeros(len(lengths), DOCUMENT)
            if self._documents:
                documents["first_item"], documents["source"] = zip(*self._documents)
            index.write(documents.tobytes() + items.tobytes())
        for file in (self._tokens, self._media):
            file.close()
        files = {suffix: _checksums(_partial(self.prefix + suffix)) for suffix in SUFFIXES}
        manifest = {"version": 1, **asdict(self.counts), "tokenizer": asdict(self.tokenizer), "files": files}
        # megatron-core's reader asks for no manifest and takes a .bin with any .idx beside it: .idx is the first of the
        # old files to go, and the last of the new ones but the manifest to come.
        for suffix in (".json", ".idx"):
            Path(self.prefix + suffix).unlink(missing_ok=True)
        for suffix in (".bin", ".media.bin", ".media.idx", ".idx"):
            _sync(_partial(self.prefix + suffix))
            os.replace(_partial(self.prefix + suffix), self.prefix + suffix)
        Path(_partial(self.prefix + ".json")).write_text(json.dumps(manifest, indent=1))
        _sync(_partial(self.prefix + ".json"))
        os.replace(_partial(self.prefix + ".json"), self.prefix + ".json")
        _sync(str(Path(self.prefix).parent))


class ShardReader:
    """Reads one set of shards by document. Reads are single preads, so threads and forks may share a reader.

    Raises DataError on opening if the shards are not finished, or their sizes and headers disagree with the manifest;
    `verify` checks every byte.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.manifest = self._read_manifest()
        self.tokenizer = TokenizerInfo(**self.manifest["tokenizer"])
        self._check_sizes()
        self.lengths, self._dtype = self._read_token_index()
        self.num_documents = len(self.lengths)
        """Tokens of each document: (num_documents,) int32."""
        self._starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self._documents, self._items = self._read_media_index()
        self._token_file = os.open(self.prefix + ".bin", os.O_RDONLY)
        self._media_file = os.open(self.prefix + ".media.bin", os.O_RDONLY)

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return ids [start, stop) of a document, int64."""
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, (document, start, stop, length)
        offset = (int(self._starts[document]) + start) * self._dtype.itemsize
        data = self._read(self._token_file, ".bin", offset, (stop - start) * self._dtype.itemsize)
        return np.frombuffer(data, self._dtype).astype(np.int64)

    def source(self, document: int) -> Source:
        """Return what kind of file a document came from."""
        return Source(int(self._documents["source"][document]))

    def media(self, document: int) -> np.ndarray:
        """Return the `ITEM` records of a document's media, in token order."""
        first = int(self._documents["first_item"][document])
        last = document + 1 < self.num_documents
        stop = int(self._documents["first_item"][document + 1]) if last else len(self._items)
        return self._items[first:stop]

    def media_bytes(self, item: np.ndarray) -> bytes:
        """Return the encoded bytes of one media item. Raises DataError if they are not those that were written."""
        data = self._read(self._media_file, ".media.bin", int(item["offset"]), int(item["num_bytes"]))
        if zlib.crc32(data) != int(item["crc32"]):
            raise DataError(
                f"{self.prefix}.media.bin: the item at byte {item['offset']} does not match its checksum. Run "
                "`verify` on the shards, and preprocess them again."
            )
        return data

    def has_media(self) -> np.ndarray:
        """Return whether each document has media: (num_documents,) bool."""
        first = np.append(self._documents["first_item"], len(self._items)).astype(np.int64)
        return np.diff(first) > 0

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Check every byte against the manifest's checksums; raise DataError at the first block that differs."""
        for suffix, expected in self.manifest["files"].items():
            for block, crc32 in enumerate(_block_checksums(self.prefix + suffix, progress)):
                if crc32 != expected["block_crc32"][block]:
                    raise DataError(
                        f"{self.prefix}{suffix}: bytes {block * BLOCK_BYTES} to {(block + 1) * BLOCK_BYTES} differ "
                        "from what was written. Preprocess the inputs again, or restore the file from a copy."
                    )

    def _read(self, file: int, suffix: str, offset: int, num_bytes: int) -> bytes:
        data = os.pread(file, num_bytes, offset)
        if len(data) != num_bytes:
            raise DataError(
                f"{self.prefix}{suffix}: {num_bytes} bytes at {offset} could not be read; it was cut short."
            )
        return data

    def _read_manifest(self) -> dict[str, Any]:
        path = self.prefix + ".json"
        try:
            manifest = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise DataError(
                f"{path} is missing: {self.prefix} is not a finished set of shards. Make it with "
                f"`python tools/preprocess_data.py --output-prefix {self.prefix} ...`."
            ) from None
        except ValueError as error:
            raise DataError(f"{path} is not JSON ({error}). Preprocess the inputs again.") from error
        if manifest.get("version") != 1:
            raise DataError(f"{path} has version {manifest.get('version')}; this package reads version 1.")
        return manifest

    def _check_sizes(self) -> None:
        for suffix, expected in self.manifest["files"].items():
            path = Path(self.prefix + suffix)
            found = path.stat().st_size if path.exists() else None
            if found != expected["bytes"]:
                raise DataError(
                    f"{path} has {found if found is not None else 'no'} bytes, its manifest says {expected['bytes']}: "
                    "it belongs to other shards or was cut short. Preprocess the inputs again."
                )

    def _read_token_index(self) -> tuple[np.ndarray, np.dtype]:
        path = self.prefix + ".idx"
        with open(path, "rb") as file:
            magic, version, code, count, _ = struct.unpack("<9sQBQQ", file.read(34))
        if magic != TOKEN_MAGIC or version != TOKEN_VERSION or code not in TOKEN_DTYPES:
            raise DataError(f"{path} does not start with an index header. Preprocess the inputs again.")
        if count != self.manifest["documents"]:
            raise DataError(f"{path} has {count} documents, its manifest says {self.manifest['documents']}.")
        lengths = np.memmap(path, np.int32, "r", 34, (count,)) if count else np.zeros(0, np.int32)
        total = int(np.sum(lengths, dtype=np.int64)) * TOKEN_DTYPES[code].itemsize
        if total != self.manifest["files"][".bin"]["bytes"] or (count and lengths.min() < 0):
            raise DataError(f"{path}: its lengths add up to {total} bytes, not to those of {self.prefix}.bin.")
        return lengths, TOKEN_DTYPES[code]

    def _read_media_index(self) -> tuple[np.ndarray, np.ndarray]:
        path = self.prefix + ".media.idx"
        data = np.fromfile(path, np.uint8)
        magic, version, documents, items = MEDIA_HEADER.unpack(data[: MEDIA_HEADER.size].tobytes())
        split = MEDIA_HEADER.size + documents * DOCUMENT.itemsize
        whole = split + items * ITEM.itemsize
        if (magic, version, documents, whole) != (MEDIA_MAGIC, MEDIA_VERSION, self.num_documents, len(data)):
            raise DataError(f"{path} is not the media index of {self.prefix}.idx. Preprocess the inputs again.")
        return data[MEDIA_HEADER.size : split].view(DOCUMENT), data[split:].view(ITEM)


def open_shards(prefixes: Sequence[str]) -> list[ShardReader]:
    """Open several sets of shards that are used together. Raises DataError if they come from different tokenizers."""
    readers = [ShardReader(prefix) for prefix in prefixes]
    for reader in readers[1:]:
        if reader.tokenizer != readers[0].tokenizer:
            raise DataError(
                f"{reader.prefix} and {readers[0].prefix} come from different tokenizers: the same id means different "
                "text. Preprocess one of them again with the other's tokenizer."
            )
    return readers


def _partial(path: str) -> str:
    return path + ".partial"


def _token_index(lengths: np.ndarray, dtype_code: int) -> bytes:
    """Return an index file as megatron-core reads it: one sequence a document."""
    itemsize = TOKEN_DTYPES[dtype_code].itemsize
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    documents = np.arange(len(lengths) + 1, dtype=np.int64)
    header = struct.pack("<9sQBQQ", TOKEN_MAGIC, TOKEN_VERSION, dtype_code, len(lengths), len(documents))
    return header + lengths.tobytes() + (pointers * itemsize).tobytes() + documents.tobytes()


def _checksums(path: str) -> dict[str, Any]:
    return {"bytes": os.path.getsize(path), "block_crc32": list(_block_checksums(path))}


def _block_checksums(path: str, progress: Callable[[int], None] = lambda num_bytes: None) -> Iterator[int]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield zlib.crc32(block)
            progress(len(block))


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
