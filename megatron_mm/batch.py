"""The in-memory border between data and model: one micro-batch, as one rank needs it."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megatron_mm.modalities import BY_NAME
from megatron_mm.source import Source


@dataclass(frozen=True)
class TokenCounts:
    """How many positions hold what: each is text, a media placeholder or padding, and some bear loss beside."""

    text: int = 0
    """Positions of documents without media in them: text, and the tokens that mark where documents and media begin
    and end."""
    media: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(BY_NAME, 0))
    """Placeholders of each modality, by its name."""
    padding: int = 0
    loss: int = 0
    """Those whose label bears loss."""

    @property
    def tokens(self) -> int:
        """Positions that hold something of a document: all but padding."""
        return self.text + sum(self.media.values())

    @property
    def padding_fraction(self) -> float:
        """Padding of all positions, 0 to 1."""
        return self.padding / max(1, self.tokens + self.padding)

    def __add__(self, other: Self) -> Self:
        media = {name: count + other.media[name] for name, count in self.media.items()}
        rest = self.text + other.text, media, self.padding + other.padding, self.loss + other.loss
        return type(self)(*rest)

    @classmethod
    def names(cls) -> list[str]:
        """Return what is counted, in the order of `numbers`."""
        return ["text", *BY_NAME, "padding", "loss"]

    @property
    def numbers(self) -> list[int]:
        """The counts end to end, as ranks send them to one another."""
        return [self.text, *(self.media[name] for name in BY_NAME), self.padding, self.loss]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Self:
        """Return the counts that were sent as `numbers`."""
        text, *media, padding, loss = map(int, numbers)
        return cls(text, dict(zip(BY_NAME, media, strict=True)), padding, loss)


@dataclass(frozen=True)
class MediaUnits:
    """The units of one modality in one micro-batch: images, or chunks of recordings.

    Units are dealt to the tensor and context ranks of the first stage in turn (unit u to rank u mod (tp cp)), encoded
    there once, and their features all-gathered; each rank then projects the rows that fall into its own shard.
    """

    inputs: tuple[Tensor, ...]
    """This rank's units, in order, as the modality's decode makes them and its encoder takes them."""
    own_rows: int
    """Feature rows that this rank's units become: as many as they have placeholders."""
    rows_per_rank: int
    """Feature rows that each rank contributes to the gather: the most that any of them has."""
    rows: Tensor
    """(num_local_tokens,) int64: which gathered rows fall into this rank's sequence shard."""
    positions: Tensor
    """(num_local_tokens,) int64: where they go in it."""


@dataclass(frozen=True)
class AttentionSpan:
    """A run of consecutive positions of the whole row that one rank attends from, cut where documents end.

    Piece i has query_lengths[i] positions, the last ones of its key_lengths[i] keys: causal attention is aligned at the
    end. Keys of all pieces lie end to end in the row: positions key_start to stop.
    """

    start: int
    stop: int
    key_start: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    cu_seqlens_q: Tensor
    """(num_pieces + 1,) int32 cumulated query_lengths."""
    cu_seqlens_kv: Tensor
    """(num_pieces + 1,) int32 cumulated key_lengths."""

    def keys_of(self, row: Tensor) -> Tensor:
        """Return the part of a whole row, (num_tokens, ...), that holds the keys of all pieces."""
        whole = (self.key_start, self.stop) == (0, row.shape[0])
        return row if whole else row[self.key_start : self.stop]


@dataclass(frozen=True)
class MicroBatch:
    """`micro_batch_size` packed samples end to end, as one row of positions; a context rank holds 1/cp of them.

    Documents never attend to one another, so samples need no batch dimension of their own: the spans say where one
    document ends and the next begins, and padding is a document of its own that bears no loss.
    """

    tokens: Tensor
    """(num_tokens/cp,) int64 ids, placeholders included."""
    labels: Tensor
    """(num_tokens/cp,) int64: the next token of the same document, 0 where there is none."""
    loss_mask: Tensor
    """(num_tokens/cp,) float32: 1 where a label bears loss, 0 at media placeholders, padding and ends."""
    origins: Tensor
    """(num_tokens/cp,) int64 where the document came from: dataset * len(Source) + source."""
    positions: Tensor
    """(num_tokens/cp,) int64 position in the document."""
    spans: tuple[AttentionSpan, ...]
    """Where this rank's positions lie in the whole row, in their order: one span, two of them under cp."""
    media: Mapping[str, MediaUnits]
    """The units of each modality, by its name: all of them, those without units too."""
    counts: TokenCounts
    """What the positions hold: this context rank's share, whether or not its stage reads media."""
    num_datasets: int = 1
    """Datasets that `origins` tells apart."""

    @property
    def sources(self) -> Tensor:
        """(num_tokens/cp,) int64 `source.Source` of the document."""
        return self.origins % len(Source)

    @property
    def datasets(self) -> Tensor:
        """(num_tokens/cp,) int64 number of the dataset, in the order of the loader's."""
        return self.origins // len(Source)

    def to(self, device: torch.device) -> Self:
        """Return this micro-batch with every tensor on `device`; copies from pinned memory do not wait."""
        return _move(self, device)


def context_spans(num_tokens: int, *, cp_rank: int, cp_size: int) -> list[range]:
    """Return which positions of a row of `num_tokens` a context rank holds, in their order.

    The row is cut into 2 cp chunks and rank r holds chunks r and 2 cp - 1 - r, so that each rank has as many keys to
    attend to as any other (Megatron-LM's and Llama 3's balance). num_tokens must be a multiple of 2 cp.
    """
    if cp_size == 1:
        return [range(num_tokens)]
    chunk = num_tokens // (2 * cp_size)
    return [range(part * chunk, (part + 1) * chunk) for part in (cp_rank, 2 * cp_size - 1 - cp_rank)]


def attention_spans(doc_lengths: Sequence[int], *, cp_rank: int, cp_size: int) -> tuple[AttentionSpan, ...]:
    """Return the spans of a context rank in a row of documents."""
    stops = list(itertools.accumulate(doc_lengths))
    if cp_size == 1:
        lengths, cumulated = tuple(doc_lengths), _cumulated(stops)
        return (AttentionSpan(0, stops[-1], 0, lengths, lengths, cumulated, cumulated),)
    documents = [range(stop - length, stop) for length, stop in zip(doc_lengths, stops)]
    spans = []
    for own in context_spans(stops[-1], cp_rank=cp_rank, cp_size=cp_size):
        inside = [document for document in documents if document.start < own.stop and document.stop > own.start]
        query = tuple(min(document.stop, own.stop) - max(document.start, own.start) for document in inside)
        key = tuple(min(document.stop, own.stop) - document.start for document in inside)
        cumulated = [_cumulated(itertools.accumulate(lengths)) for lengths in (query, key)]
        spans.append(AttentionSpan(own.start, own.stop, inside[0].start, query, key, *cumulated))
    return tuple(spans)


def _cumulated(stops: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.array([0, *stops], np.int32))


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    if isinstance(value, Mapping):
        return {name: _move(item, device) for name, item in value.items()}
    if isinstance(value, MicroBatch | MediaUnits | AttentionSpan):
        return type(value)(**{field.name: _move(getattr(value, field.name), device) for field in fields(value)})
    return value
