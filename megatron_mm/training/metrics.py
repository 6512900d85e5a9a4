"""What a run tells: a line a step on the console, a progress bar, metrics.jsonl, TensorBoard, and plots."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_mm.batch import TokenCounts
from megatron_mm.config import Config
from megatron_mm.engine import device
from megatron_mm.engine.mesh import Mesh
from megatron_mm.model.loss import BY_DATASET, by_name
from megatron_mm.retry import retrying
from megatron_mm.storage import replacing
from megatron_mm.training import processes
from megatron_mm.training.step import StepResult

log = logging.getLogger(__name__)


class Metrics:
    """Writes what the run measures; only rank 0 writes.

    metrics.jsonl holds one object a line: {"step": ..., "layout": ..., "parameters": ...} at each start of the run,
    {"step": ..., "loss": ..., ...} after each step, {"step": ..., "heldout/loss": ..., ...} after each evaluation,
    {"step": ..., "save_stall_seconds": ...} after each save. Each has its Unix time. Token counts are those of the run
    so far, over restarts and roll-backs; a loss without a loss-bearing token is null.
    """

    def __init__(self, config: Config, mesh: Mesh, *, first_step: int) -> None:
        self.config = config
        self._is_rank_0 = mesh.is_rank_0
        self._clock = time.time() - time.monotonic()  # read once: times of one process differ by what has passed
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        config = self.config
        self._counts = TokenCounts()
        if not self._is_rank_0:
            return
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        self._kept = _forget_after(path, first_step)
        self._counts = self._kept.counts
        if self._kept.uncounted_steps:
            log.warning(
                "%s has no token counts of the %d steps up to %d, so the run's counts leave them out",
                *(path, self._kept.uncounted_steps, first_step),
            )
        self._lines = _Lines(path)
        self._board = None
        if config.logging.tensorboard:
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=config.last_step,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (config.logging.progress_bar and sys.stderr.isatty()),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._is_rank_0:
            self._bar.close()
            self._lines.close()
            self._plot(lambda board: board.close())

    def start(self, *, step: int, layout: str, parameters: int, run: str = "", changed: Sequence[str] = ()) -> None:
        """Record that the run starts, or goes on, after step `step`, and what it lost by having been cut off.

        `run` names the run; `changed` are lines about the settings that it goes on with and did not have before.
        """
        if self._is_rank_0:
            seconds = processes.age()
            values = {"layout": layout, "parameters": parameters, "start_seconds": seconds, **self._kept.as_values()}
            values |= ({"run": run} if run else {}) | ({"changed": list(changed)} if changed else {})
            self._write(step, values, plot=False)

    def go_back(self, *, step: int, reason: str) -> None:
        """Record that the run goes back to what it was after step `step`, and forget what it did since."""
        self._close()
        self._open(step)
        if self._is_rank_0:
            self._write(step, {"went_back": reason, **self._kept.as_values()}, plot=False)

    def losses(self, count: int) -> list[tuple[int, float]]:
        """Return (step, loss) of the last `count` steps that changed the weights and had a finite loss.

        Collective over all ranks.
        """
        found: list[list[tuple[int, float]]] = [[]]
        if self._is_rank_0:
            updated = [one for one in read_metrics(self.config.run_dir) if one.get("updated")]
            losses = [(one["step"], one["loss"]) for one in updated if one.get("loss") is not None]
            finite = [(step, loss) for step, loss in losses if isfinite(loss)]
            found = [finite[max(0, len(finite) - count) :]]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def event(self, values: Mapping[str, Any], *, step: int) -> None:
        """Record what else is known after step `step`: what a save cost, how unlike the ranks are."""
        self._write(step, values)

    def step(self, result: StepResult, *, step: int, seconds: float) -> None:
        """Record optimizer step `step`, counted from 1, which took `seconds`."""
        self._counts += result.counts
        values = {
            "loss": None,
            **by_name(result.losses, datasets=self.config.data.train_datasets),
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "updated": result.updated,
            **_totals(self._counts),
            "padding_fraction": result.counts.padding_fraction,
            "step_seconds": seconds,
            "tokens_per_second": result.counts.tokens / seconds,
            "peak_gib": device.memory_gib(),
        }
        self._write(step, values)
        if self._is_rank_0:
            with self._bar.external_write_mode():
                if not result.bears_loss:
                    log.warning("step %d: no token of its batch bears loss; the weights are left as they were", step)
                log.info(step_line(step, values))
            self._bar.update()

    def evaluation(self, losses: Any, *, step: int) -> dict[str, float]:
        """Record and return the held-out losses after step `step`; none if no held-out token bears loss."""
        datasets = self.config.data.validation_datasets
        found = by_name(losses, datasets=datasets)
        values = {f"heldout/{name}": value for name, value in found.items()}
        self._write(step, values or {"heldout/loss": None})
        if self._is_rank_0:
            told = {name: value for name, value in found.items() if len(datasets) > 1 or BY_DATASET not in name}
            text = " | ".join(f"{name} {value:.4f}" for name, value in told.items())
            with self._bar.external_write_mode():
                log.info("step %d | held-out | %s", step, text or "no loss: no token of its samples bears loss")
        return values

    def _write(self, step: int, values: Mapping[str, Any], *, plot: bool = True) -> None:
        if not self._is_rank_0:
            return
        self._lines.add(json.dumps({"step": step, **values, "time": self._clock + time.monotonic()}))
        numbers = {name: value for name, value in values.items() if value is not None} if plot else {}
        for name, value in numbers.items():
            self._plot(lambda board, name=name, value=value: board.add_scalar(name, value, step))

    def _plot(self, action: Callable[[SummaryWriter], None]) -> None:
        """Let TensorBoard's writer do something; a disk that it cannot write ends it, not the run."""
        if self._board is None:
            return
        try:
            action(self._board)
        except OSError as error:
            log.warning("TensorBoard's file cannot be written, and is not until the run starts again: %s", error)
            self._board = None


class _Lines:
    """Appends lines to a file, each at once; while the disk takes none, keeps them for later."""

    def __init__(self, path: Path) -> None:
        self._path, self._unwritten, self._failing = path, b"", False
        self._file = path.open("ab", buffering=0)

    def add(self, line: str) -> None:
        """Append a line, and what could not be written before it."""
        self._unwritten += line.encode() + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written, its lines are kept until it can: %s", self._path, error)
            self._failing = True

    def close(self) -> None:
        """Close the file; say how many lines are lost if it still cannot be written."""
        self._file.close()
        if self._unwritten:
            log.error("%s lacks the last %d lines of the run", self._path, self._unwritten.count(b"\n"))


def step_line(step: int, values: Mapping[str, Any]) -> str:
    """Return the console line of one step."""
    return " | ".join(
        (
            f"step {step}",
            "no loss" if values["loss"] is None else f"loss {values['loss']:.4f}",
            f"grad_norm {values['grad_norm']:.2f}",
            f"lr {values['lr']:.1e}",
            f"{_short(values['tokens'])} tok",
            f"{values['step_seconds']:.2f} s",
            f"{_short(values['tokens_per_second'])} tok/s",
            f"{values['peak_gib']:.1f} GiB",
        )
    )


def run_of_metrics(run_dir: str | Path) -> str | None:
    """Return which run has written metrics.jsonl, as its starts say; None if there is none, or it does not say."""
    path = Path(run_dir) / "metrics.jsonl"
    records = (record for _, record in _records(path)) if path.exists() else ()
    return next((record["run"] for record in records if "run" in record), None)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, in order, without a line that a killed run was writing."""
    return [record for _, record in _records(Path(run_dir) / "metrics.jsonl")]


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def _totals(counts: TokenCounts) -> dict[str, int]:
    return {"tokens": counts.tokens, **{f"{name}_tokens": count for name, count in zip(counts.names(), counts.numbers)}}


@dataclass(frozen=True)
class _Kept:
    """What metrics.jsonl says of a run up to the step that it goes on from."""

    counts: TokenCounts
    """The counts of the whole run, as far as they are known."""
    uncounted_steps: int
    """Steps done whose counts are not in the file: it was lost, or not written to the end."""
    lost_steps: int
    """Steps after that one, which were done and are done again."""
    lost_seconds: float
    """How long those took."""

    def as_values(self) -> dict[str, float]:
        """Return what the record of a start or a roll-back says of it."""
        values = {"lost_steps": self.lost_steps, "lost_seconds": self.lost_seconds, **_totals(self.counts)}
        return values | ({"uncounted_steps": self.uncounted_steps} if self.uncounted_steps else {})


def _forget_after(path: Path, step: int) -> _Kept:
    """Drop records of steps after `step`, which a run that was cut off did and a resumed one does again.

    Returns what the file says of the run.
    """
    keys = [f"{name}_tokens" for name in TokenCounts.names()]
    kept, lost_seconds, last = [], [], {"step": 0, **dict.fromkeys(keys, 0)}
    for line, record in _records(path) if path.exists() else ():
        if record["step"] <= step:
            kept.append(line + "\n")
            last = record if all(type(record.get(key)) is int for key in keys) else last
        elif "grad_norm" in record and isinstance(record.get("step_seconds"), int | float):
            lost_seconds.append(record["step_seconds"])
    if path.exists():
        with replacing(path) as file:
            file.write("".join(kept).encode())
    counts = TokenCounts.of([last[key] for key in keys])
    return _Kept(counts, step - last["step"], len(lost_seconds), sum(lost_seconds, 0.0))


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line of metrics.jsonl with its record, but for one that was cut off as the run was killed.

    Other lines that hold no record are passed over with a warning: what a disk has damaged ends no run.
    """
    lines = retrying(lambda: path.read_text(errors="replace"), what=path).splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(lines):
                log.warning("line %d of metrics.jsonl holds no record, and is passed over: %.60r", number, line)
            continue
        yield line, record
