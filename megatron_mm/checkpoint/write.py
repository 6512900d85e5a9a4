"""Writing a checkpoint of weights alone, block by block, without a process group: what an import makes."""

import hashlib
import json
import os
import pickle
import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from tqdm import tqdm

from megatron_mm.checkpoint.format import MANIFEST, SEAL, seal_of
from megatron_mm.checkpoint.index import TensorInfo, check_archive
from megatron_mm.storage import PARTIAL, SYNC_BYTES, hash_file, make_folder, publish_folder, require_space

FILE_BYTES = 4 << 30
"""The most bytes of one file of the checkpoint."""

Weight = tuple[str, TensorInfo, Iterable[Tensor]]
"""Name of a tensor, what it is, and its values as blocks of rows, which are read when they are written."""


def write_weights(out: Path, weights: Sequence[Weight], *, num_layers: int, files: Mapping[str, bytes]) -> None:
    """Write the checkpoint `out` of step 0 from `weights`, with `files` of those names beside them.

    It has its name only when it is whole and on the disk, and each tensor is compared with its checksum on the way. Its
    manifest holds the SHA-256 of every file, taken as it was written, and its own.
    Raises DataError if the disk lacks the room or does not hold what was written, OSError if it refuses.
    """
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # nothing of it is looked at again
    make_folder(partial)
    require_space(partial, sum(info.shape[0] * info.row_bytes for _, info, _ in weights))
    hashes = _write(partial, weights, num_layers=num_layers)
    (partial / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    for name, content in files.items():
        (partial / name).write_bytes(content)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    listed = {name: hashes.get(name) or hash_file(partial / name) for name in sizes}
    manifest = {"step": 0, "bytes": sizes, "sha256": listed}
    (partial / MANIFEST).write_text(json.dumps(manifest | {SEAL: seal_of(manifest)}, indent=1))
    publish_folder(partial, out)


def _write(folder: Path, weights: Sequence[Weight], *, num_layers: int) -> dict[str, str]:
    """Write tensors as megatron-core lays them out: global ones, equal layers stacked, in blocks of rows.

    Returns the SHA-256 of each file of tensors, by its name.
    """
    chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    sizes: dict[str, torch.Size] = {}
    dtypes: dict[str, torch.dtype] = {}
    total = sum(info.shape[0] * info.row_bytes for _, info, _ in weights)
    # One block is read while another one is written and those before are read back.
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="import") as progress,
        ThreadPoolExecutor(1) as writer,
        _Files(folder) as file,
    ):
        written: dict[MetadataIndex, Future[_StorageInfo]] = {}
        place = None
        for name, info, blocks in weights:
            key, layer = _stacked(name)
            row = 0
            sizes[key] = torch.Size((*((num_layers,) if layer is not None else ()), *info.shape))
            dtypes[key] = info.dtype
            for block in blocks:
                offsets = torch.Size((*((layer,) if layer is not None else ()), row, *(0,) * (block.dim() - 1)))
                row += block.shape[0]
                value = block if layer is None else block.unsqueeze(0)
                chunks[key].append(ChunkStorageMetadata(offsets, value.shape))
                if place is not None:
                    written[place].result()
                place = MetadataIndex(key, offsets)
                written[place] = writer.submit(file.append, value)
                progress.update(block.nbytes)
        stored = {place: pending.result() for place, pending in written.items()}
        # megatron-core looks for what is not a tensor here: a run's scheduler, none in bare weights.
        stored[MetadataIndex("common_state/shard_0_1")] = file.append([{}])
    described: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtypes[key]), size, chunks[key]) for key, size in sizes.items()
    }
    described["common_state/shard_0_1"] = BytesStorageMetadata()
    with (folder / ".metadata").open("wb") as index:
        pickle.dump(Metadata(described, storage_data=stored), index)
    return file.hashes


class _Hashed:
    """A file that is appended to, and the SHA-256 of what was."""

    def __init__(self, path: Path) -> None:
        self._file, self._digest, self._position = path.open("wb"), hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Append `data`."""
        self._digest.update(data)
        self._position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        """Return how many bytes were appended."""
        return self._position

    def flush(self) -> None:
        """Let other descriptors see what was appended."""
        self._file.flush()

    def close(self) -> str:
        """Close the file and return its hash."""
        self._file.close()
        return self._digest.hexdigest()


class _Files:
    """Appends archives to files of at most FILE_BYTES, and compares each with its checksum on the way to the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self.hashes: dict[str, str] = {}
        """Of the files that are whole, by name."""
        self._checker, self._pending = ThreadPoolExecutor(1), None
        self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._end()
        finally:
            self._checker.shutdown()

    def append(self, value: Any) -> _StorageInfo:
        """Write a tensor, or a plain object, as torch.save does; return where it is."""
        if self._file.tell() > FILE_BYTES:
            self._end()
            self._number += 1
            self._begin()
        start = self._file.tell()
        torch.save(value, self._file)
        end = self._file.tell()
        self._unchecked.append((start, end - start))
        if end - self._unchecked[0][0] > SYNC_BYTES:
            self._check()
        return _StorageInfo(self._path.name, start, end - start)

    def _begin(self) -> None:
        self._path = self._folder / f"__0_{self._number}.distcp"
        self._file = _Hashed(self._path)
        self._unchecked: list[tuple[int, int]] = []

    def _end(self) -> None:
        self._check()
        self._pending.result()
        self.hashes[self._path.name] = self._file.close()

    def _check(self) -> None:
        self._file.flush()
        if self._pending is not None:
            self._pending.result()
        self._pending = self._checker.submit(_sync_and_check, self._path, self._unchecked)
        self._unchecked = []


def _sync_and_check(path: Path, places: list[tuple[int, int]]) -> None:
    """Bring a file to the disk and compare the archives at (offset, length) with their checksums."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        for offset, length in places:
            check_archive(descriptor, offset, length, where=path)
    finally:
        os.close(descriptor)


def _stacked(name: str) -> tuple[str, int | None]:
    """Return the name under which a tensor is stacked with those of the other layers, and its layer."""
    if not name.startswith("decoder.layers."):
        return name, None
    layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
    return f"decoder.layers.{rest}", int(layer)
