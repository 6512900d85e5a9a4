"""What stops a run that has gone wrong, before it wastes a cluster or overwrites good checkpoints."""

import logging

from megatron_mm.training.step import StepResult

log = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 10
"""Steps in a row without a finite gradient after which the run stops."""


class TrainingDiverged(RuntimeError):
    """The gradients stay non-finite: the run must be resumed from a checkpoint, with other settings or data."""


class Guard:
    """Watches the results of steps; every rank sees the same ones and decides alike."""

    def __init__(self) -> None:
        self._skipped = 0

    def check(self, result: StepResult, *, step: int) -> None:
        """Warn of a step that was skipped; raise TrainingDiverged after MAX_SKIPPED_STEPS in a row."""
        if result.updated:
            self._skipped = 0
            return
        self._skipped += 1
        log.warning("step %d: the gradient norm is %s; the weights are left as they were", step, result.grad_norm)
        if self._skipped >= MAX_SKIPPED_STEPS:
            raise TrainingDiverged(
                f"the last {self._skipped} steps, up to {step}, had no finite gradient. Nothing was saved of them: "
                "resume from the last checkpoint with a lower optimizer.lr, or look at the samples of these steps."
            )
