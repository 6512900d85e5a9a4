"""Whether another job is at work in a run_dir: the heartbeats of its ranks tell, before anything there is touched."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from megatron_mm.errors import ConfigError
from megatron_mm.training.watch import SILENT_BEATS, read_health

SKEW_SECONDS = 120.0
"""How far the clocks of two nodes may differ: examples/check_node.sh lets no more pass."""


def check_nobody_lives(run_dir: str | Path, *, heartbeat_seconds: float) -> None:
    """Pass if no other run is at work in `run_dir`; it may take some heartbeats to tell.

    A rank of this host is asked for by its process; one of another host lives if its heartbeat moves on, which is
    waited for as long as that run's own period asks, `heartbeat_seconds` where its record does not say. A life of the
    same SLURM job on another host, which SLURM has given up when it starts the next one, may be taken over: checkpoints
    are fenced. Raises ConfigError with the host and process of one that lives.
    """
    folder = Path(run_dir) / "health"
    records = [{"period": heartbeat_seconds, **record} for record in read_health(folder)]
    here = [record for record in records if record["host"] == socket.gethostname()]
    living = next((record for record in here if _is_process(record)), None)
    fresh = [record for record in records if record not in here and _is_fresh(record)]
    elsewhere = {record["rank"]: record["time"] for record in fresh}
    longest = max((record["period"] for record in fresh), default=0.0)
    deadline = time.monotonic() + SILENT_BEATS / 2 * longest
    while living is None and elsewhere and time.monotonic() < deadline:
        time.sleep(min(0.2, longest / 4))
        moved = (one for one in read_health(folder) if one["time"] > elsewhere.get(one["rank"], float("inf")))
        living = next(moved, None)
    if living is not None:
        raise ConfigError(
            f"run_dir={run_dir} is being written by another run: rank {living['rank']} on {living['host']}, process "
            f"{living['pid']}, is at step {living['step']} ({living['phase']}). Wait for it, stop it, or give another "
            "run_dir."
        )


def _is_fresh(record: Mapping[str, Any]) -> bool:
    """Return whether a heartbeat of another host may be that of a living run of another job."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is not None and record.get("job") == job:
        return False
    return time.time() - record["time"] < SILENT_BEATS * record["period"] + SKEW_SECONDS


def _is_process(record: Mapping[str, Any]) -> bool:
    """Return whether the process of a heartbeat of this host is there, and not another one with its number."""
    try:
        process = psutil.Process(record["pid"])
        started, is_dead = process.create_time(), process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    return not is_dead and record["pid"] != os.getpid() and abs(started - record.get("process_started", started)) < 1.0
