"""The watch over a rank: how often it writes and looks, and when it ends the run."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_mm.config.schema import GuardConfig
from megatron_mm.training import watch
from megatron_mm.training.watch import Watch

MESH = SimpleNamespace(rank=0, is_rank_0=True, world_size=1)


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


def test_with_a_limit_a_rank_that_stands_still_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[float] = []
    monkeypatch.setattr(Watch, "_end", lambda self, still: ended.append(still))
    with Watch(GuardConfig(hang_seconds=0.4, heartbeat_seconds=0.1), MESH, tmp_path) as own:
        own.started()
        time.sleep(1.0)
    assert ended and 0.4 < ended[0] < 0.8
