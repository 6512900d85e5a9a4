"""Where the time of a run went: goodput is the share of it that trained steps which still count."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by what they were spent on, from its first start to its last record."""

    steps: float = 0.0
    """Optimizer steps that changed the weights and that the run has kept: the productive part."""
    lost_steps: float = 0.0
    """Steps that were done again after a failure or a roll-back."""
    idle_steps: float = 0.0
    """Steps that changed no weight: their gradient was not finite, or no token of their batch bore loss."""
    save_stalls: float = 0.0
    """Training stood still for a checkpoint."""
    starts: float = 0.0
    """Seconds from the start of a process to its first record: imports, communicators, building, loading."""
    other: float = 0.0
    """Evaluations, checks, waiting for data; and between two lives: detection, node checks, the queue."""

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def fraction(self) -> float:
        """Productive seconds of all, 0 to 1."""
        return self.steps / self.total if self.total else 0.0

    def describe(self) -> str:
        """Return one line for people."""
        parts = ", ".join(
            f"{field.name.replace('_', ' ')} {getattr(self, field.name):,.0f} s" for field in fields(self)
        )
        return f"{self.fraction:.1%} of {self.total:,.0f} s: {parts}"


def goodput_of(records: Sequence[dict[str, Any]]) -> Goodput:
    """Return where the time of a run went, from the records of its metrics.jsonl; nothing if they bear no times."""
    starts = [record for record in records if "layout" in record]
    if not starts or "time" not in starts[0]:
        return Goodput()
    steps = sum(record.get("step_seconds", 0.0) for record in records if record.get("updated", True))
    idle = sum(record.get("step_seconds", 0.0) for record in records if not record.get("updated", True))
    lost = sum(record.get("lost_seconds", 0.0) for record in records)
    stalls = sum(record.get("save_stall_seconds", 0.0) for record in records)
    starting = sum(record["start_seconds"] for record in starts)
    rest = _total_seconds(records) - steps - lost - idle - stalls - starting
    return Goodput(steps, lost, idle, stalls, starting, max(0.0, rest))


def _total_seconds(records: Sequence[dict[str, Any]]) -> float:
    """Return how long a run has lasted; a clock that was set back between two lives takes nothing from either."""
    total, last = 0.0, None
    for record in records:
        began = record["time"] - record.get("start_seconds", 0.0) if "layout" in record else last
        if last is not None and began is not None:
            total += max(record.get("lost_seconds", 0.0), began - last)
        total += record["time"] - (began if began is not None else record["time"])
        last = record["time"]
    return total
