"""What stops a run that has gone wrong, or takes it back, before it wastes a cluster or overwrites good checkpoints."""

import logging
from collections import deque
from math import isfinite
from statistics import median

from megatron_mm.config.schema import GuardConfig
from megatron_mm.errors import RunStopped
from megatron_mm.model.loss import by_name
from megatron_mm.training.step import StepResult

log = logging.getLogger(__name__)

NAMED = 4
"""Ranks, and parameters of each, that a warning names."""


class TrainingDiverged(RunStopped):
    """The run cannot heal itself: it must be resumed from a checkpoint, with other settings or data."""


class BadSteps(Exception):
    """What steps `first` to `last`, counted from 1, have done to the run is not to be kept: the message says why."""

    def __init__(self, first: int, last: int, reason: str) -> None:
        super().__init__(reason)
        self.first, self.last = first, last


class LossSpike(BadSteps):
    """The loss left its course with the batch of step `first`, and has not come back."""

    def __init__(self, first: int, last: int, loss: float, usual: float) -> None:
        reason = f"the loss of steps {first} to {last} is up to {loss:.4f}; it was {usual:.4f} before"
        super().__init__(first, last, reason)


class Guard:
    """Watches the results of steps; every rank sees the same ones and decides alike."""

    def __init__(self, settings: GuardConfig) -> None:
        self._settings = settings
        self._skipped = 0
        self._losses: deque[tuple[int, float]] = deque(maxlen=max(1, settings.spike_window))
        self._above: list[tuple[int, float]] = []
        self._rollbacks = 0

    @property
    def healthy(self) -> bool:
        """Whether what the last step left may be saved as good."""
        return not self._skipped and not self._above

    def check(self, result: StepResult, *, step: int, since: int = 0) -> None:
        """Warn of a step that was skipped; `step` is counted from 1. One without a loss-bearing token says nothing.

        Losses of steps up to `since`, before a planned change of data or settings, say nothing about what is usual now.
        Raises TrainingDiverged after guard.max_skipped_steps in a row, LossSpike after guard.spike_steps in a row whose
        loss stands out.
        """
        self._forget_until(since)
        if not result.updated and (result.bears_loss or not isfinite(result.grad_norm)):
            self._skip(result, step)
        if not (result.updated and result.bears_loss):
            return
        self._skipped = 0
        loss = by_name(result.losses)["loss"]
        if self._settings.spike_window and isfinite(loss):
            self._watch(loss, step)

    def _skip(self, result: StepResult, step: int) -> None:
        self._skipped += 1
        found = _by_rank(result.not_finite) or "no rank had such a gradient before the sum over ranks"
        log.warning(
            "step %d: the gradient norm is %s; the weights are left as they were: %s", step, result.grad_norm, found
        )
        if self._skipped >= self._settings.max_skipped_steps:
            raise TrainingDiverged(
                f"the last {self._skipped} steps, up to {step}, had no finite gradient. Nothing was saved of them: go "
                "on from the last checkpoint with a lower optimizer.lr, or look at the samples of these steps with "
                "tools/inspect_data.py --run RUN_DIR --step N. "
                f"In the last of them: {found}."
            )

    def _watch(self, loss: float, step: int) -> None:
        """Compare `loss` with those of the window: robustly, so that a spike does not hide itself."""
        if loss <= self._limit():
            self._losses.extend([*self._above, (step, loss)])
            self._above = []
            return
        self._above.append((step, loss))
        if len(self._above) >= self._settings.spike_steps:
            raise self._spike()

    def _spike(self) -> LossSpike:
        highest = max(loss for _, loss in self._above)
        return LossSpike(self._above[0][0], self._above[-1][0], highest, self._usual())

    def _usual(self) -> float:
        return median(loss for _, loss in self._losses)

    def _limit(self) -> float:
        if len(self._losses) < max(2, self._settings.spike_window // 2):
            return float("inf")
        usual = self._usual()
        deviation = 1.4826 * median(abs(loss - usual) for _, loss in self._losses)  # of a normal distribution
        return usual + max(self._settings.spike_deviations * deviation, self._settings.spike_nats)

    def _forget_until(self, step: int) -> None:
        while self._losses and self._losses[0][0] <= step:
            self._losses.popleft()
        self._above = [(number, loss) for number, loss in self._above if number > step]

    def remember(self, losses: list[tuple[int, float]]) -> None:
        """Take the losses (step, loss) that led to where the run goes on as the usual ones: it was healthy there."""
        self._losses.clear()
        self._losses.extend(losses)

    def unsettled(self, step: int) -> BadSteps | None:
        """Return what stands in the way of keeping the state after `step` for good; None if nothing does."""
        if self._skipped:
            first = step - self._skipped + 1
            return BadSteps(first, step, f"steps {first} to {step}, the last of the run, had no finite gradient")
        return self._spike() if self._above else None

    def roll_back(self, bad: BadSteps) -> None:
        """Take note that the run goes back. Raises TrainingDiverged after guard.max_rollbacks times."""
        self._rollbacks += 1
        self._above, self._skipped = [], 0
        if self._rollbacks > self._settings.max_rollbacks:
            raise TrainingDiverged(
                f"{bad}, after {self._settings.max_rollbacks} roll-backs (guard.max_rollbacks): go on from the last "
                "checkpoint with a lower optimizer.lr, or look at the samples of these steps with "
                "tools/inspect_data.py --run RUN_DIR --step N."
            )


def _by_rank(not_finite: tuple[str, ...]) -> str:
    """Return the first lines 'rank R: NAME' of each rank: a gradient that is not finite soon makes others so."""
    names: dict[str, list[str]] = {}
    for line in not_finite:
        rank, _, name = line.partition(": ")
        names.setdefault(rank, []).append(name)
    told = [
        f"{rank} in {', '.join(own[:NAMED])}" + (f" and {len(own) - NAMED} more" if len(own) > NAMED else "")
        for rank, own in list(names.items())[:NAMED]
    ]
    return "; ".join(told) + (f"; and {len(names) - NAMED} more ranks" if len(names) > NAMED else "")
