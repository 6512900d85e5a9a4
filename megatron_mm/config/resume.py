"""What may change when a run goes on from a checkpoint: never, by a rule, or freely. The one place that says so.

docs/resume.md shows these lists, and a test compares it with them.
"""

from collections.abc import Mapping

from megatron_mm.config.load import anchor, differences
from megatron_mm.config.rules import untrained_encoders
from megatron_mm.config.schema import Config
from megatron_mm.errors import ConfigError
from megatron_mm.modalities import BY_NAME

NEVER = {
    "model.": "the weights are those of this decoder",
    **{f"{name}.": "the weights and optimizer state are those of this encoder, trained or frozen" for name in BY_NAME},
    "data.seq_len": "it says which samples there are",
    "data.packing": "it says which samples there are",
    "data.seed": "it says in which order samples are seen",
    "training.seed": "it is the key of weights that were made long ago",
    "optimizer.name": "the state is that of this optimizer",
}
"""Settings, or sections, and why: a start with another value is refused."""

BY_RULE = {
    "data.train": "paths and names may move: the shards behind them are compared by their checksums, and must be the "
    "same in the same order; so must the weights",
    "data.changes": "changes from the step at which the run goes on, or behind the last that it left out, may be "
    "added, altered or dropped; earlier ones not",
    "data.validation": "other held-out shards may be named; other contents under the same path are refused",
    "training.global_batch_size": "from the step at which the run goes on; samples are counted as they were consumed, "
    "so none is seen twice",
    "training.precision": "bf16 and fp8 may take each other's place: both keep FP32 master weights; fp32 may not",
    "training.start_from": "not read again: the path may move or be gone, other contents are refused",
    **{
        f"{name}.pretrained": "not read again: the path may move or be gone, other contents are refused"
        for name in BY_NAME
    },
}
"""Settings that may change so far, and how far."""

FREELY = {
    "preset": "a name",
    "run_dir": "the folder may move",
    "parallel.": "checkpoints hold whole tensors, which any layout can cut",
    "checkpoint.": "how often it is saved does not move it",
    "evaluation.": "held-out losses are measured, not trained on",
    "guard.": "what is watched does not move the run",
    "logging.": "what is written does not move the run",
    "optimizer.": "from the next step on; the values of the checkpoint do not come back",
    "schedule.": "from the next step on, as if it had been so from the start",
    "data.decoder": "decoders agree to rounding",
    "data.prefetch_steps": "a step is read alike whenever it is read",
    "data.stall_seconds": "a step is read alike whenever it is read",
    "training.steps": "the run ends later or sooner; the schedule follows where it is not set",
    "training.stop_after": "the run goes on later",
    "training.micro_batch_size": "the global batch is the same",
    "training.fp8_recipe": "how products are computed is no state",
    "training.bf16_end_layers": "how products are computed is no state",
    "training.backend": "both name and shape their parameters alike",
    "training.attention": "all forms agree to rounding",
    "training.kernels": "all forms agree to rounding",
    "training.recompute": "activations computed again are the same",
    "training.z_loss": "from the next step on",
    "training.loss_chunk_tokens": "the loss is the same to rounding",
    "training.check_replicas_interval": "what is watched does not move the run",
}
"""Settings, or sections, that may change at any start; what changed is logged and recorded with its step."""

SHIFTS_LOSS = (
    *("optimizer.", "schedule.", "data.train", "data.changes", "training.global_batch_size", "training.z_loss"),
    *("training.precision", "training.fp8_recipe", "training.bf16_end_layers"),
)
"""Settings that may move the training loss: after a change of one, the guard learns anew what is usual."""


def verdict(key: str) -> str:
    """Return 'never', 'by rule' or 'freely' for a setting: the longest entry that names it decides."""
    lists: dict[str, Mapping[str, str]] = {"never": NEVER, "by rule": BY_RULE, "freely": FREELY}
    found = [
        (len(entry), name)
        for name, entries in lists.items()
        for entry in entries
        if key == entry or (entry.endswith(".") and key.startswith(entry))
    ]
    assert found, f"{key} is on none of the lists of what may change on a resume"
    return max(found)[1]


def check_resume(saved: Config, now: Config, *, step: int, source: str) -> dict[str, str]:
    """Return a line for each setting that has changed since step `step` was saved, by its key, all of them allowed.

    `source` names the checkpoint in messages. What lies behind paths is compared elsewhere, by content. Raises
    ConfigError with every setting that a resumed run cannot change.
    """
    changed = differences(anchor(saved), anchor(now))
    if untrained := untrained_encoders(saved):
        files = " ".join(f"{name}.pretrained=FILE" for name in untrained)
        raise ConfigError(
            f"{source} is of a run whose {' and '.join(untrained)} encoder is frozen at random weights: it never "
            f"learns. Start a new run from it, in another run_dir: training.start_from={source} {files}."
        )
    refused = [line for key, line in changed.items() if verdict(key) == "never"]
    if _shares(saved.data.train) != _shares(now.data.train):
        refused.append(f"{changed['data.train']} ({BY_RULE['data.train']})")
    past = [[change for change in config.data.changes if change.from_step < step] for config in (saved, now)]
    drawn = [[(change.from_step, _shares(change.train)) for change in changes] for changes in past]
    if drawn[0] != drawn[1]:
        refused.append(f"{changed['data.changes']} (only changes from step {step} on can differ)")
    if {saved.training.precision, now.training.precision} not in ({"bf16", "fp8"}, {saved.training.precision}):
        refused.append(f"{changed['training.precision']} ({BY_RULE['training.precision']})")
    if refused:
        raise ConfigError(
            f"{source} was saved with other settings, which a resumed run cannot change:\n  "
            + "\n  ".join(refused)
            + "\n  Set them back, or start anew: another run_dir, with training.start_from for the weights."
        )
    return changed


def _shares(train: tuple[str, ...] | Mapping[str, float]) -> list[float]:
    """Return how much is drawn of each dataset, in order, whatever they are called."""
    if not isinstance(train, Mapping):
        return [1.0]
    return [round(weight / sum(train.values()), 9) for weight in train.values()]


def shifts_loss(changed: Mapping[str, str]) -> bool:
    """Return whether one of the settings that have changed may move the training loss."""
    return any(key.startswith(SHIFTS_LOSS) for key in changed)
