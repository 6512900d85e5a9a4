"""Which pieces of which documents make up each sample.

A document of n tokens gives n - 1 inputs, each with the token behind it as its label. Two ways: best fit (Ding et al.
2024, "Fewer truncations improve language modeling") never cuts a document that fits into a sample, nor a media run;
concatenation lays documents end to end and cuts every seq_len inputs, wherever that is. No plan is held in memory: a
sample is found when it is asked for.
"""

import bisect
import itertools
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from megatron_mm.data.native import TOKEN_BYTES, _index
from megatron_mm.errors import DataError
from megatron_mm.shards import ShardReader

Packing = Literal["best_fit", "concatenate"]
WINDOW_SAMPLES = 256
"""Samples' worth of documents that are packed together: what is left open at the end of a window is padding."""
SCANNED_DOCUMENTS = 2**20
"""Documents whose lengths are read at a time."""
MAX_THREADS = 8

PIECE = np.dtype([("shard", "<i8"), ("document", "<i8"), ("start", "<i8"), ("length", "<i8")])
"""A run of inputs of one document: tokens [start, start + length) of it."""
Cuts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Documents that are cut around media runs, where the pieces of each begin among all, and the lengths of the pieces."""
NO_CUTS: Cuts = (np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int32))


class Windows(NamedTuple):
    """What documents come to that were cut into windows."""

    ends: np.ndarray
    """The document behind each window: (num_windows,) int64."""
    samples: np.ndarray
    """How many samples each window makes: (num_windows,) int64."""
    num_tokens: int
    """Tokens of all windows."""
    num_long: int
    """Documents that do not fit into a sample."""


class BestFitPlan:
    """Samples packed by best fit, window after window of documents: a pure function of lengths and media runs.

    Held are where each window begins and how many samples it makes, some 20 bytes for 2 million tokens.
    """

    def __init__(self, shards: Sequence[ShardReader], *, seq_len: int, first_shard: int = 0) -> None:
        self.shards, self.seq_len, self.first_shard = shards, seq_len, first_shard
        self._long_documents = 0
        windows = [self._scan(shard) for shard in shards]
        self._first_window = [0, *itertools.accumulate(len(samples) for _, samples in windows)]
        self._ends = np.concatenate([np.zeros(0, np.int64), *(ends for ends, _ in windows)])
        self._first_sample = np.concatenate([[0], *(samples for _, samples in windows)]).cumsum()
        self._check_inputs()

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return int(self._first_sample[-1])

    @property
    def num_inputs(self) -> int:
        """Positions that hold an input, in one epoch."""
        return sum(shard.num_tokens - shard.num_documents for shard in self.shards)

    def describe(self) -> str:
        """Return what the packing costs, for people."""
        return f"{_common(self)}, {self._long_documents} documents longer than a sample cut"

    def sample(self, index: int) -> np.ndarray:
        """Return the PIECE records of one sample."""
        window = int(self._first_sample.searchsorted(index, "right")) - 1
        number = bisect.bisect_right(self._first_window, window) - 1
        begin = int(self._ends[window - 1]) if window > self._first_window[number] else 0
        shard = self.shards[number]
        documents = range(begin, int(self._ends[window]))
        cuts = self._cuts(shard, begin, shard.lengths(begin, documents.stop)) if shard.num_items else NO_CUTS
        own = index - int(self._first_sample[window])
        return pack_sample(shard, documents, self.seq_len, cuts, own, number=self.first_shard + number)

    def _scan(self, shard: ShardReader) -> tuple[np.ndarray, np.ndarray]:
        """Return (document behind each window, samples of it) of one shard."""
        ends, samples = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        start, size, num_tokens = 0, SCANNED_DOCUMENTS, 0
        while start < shard.num_documents:
            stop = min(start + size, shard.num_documents)
            lengths = shard.lengths(start, stop)
            cuts = self._cuts(shard, start, lengths)
            is_last = stop == shard.num_documents
            windows = count_samples(lengths, self.seq_len, cuts, is_last=is_last)
            if not len(windows.ends):
                size *= 2  # of so many short documents that they do not fill a window
                continue
            ends.append(start + windows.ends)
            samples.append(windows.samples)
            num_tokens += windows.num_tokens
            self._long_documents += windows.num_long
            start = int(ends[-1][-1])
        if num_tokens != shard.num_tokens:
            raise DataError(
                f"{shard.prefix}.idx: its lengths add up to {num_tokens} tokens, not to {shard.num_tokens}."
            )
        return np.concatenate(ends), np.concatenate(samples)

    def _cuts(self, shard: ShardReader, start: int, lengths: np.ndarray) -> Cuts:
        """Return how those of some documents that are long and have media are cut."""
        if not shard.num_items:
            return NO_CUTS
        has_media = shard.has_media(start, start + len(lengths))
        documents = np.flatnonzero(has_media & (lengths.astype(np.int64) - 1 > self.seq_len))
        ranges = [cut_around_media(shard, start + int(document), self.seq_len) for document in documents]
        sizes = [stop - begin for own in ranges for begin, stop in own]
        return documents, np.cumsum([0, *map(len, ranges)]), np.asarray(sizes, np.int32)

    def _check_inputs(self) -> None:
        if not self.num_samples:
            names = ", ".join(shard.prefix for shard in self.shards)
            raise DataError(f"{names}: no document has two tokens to learn from.")


class ConcatenatedPlan:
    """Samples cut from documents laid end to end: nothing is computed or held, at any number of documents."""

    def __init__(self, shards: Sequence[ShardReader], *, seq_len: int, first_shard: int = 0) -> None:
        self.shards, self.seq_len, self.first_shard = shards, seq_len, first_shard
        self._first_input = [0]
        for shard in shards:
            if shard.num_items:
                raise DataError(
                    f"{shard.prefix} holds media, whose runs data.packing=concatenate would cut. Use "
                    "data.packing=best_fit."
                )
            self._first_input.append(self._first_input[-1] + shard.num_tokens - shard.num_documents)
        if not self.num_inputs:
            names = ", ".join(shard.prefix for shard in shards)
            raise DataError(f"{names}: no document has two tokens to learn from.")

    @property
    def num_samples(self) -> int:
        """Samples of one epoch; the last one is padded."""
        return -(-self.num_inputs // self.seq_len)

    @property
    def num_inputs(self) -> int:
        """Positions that hold an input, in one epoch."""
        return self._first_input[-1]

    def describe(self) -> str:
        """Return what the packing costs, for people."""
        return f"{_common(self)}, up to {self.num_samples - 1} documents cut"

    def sample(self, index: int) -> np.ndarray:
        """Return the PIECE records of one sample."""
        position = index * self.seq_len
        stop = min(position + self.seq_len, self.num_inputs)
        parts = []
        number = bisect.bisect_right(self._first_input, position) - 1
        while position < stop:
            first, end = self._first_input[number : number + 2]
            own = (position - first, min(stop, end) - first)
            parts.append(lay_end_to_end(self.shards[number], *own, number=self.first_shard + number))
            position = min(stop, end)
            number += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


PackingPlan = BestFitPlan | ConcatenatedPlan


def plan_packing(
    shards: Sequence[ShardReader], *, seq_len: int, packing: Packing = "best_fit", first_shard: int = 0
) -> PackingPlan:
    """Return the samples of `shards`, which are numbered from `first_shard` in their pieces.

    Raises DataError if a media run is longer than `seq_len` or would be cut, or there is not one input.
    """
    plan = {"best_fit": BestFitPlan, "concatenate": ConcatenatedPlan}[packing]
    return plan(shards, seq_len=seq_len, first_shard=first_shard)


def padding_fraction(plan: PackingPlan) -> float:
    """Return the positions that hold no input, 0 to 1."""
    return 1.0 - plan.num_inputs / (plan.num_samples * plan.seq_len)


def _common(plan: PackingPlan) -> str:
    documents = sum(shard.num_documents for shard in plan.shards)
    return f"{100 * padding_fraction(plan):.2f}% padding, {documents / plan.num_samples:.1f} documents a sample"


def cut_around_media(shard: ShardReader, document: int, seq_len: int) -> list[tuple[int, int]]:
    """Cut a long document into (start, stop) ranges of inputs, each as long as fits without cutting a media run.

    A run's start and end tokens stay with it.
    """
    inputs = shard.length(document) - 1
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


def count_samples(lengths: np.ndarray, seq_len: int, cuts: Cuts, *, is_last: bool) -> Windows:
    """Cut documents into windows and count the samples of each.

    A window ends with the document that brings it to WINDOW_SAMPLES * seq_len inputs; what is left over is one only
    if `is_last`.
    """
    window_inputs = WINDOW_SAMPLES * seq_len
    if _index is not None:
        threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        return Windows(*_index.count_samples(lengths, seq_len, window_inputs, is_last, *cuts, threads))
    return count_samples_reference(lengths, seq_len, cuts, window_inputs=window_inputs, is_last=is_last)


def pack_sample(
    shard: ShardReader, documents: range, seq_len: int, cuts: Cuts, sample: int, *, number: int
) -> np.ndarray:
    """Pack documents of a shard; return the PIECE records of one sample, as of shard `number`.

    Raises DataError if the index is not what was written.
    """
    if _index is not None and shard.token_bytes in TOKEN_BYTES:
        bounds = (documents.start, documents.stop)
        numbers = _index.pack_sample(shard.token_index, *bounds, seq_len, *cuts, sample, number)
        if numbers is not None:
            return _as_pieces(numbers)
    # Says what is wrong, or reads what passed by now.
    return pack_sample_reference(shard, documents, seq_len, cuts, sample, number=number)


def pack_sample_reference(
    shard: ShardReader, documents: range, seq_len: int, cuts: Cuts, sample: int, *, number: int
) -> np.ndarray:
    """Pack all of the window, and choose the pieces of one sample."""
    *columns, samples = pack_window_reference(shard.lengths(documents.start, documents.stop), seq_len, cuts)
    columns[0] = columns[0] + documents.start
    pieces = np.full(int((samples == sample).sum()), number, PIECE)
    for name, column in zip(("document", "start", "length"), columns):
        pieces[name] = column[samples == sample]
    return pieces


def lay_end_to_end(shard: ShardReader, position: int, stop: int, *, number: int) -> np.ndarray:
    """Return the PIECE records, as of shard `number`, of inputs [position, stop) of a shard's documents end to end.

    Raises DataError if the index disagrees with itself, or is not what was written.
    """
    if _index is not None and shard.token_bytes in TOKEN_BYTES:
        numbers = _index.lay_end_to_end(shard.token_index, position, stop, number)
        if numbers is not None:
            return _as_pieces(numbers)
    # Says what is wrong, or reads what passed by now.
    return lay_end_to_end_reference(shard, position, stop, number=number)


def lay_end_to_end_reference(shard: ShardReader, position: int, stop: int, *, number: int) -> np.ndarray:
    """Find the first document by bisection, and the others behind it one by one."""

    def inputs_before(document: int) -> int:
        return shard.token_start(document) - document

    pieces = []
    document = bisect.bisect_right(range(shard.num_documents), position, key=inputs_before) - 1
    while position < stop:
        start = position - inputs_before(document)
        length = min(shard.length(document) - 1 - start, stop - position)
        if length:
            pieces.append((number, document, start, length))
        position += length
        document += 1
    return np.asarray(pieces, PIECE)


def as_numbers(pieces: np.ndarray) -> np.ndarray:
    """Return PIECE records as (num_pieces, 4) int64."""
    return pieces.view(np.int64).reshape(-1, 4)


def _as_pieces(numbers: np.ndarray) -> np.ndarray:
    return numbers.view(PIECE).reshape(-1)


def count_samples_reference(
    lengths: np.ndarray, seq_len: int, cuts: Cuts, *, window_inputs: int, is_last: bool
) -> Windows:
    """Count as `count_samples` says, by packing every window."""
    ends: list[int] = []
    inputs = 0
    for document, length in enumerate(lengths.tolist(), start=1):
        inputs += max(0, length - 1)
        if inputs >= window_inputs or (is_last and document == len(lengths)):
            ends.append(document)
            inputs = 0
    samples = []
    for begin, end in zip([0, *ends], ends):
        inside = (cuts[0] >= begin) & (cuts[0] < end)
        sizes = [cuts[2][cuts[1][i] : cuts[1][i + 1]] for i in np.flatnonzero(inside)]
        own = (cuts[0][inside] - begin, np.cumsum([0, *map(len, sizes)]), np.concatenate([cuts[2][:0], *sizes]))
        samples.append(int(pack_window_reference(lengths[begin:end], seq_len, own)[3].max(initial=-1)) + 1)
    done = lengths[: ends[-1] if ends else 0].astype(np.int64)
    num_long = int((done - 1 > seq_len).sum())
    return Windows(np.asarray(ends, np.int64), np.asarray(samples, np.int64), int(done.sum()), num_long)


def pack_window_reference(lengths: np.ndarray, seq_len: int, cuts: Cuts) -> tuple[np.ndarray, ...]:
    """Pack document by document and piece by piece; return (document, start, length, sample) of each piece."""
    pieces: list[tuple[int, int, int]] = []
    cut = {int(document): cuts[2][cuts[1][i] : cuts[1][i + 1]].tolist() for i, document in enumerate(cuts[0])}
    for document, length in enumerate(lengths.tolist()):
        inputs, start = length - 1, 0
        for size in cut.get(document, [min(seq_len, inputs - at) for at in range(0, inputs, seq_len)]):
            pieces.append((document, start, size))
            start += size
    documents, starts, sizes = (
        (np.asarray(column, np.int64) for column in zip(*pieces)) if pieces else [np.zeros(0)] * 3
    )
    return documents, starts, sizes, pack_best_fit_reference(sizes, seq_len)[0]


def pack_best_fit_reference(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Return (bin of each piece, number of bins): each piece, longest first, goes into the fullest bin that it fits in.

    Of bins that are equally full it takes the one that was touched last. Shapes: lengths (num_pieces,) in 1..capacity;
    bins (num_pieces,) int64.
    """
    bins = np.empty(len(lengths), np.int64)
    num_bins = 0
    open_bins: list[tuple[int, int]] = []  # (room, bin), the one that was touched last at the end
    for piece in sorted(range(len(lengths)), key=lambda index: -int(lengths[index])):
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
    return bins, num_bins
