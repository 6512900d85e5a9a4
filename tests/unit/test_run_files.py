"""What a start makes of the files of a run that storage does not give, that are damaged, or that are gone."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_mm import retry
from megatron_mm.checkpoint import format as layout
from megatron_mm.checkpoint.format import Fence, TakenOver, commit, damaged_ones, read_manifest, set_aside, whole_ones
from megatron_mm.checkpoint.verify import NOT_THERE, find_damage, view
from megatron_mm.errors import DataError, StorageFailed
from megatron_mm.retry import be_patient
from megatron_mm.training.living import check_nobody_lives
from megatron_mm.training.preflight import newest_checkpoint


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(retry, "FIRST_SECONDS", 1e-3)
    be_patient(1.0)
    yield
    be_patient(0.0)


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    """What is asked of the configuration of a run that has steps 1 to 3."""
    folder = tmp_path / "checkpoints"
    fence = Fence.take(folder)
    for step in (1, 2, 3):
        partial = folder / f"step_{step:08d}.partial"
        partial.mkdir()
        for name in ("config.yaml", "shard.distcp"):
            (partial / name).write_text(f"{name} of {step}\n")
        commit(partial, folder / f"step_{step:08d}", hashes={}, facts={"step": step}, fence=fence)
    return SimpleNamespace(run_dir=str(tmp_path), checkpoint=SimpleNamespace(resume=True), folder=folder, fence=fence)


def refuse(
    monkeypatch: pytest.MonkeyPatch, owner: Any, function: str, number: int, *, name: str, times: int
) -> list[str]:
    """Let a function on paths fail so many times for files of this name; return a list that will name them."""
    original, refused = getattr(owner, function), []

    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name == name and len(refused) < times:
            refused.append(str(path))
            raise OSError(number, os.strerror(number), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(owner, function, failing)
    return refused


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize(
    ("function", "name"),
    [("read_bytes", "manifest.json"), ("read_bytes", "COMMITTED"), ("stat", "COMMITTED"), ("open", "shard.distcp"),
     ("stat", "config.yaml")],
)  # fmt: skip
def test_a_read_error_is_no_damage(
    function: str, name: str, number: int, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(os.listdir(run.folder))
    with monkeypatch.context() as patch:
        refused = refuse(patch, Path, function, number, name=name, times=2)
        assert find_damage(run.folder / "step_00000003") == []
        assert len(refused) == 2
    be_patient(0.0)
    with monkeypatch.context() as patch:
        refuse(patch, Path, function, number, name=name, times=10**9)
        with pytest.raises(StorageFailed, match=name):
            find_damage(run.folder / "step_00000003")
    assert sorted(os.listdir(run.folder)) == names


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_folder_that_cannot_be_listed_is_not_empty(
    number: int, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refuse(monkeypatch, os, "listdir", number, name="checkpoints", times=3)
    assert newest_checkpoint(run) == run.folder / "step_00000003"
    assert len(refused) == 3
    be_patient(0.0)
    refuse(monkeypatch, os, "listdir", number, name="checkpoints", times=10**9)
    with pytest.raises(StorageFailed, match="checkpoints"):
        newest_checkpoint(run)


def all_empty(path: Path) -> None:
    (path / "config.yaml").write_bytes(b"")


def not_committed(path: Path) -> None:
    (path / "COMMITTED").unlink()


def put_aside(path: Path) -> None:
    set_aside(path, "damaged")


@pytest.mark.parametrize("damages", [
    (all_empty, all_empty, all_empty),
    (not_committed, not_committed, all_empty),
    (put_aside, put_aside, put_aside),
    (put_aside, not_committed, all_empty),
    (not_committed, put_aside, put_aside),
])  # fmt: skip
def test_a_run_without_a_whole_checkpoint_is_refused_each_time(
    damages: tuple[Callable[[Path], None], ...], run: SimpleNamespace
) -> None:
    for path, damage in zip(whole_ones(run.folder), damages):
        damage(path)
    for _ in range(2):
        with pytest.raises(DataError, match="no checkpoint of .* is whole"):
            newest_checkpoint(run)


def test_an_older_whole_checkpoint_is_gone_on_from_and_that_is_said(
    run: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    put_aside(run.folder / "step_00000003")
    all_empty(run.folder / "step_00000002")
    assert newest_checkpoint(run) == run.folder / "step_00000001"
    assert "step_00000003.damaged were set aside as damaged: going on from step_00000001" in caplog.text


def test_a_second_damaged_checkpoint_of_a_step_keeps_the_first(run: SimpleNamespace) -> None:
    path = run.folder / "step_00000003"
    put_aside(path)
    path.mkdir()
    (path / "second").touch()
    assert set_aside(path, "damaged").name == "step_00000003.2.damaged"
    assert [one.name for one in damaged_ones(run.folder)] == ["step_00000003.2.damaged", "step_00000003.damaged"]
    assert (run.folder / "step_00000003.damaged" / "manifest.json").exists()


def test_a_write_or_read_error_of_owner_is_tried_again(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        refused = refuse(patch, layout, "replacing", errno.EIO, name="OWNER", times=1)
        fence = Fence.take(run.folder)
        assert len(refused) == 1 and fence.holds(run.folder)
    with pytest.raises(TakenOver):
        run.fence.check()
    with monkeypatch.context() as patch:
        refuse(patch, Path, "read_bytes", errno.ESTALE, name="OWNER", times=2)
        fence.check()
    be_patient(0.0)
    with monkeypatch.context() as patch:
        refuse(patch, Path, "read_bytes", errno.EIO, name="OWNER", times=1)
        with pytest.raises(StorageFailed, match="OWNER"):  # not TakenOver: nobody can tell
            fence.check()


def test_an_empty_owner_is_nobody_elses(run: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    (run.folder / "OWNER").write_bytes(b"")
    run.fence.check()
    assert "OWNER is empty" in caplog.text
    assert run.fence.holds(run.folder)


@pytest.mark.parametrize("content", ["", "{", "3", "[]", "{}", '{"rank": 0, "host": "node", "time": null}'])
def test_a_damaged_heartbeat_keeps_nobody_out(content: str, tmp_path: Path) -> None:
    (tmp_path / "health").mkdir()
    (tmp_path / "health" / "rank_0.json").write_text(content)
    check_nobody_lives(tmp_path, heartbeat_seconds=1.0)


def test_what_a_rank_sees_of_a_checkpoint_tells_another_one_a_late_one_and_a_broken_one(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [view(path) for path in whole_ones(run.folder)]
    assert len({*seen}) == 3
    assert view(run.folder / "step_00000009") == NOT_THERE
    (run.folder / "step_00000003" / "shard.distcp").unlink()
    assert view(run.folder / "step_00000003") not in seen
    refuse(monkeypatch, os, "listdir", errno.EIO, name="step_00000003", times=1)
    assert view(run.folder / "step_00000003") == "unreadable: Input/output error"


def test_a_manifest_that_is_gone_is_damage(run: SimpleNamespace) -> None:
    (run.folder / "step_00000003" / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(run.folder / "step_00000003")
    assert json.loads((run.folder / "step_00000002" / "manifest.json").read_text())["step"] == 2
