"""The in-memory border between data and model: one micro-batch, as one rank needs it."""

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class MediaUnits:
    """The images, or the one-second chunks of sound, of one micro-batch.

    Units are dealt to the tensor ranks of the first stage in turn (unit u to rank u mod tp), encoded there once, and
    their features all-gathered; each rank then projects the rows that fall into its own sequence shard.
    """

    inputs: tuple[Tensor, ...]
    """This rank's units, in order: images (3, 224, 224) uint8, or waveforms (num_samples,) float32 at 16 kHz."""
    rows_per_rank: int
    """Feature rows that each tensor rank contributes to the gather: the most that any of them has."""
    rows: Tensor
    """(num_local_tokens,) int64: which gathered rows fall into this rank's sequence shard."""
    positions: Tensor
    """(num_local_tokens,) int64: where they go in it."""


@dataclass(frozen=True)
class MicroBatch:
    """`micro_batch_size` packed samples end to end, as one row of `num_tokens` positions.

    Documents never attend to one another, so samples need no batch dimension of their own: `doc_lengths` says where
    one document ends and the next begins, and padding is a document of its own that bears no loss.
    """

    tokens: Tensor
    """(num_tokens,) int64 ids, placeholders included."""
    labels: Tensor
    """(num_tokens,) int64: the next token of the same document, 0 where there is none."""
    loss_mask: Tensor
    """(num_tokens,) float32: 1 where a label bears loss, 0 at media placeholders, padding and ends."""
    sources: Tensor
    """(num_tokens,) int64 `modality.Source` of the document."""
    positions: Tensor
    """(num_tokens,) int64 position in the document."""
    doc_lengths: tuple[int, ...]
    """Positions of each document; their sum is num_tokens."""
    cu_seqlens: Tensor
    """(num_docs + 1,) int32 cumulated doc_lengths."""
    images: MediaUnits
    audio: MediaUnits

    @property
    def num_tokens(self) -> int:
        """Positions of the micro-batch."""
        return self.tokens.numel()

    def to(self, device: torch.device) -> Self:
        """Return this micro-batch with every tensor on `device`; copies from pinned memory do not wait."""
        return _move(self, device)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
        return tuple(_move(item, device) for item in value)
    if isinstance(value, MicroBatch | MediaUnits):
        return type(value)(**{field.name: _move(getattr(value, field.name), device) for field in fields(value)})
    return value
