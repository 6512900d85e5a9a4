"""The tensors of a Hugging Face folder, read by blocks of rows.

Nothing here holds a whole tensor, or executes what a file says.
"""

import math
import os
import struct
from pathlib import Path
from typing import Annotated, Any, TypedDict

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from megatron_mm.checkpoint.index import TensorInfo, read_into
from megatron_mm.errors import DataError
from megatron_mm.outside import checked, file_name, load_json
from megatron_mm.settings import NonNegativeInt

SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
MAX_HEADER_BYTES = 100 << 20
"""The most bytes of a safetensors file's header, as its specification has it."""


class Index(TypedDict):
    """What the index of a Hugging Face folder must say: the file of each tensor."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    weight_map: dict[str, str]


class Entry(TypedDict):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


class SafetensorsReader:
    """The tensors of a Hugging Face folder: model.safetensors, or the shards that its index lists."""

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[int, int, Path]] = {}
        for file in safetensors_files(Path(folder)):
            descriptor = os.open(file, os.O_RDONLY)
            for name, (info, offset) in read_header(file).items():
                self.tensors[name], self._places[name] = info, (descriptor, offset, file)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start to stop of a tensor."""
        info = self.tensors[name]
        descriptor, offset, file = self._places[name]
        block = torch.empty(stop - start, info.row_bytes, dtype=torch.uint8)
        read_into(descriptor, block, offset + start * info.row_bytes, file)
        return block.view(info.dtype).view(stop - start, *info.shape[1:])


def safetensors_files(folder: Path) -> list[Path]:
    """Return the files of weights in a folder. Raises DataError if its index names others, or one is not there."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise DataError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(checked(load_json(index.read_bytes()), Index, where="it")["weight_map"].values()))
    except ValueError as error:
        raise DataError(f"{index} is not an index of safetensors: {error}") from error
    for name in names:
        file_name(name, where=index, hint="Copy the folder again.")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}, which {index.name} lists: copy the folder again.")
    return [folder / name for name in names]


def read_header(file: Path) -> dict[str, tuple[TensorInfo, int]]:
    """Return (what it is, byte offset) of every tensor of a safetensors file.

    Raises DataError if the file is no safetensors file, is cut short, or holds types that are no weights.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise DataError(f"{file} is not a safetensors file, or is cut short: it has {size} bytes.")
        try:
            header = checked(load_json(opened.read(length)), dict[str, Any], where="its header")
            header.pop("__metadata__", None)
            found = checked(header, dict[str, Entry], where="its header")
        except ValueError as error:
            raise DataError(f"{file} is not a safetensors file: {error}") from error
    tensors = {}
    for name, entry in found.items():
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in DTYPES:
            raise DataError(f"{file}: {name} is {dtype}; weights of {', '.join(DTYPES)} are read.")
        if not shape:
            raise DataError(f"{file}: {name} is a single number, and no tensor of a model that is read is one.")
        info = TensorInfo(shape, DTYPES[dtype])
        if last - first != math.prod(shape) * info.dtype.itemsize or 8 + length + last > size:
            raise DataError(f"{file} is cut short or damaged: {name} ends at byte {8 + length + last} of {size}.")
        tensors[name] = (info, 8 + length + first)
    return tensors
