"""Whether every rank is alive and as fast as the others: heartbeats, hangs with their cause, slow ranks.

A thread of each rank writes to run_dir/health/rank_N.json where its main thread is; when nothing moves any more, the
ranks read each other's files, for in a hang no collective would answer, and say who waits in what and for whom.

A heartbeat bears a number and no time: whoever judges it looks whether it moves, on a clock that nobody sets.
"""

import functools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from statistics import median_low
from types import FrameType
from typing import Annotated, Any, NotRequired, TypedDict

import torch
import torch.distributed as dist
from pydantic import ConfigDict, Field
from torch._C import _distributed_c10d as c10d

from megatron_mm import endings, printable
from megatron_mm.config.schema import MAX_SECONDS, GuardConfig
from megatron_mm.engine import device
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import DataError
from megatron_mm.outside import read_json
from megatron_mm.settings import NonNegativeInt
from megatron_mm.training import processes

log = logging.getLogger(__name__)

HUNG = 86
"""Exit status of a rank that stood still for too long."""
START_FACTOR = 3
"""Times guard.hang_seconds that building, loading and the first step may take."""
SILENT_BEATS = 6
"""Twice the heartbeats that a rank may miss, while it is looked at, before it is said to be gone."""
RECORD_BYTES = 4096
"""Size of a heartbeat's file, which is written over in place: a disk that is full by then takes it all the same."""
PLACE_CHARACTERS = 500
"""Of where a rank stands: its heartbeat fits its file with room to spare."""
PACKAGE = str(Path(__file__).parents[1])
PROBE_SIZE = 256
PROBE_RUNS = 5


class Watch:
    """Watches this rank from a thread of its own; use as a context around the run."""

    def __init__(self, settings: GuardConfig, mesh: Mesh, run_dir: str | Path) -> None:
        self._settings, self._mesh, self._folder = settings, mesh, Path(run_dir) / "health"
        self._path = self._folder / f"rank_{mesh.rank}.json"
        self._host, self._process_started = socket.gethostname(), processes.began(os.getpid())
        self._step, self._phase, self._since, self._beat = 0, "start", time.monotonic(), 0
        self._patience = settings.hang_seconds * START_FACTOR
        often = settings.hang_seconds / 4 or float("inf")  # ranks that hang are told by their heartbeats
        self._period = min(settings.heartbeat_seconds, often)
        self._data_seconds: list[float] = []
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        self._write(0.0)  # at once: a second command in this run_dir looks for it
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self._place())
        self._ended.set()
        self._thread.join()
        try:
            self._path.unlink(missing_ok=True)
        except OSError as unremoved:
            log.warning("%s cannot be removed: %s", self._path, unremoved)

    def _place(self) -> str:
        if self._phase == "start":
            return "while the model was built or loaded"
        return f"in step {self._step}" + ("" if self._phase == "step" else f" ({self._phase})")

    def beat(self, phase: str, *, step: int) -> None:
        """Say that this rank has reached `phase` of step `step`: it is alive."""
        self._step, self._phase, self._since = step, phase, time.monotonic()

    def started(self) -> None:
        """Say that the first step is done: from now on a phase may take guard.hang_seconds and no more."""
        self._patience = self._settings.hang_seconds

    def waited_for_data(self, seconds: float) -> None:
        """Note how long this rank waited for its micro-batches."""
        self._data_seconds.append(seconds)

    def compare_ranks(self, *, step: int) -> dict[str, float]:
        """Warn of each rank that is slower than the others; return the worst ratios. Collective over all ranks."""
        own = torch.tensor([probe_seconds(), sum(self._data_seconds)], dtype=torch.float64, device=device.current())
        steps, self._data_seconds = max(1, len(self._data_seconds)), []
        everywhere = [torch.empty_like(own) for _ in range(self._mesh.world_size)]
        dist.all_gather(everywhere, own)
        hosts: list[str] = [""] * self._mesh.world_size
        dist.all_gather_object(hosts, self._host)
        probes = [float(rank[0]) for rank in everywhere]
        waits = [float(rank[1]) / steps for rank in everywhere]
        usual, ratio = median_low(probes), self._settings.slow_rank_ratio
        slow = [rank for rank, seconds in enumerate(probes) if seconds > ratio * usual]
        late = [rank for rank, seconds in enumerate(waits) if seconds > max(0.05, ratio * median_low(waits))]
        if self._mesh.is_rank_0:
            for rank in slow:
                log.warning(
                    "step %d: rank %d on %s is slow: the same product takes it %.1f times as long as the median rank",
                    *(step, rank, hosts[rank], probes[rank] / usual),
                )
            for rank in late:
                log.warning(
                    "step %d: rank %d on %s waits %.2f s a step for its data, the median rank %.2f s",
                    *(step, rank, hosts[rank], waits[rank], median_low(waits)),
                )
        return {"slowest_rank_ratio": max(probes) / usual, "data_wait_seconds": max(waits)}

    def _run(self) -> None:
        while not self._ended.wait(self._period):
            still = time.monotonic() - self._since
            self._write(still)
            over = still - self._patience - (0 if self._mesh.is_rank_0 else self._settings.heartbeat_seconds)
            if self._settings.hang_seconds and over > 0:
                self._end(still)

    def _write(self, still: float) -> None:
        looks = still > self._period
        place = _place(sys._current_frames().get(self._main)) if looks else None
        self._beat += 1
        record = {
            "rank": self._mesh.rank,
            "host": self._host,
            "pid": os.getpid(),
            "process_started": self._process_started,
            "job": os.environ.get("SLURM_JOB_ID"),
            "period": self._period,
            "step": self._step,
            "phase": self._phase,
            "still_seconds": round(still, 1),
            "beat": self._beat,
            "waits_in": current_collective() if looks else None,
            "at": place[:PLACE_CHARACTERS] if place else None,
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Opened each time: NFS shows others what was written once it is closed. Not synced: it is written again
            # before a crash of the machine could be looked into.
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(file, json.dumps(record).encode().ljust(RECORD_BYTES), 0)
            finally:
                os.close(file)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._path, error)

    def _end(self, still: float) -> None:
        """Report the hang, once for all ranks, and end this process: its main thread will not."""
        report = explain_hang(*self._look_around(still), world_size=self._mesh.world_size)
        try:
            with (self._folder / "hang.txt").open("x") as file:
                file.write(report + "\n")
            log.error("nothing has moved for %.0f s:\n%s", still, report)
        except FileExistsError:
            pass
        except OSError as error:
            log.error("nothing has moved for %.0f s (and hang.txt cannot be written: %s):\n%s", still, error, report)
        sys.stderr.flush()
        endings.leave_status(HUNG, f"nothing has moved for {still:.0f} s:\n{report}")
        os._exit(HUNG)

    def _look_around(self, still: float) -> tuple[list[dict[str, Any]], list[int]]:
        """Return the heartbeats of all ranks, and the ranks whose own did not move while they were looked at."""
        began, silent = time.monotonic(), set(range(self._mesh.world_size)) - {self._mesh.rank}
        before = {record["rank"]: record for record in read_health(self._folder)}
        while True:
            time.sleep(self._period)
            passed = time.monotonic() - began
            self._write(still + passed)  # the others look too
            records = read_health(self._folder)
            silent -= {record["rank"] for record in records if record != before.get(record["rank"])}
            if not silent or passed > SILENT_BEATS / 2 * self._settings.heartbeat_seconds:
                return records, sorted(silent)


class Heartbeat(TypedDict):
    """What a rank writes of itself, as far as others ask for it."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    rank: NonNegativeInt
    host: str
    pid: int
    step: int
    phase: str
    beat: NotRequired[int]
    process_started: NotRequired[float]
    period: NotRequired[Annotated[float, Field(ge=0, le=MAX_SECONDS)]]
    waits_in: NotRequired[str | None]
    at: NotRequired[str | None]


def forget_heartbeats(run_dir: str | Path) -> None:
    """Remove what the ranks of an earlier life have written: a run of fewer ranks would wait for the others."""
    for path in (Path(run_dir) / "health").glob("*"):
        if path.name == "hang.txt" or path.name.startswith("rank_"):
            path.unlink(missing_ok=True)


def read_health(folder: Path) -> list[dict[str, Any]]:
    """Return the newest heartbeat of each rank; of what is no heartbeat, as a crash leaves it, the log tells once."""
    found = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            if path.stat().st_size:  # or it is just being made
                found.append(read_json(path, Heartbeat))
        except OSError:
            continue
        except DataError as error:
            _say_not_heeded(str(error))
    return found


@functools.cache
def _say_not_heeded(problem: str) -> None:
    log.warning("%s It tells of no rank, and is not heeded.", problem)


def explain_hang(records: list[dict[str, Any]], silent: Collection[int], *, world_size: int) -> str:
    """Return who is to blame for a hang and who waits for whom; a rank in `silent`, or without a record, is gone."""
    by_rank = {record["rank"]: record for record in records}
    silent = [rank for rank in range(world_size) if rank not in by_rank or rank in silent]
    lines = [f"rank {rank} on {by_rank.get(rank, {}).get('host', '?')} has no heartbeat any more" for rank in silent]
    waiting: dict[str, list[int]] = defaultdict(list)
    for rank, record in by_rank.items():
        if rank in silent:
            continue
        if record.get("waits_in") is None:
            lines.append(
                f"rank {rank} on {record['host']} is in no collective: step {record['step']}, {record['phase']}, "
                f"at {record.get('at')}"
            )
        else:
            waiting[f"{record['waits_in']}, {record['phase']} of step {record['step']}"].append(rank)
    for what, ranks in sorted(waiting.items(), key=lambda item: len(item[1])):
        few = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
        lines.append(f"rank{'s' if len(ranks) > 1 else ''} {few} wait{'' if len(ranks) > 1 else 's'} in {what}")
    return "\n".join(f"  {printable.line(line)}" for line in lines)


def current_collective() -> str | None:
    """Return the collective that this rank has begun last and not finished, from torch's flight recorder."""
    try:
        dump = c10d._dump_nccl_trace_json if device.has_gpu() else c10d._dump_fr_trace_json
        recorded = json.loads(dump(True, False))
    except (RuntimeError, ValueError):
        return None
    for entry in reversed(recorded.get("entries", [])):
        if not entry["retired"] and entry["state"] != "completed":
            name, about = entry["process_group"]
            number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
            return f"{entry['profiling_name']} number {number} of group {about if about != 'undefined' else name}"
    return None


def probe_seconds() -> float:
    """Return how long the same matrix product takes on this rank: the fastest of a few."""
    a = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device.current())
    times = []
    for _ in range(PROBE_RUNS):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        times.append(time.perf_counter() - started)
    return min(times)


def _place(frame: FrameType | None) -> str:
    """Return the innermost line of this package, and the innermost of all, that a stack stands at."""
    inner, own = frame, None
    while frame is not None:
        if own is None and frame.f_code.co_filename.startswith(PACKAGE):
            own = frame
        frame = frame.f_back
    return " under ".join(dict.fromkeys(_line(one) for one in (inner, own) if one is not None))


def _line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}()"
