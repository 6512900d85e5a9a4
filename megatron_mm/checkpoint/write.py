"""Writing a checkpoint of weights alone, block by block, without a process group: what an import makes."""

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

from megatron_mm.checkpoint.format import MANIFEST
from megatron_mm.checkpoint.index import TensorInfo, check_archive
from megatron_mm.storage import PARTIAL, SYNC_BYTES, make_folder, publish_folder, require_space

FILE_BYTES = 4 << 30
"""The most bytes of one file of the checkpoint."""

Weight = tuple[str, TensorInfo, Iterable[Tensor]]
"""Name of a tensor, what it is, and its values as blocks of rows, which are read when they are written."""


def write_weights(out: Path, weights: Sequence[Weight], *, num_layers: int, files: Mapping[str, bytes]) -> None:
    """Write the checkpoint `out` of step 0 from `weights`, with `files` of those names beside them.

    It has its name only when it is whole and on the disk, and each tensor is compared with its checksum on the way.
    Raises DataError if the disk lacks the room or does not hold what was written, OSError if it refuses.
    """
    partial = out.with_name(out.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # nothing of it is looked at again
    make_folder(partial)
    require_space(partial, sum(info.shape[0] * info.row_bytes for _, info, _ in weights))
    _write(partial, weights, num_layers=num_layers)
    (partial / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    for name, content in files.items():
        (partial / name).write_bytes(content)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps({"step": 0, "bytes": sizes}, indent=1))
    publish_folder(partial, out)


def _write(folder: Path, weights: Sequence[Weight], *, num_layers: int) -> None:
    """Write tensors as megatron-core lays them out: global ones, equal layers stacked, in blocks of rows."""
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


class _Files:
    """Appends archives to files of at most FILE_BYTES, and compares each with its checksum on the way to the disk."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
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
        self._file = self._path.open("wb")
        self._unchecked: list[tuple[int, int]] = []

    def _end(self) -> None:
        self._check()
        self._pending.result()
        self._file.close()

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
