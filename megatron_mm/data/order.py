"""Which sample is seen when: a keyed permutation for each epoch, evaluated on the fly.

No shuffled array is held or saved, so start-up and resume cost nothing at any size, and the order does not depend on
the number of ranks or workers.
"""

import functools

import numpy as np

from megatron_mm.data.native import _index

FEISTEL_FROM = 100_000
"""Below this size a Feistel network is measurably not uniform; hashed keys are sorted instead."""
GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1


class SampleOrder:
    """The order in which `num_samples` samples are seen, epoch after epoch."""

    def __init__(self, num_samples: int, *, seed: int) -> None:
        assert num_samples > 0, "there is nothing to order"
        self.num_samples = num_samples
        self.seed = seed

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """Return the sample at each position of the endless stream of epochs: (n,) int64 to (n,) int64."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        samples = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            samples[epochs == epoch] = self._permute(int(epoch), offsets[epochs == epoch])
        return samples

    def _permute(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        key = mix(self.seed * GOLDEN + epoch & MASK)
        if self.num_samples < FEISTEL_FROM:
            return sorted_permutation(self.num_samples, key)[offsets]
        if _index is not None:
            return _index.permute(self.num_samples, key, offsets)
        return np.asarray([feistel_permutation(self.num_samples, key, int(offset)) for offset in offsets], np.int64)


@functools.lru_cache(maxsize=4)
def sorted_permutation(size: int, key: int) -> np.ndarray:
    """Return a uniform permutation of [0, size) by sorting hashes: (size,) int64."""
    elements = np.arange(1, size + 1, dtype=np.uint64)
    return np.argsort(_mix_array(elements * np.uint64(GOLDEN) + np.uint64(key)), kind="stable")


def feistel_permutation(size: int, key: int, element: int) -> int:
    """Return the image of `element` under the permutation of this key: the reference of csrc/index/permutation.h."""
    bits = max(2, (size - 1).bit_length())
    right_bits = bits - bits // 2
    left_mask, right_mask = (1 << bits // 2) - 1, (1 << right_bits) - 1
    keys = [mix(key + (number + 1) * GOLDEN & MASK) for number in range(6)]
    while True:
        left, right = element >> right_bits, element & right_mask
        for number in range(0, 6, 2):
            left ^= mix(right ^ keys[number]) & left_mask
            right ^= mix(left ^ keys[number + 1]) & right_mask
        element = left << right_bits | right
        if element < size:
            return element


def mix(value: int) -> int:
    """Return MurmurHash3's 64-bit finalizer of `value`: every bit of the input reaches every bit of the output."""
    value = (value ^ value >> 33) * 0xFF51AFD7ED558CCD & MASK
    value = (value ^ value >> 33) * 0xC4CEB9FE1A85EC53 & MASK
    return value ^ value >> 33


def _mix_array(values: np.ndarray) -> np.ndarray:
    """`mix` over (n,) uint64."""
    shift = np.uint64(33)
    values = (values ^ values >> shift) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ values >> shift) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ values >> shift
