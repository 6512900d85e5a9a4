"""examples/pretrain_tiny.sh on a real SLURM of five virtual nodes: whatever ends it, it goes on to the same bits.

`make test-slurm` runs these; they need root and SLURM, and take about half an hour on two busy cores.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing
from small import small_config, write_shards

from megatron_mm import config as configs
from megatron_mm.checkpoint.format import whole_ones
from megatron_mm.checkpoint.verify import find_damage
from megatron_mm.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 40
START = 480
"""Seconds that a busy machine may take to start four ranks and do the first steps."""
TIMES = ("step_seconds", "tokens_per_second", "peak_gib", "time")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    lacking = missing()
    assert lacking is None, f"a virtual cluster needs more than this machine has: {lacking}"
    with Cluster(tmp_path_factory.mktemp("cluster"), 5) as running:
        yield running


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


class Job:
    """A run of pretrain_tiny.sh with the small model."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        shards: Path,
        *options: str,
        run_dir: Path | None = None,
        steps: int = STEPS,
        **environment: str,
    ) -> None:
        self.cluster, self.folder, self.run_dir = cluster, folder, run_dir or folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        cheap = ("training.global_batch_size=2", f"training.steps={steps}", "checkpoint.interval=3")
        config = small_config(shards, self.run_dir, *cheap, "guard.heartbeat_seconds=1")
        (folder / "small.yaml").write_text(configs.to_yaml(config))
        settings = {"PRESET": str(folder / "small.yaml"), "RUN_DIR": str(self.run_dir), "POLL_SECONDS": "1"}
        self.submit = lambda: cluster.submit(
            ROOT,
            *(f"--job-name={folder.name}", f"--output={folder}/out.txt", *options, "examples/pretrain_tiny.sh"),
            **{**settings, "SILENT_SECONDS": "30", **environment},
        )
        self.id = self.submit()

    def wait_for_step(self, step: int) -> None:
        """Wait until a checkpoint of `step` or later is there."""
        self.cluster.wait_until(lambda: self.saved() >= step, START, f"no step {step}: {self.output()}")

    def saved(self) -> int:
        return max((int(path.name[5:]) for path in whole_ones(self.run_dir / "checkpoints")), default=0)

    def steps(self) -> list[int]:
        return [record["step"] for record in read_metrics(self.run_dir) if "grad_norm" in record]

    def output(self) -> str:
        path = self.folder / "out.txt"
        return path.read_text() if path.exists() else "no output"

    def fail(self) -> None:
        """Wait until the job has failed for good."""
        self.cluster.wait_for(self.id, "COMPLETED", "FAILED", "CANCELLED", "GONE", seconds=START)
        assert self.cluster.state(self.id) == "FAILED", self.output()

    def finish(self) -> None:
        """Wait until the job is done; nobody touches it."""
        self.cluster.wait_for(self.id, "COMPLETED", "FAILED", "CANCELLED", "GONE", seconds=3 * START)
        assert self.cluster.state(self.id) == "COMPLETED", self.output()
        assert (self.run_dir / "DONE").exists()

    def result(self) -> tuple[list[dict], dict[str, str]]:
        """Return what each step did, and the hashes of the last checkpoint's shards."""
        records = [record for record in read_metrics(self.run_dir) if "grad_norm" in record]
        last = self.run_dir / "checkpoints" / f"step_{STEPS:08d}"
        assert find_damage(last) == []
        hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(last.glob("*.distcp"))}
        return [{key: value for key, value in one.items() if key not in TIMES} for one in records], hashes

    def restarts(self) -> list[int]:
        """Return the steps at which the run started or went on."""
        return [record["step"] for record in read_metrics(self.run_dir) if "layout" in record]

    def rank_pids(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"megatron_mm.train" in line and f"run_dir={self.run_dir}".encode() in line and b"srun" not in line[0]:
                found.append(int(path.name))
        return sorted(found)


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(cluster, tmp_path_factory.mktemp("undisturbed"), shards)
    job.finish()
    return job


def assert_same(job: Job, undisturbed: Job) -> None:
    assert job.result() == undisturbed.result()


def test_four_nodes_train(undisturbed: Job) -> None:
    assert undisturbed.steps() == list(range(1, STEPS + 1))
    assert undisturbed.restarts() == [0]
    assert len(undisturbed.result()[1]) == 4
    logs = sorted(path.name for path in undisturbed.run_dir.glob(f"logs/{undisturbed.id}.0/try1/rank_*.log"))
    assert logs == [f"rank_{rank}.log" for rank in range(4)]


def test_the_warning_of_the_time_limit_saves_and_queues_again(cluster, shards, undisturbed, tmp_path) -> None:
    job = Job(cluster, tmp_path / "usr1", shards)
    job.wait_for_step(6)
    cluster.run("scancel", "--signal=USR1", "--batch", job.id)  # what --signal=B:USR1@300 does
    job.finish()
    assert "time is nearly up" in job.output()
    assert len(job.restarts()) == 2
    assert job.restarts()[1] >= 6
    assert_same(job, undisturbed)


def test_a_time_limit_that_is_nearly_up_saves_and_queues_again(cluster, shards, undisturbed, tmp_path) -> None:
    """SLURM sends the signal by itself, 60 to 120 s after the start."""
    job = Job(
        *(cluster, tmp_path / "limit", shards, "--time=00:03:00", "--signal=B:USR1@60"),
        SILENT_SECONDS="600",
    )
    job.wait_for_step(6)
    stopped = job.rank_pids()
    send(signal.SIGSTOP, stopped)  # or the job would be done before
    try:
        cluster.wait_until(lambda: "time is nearly up" in job.output(), 180, "no signal")
    finally:
        send(signal.SIGCONT, stopped)
    job.finish()
    assert len(job.restarts()) >= 2
    assert job.restarts()[1] >= 6
    assert_same(job, undisturbed)


def send(number: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it was writing a checkpoint
            os.kill(pid, number)


def test_a_requeue_by_hand_goes_on(cluster, shards, undisturbed, tmp_path) -> None:
    job = Job(cluster, tmp_path / "requeue", shards)
    job.wait_for_step(6)
    cluster.run("scontrol", "requeue", job.id)
    time.sleep(3)
    job.finish()
    assert len(job.restarts()) == 2
    assert_same(job, undisturbed)


def test_a_killed_rank_ends_the_step_and_the_next_try_goes_on(cluster, shards, undisturbed, tmp_path) -> None:
    job = Job(cluster, tmp_path / "rank", shards)
    job.wait_for_step(6)
    os.kill(job.rank_pids()[-1], signal.SIGKILL)
    job.finish()
    assert "try 2: 4 ranks" in job.output()
    assert len(job.restarts()) == 2
    assert_same(job, undisturbed)


def test_a_crashed_node_is_left_out(cluster, shards, undisturbed, tmp_path) -> None:
    job = Job(cluster, tmp_path / "node", shards)
    job.wait_for_step(6)
    nodes = cluster.run("scontrol", "show", "hostnames", cluster.run("squeue", "-h", "-j", job.id, "-o", "%N")).split()
    cluster.crash_node(nodes[-1])
    try:
        job.finish()
    finally:
        cluster.wait_until(lambda: "down" in cluster.run("sinfo", "-h", "-N", "-n", nodes[-1]), 90, "not down")
        cluster.start_node(nodes[-1])
        cluster.wait_until(lambda: "idle" in cluster.run("sinfo", "-h", "-N", "-n", nodes[-1]), 90, "not back")
    assert len(job.restarts()) == 2
    assert_same(job, undisturbed)


def test_a_preempted_job_goes_on(cluster, shards, undisturbed, tmp_path) -> None:
    job = Job(cluster, tmp_path / "preempted", shards)
    job.wait_for_step(6)
    urgent = cluster.submit(
        tmp_path, "--partition=urgent", "--nodes=5", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    )
    cluster.wait_for(urgent, "COMPLETED", "GONE", seconds=START)
    job.finish()
    assert len(job.restarts()) == 2
    assert_same(job, undisturbed)


def test_a_cancelled_job_stays_cancelled_and_the_next_goes_on(cluster, shards, undisturbed, tmp_path) -> None:
    job = Job(cluster, tmp_path / "cancelled", shards)
    job.wait_for_step(6)
    cluster.run("scancel", job.id)
    cluster.wait_for(job.id, "CANCELLED", "GONE", seconds=60)
    time.sleep(8)  # longer than a requeued job waits
    assert cluster.state(job.id) in ("CANCELLED", "GONE")
    job.id = job.submit()
    job.finish()
    assert_same(job, undisturbed)


def test_a_node_that_fails_its_check_is_left_out(cluster, shards, undisturbed, tmp_path) -> None:
    full = cluster.inside("node1", "mount", "-o", "remount,size=4k", "/dev/shm")
    assert full.returncode == 0, full.stderr
    try:
        job = Job(cluster, tmp_path / "unfit", shards)
        job.finish()
    finally:
        cluster.inside("node1", "mount", "-o", "remount,size=1G", "/dev/shm")
    assert "node1 is unfit: /dev/shm has 1 MB left, 64 are needed" in job.output()
    assert job.output().count("queued again, without node1") == 1
    assert_same(job, undisturbed)


def test_a_wrong_setting_fails_at_once(cluster, shards, tmp_path) -> None:
    job = Job(cluster, tmp_path / "wrong", shards, TRAIN_NODES="3")
    cluster.wait_for(job.id, "FAILED", seconds=START)
    assert "trying again will not help" in job.output()
    assert "error: " in job.output()
    assert "try 2" not in job.output()


def test_a_chain_of_jobs_over_damaged_checkpoints_is_refused_each_time(cluster, shards, undisturbed, tmp_path) -> None:
    run_dir = tmp_path / "damaged" / "run"
    shutil.copytree(undisturbed.run_dir / "checkpoints", run_dir / "checkpoints")
    shutil.copy(undisturbed.run_dir / "metrics.jsonl", run_dir)
    for path in run_dir.glob("checkpoints/step_*/config.yaml"):
        path.write_bytes(b"")
    job = Job(cluster, tmp_path / "damaged", shards)
    job.fail()
    job.id = job.submit()
    job.fail()
    assert job.output().count("trying again will not help: no checkpoint of") == 2
    assert not list(run_dir.glob("logs/*/try*"))
    assert read_metrics(run_dir) == read_metrics(undisturbed.run_dir)


def test_a_run_dir_that_is_full_for_a_while_ends_nothing(cluster, shards, undisturbed, tmp_path) -> None:
    """Longer than a rank may be silent, with a rank killed meanwhile; the logs are on it too."""
    job = Job(cluster, tmp_path / "full", shards, run_dir=cluster.disk / "run")
    job.wait_for_step(6)
    filling = cluster.disk / "filling"
    with contextlib.suppress(OSError), filling.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
    for pid in job.rank_pids()[-1:]:
        os.kill(pid, signal.SIGKILL)
    time.sleep(60)
    filling.unlink()
    job.finish()
    assert "excluding nobody" in job.output() and "no heartbeat" not in job.output().replace("nobody is blamed", "")
    assert "queued again" not in job.output()
    assert_same(job, undisturbed)


def test_a_cause_that_all_nodes_share_excludes_none(cluster, shards, undisturbed, tmp_path) -> None:
    """A slow prolog is no skew of clocks, and a full /dev/shm on all nodes is waited for."""
    cluster.prolog.write_text("15")
    for name in cluster.names:
        cluster.inside(name, "mount", "-o", "remount,size=4k", "/dev/shm")
    try:
        job = Job(cluster, tmp_path / "common", shards, SKEW_SECONDS="5")
        cluster.wait_until(lambda: "excluding nobody, looking again" in job.output(), START, "it does not wait")
    finally:
        cluster.prolog.unlink()
        for name in cluster.names:
            cluster.inside(name, "mount", "-o", "remount,size=1G", "/dev/shm")
    job.finish()
    assert "the clock of" not in job.output() and "queued again" not in job.output()
    assert_same(job, undisturbed)


def test_two_jobs_in_one_run_dir_have_one_owner(cluster, shards, tmp_path) -> None:
    first = Job(cluster, tmp_path / "first", shards, run_dir=tmp_path / "run", steps=4_000)
    first.wait_for_step(3)
    ranks = first.rank_pids()
    second = Job(cluster, tmp_path / "second", shards, run_dir=tmp_path / "run", steps=4_000)
    second.fail()
    assert f"is being written by another run (job {first.id})" in second.output()
    assert not list(first.run_dir.glob(f"logs/{second.id}.*/try*")) and set(ranks) & set(first.rank_pids())
    (first.run_dir / "checkpoints" / "OWNER").write_text("999.0.elsewhere.abc")  # a job that has not seen the first
    first.fail()
    assert "another job has taken this run over, so this one ends for good" in first.output()
    assert "try 2" not in first.output()
