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

MIN_DEVIATION_FRACTION = 0.005
"""Of the median loss: a window that happens to be flat does not make an ordinary step a spike."""

NAMED = 4
"""Ranks, and parameters of each, that a warning names."""


class TrainingDiverged(RunStopped):
    """The run cannot heal itself: it must be resumed from a checkpoint, with other settings or data."""


class LossSpike(Exception):
    """The loss left its course with the batch of step `first`, counted from 1, and has not come back."""

    def __init__(self, first: int, last: int, loss: float, usual: float) -> None:
        super().__init__(f"the loss of steps {first} to {last} is up to {loss:.4f}; it was {usual:.4f} before")
        self.first, self.last = first, last


class Guard:
    """Watches the results of steps; every rank sees the same ones and decides alike."""

    def __init__(self, settings: GuardConfig) -> None:
        self._settings = settings
        self._skipped = 0
        self._losses: deque[float] = deque(maxlen=max(1, settings.spike_window))
        self._above: list[float] = []
        self._rollbacks = 0

    @property
    def healthy(self) -> bool:
        """Whether what the last step left may be saved as good."""
        return not self._skipped and not self._above

    def check(self, result: StepResult, *, step: int) -> None:
        """Warn of a step that was skipped.

        Raises TrainingDiverged after guard.max_skipped_steps in a row, LossSpike after guard.spike_steps in a row whose
        loss stands out.
        """
        if not result.updated:
            self._skip(result, step)
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
                f"the last {self._skipped} steps, up to {step}, had no finite gradient. Nothing was saved of them: "
                "resume from the last checkpoint with a lower optimizer.lr, or look at the samples of these steps. "
                f"In the last of them: {found}."
            )

    def _watch(self, loss: float, step: int) -> None:
        """Compare `loss` with those of the window: robustly, so that a spike does not hide itself."""
        limit = self._limit()
        if loss <= limit:
            self._losses.extend([*self._above, loss])
            self._above = []
            return
        self._above.append(loss)
        if len(self._above) >= self._settings.spike_steps:
            raise LossSpike(step - len(self._above) + 1, step, max(self._above), median(self._losses))

    def _limit(self) -> float:
        if len(self._losses) < max(2, self._settings.spike_window // 2):
            return float("inf")
        usual = median(self._losses)
        deviation = 1.4826 * median(abs(loss - usual) for loss in self._losses)  # of a normal distribution
        return usual + self._settings.spike_deviations * max(deviation, MIN_DEVIATION_FRACTION * usual)

    def remember(self, losses: list[float]) -> None:
        """Take the losses that led to where the run goes on as the usual ones: it was healthy there."""
        self._losses.clear()
        self._losses.extend(losses)

    def roll_back(self, spike: LossSpike) -> None:
        """Take note that the run goes back. Raises TrainingDiverged after guard.max_rollbacks times."""
        self._rollbacks += 1
        self._above = []
        if self._rollbacks > self._settings.max_rollbacks:
            raise TrainingDiverged(
                f"{spike}, after {self._settings.max_rollbacks} roll-backs: resume from a checkpoint with a lower "
                "optimizer.lr, or look at the samples of these steps."
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
