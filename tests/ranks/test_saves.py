"""A save that is refused something fails by name on all ranks, and the next one is made; none hangs, none is lost."""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from disk import Disk, Judge
from launch import run_ranks
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writer
from small import small_config

from megatron_mm.checkpoint import read_back
from megatron_mm.checkpoint import save as saving
from megatron_mm.checkpoint.format import whole_ones
from megatron_mm.checkpoint.verify import find_damage
from megatron_mm.config import Config
from megatron_mm.engine import mesh as meshes
from megatron_mm.training import checkpoints
from megatron_mm.training.state import TrainState, build_state


def refuse(owner: Any, name: str, error: BaseException) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """Return what lets a function raise while it is open."""
    return lambda: mock.patch.object(owner, name, side_effect=error)


def flip_after_commit() -> contextlib.AbstractContextManager[Any]:
    """Let a bit of a shard of rank 1 flip on the disk as soon as the step is committed."""
    commit = saving.commit

    def commit_and_flip(partial: Path, final: Path, **kwargs: Any) -> dict[str, str]:
        listed = commit(partial, final, **kwargs)
        path = next(final.glob("__1_*.distcp"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        return listed

    return mock.patch.object(saving, "commit", commit_and_flip)


def refuse_to_rename_old() -> contextlib.AbstractContextManager[Any]:
    replace = os.replace

    def replace_if_new(source: Path, target: Path) -> None:
        if str(target).endswith(".removed.partial"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(source))
        replace(source, target)

    return mock.patch.object(os, "replace", replace_if_new)


Fault = tuple[int, Callable[[], contextlib.AbstractContextManager[Any]], str]
ON_A_FORK, NO_MEMORY = BlockingIOError(errno.EAGAIN, "Try again"), OSError(errno.ENOMEM, "No memory")
FAILING: dict[str, Fault] = {
    "no process can be forked": (1, refuse(os, "fork", ON_A_FORK), "rank 1 on .*Try again"),
    "no memory for a process": (0, refuse(os, "fork", NO_MEMORY), "rank 0 on .*No memory"),
    "no memory for the copy": (1, refuse(Writer, "preload_tensors", MemoryError("64 GB")), "rank 1 on .*MemoryError"),
    "no file for the result": (
        1,
        refuse(os, "memfd_create", OSError(errno.EMFILE, "Too many")),
        "rank 1 on .*Too many",
    ),
    "the description fails": (1, refuse(checkpoints, "_sharded_state", RuntimeError("CUDA")), "rank 1 on .*CUDA"),
    "the folder is stale": (
        1,
        refuse(Writer, "prepare_local_plan", OSError(errno.ESTALE, "Stale")),
        "rank 1 on .*Stale",
    ),
    "the plan's end fails": (1, refuse(Writer, "prepare_write_data", MemoryError("a clone")), "rank 1 on .*a clone"),
    "the index is refused": (0, refuse(Writer, "finish", OSError(errno.EIO, "the index")), "OSError.*the index"),
    "nothing is read back": (
        1,
        refuse(read_back, "hash_file", OSError(errno.EIO, "unread")),
        "may be damaged: .*unread",
    ),
    "no thread reads back": (0, refuse(read_back.threading.Thread, "start", RuntimeError("no thread")), "no thread"),
    "the disk has other bytes": (0, flip_after_commit, "is damaged and is now .*damaged.*__1_0.distcp has other bytes"),
}
"""By what is refused: the rank that it is refused to, how, and what must be said."""
THEN_WHOLE = ("no process can be forked", "the description fails", "the plan's end fails")
"""A whole save is made right after these; after any of the others the ranks are where they are after one of these."""


def save_with(state: TrainState, saver: saving.Saver, fault: Fault | None) -> tuple[int, bool]:
    """Make a step's checkpoint; return how many saves in a row have failed, and whether this one was returned."""
    state.step += 1
    rank, refused, _ = fault or (-1, contextlib.nullcontext, "")
    with refused() if rank == state.mesh.rank else contextlib.nullcontext():
        checkpoints.begin_save(state, saver)
        saved = saver.finish()
    return saver.failed, saved is not None


def save_in_trouble(config: Config) -> dict[str, Any]:
    """Make saves that fail, and whole ones between them; return what came of each, and what was said."""
    read_back.PATIENCE_SECONDS = 0.0
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_mm").addHandler(handler)
    state = build_state(config, meshes.cut(config))
    fence = checkpoints.take_over(config, state.mesh)
    saver, found = checkpoints.make_saver(state, fence), {}
    assert save_with(state, saver, None) == (0, True)
    for name, fault in FAILING.items():
        before = [path.name for path in whole_ones(saver.folder)]
        outcome, own = save_with(state, saver, fault), list(said)
        said.clear()
        kept = before == [path.name for path in whole_ones(saver.folder)][: len(before)]
        found[name] = (outcome, own, kept)
        saver.failed = 0
        if name in THEN_WHOLE:
            assert save_with(state, saver, None) == (0, True)
    removing = [save_with(state, saver, (0, refuse_to_rename_old, "")) for _ in range(2)]
    found["kept"] = [path.name for path in whole_ones(saver.folder)]
    found["removing"] = (removing, list(said), save_with(state, saver, None))
    found["left"] = sorted(path.name for path in saver.folder.glob("step_*") if not path.name.endswith(".damaged"))
    found["damaged"] = [find_damage(path) for path in whole_ones(saver.folder)]
    return found


@pytest.fixture(scope="module")
def found(shards: Path, memory_folder: Path) -> list[dict[str, Any]]:
    config = small_config(shards, memory_folder / "trouble", "checkpoint.keep=1")
    return run_ranks(2, save_in_trouble, config)


@pytest.mark.parametrize("name", FAILING)
def test_a_save_fails_by_name_on_all_ranks_and_the_next_one_is_made(name: str, found: list[dict[str, Any]]) -> None:
    message = FAILING[name][2]
    for rank in found:
        outcome, _, kept = rank[name]
        assert outcome == (1, False)
        assert kept
    (said,) = found[0][name][1]
    assert re.search(message, said), said


def test_an_old_step_that_cannot_be_renamed_is_a_warning_and_goes_later(found: list[dict[str, Any]]) -> None:
    for rank in found:
        removing, warnings, after = rank["removing"]
        assert removing == [(0, True)] * 2
        assert len(warnings) == (len(rank["kept"]) - 1 if rank is found[0] else 0)  # each step that stays is named once
        assert all("cannot be removed, which is tried again after each save: OSError" in one for one in warnings)
        assert after == (0, True)
        assert len(rank["kept"]) > 2
        assert len(rank["left"]) == 1
        assert rank["damaged"] == [[]]


class InThisProcess:
    """Stands for a forked process: the disk is followed in one process only."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.result = mock.Mock(return_value=action())

    is_alive = mock.Mock(return_value=False)


def has_whole_steps(folder: Path, done: bool) -> bool:
    found = whole_ones(folder / "checkpoints")
    return bool(found) and not any(find_damage(path) for path in found) and (not done or len(found) == 2)


def cut_power_in_a_save(config: Config, scratch: Path) -> tuple[int, int]:
    """Return the bad states that a power cut in a save leaves, with all syncs and without that of the shard."""
    saving.Forked = InThisProcess
    state = build_state(config, meshes.cut(config))
    saver = checkpoints.make_saver(state, checkpoints.take_over(config, state.mesh))
    save_with(state, saver, None)
    judge, found = Judge(scratch, has_whole_steps), []
    disk = Disk(Path(config.run_dir))
    disk.during(lambda: save_with(state, saver, None))
    found.append(len(list(judge.bad(disk))))
    (shard,) = [number for number, name in enumerate(disk.syncs) if name.endswith(".distcp")]
    checkpoints.set_aside(whole_ones(saver.folder)[-1], "removed.partial")
    state.step -= 1
    disk = Disk(Path(config.run_dir), ignored=[shard])
    disk.during(lambda: save_with(state, saver, None))
    return found[0], len(list(judge.bad(disk)))


def test_a_power_cut_in_a_save_leaves_whole_steps_only(shards: Path, memory_folder: Path) -> None:
    config = small_config(shards, memory_folder / "run", "checkpoint.keep=9")
    ((bad, bad_without_sync),) = run_ranks(1, cut_power_in_a_save, config, memory_folder / "left")
    assert bad == 0
    assert bad_without_sync > 0
