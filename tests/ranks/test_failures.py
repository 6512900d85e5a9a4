"""What is broken on purpose in a run: each fault is found and named; the run goes on from the right step, or stops."""

import errno
import functools
import io
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launch import run_ranks, start_ranks
from small import small_config
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from megatron_mm import retry
from megatron_mm.checkpoint import format as layout_of_files
from megatron_mm.checkpoint import load as loading
from megatron_mm.checkpoint import save as saving
from megatron_mm.checkpoint import verify
from megatron_mm.checkpoint.format import Fence, TakenOver, commit, read_manifest, remove_old, step_of, whole_ones
from megatron_mm.checkpoint.pickles import only_plain_pickles
from megatron_mm.checkpoint.save import SaveFailed
from megatron_mm.checkpoint.verify import find_damage
from megatron_mm.config import Config
from megatron_mm.data.consumption import LeftOut
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.engine.agreement import check_alike, describe_software
from megatron_mm.errors import ConfigError, DataError, StorageFailed
from megatron_mm.training import checkpoints, loop, watch
from megatron_mm.training.metrics import read_metrics
from megatron_mm.training.state import TrainState, build_state
from megatron_mm.training.step import StepResult, train_step


def run_of(shards: Path, run_dir: Path, *overrides: str) -> Config:
    """Return a run of five cheap steps that is saved after each."""
    return small_config(
        shards,
        run_dir,
        *("training.global_batch_size=2", "training.steps=5", "checkpoint.interval=1", "guard.heartbeat_seconds=0.5"),
        *overrides,
    )


Plant = Callable[[TrainState, StepResult], StepResult | None]


def train(config: Config, plant: Plant | None = None, patch: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Train as the command does, with a fault after each step; return the weights and what was logged as a warning."""
    mesh = meshes.cut(config)
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_mm").addHandler(handler)
    loop.plot_losses = lambda run_dir: run_dir
    if patch is not None:
        patch(mesh.rank)
    if plant is not None:
        loop.train_step = lambda state, batches: plant(state, result := train_step(state, batches)) or result
    try:
        state = loop.train(config, mesh)
    finally:
        os.seteuid(os.getuid())
    weights = {name: value.clone() for chunk in state.chunks for name, value in chunk.named_parameters()}
    return {"step": state.step, "weights": weights, "said": "\n".join(said), "left_out": state.consumption.left_out}


def assert_same_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, weight in one["weights"].items():
        assert torch.equal(other["weights"][name], weight), name


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of one rank that nothing disturbed, with its checkpoints."""
    run_dir = tmp_path_factory.mktemp("whole")
    (seen,) = run_ranks(1, train, run_of(shards, run_dir, "checkpoint.keep=9"))
    return {**seen, "run_dir": run_dir}


@pytest.fixture
def interrupted(whole: dict[str, Any], tmp_path: Path) -> Path:
    """The run_dir of a run of which steps 1 to 3 are done."""
    for step in (1, 2, 3):
        name = f"checkpoints/step_{step:08d}"
        shutil.copytree(whole["run_dir"] / name, tmp_path / name)
    return tmp_path


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(whole, interrupted: Path, shards: Path) -> None:
    checkpoints = interrupted / "checkpoints"
    flip(next((checkpoints / "step_00000003").glob("*.distcp")))
    (checkpoints / "step_00000009.other.partial").mkdir()
    (seen,) = run_ranks(1, train, run_of(shards, interrupted))
    assert "step_00000003 is damaged and is now step_00000003.damaged" in seen["said"]
    assert "has other bytes than were written" in seen["said"]
    assert_same_weights(seen, whole)
    assert (interrupted / "DONE").read_text() == "5\n"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == [
        *("step_00000003", "step_00000003.damaged", "step_00000004", "step_00000005"),
    ]


def fail_in_passing(rank: int) -> None:
    """Let rank 1 see the folder late and old, and read with errors that pass; rank 0's first write of OWNER fails."""
    retry.FIRST_SECONDS = 1e-3
    loading.VISIBLE_SECONDS = 9.0  # looks ten times a second
    times: Counter[str] = Counter()

    def fails(name: str, original: Callable[..., Any], number: int, when: Callable[[Path], bool], often: int) -> Any:
        def replaced(path: Any, *args: Any, **kwargs: Any) -> Any:
            if when(Path(path)) and times[name] < often:
                times[name] += 1
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *args, **kwargs)

        return replaced

    newest = lambda path: path.name == "step_00000003"  # noqa: E731
    if rank == 0:
        layout_of_files.replacing = fails("own", layout_of_files.replacing, errno.EIO, lambda p: p.name == "OWNER", 1)
        return
    verify.hash_file = fails("hash", verify.hash_file, errno.ESTALE, lambda path: True, 3)
    Path.read_bytes = fails("read", Path.read_bytes, errno.EACCES, lambda path: path.name == "manifest.json", 2)
    verify.os = SimpleNamespace(**{**vars(os), "listdir": fails("seen", os.listdir, errno.ENOENT, newest, 2)})
    layout_of_files.os = SimpleNamespace(
        **{**vars(os), "listdir": lambda path: [name for name in os.listdir(path) if not newest(Path(name))]}
    )


def test_ranks_with_passing_errors_and_an_old_listing_go_on_from_the_step_of_rank_0(
    whole, interrupted: Path, shards: Path
) -> None:
    seen = run_ranks(2, train, run_of(shards, interrupted, "guard.retry_minutes=1"), first_step_is_4, fail_in_passing)
    for one in seen:
        assert one["step"] == 5
    assert "OWNER: Input/output error; trying again" in seen[0]["said"]
    assert "do not see" in seen[0]["said"] and "rank 1 on" in seen[0]["said"]
    for message in ("Stale file handle; trying again", "manifest.json: Permission denied; trying again"):
        assert message in seen[1]["said"]
    assert not list((interrupted / "checkpoints").glob("*.damaged"))


def first_step_is_4(state: TrainState, result: StepResult) -> None:
    assert state.step in (4, 5)


def fail_for_good(rank: int) -> None:
    def refuse(path: Path, **_: Any) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    if rank == 1:
        verify.hash_file = refuse


def test_a_checkpoint_that_one_rank_cannot_read_ends_the_try_and_stays(interrupted: Path, shards: Path) -> None:
    before = sorted(path.name for path in (interrupted / "checkpoints").glob("step_*"))
    with pytest.raises(AssertionError, match=r"rank 1 on .*: Input/output error") as failure:
        run_ranks(2, train, run_of(shards, interrupted, "guard.retry_minutes=0"), None, fail_for_good)
    assert StorageFailed.__name__ in str(failure.value)
    assert sorted(path.name for path in (interrupted / "checkpoints").glob("step_*")) == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(interrupted: Path, shards: Path) -> None:
    for path in (interrupted / "checkpoints").glob("step_*"):
        os.truncate(next(path.glob("*.distcp")), 100)
    for _ in range(2):
        with pytest.raises(AssertionError, match="no checkpoint of .* is whole") as failure:
            run_ranks(1, train, run_of(shards, interrupted))
        assert DataError.__name__ in str(failure.value)


def stop_rank_1(state: TrainState, result: StepResult) -> None:
    if state.mesh.rank == 1 and state.step == 2:
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    config = run_of(shards, tmp_path, "checkpoint.interval=100")
    seen = run_ranks(2, train, config, stop_rank_1)
    assert [rank["step"] for rank in seen] == [2, 2]
    assert checkpoints.newest(config).name == "step_00000002"
    assert not (tmp_path / "DONE").exists()


def test_a_stop_file_ends_a_run_with_a_checkpoint(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(shards, tmp_path, "checkpoint.interval=100")
    (tmp_path / "stop").touch()
    (seen,) = run_ranks(1, train, config, None, functools.partial(set_stop_file, str(tmp_path / "stop")))
    assert seen["step"] == 1
    assert checkpoints.newest(config).name == "step_00000001"


def set_stop_file(path: str, _: int) -> None:
    os.environ["MEGATRON_MM_STOP_FILE"] = path


def poison(state: TrainState, result: StepResult) -> StepResult | None:
    """Let the batches 6 and 7 of the order, two samples each, have a loss far above the others."""
    if state.consumption.positions(state.step - 1)[0] in (12, 14):
        return StepResult(result.losses * torch.tensor([40.0, 1.0]), result.grad_norm, result.lr, result.updated)
    return None


def test_a_spike_takes_the_run_back_and_leaves_its_batches_out(shards: Path, tmp_path: Path) -> None:
    spikes = ("training.steps=9", "guard.spike_window=8", "guard.spike_steps=2", "checkpoint.interval=5")
    (seen,) = run_ranks(1, train, run_of(shards, tmp_path / "spike", *spikes), poison)
    assert seen["left_out"] == (LeftOut(12, 2, 6), LeftOut(14, 2, 7))
    assert "going back to" in seen["said"]
    records = read_metrics(tmp_path / "spike")
    assert [record["step"] for record in records if "grad_norm" in record] == list(range(1, 10))
    (back,) = [record for record in records if "went_back" in record]
    assert (back["step"], back["lost_steps"]) == (5, 3)
    run_ranks(1, train, run_of(shards, tmp_path / "without", *spikes, "training.stop_after=5"))
    newest = checkpoints.newest(run_of(shards, tmp_path / "without"))
    left_out = {"run": read_manifest(newest)["run"], "left_out": [[12, 2, 6], [14, 2, 7]]}
    (tmp_path / "without" / "left_out.json").write_text(json.dumps(left_out))
    (without,) = run_ranks(1, train, run_of(shards, tmp_path / "without", *spikes))  # reads the file as it goes on
    assert without["left_out"] == seen["left_out"]
    assert_same_weights(seen, without)


def begin_without(parts: tuple[LeftOut, ...], _: int) -> None:
    """Let a run leave samples out from its start."""
    begin = loop._begin

    def begin_then_leave_out(state: TrainState, *given: Any) -> None:
        begin(state, *given)
        checkpoints.leave_out(state, parts)

    loop._begin = begin_then_leave_out


def test_a_spike_before_the_first_checkpoint_begins_anew_without_its_batches(shards: Path, tmp_path: Path) -> None:
    spikes = ("training.steps=9", "guard.spike_window=8", "guard.spike_steps=2", "checkpoint.interval=100")
    (seen,) = run_ranks(1, train, run_of(shards, tmp_path / "spike", *spikes), poison)
    assert seen["left_out"] == (LeftOut(12, 2, 6), LeftOut(14, 2, 7))
    assert "going back to the initial weights, for nothing is saved yet" in seen["said"]
    without = functools.partial(begin_without, seen["left_out"])
    (never,) = run_ranks(1, train, run_of(shards, tmp_path / "without", *spikes), None, without)
    assert_same_weights(seen, never)


def spike_early(state: TrainState, result: StepResult) -> StepResult | None:
    """Let the two batches after a restart at step 5 have a loss far above the others."""
    if state.consumption.positions(state.step - 1)[0] in (10, 12):
        return StepResult(result.losses * torch.tensor([40.0, 1.0]), result.grad_norm, result.lr, result.updated)
    return None


def test_a_spike_right_after_a_restart_is_seen(shards: Path, tmp_path: Path) -> None:
    spikes = ("training.steps=7", "guard.spike_window=8", "guard.spike_steps=2", "checkpoint.interval=5")
    run_ranks(2, train, run_of(shards, tmp_path, *spikes, "training.stop_after=5"))
    for seen in run_ranks(2, train, run_of(shards, tmp_path, *spikes), spike_early):
        assert seen["left_out"] == (LeftOut(10, 2, 5), LeftOut(12, 2, 6)), seen["said"]
        assert seen["step"] == 7


def fill_disk(rank: int, *, calls: int) -> None:
    """Let rank 1 run out of disk in the middle of its shard, in the first `calls` saves."""
    write, begin, left = saving._write, saving.Saver.begin, [calls]

    def write_until_full(*args: Any) -> dict[str, Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))  # of the process that begin() forks
        return write(*args)

    def count(self: saving.Saver, *args: Any, **kwargs: Any) -> Any:
        saving._write = write_until_full if rank == 1 and left[0] > 0 else write
        left[0] -= 1
        return begin(self, *args, **kwargs)

    saving.Saver.begin = count


def test_a_full_disk_leaves_older_checkpoints_and_the_run_goes_on(shards: Path, tmp_path: Path) -> None:
    seen = run_ranks(2, train, run_of(shards, tmp_path), None, functools.partial(fill_disk, calls=2))
    assert "rank 1 on" in seen[0]["said"]
    assert "OSError: [Errno 27] File too large" in seen[0]["said"], seen[0]["said"]
    assert "MB free in" in seen[0]["said"]
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert names == ["step_00000003", "step_00000004", "step_00000005"]
    with pytest.raises(AssertionError, match="3 saves in a row failed") as failure:
        run_ranks(2, train, run_of(shards, tmp_path, "training.steps=9"), None, functools.partial(fill_disk, calls=9))
    assert SaveFailed.__name__ in str(failure.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == names


def fill_disk_of_all_files(state: TrainState, result: StepResult) -> None:
    """Let no file of rank 0 grow from step 3 to step 4."""
    if state.mesh.rank == 0 and state.step in (3, 4):
        limit = resource.RLIM_INFINITY if state.step == 4 else 512
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def test_a_full_disk_ends_no_run_that_can_do_without_it_for_a_while(whole, shards: Path, tmp_path: Path) -> None:
    config = run_of(shards, tmp_path, "logging.tensorboard=true")
    (seen,) = run_ranks(1, train, config, fill_disk_of_all_files)
    assert "metrics.jsonl cannot be written, its lines are kept until it can" in seen["said"]
    assert [record["step"] for record in read_metrics(tmp_path) if "grad_norm" in record] == [1, 2, 3, 4, 5]
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert names == ["step_00000001", "step_00000004", "step_00000005"]
    assert_same_weights(seen, whole)


def become_nobody(rank: int) -> None:
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_a_folder_that_cannot_be_written_is_named(shards: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to the user that it becomes
        os.chmod(folder, 0o555)
        with pytest.raises(AssertionError, match=f"run_dir={folder} cannot be written: PermissionError") as failure:
            run_ranks(1, train, run_of(shards, Path(folder)), None, become_nobody)
    assert ConfigError.__name__ in str(failure.value)


def test_a_job_that_was_taken_over_commits_nothing(tmp_path: Path) -> None:
    old, new = Fence.take(tmp_path), Fence.take(tmp_path)
    for fence, partial in ((old, tmp_path / "a.partial"), (new, tmp_path / "b.partial")):
        partial.mkdir()
        (partial / "shard").write_bytes(b"data")
        commit_it = functools.partial(commit, partial, hashes={}, facts={"step": 7}, fence=fence)
        if fence is old:
            with pytest.raises(TakenOver, match="another job goes on with this run"):
                commit_it(tmp_path / "step_00000007")
        else:
            commit_it(tmp_path / "step_00000007")
    assert find_damage(tmp_path / "step_00000007") == []


def hang_rank_1(state: TrainState, result: StepResult) -> None:
    if state.mesh.rank == 1 and state.step == 2:
        time.sleep(600)


def test_a_hung_rank_is_named_with_the_collective_that_waits_for_it(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):  # no rank returns: they end themselves
        run_ranks(2, train, run_of(shards, tmp_path, "guard.hang_seconds=12", "guard.retry_minutes=0.1"), hang_rank_1)
    report = (tmp_path / "health" / "hang.txt").read_text()
    assert "rank 1 on" in report
    assert "is in no collective: step 2" in report
    assert "hang_rank_1()" in report
    assert "rank 0 waits in gloo:all_reduce number" in report


def slow_rank_1(rank: int) -> None:
    if rank == 1:
        watch.PROBE_SIZE *= 4


def test_a_slow_rank_is_named(shards: Path, tmp_path: Path) -> None:
    config = run_of(shards, tmp_path, "guard.slow_rank_interval=5", "guard.slow_rank_ratio=2")
    seen = run_ranks(2, train, config, None, slow_rank_1)
    assert "rank 1 on" in seen[0]["said"]
    assert "is slow" in seen[0]["said"]


def compare_software(config: Config) -> str:
    mesh = meshes.cut(config)
    own = describe_software()
    check_alike(own, what="software")
    with pytest.raises(ConfigError) as failure:
        check_alike({**own, "torch": "1.0"} if mesh.rank == 2 else own, what="software")
    return str(failure.value)


def test_a_rank_with_other_versions_is_named(shards: Path, tmp_path: Path) -> None:
    for message in run_ranks(3, compare_software, run_of(shards, tmp_path)):
        assert f"torch 1.0, most ranks have {describe_software()['torch']}: rank 2 on" in message


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


def load_foreign(config: Config, path: Path) -> str:
    os.chdir(path.parent)
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    train_step(state, Loader(config.data.train, config=config, mesh=mesh).step(0))
    with pytest.raises(DataError) as failure:
        checkpoints.load(state, path, verify=False)
    return str(failure.value)


def test_a_checkpoint_that_would_execute_code_is_refused(interrupted: Path, shards: Path) -> None:
    path = interrupted / "checkpoints" / "step_00000003"
    (path / ".metadata").write_bytes(pickle.dumps(Payload()))
    (message,) = run_ranks(1, load_foreign, run_of(shards, interrupted), path)
    assert "system, which no checkpoint needs" in message
    assert not (path.parent / "executed").exists()


def test_what_lies_beside_the_tensors_may_not_execute_code_either(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({})))
    data = io.BytesIO()
    torch.save(Payload(), data)
    data.seek(0)
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="common_state"))
    with only_plain_pickles(tmp_path), pytest.raises(DataError, match="common_state is not plain data"):
        DefaultLoadPlanner().load_bytes(item, data)


KILLS = int(os.environ.get("MEGATRON_MM_KILLS", "2"))
"""Times that a run is killed: 30 for the record of docs/failure_tests.md."""


def kill(ranks: list[Any], folder: Path, *, seconds: float | None) -> bool:
    """Kill every rank with -9, `seconds` after its start or, without, inside a save; return whether it was inside one.

    Returns at once if the run has ended by itself.
    """
    if seconds is None:
        deadline = time.monotonic() + 120
        while any(rank.is_alive() for rank in ranks) and not any(folder.glob("*.partial/__*")):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
    else:
        time.sleep(seconds)
    caught = any(folder.glob("step_*.partial/__*"))
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    return caught and all(rank.exitcode == -signal.SIGKILL for rank in ranks)


def test_a_run_that_is_killed_again_and_again_is_the_one_that_was_not(shards: Path, tmp_path: Path) -> None:
    steps = f"training.steps={6 * KILLS}"
    whole = run_ranks(2, train, run_of(shards, tmp_path / "whole", steps, "checkpoint.interval=0"))
    config = run_of(shards, tmp_path / "killed", steps, "checkpoint.interval=4")
    chance, inside = random.Random(0), 0
    for number in range(KILLS):
        ranks = start_ranks(2, tmp_path / f"life{number}", train, config)
        caught = kill(ranks, checkpoints.folder(config), seconds=chance.uniform(0.0, 4.0) if number % 2 else None)
        inside += caught
        damaged = [find_damage(path) for path in whole_ones(checkpoints.folder(config))]
        assert not any(damaged), damaged
    seen = run_ranks(2, train, config)
    print(f"{KILLS} kills, {inside} of them while a save was written")
    assert inside >= KILLS // 3
    assert [rank["step"] for rank in seen] == [6 * KILLS] * 2
    for rank in range(2):
        assert_same_weights(seen[rank], whole[rank])
    assert "damaged" not in seen[0]["said"]


def test_retention_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    fence = Fence.take(tmp_path)
    for step in range(1, 8):
        partial = tmp_path / "new.partial"
        partial.mkdir()
        commit(partial, tmp_path / f"step_{step:08d}", hashes={}, facts={"step": step}, fence=fence)
        remove_old(tmp_path, keep=2, keep_every=3)
    assert [step_of(path) for path in whole_ones(tmp_path)] == [3, 6, 7]
    assert json.loads((tmp_path / "step_00000007" / "manifest.json").read_text())["step"] == 7
