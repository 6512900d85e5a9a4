"""Writing shards: appended to, committed now and then, and published whole."""

import fcntl
import io
import itertools
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.modalities import BY_NAME, MODALITIES, Geometries, default_geometries
from megatron_mm.outside import parse_json
from megatron_mm.settings import NonNegativeInt
from megatron_mm.shards import origin_file
from megatron_mm.shards.format import (
    BLOCK_BYTES,
    DOCUMENT,
    ITEM,
    MANIFEST_VERSION,
    MEDIA_HEADER,
    MEDIA_MAGIC,
    MEDIA_VERSION,
    PAGE_BYTES,
    PAGED,
    PAGES_SUFFIX,
    TOKEN_DTYPES,
    TOKEN_HEADER,
    TOKEN_MAGIC,
    TOKEN_VERSION,
    TOKENIZER_SUFFIX,
    Counts,
    EncodedBatch,
    EncodedDocument,
    TokenizerInfo,
    manifest_hash,
)
from megatron_mm.shards.origin_file import ORIGIN_SUFFIX
from megatron_mm.shards.origins import Origins
from megatron_mm.source import Source
from megatron_mm.storage import PARTIAL, give_name, make_folder, remove_file, replacing

PARTS = (".bin", ".media.bin", ".rejected.jsonl", ".lengths", ".documents", ".items", ".origins")
"""Files that grow while shards are written; the last four become the two indexes and the column of origins."""
SUFFIXES = (".rejected.jsonl", PAGES_SUFFIX, ORIGIN_SUFFIX, ".bin", ".media.bin", ".media.idx", ".idx")
"""Files of finished shards, in the order in which they get their names."""
REPORT_SUFFIX = ".report.json"
"""What became of all that a run took in; for people, and the only file that no checksum covers."""
COMMIT_BYTES = 64 * 2**20
COMMIT_SECONDS = 10.0
"""A commit is due after so much: what a run that is killed has to do again."""
COPY_ELEMENTS = 2**20
"""Documents of which the index is made at a time."""


class FileState(TypedDict):
    """What a line of a journal says of a file that is being written."""

    bytes: NonNegativeInt
    crc32: NonNegativeInt
    blocks: list[NonNegativeInt]


class Journal(TypedDict):
    """What a line of a journal says: how far the writing had come."""

    progress: Any
    items: NonNegativeInt
    counts: dict[str, Any]
    files: dict[str, FileState]


class ShardWriter:
    """Writes one set of shards; nothing appears under its final name before all of it is on disk.

    `tokenizer_content` is the tokenizer.json, which is stored with them: a model that is trained on them needs it.
    Use as a context manager: leaving it publishes the shards, leaving it by an exception removes what was begun.
    With a `resume_key` what was begun stays, unless the exception is a DataError, and the next writer with the same
    key goes on after the last `commit`. `geometries`, by the name of a modality, are what media were measured by, and
    are recorded in the manifest; without them, or one of them, its defaults. Raises DataError if another process is
    writing the same prefix.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        tokenizer: TokenizerInfo,
        tokenizer_content: bytes | None = None,
        resume_key: str | None = None,
        geometries: Geometries | None = None,
    ) -> None:
        self._geometries = default_geometries() | dict(geometries or {})
        self.prefix = str(prefix)
        self._tokenizer_content = tokenizer_content
        self.tokenizer = tokenizer
        self.resume_key = resume_key
        self.counts = Counts()
        self.progress: Any = None
        """What the last `commit` of the run that this one goes on with was given; None from the start."""
        self.report: bytes | None = None
        """What P.report.json will say; None if there is none."""
        self._num_items = 0
        self._dtype_code = 8 if tokenizer.vocab_size <= np.iinfo(np.uint16).max else 4
        self._dtype = TOKEN_DTYPES[self._dtype_code]

    def __enter__(self) -> Self:
        make_folder(Path(self.prefix).parent)
        lock = open(_partial(self.prefix + ".bin"), "ab")  # closed when .bin has its name
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.prefix}: another process is writing these shards. Wait for it.") from None
        self._lock = lock
        self._files = {part: CheckedFile(_partial(self.prefix + part)) for part in PARTS}
        self._resume()
        self._committed_bytes, self._committed_at = self._num_bytes, time.monotonic()
        return self

    def add(self, document: EncodedDocument) -> None:
        """Append one document. Raises DataError as `add_batch` does."""
        self.add_batch(EncodedBatch.of([document]))

    def add_batch(self, batch: EncodedBatch) -> None:
        """Append documents.

        Raises DataError if an id is outside the vocabulary, a document is empty or of no known source, or a media item
        cannot become so many tokens, does not lie on its placeholders, or is out of order.
        """
        tokens, lengths = batch.tokens, batch.lengths
        if len(tokens) != lengths.sum(dtype=np.int64) or len(lengths) != len(batch.sources):
            raise DataError(f"{self.prefix}: {len(tokens)} tokens came for documents of {lengths.sum()}.")
        if batch.origins is not None and batch.origins.count != len(lengths):
            raise DataError(f"{self.prefix}: {batch.origins.count} origins came for {len(lengths)} documents.")
        if not len(lengths):
            return
        if lengths.min() < 1:
            raise DataError(f"{self.prefix}: document {self.counts.documents + int(lengths.argmin())} has no tokens.")
        if not 0 <= tokens.min() <= tokens.max() < self.tokenizer.vocab_size:
            raise DataError(f"{self.prefix}: a token id is outside the vocabulary of {self.tokenizer.vocab_size}.")
        if batch.sources.max() >= len(Source):
            document = self.counts.documents + int(batch.sources.argmax())
            raise DataError(f"{self.prefix}: document {document} has source {batch.sources.max()}, which is none.")
        self._check_order(batch)
        documents = np.zeros(len(lengths), DOCUMENT)
        documents["source"] = batch.sources
        items_before = np.bincount([number for number, _ in batch.media], minlength=len(lengths)).cumsum()
        documents["first_item"] = self._num_items + np.concatenate([[0], items_before[:-1]])
        self._files[".items"].write(self._write_media(batch))
        self._files[".bin"].write(tokens.astype(self._dtype, copy=False))
        self._files[".lengths"].write(lengths.astype(np.int32, copy=False))
        self._files[".documents"].write(documents)
        self._files[".origins"].write((batch.origins or Origins(len(lengths))).to_line())
        self._num_items += len(batch.media)
        self.counts.add(batch)

    def _check_order(self, batch: EncodedBatch) -> None:
        """Raise DataError unless media items come document by document, none beginning before the last has ended."""
        document = stop = 0
        for number, item in batch.media:
            lengths = BY_NAME[item.modality].unit_lengths(item.num_tokens, self._geometries[item.modality])
            known = item.num_tokens > 0 and sum(lengths) == item.num_tokens
            if number < document or (number == document and item.token_offset < stop) or not known:
                raise DataError(
                    f"{self.prefix}: document {self.counts.documents + number} has an item of {item.num_tokens} tokens "
                    f"({item.modality}) at {item.token_offset}, "
                    + ("behind one that comes later." if known else "which cannot be.")
                )
            document, stop = number, item.token_offset + item.num_tokens

    def add_rejection(self, record: dict[str, str]) -> None:
        """Note something that was left out: {"path": ..., "reason": ...}."""
        self._files[".rejected.jsonl"].write(json.dumps(record).encode() + b"\n")
        self.counts.rejected += 1

    def rejections(self, limit: int) -> list[dict[str, str]]:
        """Return the first `limit` notes of what was left out."""
        with open(self._files[".rejected.jsonl"].path) as file:
            return [json.loads(line) for line in itertools.islice(file, limit)]

    def commit_if_due(self, progress: Any) -> None:
        """Commit if enough was appended, or time went by, since the last time."""
        is_much = self._num_bytes - self._committed_bytes >= COMMIT_BYTES
        if is_much or time.monotonic() - self._committed_at >= COMMIT_SECONDS:
            self.commit(progress)

    def commit(self, progress: Any) -> None:
        """Make what was appended the place to go on from; `progress` is any JSON that says how far that is."""
        if self.resume_key is None:
            return
        for file in self._files.values():
            file.sync()
        state = {part: file.state() for part, file in self._files.items()}
        line = {"progress": progress, "items": self._num_items, "counts": asdict(self.counts), "files": state}
        self._journal.write(json.dumps(line).encode() + b"\n")
        os.fsync(self._journal.fileno())
        self._committed_bytes, self._committed_at = self._num_bytes, time.monotonic()

    @property
    def _num_bytes(self) -> int:
        return sum(file.num_bytes for file in self._files.values())

    def _resume(self) -> None:
        """Go on from the last commit of a run with the same key whose bytes are all there; from nothing otherwise."""
        states: list[dict[str, Any]] = []
        if self.resume_key is not None:
            path = _partial(self.prefix + ".journal")
            lines = _whole_lines(path)
            start = json.dumps({"key": self.resume_key, "parts": PARTS}).encode() + b"\n"
            if lines[:1] == [start]:
                states = [parse_json(line, Journal, where=path, hint="Remove it.") for line in lines[1:]]
            while states and not all(
                os.path.getsize(self._files[p].path) >= states[-1]["files"][p]["bytes"] for p in PARTS
            ):
                states.pop()
            self._journal = open(path, "ab", buffering=0)
            self._journal.truncate(sum(map(len, lines[: len(states) + 1])) if states else 0)
            if not states:
                self._journal.write(start)
        for part, file in self._files.items():
            file.restore([state["files"][part] for state in states])
        if states:
            self.progress, self._num_items = states[-1]["progress"], states[-1]["items"]
            self.counts = Counts(**states[-1]["counts"])

    def _write_media(self, batch: EncodedBatch) -> np.ndarray:
        """Append the bytes of a batch's media and return their ITEM records."""
        starts = np.concatenate([[0], np.cumsum(batch.lengths, dtype=np.int64)])
        records = np.zeros(len(batch.media), ITEM)
        for record, (number, item) in zip(records, batch.media):
            placeholder = self.tokenizer.special_ids[item.modality]
            first = int(starts[number]) + item.token_offset
            run = batch.tokens[first : min(first + item.num_tokens, starts[number + 1])]
            if len(run) != item.num_tokens or (run != placeholder).any():
                raise DataError(
                    f"{self.prefix}: document {self.counts.documents + number} has a media run at {item.token_offset} "
                    f"that is not {item.num_tokens} placeholders."
                )
            record["offset"], record["num_bytes"] = self._files[".media.bin"].num_bytes, len(item.data)
            record["crc32"], record["kind"] = zlib.crc32(item.data), BY_NAME[item.modality].kind
            record["token_offset"], record["num_tokens"] = item.token_offset, item.num_tokens
            self._files[".media.bin"].write(item.data)
        return records

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._publish()
        elif self.resume_key is None or issubclass(kind, DataError):
            for suffix in {*PARTS, *SUFFIXES, ".journal"}:
                Path(_partial(self.prefix + suffix)).unlink(missing_ok=True)
        for file in self._files.values():
            file.close()
        self._lock.close()

    def _publish(self) -> None:
        """Make the shards appear whole: data to disk, old manifest away, names in place, new manifest last."""
        finished = {suffix: self._files[suffix] for suffix in (".rejected.jsonl", ".bin", ".media.bin")}
        finished |= {".media.idx": self._media_index(), ".idx": self._token_index()}
        finished[PAGES_SUFFIX] = self._page_checksums([finished[suffix] for suffix in PAGED])
        origins = self._origin_columns(finished)
        for file in finished.values():
            file.sync()
        files = {suffix: finished[suffix].summary() for suffix in (".bin", ".idx", ".media.bin", ".media.idx")}
        modalities = {own.name: own.fingerprint(self._geometries[own.name]) for own in MODALITIES}
        manifest = {"version": MANIFEST_VERSION, **asdict(self.counts), "tokenizer": asdict(self.tokenizer)}
        manifest |= {"modalities": modalities, "files": files, "pages": finished[PAGES_SUFFIX].summary()}
        if origins is not None:
            manifest |= {"origin": finished[ORIGIN_SUFFIX].summary(), "origins": origins}
        # megatron-core's reader asks for no manifest and takes a .bin with any .idx beside it: .idx is the first of the
        # old files to go, and the last of the new ones but the manifest to come.
        for suffix in (".json", ".idx"):
            remove_file(Path(self.prefix + suffix))
        # A run that is killed from here on has nothing to go on from: half of its files have other names.
        for suffix in (".journal", *set(PARTS) - set(SUFFIXES)):
            Path(_partial(self.prefix + suffix)).unlink(missing_ok=True)
        for suffix in SUFFIXES:
            if suffix in finished:
                give_name(Path(_partial(self.prefix + suffix)), Path(self.prefix + suffix))
                finished[suffix].close()
            elif Path(self.prefix + suffix).exists():
                remove_file(Path(self.prefix + suffix))
        if self.report is None:
            remove_file(Path(self.prefix + REPORT_SUFFIX))
        else:
            with replacing(Path(self.prefix + REPORT_SUFFIX)) as file:
                file.write(self.report)
        if self._tokenizer_content is None:
            remove_file(Path(self.prefix + TOKENIZER_SUFFIX))
        else:
            with replacing(Path(self.prefix + TOKENIZER_SUFFIX)) as file:
                file.write(self._tokenizer_content)
        write_manifest(self.prefix, manifest)

    def _token_index(self) -> "CheckedFile":
        """Write the index as megatron-core reads it, one sequence a document, in bounded memory."""
        count = self.counts.documents
        index = CheckedFile(_partial(self.prefix + ".idx"))
        index.restore([])
        index.write(TOKEN_HEADER.pack(TOKEN_MAGIC, TOKEN_VERSION, self._dtype_code, count, count + 1))
        for lengths in self._elements(".lengths", np.dtype(np.int32)):
            index.write(lengths)
        pointer = 0
        for lengths in self._elements(".lengths", np.dtype(np.int32)):
            ends = pointer + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
            index.write(np.concatenate([[pointer], ends[:-1]]))
            pointer = int(ends[-1])
        for start in range(0, count + 1, COPY_ELEMENTS):
            index.write(np.arange(start, min(start + COPY_ELEMENTS, count + 1), dtype=np.int64))
        return index

    def _media_index(self) -> "CheckedFile":
        index = CheckedFile(_partial(self.prefix + ".media.idx"))
        index.restore([])
        index.write(MEDIA_HEADER.pack(MEDIA_MAGIC, MEDIA_VERSION, self.counts.documents, self._num_items))
        for part, dtype in ((".documents", DOCUMENT), (".items", ITEM)):
            for elements in self._elements(part, dtype):
                index.write(elements)
        return index

    def _origin_columns(self, finished: dict[str, "CheckedFile"]) -> dict[str, Any] | None:
        """Write where the documents came from and return its summary; None, and no file, if nothing of it is known."""
        path = _partial(self.prefix + ".origins")
        if not any(batch.is_known for batch in origin_file.read_lines(path)):
            return None
        finished[ORIGIN_SUFFIX] = CheckedFile(_partial(self.prefix + ORIGIN_SUFFIX))
        finished[ORIGIN_SUFFIX].restore([])
        return origin_file.write_columns(origin_file.read_lines(path), Sink(finished[ORIGIN_SUFFIX]))

    def _page_checksums(self, files: Sequence["CheckedFile"]) -> "CheckedFile":
        """Write the checksum of each page of `files` as they are read back. Raises DataError if they differ by then."""
        sums = CheckedFile(_partial(self.prefix + PAGES_SUFFIX))
        sums.restore([])
        for file in files:
            for block in file.read_back():
                pages = range(0, len(block), PAGE_BYTES)
                sums.write(np.asarray([zlib.crc32(block[page : page + PAGE_BYTES]) for page in pages], "<u4"))
        return sums

    def _elements(self, part: str, dtype: np.dtype) -> Iterator[np.ndarray]:
        """Yield what was appended to one of the files that become an index."""
        with open(_partial(self.prefix + part), "rb") as file:
            while len(elements := np.fromfile(file, dtype, COPY_ELEMENTS)):
                yield elements


class CheckedFile:
    """A file that is appended to, and the checksum of each block of it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_bytes = 0
        self._file = open(path, "ab", buffering=0)
        self._blocks: list[int] = []
        self._crc32 = 0  # of the block that is not full yet
        self._reported = 0  # blocks that `state` has told of

    def write(self, data: bytes | np.ndarray) -> None:
        """Append `data`."""
        view = memoryview(data if isinstance(data, bytes) else np.ascontiguousarray(data).view(np.uint8).data)
        while len(view):
            piece = view[: BLOCK_BYTES - self.num_bytes % BLOCK_BYTES]
            piece = piece[: self._file.write(piece)]
            self._crc32 = zlib.crc32(piece, self._crc32)
            self.num_bytes += len(piece)
            if self.num_bytes % BLOCK_BYTES == 0:
                self._blocks.append(self._crc32)
                self._crc32 = 0
            view = view[len(piece) :]

    def sync(self) -> None:
        """Wait until what was appended is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs beside the states that were returned before."""
        new = self._blocks[self._reported :]
        self._reported = len(self._blocks)
        return {"bytes": self.num_bytes, "crc32": self._crc32, "blocks": new}

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Cut the file back to where it was at the last of `states`."""
        self.num_bytes, self._crc32 = (states[-1]["bytes"], states[-1]["crc32"]) if states else (0, 0)
        self._blocks = [block for state in states for block in state["blocks"]]
        self._reported = len(self._blocks)
        self._file.truncate(self.num_bytes)

    def read_back(self) -> Iterator[memoryview]:
        """Yield the blocks of the file. Raises DataError at the first that is not what was written."""
        with open(self.path, "rb") as file:
            for number, crc32 in enumerate(self.summary()["block_crc32"]):
                block = file.read(BLOCK_BYTES)
                if zlib.crc32(block) != crc32:
                    raise DataError(
                        f"{self.path} does not hold what was written to it (block {number} of {BLOCK_BYTES} bytes "
                        "differs): the disk is not reliable. Write to another one."
                    )
                yield memoryview(block)

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says of the file."""
        open_block = [self._crc32] if self.num_bytes % BLOCK_BYTES else []
        return {"bytes": self.num_bytes, "block_crc32": [*self._blocks, *open_block]}


class Sink(io.RawIOBase):
    """Lets a library write into a CheckedFile."""

    def __init__(self, file: CheckedFile) -> None:
        self._checked = file

    def writable(self) -> bool:
        """Tell that it can be written to."""
        return True

    def write(self, data: Any) -> int:
        """Append `data`."""
        self._checked.write(bytes(data))
        return len(data)

    def tell(self) -> int:
        """Return the bytes that were written."""
        return self._checked.num_bytes


def write_manifest(prefix: str, manifest: dict[str, Any]) -> None:
    """Write `prefix`.json with its own hash: from then on the shards are there."""
    with replacing(Path(prefix + ".json")) as file:
        file.write(json.dumps(manifest | {"sha256": manifest_hash(manifest)}, indent=1).encode())


def _whole_lines(path: str) -> list[bytes]:
    """Return the lines of a journal, without the one that a killed run was writing."""
    if not os.path.exists(path):
        return []
    lines = Path(path).read_bytes().splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _partial(path: str) -> str:
    return path + PARTIAL
