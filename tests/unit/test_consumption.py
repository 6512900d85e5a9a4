"""What each step consumes, beside a plain simulation that writes down every sample as it is taken."""

import numpy as np
import pytest

from megatron_mm.data.blend import Blend
from megatron_mm.data.consumption import Consumption, LeftOut

CHANGES = [(0, {"a": 2, "b": 1}), (12, {"b": 1, "c": 3}), (20, {"a": 1, "b": 1, "c": 1})]


class Simulated:
    """A run that takes sample after sample and remembers which dataset each came from."""

    def __init__(self, changes: list) -> None:
        self.changes, self.at, self.log = changes, {}, {}
        self.next, self.out = 0, set()

    def weights(self, step: int) -> dict:
        return [weights for first, weights in self.changes if first <= step][-1]

    def train(self, steps: range, size: int) -> None:
        for step in steps:
            taken = []
            while len(taken) < size:
                if self.next not in self.out:
                    taken.append(self.next)
                    self.log[self.next] = self.weights(step)
                self.next += 1
            self.at[step] = taken

    def go_back(self, step: int, out: range) -> None:
        """Go back to what the run was before `step`, leaving out the samples of the steps `out`."""
        self.out |= {sample for left in out for sample in self.at[left]}
        self.next = min(self.at[step])


@pytest.mark.parametrize("size_after", [4, 6])
def test_a_run_with_roll_backs_and_changes_is_the_simulated_one(size_after: int) -> None:
    run, ours = Simulated(CHANGES), Consumption(((0, 4),))
    run.train(range(15), 4)
    run.go_back(8, range(10, 15))  # five batches, of which the last three had the weights of step 12
    ours = ours.leave_out(range(10, 15))
    run.train(range(8, 18), 4)
    run.go_back(18 - 3, range(16, 18))
    ours = ours.leave_out(range(16, 18))
    run.train(range(15, 18), 4)
    ours = ours.resize(size_after, step=18)
    run.train(range(18, 25), size_after)
    run.go_back(8, range(9, 11))  # behind what was left out before: an older checkpoint
    ours = ours.leave_out(range(9, 11))
    run.train(range(8, 18), 4)
    run.train(range(18, 30), size_after)
    for step in range(30):
        assert ours.positions(step).tolist() == run.at[step], step
        assert len(set(ours.positions(step).tolist())) == ours.batch_size(step)
    starts, stretches = zip(*ours.stretches(CHANGES))
    for position, weights in run.log.items():
        if position not in run.out or any(position in run.at[step] for step in run.at):
            assert stretches[np.searchsorted(starts, position, "right") - 1] == weights, position


def test_a_change_after_batches_were_left_out_repeats_and_skips_nothing() -> None:
    """Five batches are left out before step 12, at which the weights change: every dataset goes on where it was."""
    changes, size = CHANGES[:2], 8
    consumption = Consumption(((0, size),)).leave_out(range(4, 9))
    blend = Blend(consumption.stretches(changes))
    last = int(consumption.positions(40)[-1])
    datasets, indexes = blend.locate(np.arange(last + 1))
    for dataset in range(3):
        own = indexes[datasets == dataset]
        assert own.tolist() == list(range(len(own))), "in order, each once"
    names = np.asarray(blend.datasets)[blend.locate(consumption.positions(11))[0]]
    assert "c" not in names
    names = np.asarray(blend.datasets)[blend.locate(consumption.positions(12))[0]]
    assert "a" not in names


def test_weights_added_later_do_not_move_what_was_drawn() -> None:
    """A fourth dataset would cut the tree of the first three elsewhere, were they dealt together."""
    first = {"a": 5, "b": 3, "c": 2}
    before = Blend([(0, first)])
    after = Blend([(0, first), (100, {**first, "d": 4}), (200, {"d": 1})])
    past = np.arange(100)
    for ours, theirs in zip(before.locate(past), after.locate(past), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_batch_size_that_changes_takes_the_next_samples() -> None:
    ours = Consumption(((0, 4),)).resize(10, step=3)
    assert [len(ours.positions(step)) for step in (2, 3)] == [4, 10]
    assert ours.positions(3).tolist() == list(range(12, 22))
    assert ours.trained_samples(5) == 32
    assert ours.resize(7, step=3).batch_sizes == ((0, 4), (3, 7)), "the same step again: a run that was killed before"
    assert ours.resize(4, step=3).batch_sizes == ((0, 4),)
    assert ours.resize(10, step=9) == ours


def test_a_step_over_a_gap_is_left_out_in_parts() -> None:
    ours = Consumption(((0, 4), (2, 6)), (LeftOut(10, 4, 2),))
    assert ours.positions(2).tolist() == [8, 9, 14, 15, 16, 17]
    ours = ours.leave_out(range(2, 3))
    assert ours.left_out == (LeftOut(8, 2, 2), LeftOut(10, 4, 2), LeftOut(14, 4, 2))
    assert ours.positions(2).tolist() == list(range(18, 24))
