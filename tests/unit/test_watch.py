"""The watch over a rank: how often it writes and looks, when it ends the run, and what clocks and disks do to it."""

import errno
import json
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mm.config.schema import GuardConfig
from megatron_mm.errors import ConfigError
from megatron_mm.training import living, processes, stop, watch
from megatron_mm.training.goodput import goodput_of
from megatron_mm.training.living import check_nobody_lives
from megatron_mm.training.stop import StopRequest
from megatron_mm.training.watch import Watch

MESH = SimpleNamespace(rank=0, is_rank_0=True, world_size=1)


@pytest.fixture
def wild_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the wall clock jump by hours at each look; durations are none of its business."""
    chance, now = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: now() + 3600.0 * chance.randint(-48, 48))


def test_without_a_limit_it_writes_at_heartbeats_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[float] = []
    looks: list[float] = []
    ended: list[float] = []
    write = Watch._write
    monkeypatch.setattr(Watch, "_write", lambda self, still: (written.append(still), write(self, still)))
    monkeypatch.setattr(Watch, "_end", lambda self, still: ended.append(still))
    monkeypatch.setattr(watch, "current_collective", lambda: looks.append(time.time()))
    with Watch(GuardConfig(hang_seconds=0, heartbeat_seconds=1.0), MESH, tmp_path) as own:
        own.started()
        time.sleep(1.6)
        assert json.loads((tmp_path / "health" / "rank_0.json").read_text())["rank"] == 0
    assert len(written) == 2 and not ended, "at once, for a second command to see, and after a second"
    assert len(looks) <= 1
    assert not (tmp_path / "health" / "rank_0.json").exists(), "a rank that has ended keeps no other out"


@pytest.mark.parametrize("clock", ["steady", "wild"])
def test_with_a_limit_a_rank_that_stands_still_ends(
    clock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if clock == "wild":
        request.getfixturevalue("wild_clock")
    ended: list[float] = []
    monkeypatch.setattr(Watch, "_end", lambda self, still: ended.append(still))
    with Watch(GuardConfig(hang_seconds=0.4, heartbeat_seconds=0.1), MESH, tmp_path) as own:
        own.started()
        time.sleep(1.0)
    assert ended and 0.4 < ended[0] < 0.8


def test_a_clock_that_jumps_ends_no_rank_that_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wild_clock: None
) -> None:
    ended: list[float] = []
    monkeypatch.setattr(Watch, "_end", lambda self, still: ended.append(still))
    with Watch(GuardConfig(hang_seconds=5.0, heartbeat_seconds=0.05), MESH, tmp_path) as own:
        own.started()
        for step in range(5):
            own.beat("step", step=step)
            time.sleep(0.1)
    assert not ended


def test_a_heartbeat_moves_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is created, renamed or made longer once the first one is there."""
    with Watch(GuardConfig(hang_seconds=0, heartbeat_seconds=60.0), MESH, tmp_path) as own:
        path = tmp_path / "health" / "rank_0.json"
        first, size, inode = json.loads(path.read_text()), path.stat().st_size, path.stat().st_ino
        own.beat("a phase", step=10**9)
        monkeypatch.setattr(watch, "current_collective", lambda: "a collective of a long name" * 100)
        own._write(100.0)
        assert json.loads(path.read_text())["beat"] == first["beat"] + 1
        assert (path.stat().st_size, path.stat().st_ino) == (size, inode)


def test_a_disk_that_refuses_heartbeats_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = {"now": True}
    make = os.open

    def full(path, *others, **named):
        if refusing["now"] and str(path).startswith(str(tmp_path)):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return make(path, *others, **named)

    monkeypatch.setattr(os, "open", full)
    with Watch(GuardConfig(hang_seconds=0, heartbeat_seconds=0.1), MESH, tmp_path):
        assert not list(tmp_path.glob("health/*"))
        refusing["now"] = False
        for _ in range(100):
            if watch.read_health(tmp_path / "health"):
                break
            time.sleep(0.05)
        assert watch.read_health(tmp_path / "health")[0]["rank"] == 0


def test_a_hang_is_explained_by_who_moves_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wild_clock: None
) -> None:
    """Rank 1 moves on, rank 2 has left its last heartbeat, rank 3 none."""
    settings = GuardConfig(hang_seconds=10.0, heartbeat_seconds=0.2)
    mesh = SimpleNamespace(rank=0, is_rank_0=True, world_size=4)
    other = [Watch(settings, SimpleNamespace(rank=rank, is_rank_0=False), tmp_path) for rank in (1, 2)]
    for one in other:
        one._write(0.0)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: (other[0]._write(9.0), sleep(seconds)))
    records, silent = Watch(settings, mesh, tmp_path)._look_around(9.0)
    assert silent == [2, 3]
    report = watch.explain_hang(records, silent, world_size=4)
    assert "rank 2 on" in report and "rank 3 on ? has no heartbeat any more" in report
    assert "rank 1 on" in report and not any("rank 1" in line and "heartbeat" in line for line in report.splitlines())


def heartbeat(run_dir: Path, **other: object) -> None:
    (run_dir / "health").mkdir(exist_ok=True)
    record = {
        "rank": 0,
        "host": "elsewhere",
        "pid": 1,
        "period": 0.3,
        "step": 7,
        "phase": "step",
        "job": "12",
        "beat": 1,
    }
    (run_dir / "health" / "rank_0.json").write_text(json.dumps({**record, **other}))


def test_a_run_elsewhere_lives_if_its_heartbeat_moves_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wild_clock: None
) -> None:
    heartbeat(tmp_path)
    check_nobody_lives(tmp_path, heartbeat_seconds=10.0)  # it stands still: its node died
    sleep, beats = time.sleep, iter(range(2, 1000))
    monkeypatch.setattr(living.time, "sleep", lambda seconds: (heartbeat(tmp_path, beat=next(beats)), sleep(seconds)))
    with pytest.raises(ConfigError, match=r"another run \(job 12\): rank 0 on elsewhere"):
        check_nobody_lives(tmp_path, heartbeat_seconds=10.0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")  # a later life of it: the other is fenced off
    check_nobody_lives(tmp_path, heartbeat_seconds=10.0)


def test_a_process_is_known_by_when_it_began_on_a_clock_that_nobody_sets(wild_clock: None) -> None:
    own = processes.began(os.getpid())
    assert own is not None and own == processes.began(os.getpid())
    assert 0.0 < processes.age() < time.clock_gettime(time.CLOCK_BOOTTIME) - own + 1.0
    assert processes.began(2**22 + 1) is None


def test_a_deadline_stays_where_it_was_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    now, passed = time.time, time.monotonic
    monkeypatch.setenv(stop.DEADLINE, str(now() + 100.0))
    with StopRequest(MESH) as request:
        for hours in (-24, 24):
            monkeypatch.setattr(time, "time", lambda hours=hours: now() + 3600.0 * hours)
            assert request.reason() is None
        monkeypatch.setattr(time, "monotonic", lambda: passed() + 101.0)
        assert request.reason() == "the deadline is reached"


def test_a_clock_that_is_set_back_between_two_lives_takes_no_time_from_a_run() -> None:
    records = [
        {"step": 0, "layout": "TP2", "start_seconds": 10.0, "time": 7_210.0},
        {"step": 1, "grad_norm": 1.0, "step_seconds": 20.0, "time": 7_230.0},
        {"step": 1, "layout": "TP2", "start_seconds": 8.0, "time": 108.0, "lost_seconds": 5.0},
        {"step": 2, "grad_norm": 1.0, "step_seconds": 10.0, "time": 118.0},
    ]
    assert goodput_of(records).total == 30.0 + 5.0 + 18.0
