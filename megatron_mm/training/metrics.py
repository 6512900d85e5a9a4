"""What a run tells: a line a step on the console, a progress bar, metrics.jsonl, TensorBoard, and plots."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Self

import psutil
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_mm.config import Config
from megatron_mm.model.loss import by_name
from megatron_mm.parallel import device
from megatron_mm.parallel.mesh import Mesh
from megatron_mm.training.step import StepResult

log = logging.getLogger(__name__)


class Metrics:
    """Writes what the run measures; only rank 0 speaks, the others pass through.

    metrics.jsonl holds one object a line: {"step": ..., "layout": ..., "parameters": ...} at each start of the run,
    {"step": ..., "loss": ..., ...} after each step, {"step": ..., "heldout/loss": ..., ...} after each evaluation,
    {"step": ..., "save_stall_seconds": ...} after each save. Each has its Unix time.
    """

    def __init__(self, config: Config, mesh: Mesh, *, first_step: int) -> None:
        self.config = config
        self._speaks = mesh.speaks
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        config = self.config
        self._tokens = first_step * config.tokens_per_step
        if not self._speaks:
            return
        folder = Path(config.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        self._lost = _forget_after(path, first_step)
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
        if self._speaks:
            self._bar.close()
            self._lines.close()
            self._plot(lambda board: board.close())

    def start(self, *, step: int, layout: str, parameters: int, changed: Sequence[str] = ()) -> None:
        """Record that the run starts, or goes on, after step `step`, and what it lost by having been cut off.

        `changed` are lines about the settings that it goes on with and did not have before.
        """
        if self._speaks:
            seconds = time.time() - psutil.Process().create_time()
            values = {"layout": layout, "parameters": parameters, "start_seconds": seconds, **self._lost}
            values |= {"changed": list(changed)} if changed else {}
            self._write(step, values, plot=False)

    def go_back(self, *, step: int, reason: str) -> None:
        """Record that the run goes back to what it was after step `step`, and forget what it did since."""
        self._close()
        self._open(step)
        if self._speaks:
            self._write(step, {"went_back": reason, **self._lost}, plot=False)

    def losses(self, count: int) -> list[tuple[int, float]]:
        """Return (step, loss) of the last `count` steps that changed the weights and had a finite loss.

        Collective over all ranks.
        """
        found: list[list[tuple[int, float]]] = [[]]
        if self._speaks:
            records = [one for one in read_metrics(self.config.run_dir) if one.get("updated") and isfinite(one["loss"])]
            found = [[(one["step"], one["loss"]) for one in records][max(0, len(records) - count) :]]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def event(self, values: Mapping[str, Any], *, step: int) -> None:
        """Record what else is known after step `step`: what a save cost, how unlike the ranks are."""
        self._write(step, values)

    def step(self, result: StepResult, *, step: int, seconds: float) -> None:
        """Record optimizer step `step`, counted from 1, which took `seconds`."""
        self._tokens += self.config.tokens_per_step
        values = {
            **by_name(result.losses),
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "updated": result.updated,
            "tokens": self._tokens,
            "step_seconds": seconds,
            "tokens_per_second": self.config.tokens_per_step / seconds,
            "peak_gib": device.memory_gib(),
        }
        self._write(step, values)
        if self._speaks:
            with self._bar.external_write_mode():
                log.info(step_line(step, values))
            self._bar.update()

    def evaluation(self, losses: Any, *, step: int) -> dict[str, float]:
        """Record and return the held-out losses after step `step`."""
        values = {f"heldout/{name}": value for name, value in by_name(losses).items()}
        self._write(step, values)
        if self._speaks:
            text = " | ".join(f"{name.removeprefix('heldout/')} {value:.4f}" for name, value in values.items())
            with self._bar.external_write_mode():
                log.info("step %d | held-out | %s", step, text)
        return values

    def _write(self, step: int, values: Mapping[str, Any], *, plot: bool = True) -> None:
        if not self._speaks:
            return
        self._lines.add(json.dumps({"step": step, **values, "time": time.time()}))
        for name, value in values.items() if plot else ():
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
            f"loss {values['loss']:.4f}",
            f"grad_norm {values['grad_norm']:.2f}",
            f"lr {values['lr']:.1e}",
            f"{_short(values['tokens'])} tok",
            f"{values['step_seconds']:.2f} s",
            f"{_short(values['tokens_per_second'])} tok/s",
            f"{values['peak_gib']:.1f} GiB",
        )
    )


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


def _short(number: float) -> str:
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def _forget_after(path: Path, step: int) -> dict[str, float]:
    """Drop records of steps after `step`, which a run that was cut off did and a resumed one does again.

    Returns how many steps those were and how long they took.
    """
    if not path.exists():
        return {"lost_steps": 0, "lost_seconds": 0.0}
    kept, lost = [], {"lost_steps": 0, "lost_seconds": 0.0}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the run was killed while it wrote this line
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
        elif "grad_norm" in record:
            lost["lost_steps"] += 1
            lost["lost_seconds"] += record["step_seconds"]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
    return lost
