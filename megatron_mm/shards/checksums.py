"""Comparing what is read of shards with what was written, before it is used."""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.retry import retrying
from megatron_mm.shards.format import BLOCK_BYTES, PAGE_BYTES, PAGED, PAGES_SUFFIX

RUN_PAGES = 256
"""Pages that are read at once where many are compared."""


class Checksums:
    """Reads the files of one set of shards by pages that are compared with their checksums.

    Pages of P.bin are compared at every read: they are many, and reads are small. Those of the indexes, which are
    mapped, are compared at their first use by this process. Shards of version 1 have no P.crc: pages are then the
    manifest's blocks, each compared at its first use. Threads and forks may share it. Raises DataError on opening if
    P.crc is missing or is not of this size.
    """

    def __init__(self, prefix: str, manifest: Mapping[str, Any]) -> None:
        self._prefix, self._files = prefix, manifest["files"]
        self.is_paged = "pages" in manifest
        self.page_bytes = PAGE_BYTES if self.is_paged else BLOCK_BYTES
        self._descriptors = {suffix: os.open(prefix + suffix, os.O_RDONLY) for suffix in self._files}
        self.expected = self._map_pages(manifest["pages"]["bytes"]) if self.is_paged else self._blocks()
        """By suffix, the checksum of each page: (num_pages,) uint32."""
        self._maps = {suffix: map_file(prefix + suffix, np.dtype("u1"), 0, self.size(suffix)) for suffix in PAGED[1:]}
        once = PAGED[1:] if self.is_paged else PAGED
        self._passed = {suffix: bytearray(len(self.expected[suffix])) for suffix in once}

    def size(self, suffix: str) -> int:
        """Return the bytes of a file."""
        return self._files[suffix]["bytes"]

    def descriptor(self, suffix: str) -> int:
        """Return the descriptor of a file."""
        return self._descriptors[suffix]

    def index(self, suffix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what csrc/index checks an index by: its bytes, checksums, and which pages have passed (uint8)."""
        passed = np.frombuffer(self._passed[suffix], np.uint8)
        return self._maps[suffix], self.expected[suffix], passed

    def read(self, suffix: str, offset: int, num_bytes: int) -> bytes:
        """Return bytes of a file. Raises DataError if they cannot be read, or are not those that were written."""
        if suffix != ".bin" or not self.is_paged:
            self.require(suffix, offset, num_bytes)
            return self.read_unchecked(suffix, offset, num_bytes)
        first, stop = offset // PAGE_BYTES, -(-(offset + num_bytes) // PAGE_BYTES)
        data, start = self._read_pages(suffix, first, stop), first * PAGE_BYTES
        return data[offset - start : offset - start + num_bytes]

    def read_unchecked(self, suffix: str, offset: int, num_bytes: int) -> bytes:
        """Return bytes of a file, which have another checksum. Raises DataError if they cannot be read."""
        file = self._descriptors[suffix]
        path = self._prefix + suffix
        data = _pread(file, num_bytes, offset, path)
        while len(data) < num_bytes and (more := _pread(file, num_bytes - len(data), offset + len(data), path)):
            data += more  # Linux reads at most 2 GiB at a time
        if len(data) != num_bytes:
            raise DataError(
                f"{self._prefix}{suffix}: {num_bytes} bytes at {offset} could not be read; it was cut short."
            )
        return data

    def require(self, suffix: str, offset: int, num_bytes: int) -> None:
        """Pass if the pages that hold some bytes are what was written; each is compared once. Raises DataError."""
        passed, first = self._passed[suffix], offset // self.page_bytes
        stop = (offset + num_bytes + self.page_bytes - 1) // self.page_bytes
        first = passed.find(0, first, stop)
        while first >= 0:
            end = passed.find(1, first, min(stop, first + RUN_PAGES))
            end = min(stop, first + RUN_PAGES) if end < 0 else end
            self._compare(suffix, first, end)
            first = passed.find(0, end, stop)

    def require_each(self, suffix: str, offsets: np.ndarray) -> None:
        """As `require`, for one byte at each of `offsets`: (n,) int64."""
        passed, pages = self._passed[suffix], offsets // self.page_bytes
        for page in set(pages.tolist()):
            if not passed[page]:
                self._compare(suffix, page, page + 1)

    def _compare(self, suffix: str, first: int, stop: int) -> None:
        self._read_pages(suffix, first, stop)
        self._passed[suffix][first:stop] = b"\1" * (stop - first)

    def _read_pages(self, suffix: str, first: int, stop: int) -> bytes:
        """Return pages [first, stop), compared. They are read, not mapped: mapped ones count as a process's memory."""
        start = first * self.page_bytes
        data = self.read_unchecked(suffix, start, min(stop * self.page_bytes, self.size(suffix)) - start)
        view, expected = memoryview(data), self.expected[suffix][first:stop].tolist()
        for number, crc32 in enumerate(expected):
            if zlib.crc32(view[number * self.page_bytes : (number + 1) * self.page_bytes]) != crc32:
                raise self._error(suffix, first + number)
        return data

    def _error(self, suffix: str, page: int) -> DataError:
        """Return what to say of a page: that it is damaged, or, if its block is not, that its checksum is."""
        start = page * self.page_bytes
        block = start // BLOCK_BYTES
        begin = block * BLOCK_BYTES
        data = self.read_unchecked(suffix, begin, min(BLOCK_BYTES, self.size(suffix) - begin))
        if zlib.crc32(data) == self._files[suffix]["block_crc32"][block]:
            return DataError(
                f"{self._prefix}{PAGES_SUFFIX} is damaged: what it says of {self._prefix}{suffix} from byte {start} on "
                "is not what was written. Preprocess the inputs again, or restore the file from a copy."
            )
        return differs(self._prefix + suffix, start, min(start + self.page_bytes, self.size(suffix)))

    def _blocks(self) -> dict[str, np.ndarray]:
        return {suffix: np.asarray(self._files[suffix]["block_crc32"], np.uint32) for suffix in PAGED}

    def _map_pages(self, num_bytes: int) -> dict[str, np.ndarray]:
        path = self._prefix + PAGES_SUFFIX
        counts = [-(-self.size(suffix) // PAGE_BYTES) for suffix in PAGED]
        found = os.path.getsize(path) if Path(path).exists() else None
        if not found == num_bytes == 4 * sum(counts):
            raise DataError(
                f"{path} has {found if found is not None else 'no'} bytes, and {4 * sum(counts)} belong to these "
                "shards. Preprocess the inputs again, or restore the file from a copy."
            )
        whole = map_file(path, np.dtype("<u4"), 0, sum(counts))
        return dict(zip(PAGED, np.split(whole, np.cumsum(counts)[:-1]), strict=True))


def differs(path: str, start: int, stop: int) -> DataError:
    """Return what to raise for bytes of a file that are not those that were written."""
    return DataError(
        f"{path}: bytes {start} to {stop} differ from what was written. Preprocess the inputs again, or restore the "
        "file from a copy."
    )


def _pread(file: int, num_bytes: int, offset: int, path: str) -> bytes:
    return retrying(lambda: os.pread(file, num_bytes, offset), what=path)


def map_file(path: str, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """Return `count` elements of a file without reading them."""
    return np.asarray(np.memmap(path, dtype, "r", offset, (count,))) if count else np.zeros(0, dtype)
