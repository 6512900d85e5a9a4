"""The index of a checkpoint, and its tensors one by one, read by blocks of rows.

Nothing here imports megatron-core, opens a process group, holds a whole tensor, or executes what a file says.
"""

import functools
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_mm.checkpoint.verify import check_outline
from megatron_mm.errors import DataError, StorageFailed
from megatron_mm.outside import file_name
from megatron_mm.retry import retrying

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of weights, as settings and commands call them."""
BLOCK_BYTES = 32 << 20
"""Bytes that are read, converted and written at a time: they bound the memory, whatever the size of a tensor."""
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(str(dtype).removeprefix("torch.") for dtype in PRECISIONS.values()), "int64", "uint8"),
    "pathlib": ("PosixPath",),
}
"""All that the index of a checkpoint may name; any other class in it is refused before it is looked up."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of everything behind the first dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that are read by rows."""

    tensors: dict[str, TensorInfo]

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop of a tensor."""


def row_blocks(start: int, stop: int, *, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut rows start to stop into blocks of at most BLOCK_BYTES, or of one row."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor as one rank wrote it: where it stands in the tensor, and where its bytes are."""

    first_row: int
    rows: int
    first_column: int
    """Columns are elements of everything behind the first dimension."""
    columns: int
    file: str
    offset: int
    """Where its zip archive begins in the file; `layer_offset` bytes into its data if it holds several layers."""
    length: int
    layer_offset: int
    num_bytes: int
    """The bytes of all layers in it."""


class CheckpointReader:
    """The model's tensors in a checkpoint of any layout, each whole and under one name, layer by layer.

    megatron-core stacks equal layers into one tensor, or keeps them apart, and may cut a SwiGLU weight into its halves;
    all are read as `decoder.layers.N.name`. Optimizer state is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.step = check_outline(self.path)
        self._files: dict[str, int] = {}
        self._data: dict[tuple[str, int], int] = {}
        self.keys: set[str] = set()
        """As they are on the disk, stacked or not."""
        self.tensors: dict[str, TensorInfo] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        metadata = read_index(self.path / ".metadata")
        try:
            stored = {(key.fqn, tuple(key.offset or ())): value for key, value in metadata.storage_data.items()}
            for key, value in metadata.state_dict_metadata.items():
                if hasattr(value, "chunks") and not key.startswith("optimizer."):
                    self.keys.add(key)
                    self._add(key, value, stored)
            self._join_halves()
        except (TypeError, AttributeError, LookupError, AssertionError) as error:
            raise DataError(f"{self.path / '.metadata'} is damaged: {type(error).__name__}: {error}") from error

    def _add(self, key: str, value: Any, stored: dict[tuple[str, tuple[int, ...]], Any]) -> None:
        """List tensor `key`, or each layer of a stacked one."""
        dtype, size = value.properties.dtype, tuple(value.size)
        if dtype not in PRECISIONS.values():
            raise DataError(f"{self.path}: {key} is {dtype}, which is no type of a weight.")
        stacked = re.fullmatch(r"(decoder\.layers)\.(\D.*)", key)
        names = [f"{stacked[1]}.{n}.{stacked[2]}" for n in range(size[0])] if stacked else [key]
        shape = size[1:] if stacked else size
        for name in names:
            self.tensors[name], self._chunks[name] = TensorInfo(shape, dtype), []
        for chunk in value.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            place = stored[key, offsets]
            if place.transform_descriptors:
                raise DataError(f"{self.path}: {key} is compressed or encrypted, which is not read.")
            layers = range(offsets[0], offsets[0] + sizes[0]) if stacked else range(1)
            inner, extent = (offsets[1:], sizes[1:]) if stacked else (offsets, sizes)
            num_bytes = math.prod(extent) * dtype.itemsize
            first_column = math.prod(shape[2:]) * inner[1] if len(shape) > 1 else 0
            columns = math.prod(extent[1:])
            for number, layer in enumerate(layers):
                self._chunks[names[layer]].append(
                    Chunk(
                        *(inner[0], extent[0], first_column, columns),
                        *(place.relative_path, place.offset, place.length, number * num_bytes),
                        num_bytes * len(layers),
                    )
                )

    def _join_halves(self) -> None:
        """Join a SwiGLU weight that was saved as `weight_w` (gate) and `weight_v` (up)."""
        for gate in [name for name in self.tensors if name.endswith(".weight_w")]:
            up, whole = gate[:-1] + "v", gate[:-2]
            info, below = self.tensors.pop(gate), self.tensors.pop(up)
            self.tensors[whole] = TensorInfo((info.shape[0] + below.shape[0], *info.shape[1:]), info.dtype)
            moved = [
                Chunk(**{**vars(chunk), "first_row": chunk.first_row + info.shape[0]}) for chunk in self._chunks.pop(up)
            ]
            self._chunks[whole] = self._chunks.pop(gate) + moved

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop of a tensor. Raises DataError if they are not all there."""
        info = self.tensors[name]
        itemsize = info.dtype.itemsize
        block = torch.empty(stop - start, info.row_bytes, dtype=torch.uint8)
        read = 0
        for chunk in self._chunks[name]:
            first, last = max(start, chunk.first_row), min(stop, chunk.first_row + chunk.rows)
            if first >= last:
                continue
            width = chunk.columns * itemsize
            offset = self._data_offset(chunk) + chunk.layer_offset + (first - chunk.first_row) * width
            target = block[first - start : last - start]
            whole = width == info.row_bytes
            part = target if whole else torch.empty(last - first, width, dtype=torch.uint8)
            read_into(self._open(chunk.file), part, offset, self.path / chunk.file)
            if not whole:
                target[:, chunk.first_column * itemsize :][:, :width] = part
            read += part.numel()
        if read != block.numel():
            raise DataError(f"{self.path}: {read} of {block.numel()} bytes of {name} are there.")
        return block.view(info.dtype).view(stop - start, *info.shape[1:])

    def check(self) -> None:
        """Compare every tensor with the checksum of its archive. Raises DataError at the first that differs."""
        for chunk in {(c.file, c.offset): c for chunks in self._chunks.values() for c in chunks}.values():
            check_archive(self._open(chunk.file), chunk.offset, chunk.length, where=self.path / chunk.file)

    def _open(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(self.path / name, os.O_RDONLY)
        return self._files[name]

    def _data_offset(self, chunk: Chunk) -> int:
        """Return where the raw bytes of a chunk start: torch.save puts them, uncompressed, into a zip archive."""
        key = (chunk.file, chunk.offset)
        if key not in self._data:
            window = _Window(self._open(chunk.file), chunk.offset, chunk.length)
            try:
                (record,) = [r for r in zipfile.ZipFile(window).infolist() if r.filename.endswith("/data/0")]
            except (zipfile.BadZipFile, ValueError) as error:
                raise DataError(f"{self.path / chunk.file} is damaged at byte {chunk.offset}: {error}") from error
            if record.file_size != chunk.num_bytes or record.compress_type != zipfile.ZIP_STORED:
                raise DataError(
                    f"{self.path / chunk.file}: {record.file_size} bytes stand where {chunk.num_bytes} should."
                )
            window.seek(record.header_offset + 26)  # of the local header: lengths of its name and of its extra field
            name_bytes, extra_bytes = struct.unpack("<HH", window.read(4))
            self._data[key] = chunk.offset + record.header_offset + 30 + name_bytes + extra_bytes
        return self._data[key]


def check_archive(descriptor: int, offset: int, length: int, *, where: Path) -> None:
    """Compare what torch.save wrote to a part of a file with its checksum. Raises DataError if they differ."""
    try:
        bad = zipfile.ZipFile(_Window(descriptor, offset, length)).testzip()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        bad = error
    if bad is not None:
        raise DataError(f"{where} is damaged at byte {offset}: {bad}")
    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)


def read_into(descriptor: int, block: Tensor, offset: int, file: Path) -> None:
    """Fill `block` from a file. Raises DataError if it ends before."""
    view = memoryview(block.view(-1).numpy())
    start = offset
    while view.nbytes:
        count = retrying(functools.partial(os.preadv, descriptor, [view], offset), what=file)
        if not count:
            raise DataError(f"{file} is cut short: byte {offset} is missing.")
        offset, view = offset + count, view[count:]
    os.posix_fadvise(descriptor, start, offset - start, os.POSIX_FADV_DONTNEED)


class _Window(RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._position = descriptor, offset, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, base + position)
        return self._position

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._length - self._position)
        count, start = rest if size < 0 else min(size, rest), self._offset + self._position
        data = retrying(lambda: os.pread(self._descriptor, count, start), what="a checkpoint")
        self._position += len(data)
        return data


class IndexUnpickler(pickle.Unpickler):
    """Reads the index of a checkpoint. Raises DataError at the first class in it that no index needs."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that an index may name."""
        if name not in METADATA_CLASSES.get(module, ()):
            raise DataError(f"its index names {module}.{name}, which no checkpoint needs: it is not opened.")
        return super().find_class(module, name)


def read_index(path: Path) -> Any:
    """Return the index of a checkpoint. Raises DataError if it is damaged or names what no index needs."""
    try:
        metadata = IndexUnpickler(BytesIO(retrying(path.read_bytes, what=path))).load()
        for place in (metadata.storage_data or {}).values():
            file_name(place.relative_path, where="it")
            if not all(type(number) is int and 0 <= number < 2**63 for number in (place.offset, place.length)):
                raise DataError(f"its part of {place.relative_path} lies nowhere.")
        return metadata
    except (StorageFailed, PermissionError):
        raise
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}") from error
