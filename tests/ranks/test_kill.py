"""A run that is killed with -9 and started again is, to the bit, the run that was not killed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from small import TRAINED, small_config

from megatron_mm import config as configs
from megatron_mm.training import checkpoints
from megatron_mm.training.metrics import read_metrics

TIMEOUT_SECONDS = 900
TIMES = ("step_seconds", "tokens_per_second", "peak_gib", "time")
"""Metrics that no two runs share."""


def start(shards: Path, run_dir: Path) -> subprocess.Popen:
    """Start six steps on 4 ranks, with a checkpoint after the third, as a user would."""
    config = small_config(shards, run_dir, "checkpoint.interval=3", "parallel.tp=2", "parallel.pp=2", *TRAINED)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "settings.yaml").write_text(configs.to_yaml(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    with (run_dir / "console.log").open("a") as console:
        return subprocess.Popen(
            [*launcher, "-m", "megatron_mm.train", str(run_dir / "settings.yaml")],
            stdout=console,
            stderr=console,
            start_new_session=True,
        )


def finish(run: subprocess.Popen, run_dir: Path) -> None:
    try:
        status = run.wait(TIMEOUT_SECONDS)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert status == 0, (run_dir / "console.log").read_text()


def kill_after_the_checkpoint(run: subprocess.Popen, run_dir: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (run_dir / "checkpoints" / "step_00000003").exists():
        assert run.poll() is None, (run_dir / "console.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


def steps(run_dir: Path) -> list[dict]:
    records = [record for record in read_metrics(run_dir) if "grad_norm" in record]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def digests(run_dir: Path) -> dict[str, str]:
    (path,) = run_dir.glob("checkpoints/step_00000006")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.glob("*.distcp")}


def test_three_steps_a_kill_and_three_steps_are_six(shards: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(shards, whole), whole)
    kill_after_the_checkpoint(start(shards, killed), killed)
    assert checkpoints.newest(configs.load(str(killed / "settings.yaml"))).name == "step_00000003"
    finish(start(shards, killed), killed)
    assert [record["step"] for record in steps(killed)] == list(range(1, 7))
    assert steps(killed) == steps(whole)
    assert digests(killed) == digests(whole)
    assert len(digests(whole)) == 4
