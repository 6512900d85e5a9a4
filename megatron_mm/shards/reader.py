"""Reading shards: sizes and headers are checked on opening, what is read at every read, every byte by `verify`."""

import difflib
import functools
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from megatron_mm.errors import DataError
from megatron_mm.modalities import BY_KIND, BY_NAME, Geometries
from megatron_mm.outside import checked
from megatron_mm.retry import retrying
from megatron_mm.shards.checksums import Checksums, differs, map_file
from megatron_mm.shards.format import (
    BLOCK_BYTES,
    DOCUMENT,
    ITEM,
    MANIFEST_VERSION,
    MEDIA_HEADER,
    MEDIA_MAGIC,
    MEDIA_VERSION,
    PAGES_SUFFIX,
    SUFFIXES,
    TOKEN_DTYPES,
    TOKEN_HEADER,
    TOKEN_MAGIC,
    TOKEN_VERSION,
    TOKENIZER_SUFFIX,
    EncodedDocument,
    Manifest,
    MediaItem,
    MergedManifest,
    TokenizerInfo,
    manifest_hash,
)
from megatron_mm.shards.origin_file import OriginReader, summed
from megatron_mm.shards.origins import Origins
from megatron_mm.shards.writer import write_manifest
from megatron_mm.source import Source
from megatron_mm.storage import make_folder

log = logging.getLogger(__name__)

SOURCES_AT = MEDIA_HEADER.size + DOCUMENT.fields["source"][1]
"""Where the source of the first document stands in P.media.idx."""
CHECKED_DOCUMENTS = 2**16
"""Documents whose index is checked on opening: the first half of them and the last; the others when they are read."""


class DamagedItem(DataError):
    """The bytes of one media item are not those that were written: what is left of its document can be used."""


class ShardReader:
    """Reads one set of shards by document, with as little memory for a billion documents as for one.

    Reads are single preads, so threads and forks may share a reader. Raises DataError on opening if the shards are not
    finished, or their sizes, headers and indexes disagree, and at any read of what is not as it was written, or whose
    document has an index that disagrees; `verify` checks every byte.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.manifest = _read_manifest(self.prefix)
        if "parts" in self.manifest:
            raise DataError(f"{self.prefix}.json lists parts: open them with open_shards(['{self.prefix}']).")
        self.tokenizer = TokenizerInfo(**self.manifest["tokenizer"])
        self.num_documents: int = self.manifest["documents"]
        self.num_tokens: int = self.manifest["tokens"]
        self._check_sizes()
        self._checksums = Checksums(self.prefix, self.manifest)
        self._map_token_index()
        self._map_media_index()
        self._check_index(0, min(self.num_documents, CHECKED_DOCUMENTS // 2))
        self._check_index(max(0, self.num_documents - CHECKED_DOCUMENTS // 2), self.num_documents)

    @property
    def num_items(self) -> int:
        """Media items of all documents."""
        return len(self._items)

    @property
    def token_bytes(self) -> int:
        """Bytes of an id."""
        return self._dtype.itemsize

    def length(self, document: int) -> int:
        """Return the tokens of a document. Raises DataError if the index disagrees about where it ends."""
        self._require_index(document, document + 1)
        start, length = int(self._pointers[document]), int(self._lengths[document])
        last = document + 1 == self.num_documents
        stop = self.num_tokens * self._dtype.itemsize if last else int(self._pointers[document + 1])
        if length < 1 or stop - start != length * self._dtype.itemsize:
            raise self._index_error(document)
        return length

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the tokens of documents [start, stop): (stop - start,) int32. They are read, not mapped."""
        stop = self.num_documents if stop is None else stop
        data = self._checksums.read(".idx", TOKEN_HEADER.size + 4 * start, 4 * (stop - start))
        return np.frombuffer(data, np.int32)

    def token_start(self, document: int) -> int:
        """Return the tokens before a document; all of them at num_documents."""
        if document == self.num_documents:
            return self.num_tokens
        self._checksums.require(".idx", self._pointers_at + 8 * document, 8)
        return int(self._pointers[document]) // self._dtype.itemsize

    def tokens(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return ids [start, stop) of a document, int64."""
        length = self.length(document)
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, (document, start, stop, length)
        offset = int(self._pointers[document]) + start * self._dtype.itemsize
        data = self._checksums.read(".bin", offset, (stop - start) * self._dtype.itemsize)
        return np.frombuffer(data, self._dtype).astype(np.int64)

    @functools.cached_property
    def token_index(self) -> tuple[Any, ...]:
        """What csrc/index reads pieces by, and checks them with; for shards without P.crc after `check_tokens`.

        Descriptors of P.bin and P.idx, bytes of a token, tokens, documents, bytes of a page; checksums of P.bin; and
        of P.idx and P.media.idx the bytes, checksums, and pages that have passed.
        """
        sums = self._checksums
        token_sums = sums.expected[".bin"] if sums.is_paged else np.zeros(0, np.uint32)
        sizes = (self._dtype.itemsize, self.num_tokens, self.num_documents, sums.page_bytes)
        files = (sums.descriptor(".bin"), sums.descriptor(".idx"))
        return (*files, *sizes, token_sums, *sums.index(".idx"), *sums.index(".media.idx"))

    def check_tokens(self, documents: np.ndarray) -> None:
        """Pass if the tokens of documents are as written, in shards without P.crc; others are checked as read."""
        if self._checksums.is_paged:
            return
        for document in documents.tolist():
            num_bytes = self.length(document) * self._dtype.itemsize
            self._checksums.require(".bin", int(self._pointers[document]), num_bytes)

    def sources(self, documents: np.ndarray) -> np.ndarray:
        """Return what kind of file each document came from: (n,) uint8, source.Source."""
        self._checksums.require_each(".media.idx", SOURCES_AT + documents * DOCUMENT.itemsize)
        return self._sources[documents]

    def source(self, document: int) -> Source:
        """Return what kind of file a document came from."""
        self._require_media(document, document + 1)
        return Source(int(self._sources[document]))

    def media(self, document: int) -> np.ndarray:
        """Return the `ITEM` records of a document's media, in token order."""
        if not len(self._items):
            return self._items
        self._require_media(document, document + 2)
        first = int(self._first_items[document])
        last = document + 1 == self.num_documents
        stop = len(self._items) if last else int(self._first_items[document + 1])
        self._checksums.require(".media.idx", self._items_at + first * ITEM.itemsize, (stop - first) * ITEM.itemsize)
        return self._items[first:stop]

    def media_bytes(self, item: np.ndarray) -> bytes:
        """Return the encoded bytes of one media item. Raises DamagedItem if they are not those that were written."""
        data = self._checksums.read_unchecked(".media.bin", int(item["offset"]), int(item["num_bytes"]))
        if zlib.crc32(data) != int(item["crc32"]):
            raise DamagedItem(
                f"{self.prefix}.media.bin: the item at byte {item['offset']} does not match its checksum. Run "
                "`verify` on the shards, and preprocess them again."
            )
        return data

    def document(self, number: int) -> EncodedDocument:
        """Return a document as it was encoded."""
        media = [
            MediaItem(
                BY_KIND[int(item["kind"])].name,
                self.media_bytes(item),
                int(item["token_offset"]),
                int(item["num_tokens"]),
            )
            for item in self.media(number)
        ]
        return EncodedDocument(self.tokens(number), self.source(number), media)

    def origins(self, start: int, stop: int) -> Origins | None:
        """Return where documents [start, stop) came from; None if these shards do not say it of any.

        Raises DataError if the file that says it is missing or damaged: nothing else needs it.
        """
        return None if self._origin_reader is None else self._origin_reader.read(start, stop)

    @functools.cached_property
    def _origin_reader(self) -> OriginReader | None:
        summary = self.manifest.get("origin")
        return None if summary is None else OriginReader(self.prefix, summary)

    def has_media(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return whether each of documents [start, stop) has media: (stop - start,) bool."""
        stop = self.num_documents if stop is None else stop
        if not len(self._items):
            return np.zeros(stop - start, bool)
        self._require_media(start, stop + 1)
        first = np.append(self._first_items[start : stop + 1], len(self._items)).astype(np.int64)
        return np.diff(first[: stop - start + 1]) > 0

    @property
    def geometries(self) -> Geometries:
        """How the items of these shards became tokens, by modality; of versions that recorded none, the defaults.

        Raises DataError if they hold a modality, or were made for a setting, that this version has not.
        """
        recorded: dict[str, dict[str, Any]] = self.manifest.get("modalities", {})
        unknown = [name for name in self.manifest["media"] if name not in BY_NAME]
        if unknown:
            raise DataError(f"{self.prefix} holds media of {', '.join(unknown)}, a modality that this version has not.")
        try:
            return {name: own.geometry(**recorded.get(name, {})) for name, own in BY_NAME.items()}
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise DataError(f"{self.prefix}.json: its modalities are not those of this version ({wrong}).") from error

    def check_geometries(self, others: Geometries, *, whose: str) -> None:
        """Pass if the media of these shards become as many tokens as by `others`, which are those of `whose`.

        Raises DataError with both sides.
        """
        own = self.geometries
        for name in self.manifest["media"]:
            theirs, ours = (BY_NAME[name].fingerprint(one[name]) for one in (own, others))
            differing = [key for key in ours if ours[key] != theirs[key]]
            if differing:
                here, there = (" ".join(f"{name}.{key}={one[key]}" for key in differing) for one in (theirs, ours))
                raise DataError(
                    f"{self.prefix} was made for {here}, and {whose} has {there}: the same item becomes other tokens. "
                    "Preprocess the inputs again for it, or use the settings that the shards were made for."
                )

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Check every byte against the manifest's checksums; raise DataError at the first block that differs.

        What is stored of the tokenizer, and of where documents came from, is checked too.
        """
        for suffix in self._summaries:
            for block, crc32 in enumerate(_block_checksums(self.prefix + suffix, progress)):
                self._compare(suffix, block, crc32)
        if self._origin_reader is not None:
            self._origin_reader.verify(progress)
        stored_tokenizer(self.prefix)

    @property
    def num_bytes(self) -> int:
        """Bytes that `verify` reads."""
        origin = self.manifest.get("origin")
        own = [*self._summaries.values(), *([] if origin is None else [origin])]
        return sum(summary["bytes"] for summary in own)

    @property
    def blocks(self) -> list[tuple[str, int, int]]:
        """The blocks that the manifest has checksums of: (suffix of the file, number of the block, its bytes)."""
        return [
            (suffix, block, min(BLOCK_BYTES, own["bytes"] - block * BLOCK_BYTES))
            for suffix, own in self._summaries.items()
            for block in range(len(own["block_crc32"]))
        ]

    @property
    def _summaries(self) -> dict[str, dict[str, Any]]:
        """Size and checksums of each file that training may read, by its suffix."""
        pages = self.manifest.get("pages")
        return self.manifest["files"] | ({PAGES_SUFFIX: pages} if pages is not None else {})

    def check_block(self, suffix: str, block: int) -> None:
        """Pass if a block holds what was written; raise DataError if not."""
        path = self.prefix + suffix
        self._compare(suffix, block, retrying(lambda: _block_checksum(path, block), what=path))

    def _compare(self, suffix: str, block: int, crc32: int) -> None:
        if crc32 != self._summaries[suffix]["block_crc32"][block]:
            raise differs(self.prefix + suffix, block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)

    def _require_index(self, start: int, stop: int) -> None:
        """Pass if lengths and pointers of documents [start, stop), and the pointer behind them, are as written."""
        self._checksums.require(".idx", TOKEN_HEADER.size + 4 * start, 4 * (stop - start))
        self._checksums.require(".idx", self._pointers_at + 8 * start, 8 * (stop + 1 - start))

    def _require_media(self, start: int, stop: int) -> None:
        """Pass if the records of documents [start, stop) are as written; there may be fewer."""
        count = min(stop, self.num_documents) - start
        self._checksums.require(".media.idx", MEDIA_HEADER.size + start * DOCUMENT.itemsize, count * DOCUMENT.itemsize)

    def _check_sizes(self) -> None:
        for suffix, expected in self.manifest["files"].items():
            path = Path(self.prefix + suffix)
            found = path.stat().st_size if path.exists() else None
            if found != expected["bytes"]:
                raise DataError(
                    f"{path} has {found if found is not None else 'no'} bytes, its manifest says {expected['bytes']}: "
                    "it belongs to other shards or was cut short. Preprocess the inputs again."
                )

    def _map_token_index(self) -> None:
        path, count = self.prefix + ".idx", self.num_documents
        with open(path, "rb") as file:
            header = file.read(TOKEN_HEADER.size)
        whole = TOKEN_HEADER.size + 4 * count + 8 * count + 8 * (count + 1)
        if len(header) < TOKEN_HEADER.size or os.path.getsize(path) != whole:
            raise DataError(f"{path} does not hold the {count} documents of its manifest. Preprocess the inputs again.")
        magic, version, code, documents, boundaries = TOKEN_HEADER.unpack(header)
        if magic != TOKEN_MAGIC or version != TOKEN_VERSION or code not in TOKEN_DTYPES:
            raise DataError(f"{path} does not start with an index header. Preprocess the inputs again.")
        if (documents, boundaries) != (count, count + 1):
            raise DataError(f"{path} has {documents} documents, its manifest says {count}.")
        self._dtype = TOKEN_DTYPES[code]
        if self.num_tokens * self._dtype.itemsize != self.manifest["files"][".bin"]["bytes"]:
            raise DataError(f"{path}: {self.num_tokens} tokens of {self._dtype} are not what {self.prefix}.bin holds.")
        self._checksums.require(".idx", 0, TOKEN_HEADER.size)
        self._pointers_at = TOKEN_HEADER.size + 4 * count
        self._lengths = map_file(path, np.dtype("<i4"), TOKEN_HEADER.size, count)
        self._pointers = map_file(path, np.dtype("<i8"), self._pointers_at, count)
        self._boundaries = map_file(path, np.dtype("<i8"), TOKEN_HEADER.size + 12 * count, count + 1)

    def _map_media_index(self) -> None:
        path = self.prefix + ".media.idx"
        with open(path, "rb") as file:
            header = file.read(MEDIA_HEADER.size).ljust(MEDIA_HEADER.size, b"\0")
        magic, version, documents, items = MEDIA_HEADER.unpack(header)
        split = MEDIA_HEADER.size + documents * DOCUMENT.itemsize
        found = (magic, version, documents, split + items * ITEM.itemsize)
        if found != (MEDIA_MAGIC, MEDIA_VERSION, self.num_documents, os.path.getsize(path)):
            raise DataError(f"{path} is not the media index of {self.prefix}.idx. Preprocess the inputs again.")
        self._checksums.require(".media.idx", 0, MEDIA_HEADER.size)
        records = map_file(path, DOCUMENT, MEDIA_HEADER.size, documents)
        self._sources, self._first_items = records["source"], records["first_item"]
        self._items_at = split
        self._items = map_file(path, ITEM, split, items)

    def _check_index(self, start: int, stop: int) -> None:
        """Raise DataError if lengths, pointers and boundaries of documents [start, stop) disagree."""
        if start == stop:
            return
        self._require_index(start, stop)
        self._checksums.require(".idx", TOKEN_HEADER.size + 12 * self.num_documents + 8 * start, 8 * (stop + 1 - start))
        last = stop == self.num_documents
        end = self.num_tokens * self._dtype.itemsize if last else int(self._pointers[stop])
        pointers = np.append(self._pointers[start:stop], end)
        wrong = np.diff(pointers) != self._lengths[start:stop].astype(np.int64) * self._dtype.itemsize
        wrong |= (self._lengths[start:stop] < 1) | (self._boundaries[start:stop] != np.arange(start, stop))
        if wrong.any():
            raise self._index_error(start + int(wrong.argmax()))
        if (start == 0 and pointers[0] != 0) or (last and self._boundaries[stop] != stop):
            raise self._index_error(start)

    def _index_error(self, document: int) -> DataError:
        return DataError(
            f"{self.prefix}.idx disagrees with itself about document {document}: it is damaged, or belongs to other "
            "shards. Preprocess the inputs again, or restore the file from a copy."
        )


def open_shards(prefixes: Sequence[str]) -> list[ShardReader]:
    """Open several sets of shards that are used together, a prefix of `merge` as its parts.

    Raises DataError if they come from different tokenizers, or their media from different sizes.
    """
    readers = [
        retrying(lambda part=part: ShardReader(part), what=part) for prefix in prefixes for part in _parts(str(prefix))
    ]
    check_tokenizers(readers)
    with_media = [reader for reader in readers if reader.manifest["media"]]
    for reader in with_media[1:]:
        reader.check_geometries(with_media[0].geometries, whose=with_media[0].prefix)
    return readers


def check_tokenizers(readers: Sequence[ShardReader]) -> None:
    """Pass if all shards come from one tokenizer; raise DataError otherwise."""
    for reader in readers[1:]:
        if reader.tokenizer != readers[0].tokenizer:
            raise DataError(
                f"{reader.prefix} and {readers[0].prefix} come from different tokenizers: the same id means different "
                "text. Preprocess one of them again with the other's tokenizer."
            )


def stored_tokenizer(prefix: str) -> bytes | None:
    """Return the tokenizer.json that is stored with a set of shards, None if they were written without.

    Raises DataError if it is not the one that the manifest names.
    """
    part = _parts(prefix)[0]
    path = Path(part + TOKENIZER_SUFFIX)
    if not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _read_manifest(part)["tokenizer"]["sha256"]:
        raise DataError(f"{path} is not the tokenizer that {part}.json names: put that one in its place.")
    return content


def fingerprints(prefix: str) -> list[tuple[str, str]]:
    """Return (own prefix, what identifies its contents) of each set of shards that `prefix` stands for, in order.

    A SHA-256 over the checksums of all files and of the tokenizer: names, paths and merging do not change it, any other
    document, order or tokenizer does. Parts without documents, which hold nothing, are left out. Raises DataError if
    there are no finished shards.
    """
    found = []
    for part, manifest in manifests(prefix):
        if manifest["documents"]:
            content = {"tokenizer": manifest["tokenizer"]["sha256"], "files": manifest["files"]}
            found.append((part, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()))
    return found


def manifests(prefix: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (own prefix, manifest) of each set of shards that `prefix` stands for, in order.

    Raises DataError if there are no finished shards.
    """
    return [(part, _read_manifest(part)) for part in _parts(prefix)]


def merge(prefix: str | Path, parts: Sequence[str]) -> dict[str, Any]:
    """Make `prefix` name all of `parts`, in their order, without copying data; return its manifest.

    The parts stay where they are and are named relative to the folder of `prefix`. Raises DataError as `open_shards`.
    """
    readers = open_shards(parts)
    own, named = Path(prefix).resolve(), [Path(part).resolve() for part in parts]
    if own in named or Path(f"{own}.bin").exists():
        raise DataError(f"{prefix}.json is that of shards, which it would no longer name. Give a prefix of its own.")
    if twice := [part for part, path in zip(parts, named) if named.count(path) > 1]:
        raise DataError(f"{twice[0]} is given twice: its documents would be there twice. Take one out.")
    folder = own.parent
    make_folder(folder)
    manifest = {
        "version": MANIFEST_VERSION,
        "documents": sum(reader.num_documents for reader in readers),
        "tokens": sum(reader.num_tokens for reader in readers),
        "tokenizer": asdict(readers[0].tokenizer),
        "parts": [os.path.relpath(Path(reader.prefix).resolve(), folder) for reader in readers],
    }
    origins = [reader.manifest["origins"] for reader in readers if "origins" in reader.manifest]
    if origins:
        manifest["origins"] = summed(origins)
    write_manifest(str(prefix), manifest)
    return manifest


def _parts(prefix: str) -> list[str]:
    """Return the prefixes of the files that `prefix` stands for: itself, or the parts that were merged."""
    parts = _read_manifest(prefix).get("parts")
    return [prefix] if parts is None else [str(Path(prefix).parent / part) for part in parts]


def _read_manifest(prefix: str) -> dict[str, Any]:
    path = prefix + ".json"
    try:
        manifest = json.loads(retrying(Path(path).read_text, what=path))
    except FileNotFoundError:
        if _is_index(prefix + ".idx") and Path(prefix + ".bin").exists():
            raise DataError(
                f"{path} is missing: {prefix}.bin and .idx are a pair of Megatron-LM, or shards that lost their "
                f"manifest. Make the pair shards with `python tools/shards.py adopt {prefix} --tokenizer T`, which "
                "copies nothing."
            ) from None
        raise DataError(
            f"{path} is missing: {prefix} is not a finished set of shards. Make it with "
            f"`python tools/preprocess_data.py --output-prefix {prefix} ...`.{_hint(prefix)}"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Give shards that can.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}). Preprocess the inputs again.") from error
    if not isinstance(manifest, dict) or manifest.get("version") not in range(1, MANIFEST_VERSION + 1):
        version = manifest.get("version") if isinstance(manifest, dict) else None
        raise DataError(
            f"{path} has version {version}; this package reads 1 to {MANIFEST_VERSION}. Preprocess the inputs again."
        )
    needed = {"documents", "tokens", "tokenizer"}
    if not (needed <= manifest.keys() and manifest.keys() & {"files", "parts"}):
        raise DataError(f"{path} lacks what a manifest of shards says. Preprocess the inputs again.")
    if manifest["version"] == 1 and "sha256" not in manifest:
        _say_unhashed(path)
    elif manifest.get("sha256") != manifest_hash(manifest):
        raise DataError(
            f"{path} does not say what was written: it is damaged, or was edited. Preprocess the inputs again, or "
            "restore the file from a copy."
        )
    kind = MergedManifest if "parts" in manifest else Manifest
    checked(manifest, kind, where=path, hint="Preprocess the inputs again.")
    for suffix in SUFFIXES if kind is Manifest else ():
        file = manifest["files"].get(suffix)
        if file is None or len(file["block_crc32"]) != -(-file["bytes"] // BLOCK_BYTES):
            raise DataError(f"{path} lacks {suffix}, or checksums of it. Preprocess the inputs again.")
    return manifest


def _is_index(path: str) -> bool:
    """Tell whether a file begins as megatron-core's index does."""
    if not Path(path).is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(TOKEN_MAGIC)) == TOKEN_MAGIC


@functools.cache
def _say_unhashed(path: str) -> None:
    log.info("%s was written by an older version, without a hash of its own: damage to it may not be seen", path)


def _hint(prefix: str) -> str:
    """Return which shards may have been meant by a prefix that has none, as a sentence."""
    folder = Path(prefix) if Path(prefix).is_dir() else Path(prefix).parent
    there = sorted(str(path).removesuffix(".idx") for path in folder.glob("*.idx") if ".media" not in path.name)
    near = there if folder == Path(prefix) else difflib.get_close_matches(prefix, there, n=1)
    return f" Did you mean {' or '.join(near[:3])}?" if near else ""


def _block_checksum(path: str, block: int) -> int:
    with open(path, "rb") as file:
        file.seek(block * BLOCK_BYTES)
        return zlib.crc32(file.read(BLOCK_BYTES))


def _block_checksums(path: str, progress: Callable[[int], None]) -> Iterator[int]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield zlib.crc32(block)
            progress(len(block))
