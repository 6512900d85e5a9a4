"""Blending: a dataset and a place in it for every position, by weights that may change without repeating anything."""

import numpy as np
import pytest

from megatron_mm.data.blend import Blend

MANY = {f"d{number}": float(weight) for number, weight in enumerate(np.random.default_rng(0).exponential(1.0, 50))}


def reference(blend: Blend, positions: int) -> tuple[list[int], list[int]]:
    """Count what came before, position after position."""
    datasets = blend.locate(np.arange(positions))[0].tolist()
    counts = [0] * len(blend.datasets)
    indexes = []
    for dataset in datasets:
        indexes.append(counts[dataset])
        counts[dataset] += 1
    return datasets, indexes


@pytest.mark.parametrize(
    "stretches",
    [
        [(0, {"a": 1.0})],
        [(0, {"a": 0.7, "b": 0.3})],
        [(0, MANY)],
        [(0, {"a": 0.7, "b": 0.3}), (500, {"b": 1.0, "c": 3.0}), (1_201, {"c": 1.0, "a": 1e-9}), (1_300, MANY)],
    ],
    ids=["one", "two", "many", "changing"],
)
def test_each_sample_of_a_dataset_is_drawn_once_and_in_order(stretches) -> None:
    blend = Blend(stretches)
    datasets, indexes = blend.locate(np.arange(3_000))
    assert (datasets.tolist(), indexes.tolist()) == reference(blend, 3_000)
    alone = [blend.locate(np.asarray([position])) for position in (0, 1, 499, 500, 1_200, 1_201, 1_300, 2_999)]
    assert [int(dataset[0]) for dataset, _ in alone] == datasets[[0, 1, 499, 500, 1_200, 1_201, 1_300, 2_999]].tolist()


@pytest.mark.parametrize(
    "weights", [{"a": 0.7, "b": 0.3}, {"a": 5, "b": 1, "c": 1}, MANY], ids=["two", "three", "many"]
)
def test_counts_keep_to_the_weights_all_along(weights) -> None:
    datasets, _ = Blend([(0, weights)]).locate(np.arange(20_000))
    drawn = np.cumsum(datasets[:, None] == np.arange(len(weights)), axis=0)
    share = np.asarray(list(weights.values())) / sum(weights.values())
    wanted = np.arange(1, 20_001)[:, None] * share
    # Half a sample for each of the log2(n) levels, and what rounding weights to 2^-20 adds over 20,000 samples.
    assert np.abs(drawn - wanted).max() < 0.5 * np.ceil(np.log2(len(weights))) + 0.05


def test_a_later_change_leaves_the_past_as_it_was() -> None:
    before = Blend([(0, {"a": 0.7, "b": 0.3})])
    after = Blend([(0, {"a": 0.7, "b": 0.3}), (1_000, {"a": 0.2, "b": 0.3, "c": 0.5})])
    past = np.arange(1_000)
    for ours, theirs in zip(before.locate(past), after.locate(past), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    datasets, indexes = after.locate(np.arange(5_000))
    drawn = set(zip(datasets.tolist(), indexes.tolist()))
    assert len(drawn) == 5_000, "nothing is drawn twice"
    assert after.datasets == ["a", "b", "c"]


def test_positions_of_a_long_run_cost_what_the_first_ones_do() -> None:
    datasets, indexes = Blend([(0, MANY)]).locate(np.arange(2**41, 2**41 + 1_000))
    share = np.asarray(list(MANY.values())) / sum(MANY.values())
    np.testing.assert_allclose(indexes, 2**41 * share[datasets], rtol=1e-3)


def test_what_was_drawn_before_a_position_is_what_was_located_there() -> None:
    blend = Blend([(0, {"a": 2, "b": 1}), (50, {"b": 1, "c": 3}), (90, {"a": 1, "b": 1, "c": 1})])
    for position in (0, 1, 49, 50, 51, 90, 133):
        datasets, _ = blend.locate(np.arange(position))
        assert blend.drawn(position).tolist() == np.bincount(datasets, minlength=3).tolist()
