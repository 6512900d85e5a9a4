"""Which dataset each sample of a run comes from: weights hold over every stretch of the run, and may change on the way.

Positions are dealt down a binary tree over the datasets, at each node in proportion to the weights on either side
(Bresenham 1965). So a position's dataset, and how many came from that dataset before, are found from the position
alone, and the counts never stray from the weights by more than half a sample for each level of the tree.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

RESOLUTION = 2**20
"""Weights are rounded to this part of their sum, so that products with positions are exact in 64 bits."""
MAX_POSITIONS = 2**42


class Blend:
    """A blend of datasets: the weights of `stretches`, each from a position on.

    A dataset that is drawn from again goes on where it was, so neither a new dataset nor new weights repeat anything.
    Each stretch deals among the datasets that it names and no others: what is added later does not move the past.
    """

    def __init__(
        self, stretches: Sequence[tuple[int, Mapping[str, float]]], *, datasets: Sequence[str] | None = None
    ) -> None:
        assert stretches[0][0] == 0 and all(before[0] < after[0] for before, after in pairwise(stretches))
        self.datasets = list(datasets or dict.fromkeys(name for _, weights in stretches for name in weights))
        """Their names, in the order given or in which they first appear."""
        self._starts = np.asarray([start for start, _ in stretches], np.int64)
        number = {name: place for place, name in enumerate(self.datasets)}
        self._named = [np.asarray([number[name] for name in weights], np.int64) for _, weights in stretches]
        self._weights = [_whole(weights) for _, weights in stretches]
        drawn = np.zeros(len(self.datasets), np.int64)
        self._drawn_before = [drawn]
        for named, weights, start, stop in zip(self._named, self._weights, self._starts, self._starts[1:]):
            drawn = drawn.copy()
            drawn[named] += _counts(weights, int(stop - start))
            self._drawn_before.append(drawn)

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (dataset, how many samples of it came before) at each position: (n,) int64 to two of (n,) int64."""
        positions = np.asarray(positions, np.int64)
        assert positions.size == 0 or 0 <= positions.min() <= positions.max() < MAX_POSITIONS
        datasets, indexes = np.empty_like(positions), np.empty_like(positions)
        stretches = np.searchsorted(self._starts, positions, "right") - 1
        for stretch in np.unique(stretches):
            own = stretches == stretch
            place, index = _deal(self._weights[stretch], positions[own] - self._starts[stretch])
            dataset = self._named[stretch][place]
            datasets[own], indexes[own] = dataset, index + self._drawn_before[stretch][dataset]
        return datasets, indexes

    def drawn(self, position: int) -> np.ndarray:
        """Return how many samples of each dataset come before `position`: (num_datasets,) int64."""
        stretch = int(np.searchsorted(self._starts, position, "right")) - 1
        counts = self._drawn_before[stretch].copy()
        counts[self._named[stretch]] += _counts(self._weights[stretch], position - int(self._starts[stretch]))
        return counts


def _whole(weights: Mapping[str, float]) -> np.ndarray:
    """Return the weight of every dataset that is named as a whole number: (num_named,) int64."""
    total = sum(weights.values())
    return np.asarray([max(1, round(weight / total * RESOLUTION)) for weight in weights.values()], np.int64)


def _deal(weights: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (dataset, index in it) of each position: (n,) int64 to two of (n,) int64."""
    if len(weights) == 1:
        return np.zeros_like(positions), positions
    middle = len(weights) // 2
    before, after = _left(weights, middle, positions), _left(weights, middle, positions + 1)
    goes_left = after > before
    datasets, indexes = np.empty_like(positions), np.empty_like(positions)
    datasets[goes_left], indexes[goes_left] = _deal(weights[:middle], before[goes_left])
    right, indexes[~goes_left] = _deal(weights[middle:], (positions - before)[~goes_left])
    datasets[~goes_left] = right + middle
    return datasets, indexes


def _counts(weights: np.ndarray, positions: int) -> np.ndarray:
    """Return how many of the first `positions` each dataset gets: (num_datasets,) int64."""
    if len(weights) == 1:
        return np.asarray([positions], np.int64)
    middle = len(weights) // 2
    left = int(_left(weights, middle, np.asarray(positions)))
    return np.concatenate([_counts(weights[:middle], left), _counts(weights[middle:], positions - left)])


def _left(weights: np.ndarray, middle: int, positions: np.ndarray) -> np.ndarray:
    """Return how many of the first `positions` go to the datasets before `middle`."""
    total = max(1, int(weights.sum()))
    return (positions * int(weights[:middle].sum()) + total // 2) // total
