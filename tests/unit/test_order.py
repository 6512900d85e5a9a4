"""Sample order: a permutation of every epoch, known from a position alone, the same in C++ and in Python."""

import numpy as np
import pytest

from megatron_mm.data import _index, order
from megatron_mm.data.order import FEISTEL_FROM, SampleOrder, feistel_permutation, mix, sorted_permutation


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 4_095, 4_097])
def test_the_feistel_network_is_a_permutation_and_its_reference_agrees(size: int) -> None:
    for key in (0, 1, 2**64 - 1):
        native = _index.permute(size, key, np.arange(size))
        assert sorted(native) == list(range(size))
        sample = range(0, size, max(1, size // 50))
        assert [feistel_permutation(size, key, element) for element in sample] == native[list(sample)].tolist()


@pytest.mark.parametrize("size", [10**6, 2**33 + 1, 2**40])
def test_it_reaches_any_size_without_memory(size: int) -> None:
    elements = np.asarray([0, 1, size // 2, size - 1])
    native = _index.permute(size, 5, elements)
    assert native.min() >= 0
    assert native.max() < size
    assert native.tolist() == [feistel_permutation(size, 5, int(element)) for element in elements]


def test_elements_outside_are_refused() -> None:
    with pytest.raises(IndexError):
        _index.permute(10, 0, np.asarray([10]))


@pytest.mark.parametrize("num_samples", [1, 7, 500, FEISTEL_FROM + 3])
def test_every_epoch_sees_every_sample_once(num_samples: int) -> None:
    samples = SampleOrder(num_samples, seed=3)
    epochs = [samples.samples(np.arange(epoch * num_samples, (epoch + 1) * num_samples)) for epoch in range(3)]
    for seen in epochs:
        assert (np.sort(seen) == np.arange(num_samples)).all()
    if num_samples > 10:
        assert (epochs[0] != epochs[1]).any()
        assert (SampleOrder(num_samples, seed=4).samples(np.arange(num_samples)) != epochs[0]).any()


def test_a_position_is_looked_up_alone() -> None:
    samples = SampleOrder(50, seed=1)
    stream = samples.samples(np.arange(170))
    assert [int(samples.samples(np.asarray([position]))[0]) for position in range(170)] == stream.tolist()


def test_without_the_extension_the_order_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = SampleOrder(FEISTEL_FROM, seed=9)
    positions = np.asarray([0, 5, 99_999, 100_000, 250_000])
    native = samples.samples(positions)
    monkeypatch.setattr(order, "_index", None)
    assert samples.samples(positions).tolist() == native.tolist()


@pytest.mark.parametrize("size", [5, 6])
def test_small_permutations_are_uniform(size: int) -> None:
    """Chi-square over where each element goes; a Feistel network fails this below about 1e5 elements."""
    counts = np.zeros((size, size))
    keys = 6_000
    for key in range(keys):
        counts[np.arange(size), sorted_permutation(size, mix(key))] += 1
    chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
    degrees = (size - 1) ** 2
    assert abs(chi_square - degrees) < 6 * np.sqrt(2 * degrees)
