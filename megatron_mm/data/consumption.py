"""Which samples of the endless stream each optimizer step takes: batch sizes that change, and batches left out.

The stream is counted in samples as they are consumed. A step takes the next samples behind those of the step before;
samples of steps that the run went back from are left out for good, so what comes after is never seen twice.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

Weights = Mapping[str, float]


@dataclass(frozen=True, order=True)
class LeftOut:
    """Samples [first, first + count) of the stream, which optimizer step `step`, counted from 0, had consumed."""

    first: int
    count: int
    step: int


@dataclass(frozen=True)
class Consumption:
    """What a run has consumed, and will: a pure function of the step, its history of batch sizes and what it left out.

    `batch_sizes` are (first step, counted from 0, samples of each step from then on), ascending, from step 0.
    """

    batch_sizes: tuple[tuple[int, int], ...]
    left_out: tuple[LeftOut, ...] = field(default=())

    def __post_init__(self) -> None:
        assert self.batch_sizes[0][0] == 0
        assert all(before[0] < after[0] for before, after in pairwise(self.batch_sizes))
        object.__setattr__(self, "left_out", tuple(sorted(self.left_out)))

    def batch_size(self, step: int) -> int:
        """Return the samples of optimizer step `step`, counted from 0."""
        return next(size for first, size in reversed(self.batch_sizes) if first <= step)

    def trained_samples(self, step: int) -> int:
        """Return the samples that the steps before `step` have trained on."""
        ends = [*(first for first, _ in self.batch_sizes[1:]), step]
        return sum(size * max(0, min(end, step) - first) for (first, size), end in zip(self.batch_sizes, ends))

    def positions(self, step: int) -> np.ndarray:
        """Return where in the stream the samples of a step lie: (batch_size,) int64, ascending."""
        first = self.trained_samples(step)
        return self._positions_of(np.arange(first, first + self.batch_size(step)))

    def leave_out(self, steps: range) -> "Consumption":
        """Return this consumption with the samples of `steps` left out: the first of them takes what follows."""
        more = [part for step in steps for part in _runs(self.positions(step), step)]
        return replace(self, left_out=(*self.left_out, *more))

    def resize(self, size: int, *, step: int) -> "Consumption":
        """Return this consumption with batches of `size` samples from step `step` on."""
        kept = tuple(pair for pair in self.batch_sizes if pair[0] < step)
        same = bool(kept) and kept[-1][1] == size
        return replace(self, batch_sizes=kept if same else (*kept, (step, size)))

    def stretches(self, changes: Sequence[tuple[int, Weights]]) -> list[tuple[int, Weights]]:
        """Return the weights from each position of the stream on, of `changes`: (first step, weights), from step 0.

        Samples that were left out count with the weights of the step that consumed them.
        """
        begins = {int(self._positions_of(np.asarray([self.trained_samples(step)]))[0]) for step, _ in changes}
        edges = {edge for part in self.left_out for edge in (part.first, part.first + part.count)}
        found: list[tuple[int, Weights]] = []
        for position in sorted({0} | begins | edges):
            step = self._step_at(position)
            weights = next(weights for first, weights in reversed(changes) if first <= step)
            if not found or found[-1][1] is not weights:
                found.append((position, weights))
        return found

    def _positions_of(self, trained: np.ndarray) -> np.ndarray:
        """Return the position of each sample that is trained on, by its number among them: (n,) int64."""
        gaps, total = [], 0
        for part in self.left_out:
            gaps.append((part.first - total, part.count))
            total += part.count
        starts = np.asarray([start for start, _ in gaps], np.int64)
        shifts = np.concatenate([[0], np.cumsum([count for _, count in gaps], dtype=np.int64)])
        return trained + shifts[starts.searchsorted(trained, "right")]

    def _step_at(self, position: int) -> int:
        """Return the step that consumes, or had consumed, the sample at `position`."""
        for part in self.left_out:
            if part.first <= position < part.first + part.count:
                return part.step
        trained = position - sum(part.count for part in self.left_out if part.first < position)
        step = 0
        for (first, size), (end, _) in pairwise([*self.batch_sizes, (None, 0)]):
            step = first + trained // size
            if end is None or step < end:
                return step
            trained -= (end - first) * size
        return step


def _runs(positions: np.ndarray, step: int) -> Iterator[LeftOut]:
    """Yield the runs of consecutive positions."""
    for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
        yield LeftOut(int(run[0]), len(run), step)
