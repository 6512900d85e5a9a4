"""megatron-core's loading without the code that a checkpoint could carry."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mm.checkpoint.index import IndexUnpickler, read_index
from megatron_mm.engine import patches


@contextmanager
def only_plain_pickles(path: Path) -> Iterator[None]:
    """Let torch and megatron-core unpickle nothing but plain data from the checkpoint at `path` while this is open.

    torch 2.14 and megatron-core 0.19.2 run whatever code its index, or an object beside its tensors, names. Raises
    DataError if one names any.
    """
    read_index(path / ".metadata")  # for its error: torch hides the one of its own reading in another
    with patches.only_plain_data(path, IndexUnpickler):
        yield
