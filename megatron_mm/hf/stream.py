"""Tensors from one form on disk to the other, a block of rows at a time: safetensors shards, written and checked."""

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_mm.errors import DataError
from megatron_mm.hf.tensors import BLOCK_BYTES, SAFETENSORS_NAMES, TensorInfo, TensorSource, row_blocks
from megatron_mm.hf.weight_map import IGNORED, KEPT, Target

SYNC_BYTES = 256 << 20
"""Bytes after which what was written is pushed to the disk: a page cache full of unwritten pages stalls the machine."""


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


def check_complete(source: TensorSource, targets: Sequence[Target], *, where: str) -> None:
    """Pass if `targets` take every row of every tensor of `source` that they know. Raises DataError otherwise."""
    taken: dict[str, int] = {}
    for target in targets:
        for rows in target.rows:
            taken[rows.source] = max(taken.get(rows.source, 0), rows.stop)
        if target.plus:
            taken[target.plus] = source.tensors[target.plus].shape[0]
    for name, info in source.tensors.items():
        if not name.startswith(KEPT) and not name.endswith(IGNORED) and taken.get(name, 0) != info.shape[0]:
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


class ShardWriter:
    """Writes shards under a folder, one file after the other, and reads each back while the next one is written.

    A file appears under its name only when it is whole and on the disk. `done` maps the path of each such file to its
    sha256; an interrupted export goes on behind them.
    """

    def __init__(self, folder: Path, *, done: dict[str, str], progress: tqdm) -> None:
        self.folder, self.done, self.progress = folder, done, progress
        self._checker = ThreadPoolExecutor(1)
        self._checks: list[Future[None]] = []

    def write(self, shard: Shard, source: TensorSource) -> None:
        """Write one shard, unless it is there. Raises DataError if the disk is full."""
        final = self.folder / shard.path
        if shard.path not in self.done or not final.exists():
            partial = final.with_name(final.name + ".partial")
            try:
                self.done[shard.path] = self._write(partial, shard, source)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise _explained(error, self.folder, shard.num_bytes) from error
            os.replace(partial, final)
        else:
            self.progress.update(shard.num_bytes)
        self._checks.append(self._checker.submit(check_sha256, final, self.done[shard.path]))

    def _write(self, path: Path, shard: Shard, source: TensorSource) -> str:
        digest = hashlib.sha256()
        # The thread ends before the file is closed: it must not write to another file under the same descriptor.
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
            os.posix_fallocate(file.fileno(), 0, len(shard.header()) + shard.num_bytes)
            pending = writer.submit(_append, file.fileno(), digest, shard.header(), 0)
            position = len(shard.header())
            for target, info in shard.tensors:
                for block in blocks(target, source, dtype=info.dtype):
                    data = memoryview(block.reshape(-1).view(torch.uint8).numpy())
                    pending.result()  # one block is read while another one is written
                    pending = writer.submit(_append, file.fileno(), digest, data, position)
                    position += data.nbytes
                    self.progress.update(data.nbytes)
            pending.result()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that it is read back from the disk
        return digest.hexdigest()

    def finish(self) -> None:
        """Wait until every shard has been read back. Raises DataError if one is not what was written."""
        try:
            for check in self._checks:
                check.result()
        finally:
            self._checker.shutdown()


def _append(descriptor: int, digest: "hashlib._Hash", data: bytes | memoryview, position: int) -> None:
    digest.update(data)
    view = memoryview(data)
    start = position
    while view.nbytes:
        count = os.pwrite(descriptor, view, position)
        position, view = position + count, view[count:]
    if position // SYNC_BYTES != start // SYNC_BYTES:
        os.fdatasync(descriptor)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read by blocks."""
    digest = hashlib.sha256()
    buffer = bytearray(min(BLOCK_BYTES, 8 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Pass if a file is what was written. Raises DataError otherwise."""
    if not path.exists():
        raise DataError(f"{path} is missing: the export is damaged. Write it again.")
    if sha256_of(path) != expected:
        raise DataError(f"{path} is not what was written (its sha256 differs): remove it, and write it again.")


def require_space(folder: Path, num_bytes: int) -> None:
    """Pass if `num_bytes` fit on the disk of `folder`. Raises DataError otherwise."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise DataError(f"{num_bytes / 1e9:.1f} GB are to be written to {folder}, but {free / 1e9:.1f} GB are free.")


def _explained(error: OSError, folder: Path, num_bytes: int) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return DataError(
        f"the disk of {folder} is full: the next {num_bytes / 1e9:.2f} GB do not fit. Make room and run the same "
        "command again; it goes on behind the shards that are whole."
    )
