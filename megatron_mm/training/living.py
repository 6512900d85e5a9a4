"""Whether another job is at work in a run_dir: the heartbeats of its ranks tell, before anything there is touched."""

import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mm.errors import ConfigError
from megatron_mm.training import processes
from megatron_mm.training.watch import SILENT_BEATS, read_health

log = logging.getLogger(__name__)


def check_nobody_lives(run_dir: str | Path, *, heartbeat_seconds: float) -> None:
    """Pass if no other run is at work in `run_dir`; it may take some heartbeats to tell.

    A rank of this host is asked for by its process; one of another host lives if its heartbeat moves on, whatever the
    clocks say, which is waited for as long as that run's own period asks, `heartbeat_seconds` where it does not say. A
    life of the same SLURM job on another host, which SLURM has given up when it starts the next one, may be taken over:
    checkpoints are fenced. Raises ConfigError with the job, host and process of one that lives.
    """
    folder = Path(run_dir) / "health"
    records = [record for record in read_health(folder) if _is_heartbeat(record)]
    here = [record for record in records if record["host"] == socket.gethostname()]
    living = next((record for record in here if _is_process(record)), None)
    elsewhere = {one["rank"]: one for one in records if one not in here and not _is_of_this_job(one)}
    longest = max((record.get("period", heartbeat_seconds) for record in elsewhere.values()), default=0.0)
    wait_seconds = SILENT_BEATS / 2 * longest
    if living is None and elsewhere:
        log.info("looking for %.0f s whether ranks that left heartbeats in %s still live", wait_seconds, folder)
    deadline = time.monotonic() + wait_seconds
    while living is None and elsewhere and time.monotonic() < deadline:
        time.sleep(min(0.2, longest / 4))
        moved = (one for one in read_health(folder) if _is_heartbeat(one) and one != elsewhere.get(one["rank"], one))
        living = next(moved, None)
    if living is not None:
        job = f" (job {living['job']})" if living.get("job") else ""
        raise ConfigError(
            f"run_dir={run_dir} is being written by another run{job}: rank {living['rank']} on {living['host']}, "
            f"process {living['pid']}, is at step {living['step']} ({living['phase']}). Wait for it, stop it, or "
            "give another run_dir."
        )


def _is_heartbeat(record: Mapping[str, Any]) -> bool:
    """Return whether a file of run_dir/health says what a heartbeat does: a crash may have left another thing there."""
    return type(record.get("pid")) is int and isinstance(record.get("host"), str) and {"step", "phase"} <= record.keys()


def _is_of_this_job(record: Mapping[str, Any]) -> bool:
    """Return whether a heartbeat is of a life of the same SLURM job as this one."""
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and record.get("job") == job


def _is_process(record: Mapping[str, Any]) -> bool:
    """Return whether the process of a heartbeat of this host is there, and not another one with its number."""
    started = processes.began(record["pid"])
    if started is None or record["pid"] == os.getpid():
        return False
    return abs(started - (record.get("process_started") or started)) < 1.0
