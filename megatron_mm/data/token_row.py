"""The token side of a micro-batch while it is filled: documents end to end in one row."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_mm.batch import TokenCounts
from megatron_mm.data.native import TOKEN_BYTES, _index
from megatron_mm.data.packing import as_numbers
from megatron_mm.shards import ShardReader
from megatron_mm.source import Source


class TokenRow:
    """Ids, labels, loss mask, origins and positions of `num_tokens` positions, filled piece after piece.

    Pieces and the ends of samples fill all of it: before that it holds whatever was in the memory.
    """

    def __init__(self, num_tokens: int, *, pad: int, placeholders: Sequence[int] = ()) -> None:
        self.position = 0
        self.pad, self.placeholders = pad, placeholders
        self.tokens = np.empty(num_tokens, np.int64)
        self.labels = np.empty(num_tokens, np.int64)
        self.loss_mask = np.empty(num_tokens, np.float32)
        self.origins = np.empty(num_tokens, np.int64)
        self.positions = np.empty(num_tokens, np.int64)
        self.doc_lengths: list[int] = []
        self.padding: list[range] = []
        """Positions that hold nothing."""

    def add_pieces(self, shard: ShardReader, pieces: np.ndarray, *, dataset: int = 0) -> int:
        """Lay PIECE records of one shard at the current position: inputs, each with the token behind it as its label.

        Returns how many of the inputs are placeholders of media. Raises DataError if they cannot be read.
        """
        lengths = pieces["length"].tolist()
        place = slice(self.position, self.position + sum(lengths))
        tokens, labels, positions, origins = self.tokens, self.labels, self.positions, self.origins
        rows = (tokens[place], labels[place], positions[place], origins[place], self.loss_mask[place])
        first_origin = dataset * len(Source)
        shard.check_tokens(pieces["document"])
        found = -1
        if _index is not None and shard.token_bytes in TOKEN_BYTES:
            found = _index.lay_pieces(shard.token_index, as_numbers(pieces), first_origin, self.placeholders, *rows)
        if found < 0:  # the reference says what is wrong, or reads what passed by now
            found = lay_pieces_reference(shard, pieces, first_origin, self.placeholders, rows)
        self.doc_lengths += lengths
        self.position = place.stop
        return found

    def end_sample(self, stop: int) -> None:
        """Make what is left of the sample a document of padding."""
        if stop > self.position:
            place = slice(self.position, stop)
            self.tokens[place], self.labels[place], self.loss_mask[place], self.origins[place] = self.pad, 0, 0.0, 0
            self.positions[place] = np.arange(stop - self.position)
            self.doc_lengths.append(stop - self.position)
            self.padding.append(range(self.position, stop))

    def mask_labels(self) -> None:
        """Take the loss off labels that are media placeholders."""
        for placeholder in self.placeholders:
            self.loss_mask[self.labels == placeholder] = 0.0

    def tensors(self, parts: Sequence[range]) -> dict[str, Tensor]:
        """Return the tensors of a MicroBatch that are not media, at the positions of `parts`, end to end."""
        return {
            "tokens": _taken(self.tokens, parts),
            "labels": _taken(self.labels, parts),
            "loss_mask": _taken(self.loss_mask, parts),
            "origins": _taken(self.origins, parts),
            "positions": _taken(self.positions, parts),
        }

    def counts(self, parts: Sequence[range], *, media: Mapping[str, Sequence[range]]) -> TokenCounts:
        """Count what the positions of `parts` hold, given those of each modality's runs in the whole row."""
        in_media = {name: _shared(runs, parts) for name, runs in media.items()}
        in_padding = _shared(self.padding, parts)
        bears_loss = self.loss_mask.view(np.int32)  # which numpy counts four times as fast
        return TokenCounts(
            text=sum(map(len, parts)) - sum(in_media.values()) - in_padding,
            media=in_media,
            padding=in_padding,
            loss=sum(np.count_nonzero(bears_loss[part.start : part.stop]) for part in parts),
        )


def _taken(row: np.ndarray, parts: Sequence[range]) -> Tensor:
    """Return the positions of `parts` end to end, of the memory of `row` if there is one part."""
    if len(parts) == 1:
        return torch.from_numpy(row[parts[0].start : parts[0].stop])
    return torch.from_numpy(np.concatenate([row[part.start : part.stop] for part in parts]))


def _shared(runs: Sequence[range], parts: Sequence[range]) -> int:
    """Return how many positions lie both in a run and in a part."""
    if not runs:
        return 0
    return sum(max(0, min(run.stop, part.stop) - max(run.start, part.start)) for run in runs for part in parts)


def lay_pieces_reference(
    shard: ShardReader,
    pieces: np.ndarray,
    first_origin: int,
    placeholders: Sequence[int],
    rows: tuple[np.ndarray, ...],
) -> int:
    """Fill `rows` (tokens, labels, positions, origins and loss mask of all pieces) piece by piece.

    Returns how many tokens are one of `placeholders`.
    """
    tokens, labels, positions, origins, loss_mask = rows
    begin = 0
    for (_, document, start, length), source in zip(pieces.tolist(), shard.sources(pieces["document"]).tolist()):
        ids = shard.tokens(document, start, start + length + 1)
        place = slice(begin, begin + length)
        tokens[place], labels[place] = ids[:-1], ids[1:]
        positions[place], origins[place], loss_mask[place] = np.arange(length), first_origin + source, 1.0
        begin += length
    return int(np.isin(tokens, placeholders).sum())
