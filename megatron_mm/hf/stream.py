"""Tensors from one form on disk to the other, a block of rows at a time: safetensors shards, written and checked."""

import errno
import hashlib
import json
import os
import struct
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_mm.checkpoint.index import TensorInfo, TensorSource, row_blocks
from megatron_mm.errors import DataError, StorageFailed
from megatron_mm.hf.tensors import SAFETENSORS_NAMES
from megatron_mm.hf.weight_map import Target
from megatron_mm.storage import READ_BYTES, SYNC_BYTES, hash_file, replacing


def info_of(target: Target, source: TensorSource, *, dtype: torch.dtype | None = None) -> TensorInfo:
    """Return what `target` will be.

    Raises DataError if `source` lacks what it is made of, or has it in another shape.
    """
    needed = [rows.source for rows in target.rows] + [name for name in (target.plus, target.fill_like) if name]
    missing = [name for name in needed if name not in source.tensors]
    if missing:
        raise DataError(f"{missing[0]} is missing, of which {target.name} is made: it is another model's.")
    if not target.rows:
        like = source.tensors[target.fill_like]
        return TensorInfo(like.shape[-1:], dtype or like.dtype)
    first = source.tensors[target.rows[0].source]
    for rows in target.rows:
        info = source.tensors[rows.source]
        if info.shape[1:] != first.shape[1:] or info.dtype != first.dtype or rows.stop > info.shape[0]:
            raise DataError(
                f"{rows.source} is {info.dtype} {info.shape}, where {target.name} needs rows {rows.start} to "
                f"{rows.stop} of {first.dtype} {first.shape[1:]}: it is another model's."
            )
    num_rows = sum(rows.stop - rows.start for rows in target.rows)
    return TensorInfo((num_rows, *first.shape[1:]), dtype or first.dtype)


def check_complete(source: TensorSource, targets: Sequence[Target], *, where: str, without: Collection[str]) -> None:
    """Pass if `targets` take every row of every tensor of `source` but those `without`. Raises DataError otherwise."""
    taken: dict[str, int] = {}
    for target in targets:
        for rows in target.rows:
            taken[rows.source] = max(taken.get(rows.source, 0), rows.stop)
        if target.plus:
            taken[target.plus] = source.tensors[target.plus].shape[0]
    for name, info in source.tensors.items():
        if name not in without and taken.get(name, 0) != info.shape[0]:
            raise DataError(
                f"{where}: {name} has {info.shape[0]} rows, of which its configuration knows {taken.get(name, 0)}: "
                "they do not belong together."
            )


def blocks(target: Target, source: TensorSource, *, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield `target` as blocks of rows in `dtype`.

    What is added is added in the type that it was trained in, so that the sum is the training's to the bit; zeros are
    not added at all, which keeps the sign of a negative zero.
    """
    if not target.rows:
        yield torch.full(source.tensors[target.fill_like].shape[-1:], target.fill, dtype=dtype)
        return
    plus = None
    if target.plus is not None:
        plus = source.read_rows(target.plus, 0, source.tensors[target.plus].shape[0])
        plus = plus if plus.any() else None
    for rows in target.rows:
        row_bytes = source.tensors[rows.source].row_bytes
        for start, stop in row_blocks(rows.start, rows.stop, row_bytes=row_bytes):
            block = source.read_rows(rows.source, start, stop)
            if plus is not None:
                block = block + (plus if block.dim() > 1 else plus[start:stop])
            yield block.to(dtype)


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be: its path in the export, and the tensors in it."""

    path: str
    tensors: tuple[tuple[Target, TensorInfo], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(info.shape[0] * info.row_bytes for _, info in self.tensors)

    def header(self) -> bytes:
        """Return what stands before the tensors."""
        entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for target, info in self.tensors:
            stop = offset + info.shape[0] * info.row_bytes
            dtype = SAFETENSORS_NAMES[info.dtype]
            entries[target.name] = {"dtype": dtype, "shape": list(info.shape), "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def pack(
    tensors: Sequence[tuple[Target, TensorInfo]], *, shard_bytes: int
) -> list[tuple[tuple[Target, TensorInfo], ...]]:
    """Deal tensors to shards of at most `shard_bytes`, or of one tensor, in their order."""
    shards: list[list[tuple[Target, TensorInfo]]] = [[]]
    filled = 0
    for target, info in tensors:
        size = info.shape[0] * info.row_bytes
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((target, info))
        filled += size
    return [tuple(shard) for shard in shards if shard]


def write_shard(folder: Path, shard: Shard, source: TensorSource, *, progress: tqdm) -> str:
    """Write one shard under `folder`, read it back as it grows, and return its sha256.

    It appears under its name only when it is whole and on the disk. Raises StorageFailed if the disk is full, DataError
    if what is read back is not what was written.
    """
    try:
        with replacing(folder / shard.path) as file:
            return _write(file, shard, source, progress)
    except OSError as error:
        raise explained(error, folder, shard.num_bytes) from error


def _write(file: BinaryIO, shard: Shard, source: TensorSource, progress: tqdm) -> str:
    descriptor, written, header = file.fileno(), hashlib.sha256(), shard.header()
    # The threads end before the file is closed: they must not go on with another file under the same descriptor.
    with ThreadPoolExecutor(1) as writer, _ReadBack(descriptor) as back:
        os.posix_fallocate(descriptor, 0, len(header) + shard.num_bytes)
        pending = writer.submit(_append, descriptor, written, header, 0)
        position = len(header)
        for target, info in shard.tensors:
            for block in blocks(target, source, dtype=info.dtype):
                data = memoryview(block.reshape(-1).view(torch.uint8).numpy())
                pending.result()  # one block is read while another one is written and one before it read back
                back.follow(position)
                pending = writer.submit(_append, descriptor, written, data, position)
                position += data.nbytes
                progress.update(data.nbytes)
        pending.result()
        found = back.finish(position)
    if found != written.hexdigest():
        raise DataError(
            f"{file.name} does not hold what was written to it (its sha256 differs): the disk is not reliable."
        )
    return found


class _ReadBack:
    """Pushes a growing file to the disk and hashes what it then holds, a window behind its writer.

    It is read while it is in the page cache: the disk is not read a second time (`check_sha256` does that), and no more
    than two windows of unwritten pages stand against the machine's memory.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._digest = descriptor, hashlib.sha256()
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._checker, self._pending, self._start = ThreadPoolExecutor(1), None, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._checker.shutdown()

    def follow(self, stop: int) -> None:
        """Take note that everything before byte `stop` is written."""
        if stop - self._start >= SYNC_BYTES:
            self._submit(stop)

    def finish(self, stop: int) -> str:
        """Return the sha256 of the file, which ends at byte `stop` and is on the disk by then."""
        self._submit(stop)
        self._pending.result()
        return self._digest.hexdigest()

    def _submit(self, stop: int) -> None:
        if self._pending is not None:
            self._pending.result()
        self._pending = self._checker.submit(self._check, self._start, stop)
        self._start = stop

    def _check(self, start: int, stop: int) -> None:
        os.fdatasync(self._descriptor)
        position = start
        while position < stop:
            count = os.preadv(self._descriptor, [self._buffer[: stop - position]], position)
            if not count:
                raise DataError(f"a shard ends at byte {position} of {stop} that were written to it.")
            self._digest.update(self._buffer[:count])
            position += count
        os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_DONTNEED)


def _append(descriptor: int, digest: "hashlib._Hash", data: bytes | memoryview, position: int) -> None:
    digest.update(data)
    view = memoryview(data)
    while view.nbytes:
        count = os.pwrite(descriptor, view, position)
        position, view = position + count, view[count:]


def check_sha256(path: Path, expected: str) -> None:
    """Pass if a file is what was written. Raises DataError otherwise."""
    if not path.exists():
        raise DataError(f"{path} is missing: the export is damaged. Write it again.")
    if hash_file(path, keep_cached=False) != expected:
        raise DataError(f"{path} is not what was written (its sha256 differs): remove it, and write it again.")


def explained(error: OSError, folder: Path, num_bytes: int) -> Exception:
    """Return what to raise for an error of the disk under `folder`: StorageFailed if it is that it is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    what = f"the next {num_bytes / 1e9:.2f} GB" if num_bytes else "the small files around the weights"
    return StorageFailed(
        f"the disk of {folder} is full ({error.strerror}): {what} do not fit. Make room and "
        "run the same command again; an export goes on behind the shards that are whole."
    )
