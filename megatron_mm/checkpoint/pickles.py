"""megatron-core's loading without the code that a checkpoint could carry."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, filesystem
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.planner import ReadItem

from megatron_mm.checkpoint.index import IndexUnpickler, read_index
from megatron_mm.errors import DataError


@contextmanager
def only_plain_pickles(path: Path) -> Iterator[None]:
    """Let torch and megatron-core unpickle nothing but plain data from the checkpoint at `path` while this is open.

    torch 2.14 and megatron-core 0.19.2 run whatever code its index, or an object beside its tensors, names. Raises
    DataError if one names any.
    """

    def load_bytes(planner: DefaultLoadPlanner, item: ReadItem, value: BytesIO) -> None:
        name = item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise DataError(f"{path}: {name} is not plain data, so it is not opened: {error}") from error
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], loaded)
        else:
            planner.state_dict[name] = loaded

    read_index(path / ".metadata")  # for its error: torch hides the one of its own reading in another
    index = SimpleNamespace(load=lambda file: IndexUnpickler(file).load())
    with (
        mock.patch.object(filesystem, "pickle", index),
        mock.patch.object(DefaultLoadPlanner, "load_bytes", load_bytes),
    ):
        yield
