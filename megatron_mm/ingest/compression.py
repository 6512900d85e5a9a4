"""Compressed files as streams of bytes: any number of members, in the memory of one block."""

import bz2
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

from backports import zstd  # of the standard library from Python 3.14 on
from isal import igzip_lib  # four times as fast as zlib

from megatron_mm.errors import DataError

READ_BYTES = 64 * 2**10
"""Compressed bytes that are read at a time: damage is found to lie within so many."""
BLOCK_BYTES = 2**20
"""The most bytes that are unpacked at a time, however well they are compressed."""
ERRORS = (OSError, EOFError, ValueError, igzip_lib.IsalError, lzma.LZMAError, zstd.ZstdError)
"""What the libraries raise on damaged data."""


class Decompressor(Protocol):
    """What unpacks one member, as those of bz2 and lzma in the standard library do."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Return at most `max_length` of the bytes that `data`, and what was given before, unpack to."""
        ...


def _zstd() -> Decompressor:
    # The Pile and other sets made with --long refer further back than what is allowed by itself.
    _, longest = zstd.DecompressionParameter.window_log_max.bounds()
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: longest})


FORMATS: dict[bytes, Callable[[], Decompressor]] = {
    b"\x1f\x8b": lambda: igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP),
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\0": lzma.LZMADecompressor,
    b"\x28\xb5\x2f\xfd": _zstd,
}
"""What unpacks the members that begin with these bytes."""
MARK_BYTES = max(map(len, FORMATS))


def is_compressed(path: Path) -> bool:
    """Tell whether a file begins as one of the formats that are unpacked."""
    with path.open("rb") as file:
        return _format_of(file.read(MARK_BYTES)) is not None


class Blocks:
    """The bytes of a file, unpacked if it is compressed: an iterator over blocks of them, which goes on where it is."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_read = path, 0
        """Bytes of the file itself that have been read."""
        self._blocks = self._unpacked() if is_compressed(path) else self._plain()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return the next block. Raises DataError, with the bytes where it is, at damage."""
        return next(self._blocks)

    def _read(self, file: IO[bytes], num_bytes: int = READ_BYTES) -> bytes:
        data = file.read(num_bytes)
        self.num_read += len(data)
        return data

    def _plain(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while block := self._read(file, BLOCK_BYTES):
                yield block

    def _unpacked(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            data = self._read(file)
            while data:
                data = yield from self._member(file, data)
                # Tapes and some downloads are filled up with zeros behind the last member.
                while data and not (data := data.lstrip(b"\0")):
                    data = self._read(file)
                if 0 < len(data) < MARK_BYTES:
                    data += self._read(file)

    def _member(self, file: IO[bytes], data: bytes) -> Iterator[bytes]:
        """Yield what the member that begins with `data` unpacks to, and return what was read behind it."""
        make = _format_of(data)
        if make is None:
            where = self.num_read - len(data)
            raise DataError(f"it is damaged at byte {where:,}: neither a further member nor zeros are there")
        unpack = make()
        while not unpack.eof:
            try:
                block = unpack.decompress(data, BLOCK_BYTES)
            except ERRORS as error:
                where = f"within the {READ_BYTES:,} bytes before {self.num_read:,}"
                raise DataError(f"it is damaged {where}: {error}") from error
            if block:
                yield block
            data = b""
            if unpack.needs_input and not unpack.eof and not (data := self._read(file)):
                raise DataError(f"it is cut off: it ends at byte {self.num_read:,}, within its data")
        return unpack.unused_data


def _format_of(head: bytes) -> Callable[[], Decompressor] | None:
    return next((make for mark, make in FORMATS.items() if head.startswith(mark)), None)
