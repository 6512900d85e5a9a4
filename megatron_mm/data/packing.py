"""Which pieces of which documents make up each sample.

A document of n tokens gives n - 1 inputs, each with the token behind it as its label. Documents that fit are never
cut; longer ones are cut into pieces of seq_len, and never inside a media run. Pieces are packed into samples by
best-fit (Ding et al. 2024, "Fewer truncations improve language modeling") over windows of documents, in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mm.errors import DataError
from megatron_mm.shards import ShardReader

try:
    from megatron_mm.data import _index
except ImportError:  # built by setup.py where a C++ compiler is
    _index = None

WINDOW = 10_000
"""Pieces that are sorted by length together."""
MAX_OPEN = 100
"""Samples with room left that are carried from one window to the next."""

PIECE = np.dtype([("shard", "<u4"), ("document", "<u8"), ("start", "<u4"), ("length", "<u4")])
"""A run of inputs of one document: tokens [start, start + length) of it."""


@dataclass(frozen=True)
class PackingPlan:
    """The pieces of every sample."""

    pieces: np.ndarray
    """(num_pieces,) PIECE, sample after sample."""
    first_piece: np.ndarray
    """(num_samples + 1,) int64: where each sample's pieces start."""
    seq_len: int

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return len(self.first_piece) - 1

    @property
    def padding_fraction(self) -> float:
        """Positions that hold no input, 0 to 1."""
        return 1.0 - float(self.pieces["length"].sum(dtype=np.int64)) / max(1, self.num_samples * self.seq_len)

    def sample(self, index: int) -> np.ndarray:
        """Return the PIECE records of one sample."""
        return self.pieces[self.first_piece[index] : self.first_piece[index + 1]]


def plan_packing(shards: Sequence[ShardReader], *, seq_len: int) -> PackingPlan:
    """Pack the documents of `shards` into samples: a pure function of their lengths and media runs.

    Raises DataError if a media run is longer than `seq_len`, or there is not one input.
    """
    pieces = np.concatenate([np.zeros(0, PIECE), *(_pieces(shard, i, seq_len) for i, shard in enumerate(shards))])
    if not len(pieces):
        raise DataError(f"{', '.join(shard.prefix for shard in shards)}: no document has two tokens to learn from.")
    bins, num_samples = pack_best_fit(pieces["length"], seq_len)
    counts = np.bincount(bins, minlength=num_samples)
    first_piece = np.concatenate([[0], np.cumsum(counts)])
    return PackingPlan(pieces[np.argsort(bins, kind="stable")], first_piece, seq_len)


def _pieces(shard: ShardReader, number: int, seq_len: int) -> np.ndarray:
    """Return the pieces of all documents of one shard, in their order."""
    inputs = np.maximum(shard.lengths.astype(np.int64) - 1, 0)
    cut_at_runs = np.flatnonzero(shard.has_media() & (inputs > seq_len))
    counts = -(-inputs // seq_len)
    cuts = {int(document): _cut(shard, int(document), seq_len) for document in cut_at_runs}
    counts[cut_at_runs] = [len(cuts[int(document)]) for document in cut_at_runs]
    pieces = np.zeros(int(counts.sum()), PIECE)
    pieces["shard"] = number
    pieces["document"] = np.repeat(np.arange(len(inputs)), counts)
    first = np.cumsum(counts) - counts
    pieces["start"] = (np.arange(len(pieces)) - np.repeat(first, counts)) * seq_len
    pieces["length"] = np.minimum(seq_len, np.repeat(inputs, counts) - pieces["start"])
    for document, own in cuts.items():
        pieces[first[document] : first[document] + len(own)]["start"] = [start for start, _ in own]
        pieces[first[document] : first[document] + len(own)]["length"] = [stop - start for start, stop in own]
    return pieces


def _cut(shard: ShardReader, document: int, seq_len: int) -> list[tuple[int, int]]:
    """Cut a long document into (start, stop) ranges of inputs, each as long as fits without cutting a media run.

    A run's start and end tokens stay with it.
    """
    inputs = int(shard.lengths[document]) - 1
    media = shard.media(document)
    first = media["token_offset"].astype(np.int64)
    runs = list(zip((first - 1).tolist(), (first + media["num_tokens"] + 1).tolist()))
    ranges, start = [], 0
    while start < inputs:
        stop = min(start + seq_len, inputs)
        inside = [run for run in runs if run[0] < stop < min(run[1], inputs)]
        if inside:
            stop = inside[0][0]
            if stop <= start:
                raise DataError(
                    f"{shard.prefix}: document {document} has a media run of {inside[0][1] - inside[0][0]} tokens, "
                    f"which data.seq_len={seq_len} cannot hold. Use a longer seq_len, or preprocess with a smaller "
                    "--max-audio-seconds."
                )
        ranges.append((start, stop))
        start = stop
    return ranges


def pack_best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Return (bin of each piece, number of bins): each piece goes into the fullest open bin that it fits in.

    Pieces are taken longest first within each WINDOW; between windows the fullest bins are closed until MAX_OPEN
    remain. Shapes: lengths (num_pieces,) in 1..capacity; bins (num_pieces,) int64.
    """
    if _index is not None:
        return _index.pack_best_fit(lengths, capacity, WINDOW, MAX_OPEN)
    return pack_best_fit_reference(lengths, capacity, window=WINDOW, max_open=MAX_OPEN)


def pack_best_fit_reference(
    lengths: np.ndarray, capacity: int, *, window: int, max_open: int
) -> tuple[np.ndarray, int]:
    """Pack as `pack_best_fit` says, by searching all open bins for every piece."""
    bins = np.empty(len(lengths), np.int64)
    num_bins = 0
    open_bins: list[tuple[int, int]] = []  # (room, bin), the one that was touched last at the end
    for start in range(0, len(lengths), window):
        members = range(start, min(start + window, len(lengths)))
        for piece in sorted(members, key=lambda index: -int(lengths[index])):
            length = int(lengths[piece])
            rooms = [room for room, _ in open_bins if room >= length]
            if rooms:
                index = max(i for i, (room, _) in enumerate(open_bins) if room == min(rooms))
                room, bin_ = open_bins.pop(index)
            else:
                room, bin_ = capacity, num_bins
                num_bins += 1
            bins[piece] = bin_
            if room > length:
                open_bins.append((room - length, bin_))
        while len(open_bins) > max_open:
            fullest = min(room for room, _ in open_bins)
            open_bins.pop(max(i for i, (room, _) in enumerate(open_bins) if room == fullest))
    return bins, num_bins
