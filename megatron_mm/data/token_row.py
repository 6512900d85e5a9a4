"""The token side of a micro-batch while it is filled: documents end to end in one row."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_mm.batch import TokenCounts
from megatron_mm.data.native import _index
from megatron_mm.shards import ShardReader
from megatron_mm.source import Source

LAID_BYTES = (2, 4)
"""Sizes of ids that csrc/index lays; those of other sizes, in shards that were adopted, are laid by the reference."""


class TokenRow:
    """Ids, labels, loss mask, origins and positions of `num_tokens` positions, filled piece after piece."""

    def __init__(self, num_tokens: int, *, pad: int) -> None:
        self.position = 0
        self.tokens = np.full(num_tokens, pad, np.int64)
        self.labels = np.zeros(num_tokens, np.int64)
        self.loss_mask = np.zeros(num_tokens, np.float32)
        self.origins = np.zeros(num_tokens, np.int64)
        self.positions = np.zeros(num_tokens, np.int64)
        self.doc_lengths: list[int] = []
        self.padding: list[range] = []
        """Positions that hold nothing."""

    def add_pieces(self, shard: ShardReader, pieces: np.ndarray, *, dataset: int = 0) -> None:
        """Lay PIECE records of one shard at the current position: inputs, each with the token behind it as its label.

        Raises DataError if they cannot be read.
        """
        documents, starts, lengths = pieces["document"], pieces["start"], pieces["length"]
        place = slice(self.position, self.position + int(lengths.sum()))
        rows = (self.tokens[place], self.labels[place], self.positions[place], self.origins[place])
        sources = shard.sources(documents)
        laid = 0
        if _index is not None and shard.token_bytes in LAID_BYTES:
            shard.check_tokens(documents)
            laid = _index.lay_pieces(*shard.token_index, documents, starts, lengths, sources, *rows)
        if laid < len(pieces):  # the reference says what is wrong, or reads what passed by now
            lay_pieces_reference(shard, pieces, sources, rows)
        self.origins[place] += dataset * len(Source)
        self.loss_mask[place] = 1.0
        self.doc_lengths += lengths.tolist()
        self.position = place.stop

    def end_sample(self, stop: int) -> None:
        """Make what is left of the sample a document of padding."""
        if stop > self.position:
            self.positions[self.position : stop] = np.arange(stop - self.position)
            self.doc_lengths.append(stop - self.position)
            self.padding.append(range(self.position, stop))

    def mask_labels(self, placeholders: Sequence[int]) -> None:
        """Take the loss off labels that are media placeholders."""
        for placeholder in placeholders:
            self.loss_mask[self.labels == placeholder] = 0.0

    def tensors(self, parts: Sequence[range]) -> dict[str, Tensor]:
        """Return the tensors of a MicroBatch that are not media, at the positions of `parts`, end to end."""
        names = ("tokens", "labels", "loss_mask", "origins", "positions")
        arrays = {name: [getattr(self, name)[part.start : part.stop] for part in parts] for name in names}
        whole = {name: own[0] if len(own) == 1 else np.concatenate(own) for name, own in arrays.items()}
        return {name: torch.from_numpy(array) for name, array in whole.items()}

    def counts(self, parts: Sequence[range], *, media: Mapping[str, Sequence[range]]) -> TokenCounts:
        """Count what the positions of `parts` hold, given those of each modality's runs in the whole row."""
        in_media = {name: _shared(runs, parts) for name, runs in media.items()}
        in_padding = _shared(self.padding, parts)
        return TokenCounts(
            text=sum(map(len, parts)) - sum(in_media.values()) - in_padding,
            media=in_media,
            padding=in_padding,
            loss=sum(int(np.count_nonzero(self.loss_mask[part.start : part.stop])) for part in parts),
        )


def _shared(runs: Sequence[range], parts: Sequence[range]) -> int:
    """Return how many positions lie both in a run and in a part."""
    return sum(max(0, min(run.stop, part.stop) - max(run.start, part.start)) for run in runs for part in parts)


def lay_pieces_reference(
    shard: ShardReader, pieces: np.ndarray, sources: np.ndarray, rows: tuple[np.ndarray, ...]
) -> None:
    """Fill `rows` (tokens, labels, positions, sources of all pieces) piece by piece."""
    tokens, labels, positions, source = rows
    begin = 0
    for (_, document, start, length), kind in zip(pieces.tolist(), sources.tolist(), strict=True):
        ids = shard.tokens(document, start, start + length + 1)
        place = slice(begin, begin + length)
        tokens[place], labels[place] = ids[:-1], ids[1:]
        positions[place], source[place] = np.arange(length), kind
        begin += length
