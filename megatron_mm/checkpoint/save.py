"""Saving in the background: every rank forks a process that writes its shards while training goes on.

Training stands still while the tensors are described and, on a GPU, copied to the host; a forked process sees the
memory of the moment it was forked, so what training changes afterwards does not reach it. (megatron-core 0.19.2's
persistent writer would: it shares CPU tensors.) Errors of any rank are known to all before anything is committed.
"""

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_mm.checkpoint.format import Fence, TakenOver, commit, name_of, remove_old
from megatron_mm.engine import device, patches
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import RunStopped
from megatron_mm.storage import PARTIAL, hash_file

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Saves in a row that may fail before the run stops: what it computes from then on could be lost."""


class SaveFailed(RunStopped):
    """A checkpoint could not be written: the message names rank, host and reason. Older ones are as they were."""


@dataclass(frozen=True)
class Saved:
    """What a save cost."""

    step: int
    path: Path
    stall_seconds: float
    """How long training stood still for it, on this rank."""
    seconds: float
    """Seconds from its beginning to its commit."""


@dataclass
class _Pending:
    step: int
    final: Path
    partial: Path
    facts: dict[str, Any]
    texts: dict[str, str]
    process: Any
    outcome: Any
    started: float
    stall_seconds: float


class Saver:
    """Writes checkpoints of one run, one at a time. Every method is collective over all ranks."""

    def __init__(self, folder: Path, mesh: Mesh, fence: Fence | None, *, keep: int, keep_every: int = 0) -> None:
        self.folder, self.mesh, self._fence, self._keep, self._keep_every = folder, mesh, fence, keep, keep_every
        self._strategy = _Strategy()
        self._spread = FullyParallelSaveStrategyWrapper(self._strategy, mesh.dp_cp_group, do_cache_distribution=True)
        self._pending: _Pending | None = None
        self.failed = 0
        """Saves in a row that have failed."""

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._pending is not None

    def begin(
        self,
        step: int,
        describe: Callable[[], dict[str, Any]],
        *,
        metadata: dict[str, Any],
        facts: dict[str, Any],
        texts: dict[str, str],
    ) -> Saved | None:
        """Start to save what `describe` returns as sharded tensors; return the save before if this had to wait for it.

        `facts` go into the manifest, `texts` into files of those names.
        """
        before = self.finish()
        started = time.perf_counter()
        final = self.folder / name_of(step)
        token = self._fence.token if self._fence is not None else "alone"
        partial = final.with_name(f"{final.name}.{token}{PARTIAL}")
        try:
            self._agree(lambda: _make_folder(partial, final))
        except SaveFailed as error:
            self._fail(error, partial)
            return before
        described = describe()
        with patches.for_save():
            dist_checkpointing.save(
                described,
                str(partial),
                self._spread,
                async_sharded_save=True,
                async_strategy="mcore",
                content_metadata=metadata,
            )
        writer, outcome = self._strategy.writer, tempfile.TemporaryFile()
        buckets = FileSystemWriterAsync.preload_tensors(writer.write_buckets, non_blocking=False)
        process = multiprocessing.get_context("fork").Process(
            target=_write,
            args=(buckets, writer.transforms, outcome),
            daemon=True,  # it ends with a run that is cut off
        )
        process.start()
        writer.write_buckets = []  # the other process has them
        stall = time.perf_counter() - started
        self._pending = _Pending(step, final, partial, facts, texts, process, outcome, started, stall)
        return before

    def poll(self) -> Saved | None:
        """Commit the save under way if all ranks have written their shards, and return it; None if there is none yet.

        Raises SaveFailed after MAX_FAILED_SAVES failures in a row.
        """
        if self._pending is None:
            return None
        busy = torch.tensor(int(self._pending.process.is_alive()), device=device.current())
        dist.all_reduce(busy)
        return None if int(busy) else self.finish()

    def finish(self) -> Saved | None:
        """Wait for the save under way, commit it and return it; None if there is none, or if it failed."""
        if self._pending is None:
            return None
        waited = time.perf_counter()
        pending, self._pending = self._pending, None
        pending.process.join()
        own = _read_outcome(pending)
        everywhere: list[Any] = [None] * self.mesh.world_size
        dist.gather_object(own, everywhere if self.mesh.is_rank_0 else None)
        try:
            self._agree(lambda: self._commit(pending, everywhere))
        except SaveFailed as error:
            self._fail(error, pending.partial)
            return None
        self.failed = 0
        now = time.perf_counter()
        return Saved(pending.step, pending.final, pending.stall_seconds + now - waited, now - pending.started)

    def check_last(self) -> None:
        """Raise SaveFailed if the last save failed: at the end of a run there is no next one."""
        if self.failed:
            raise SaveFailed("the last checkpoint of the run could not be written; the one before is whole")

    def _commit(self, pending: _Pending, everywhere: list[dict[str, Any]]) -> None:
        errors = [
            f"rank {rank} on {own['host']}: {own['error']}" for rank, own in enumerate(everywhere) if own["error"]
        ]
        if errors:
            raise OSError("; ".join(errors))
        self._strategy.writer.finish(self._strategy.metadata, [own["results"] for own in everywhere])
        save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(pending.partial))
        for name, text in pending.texts.items():
            (pending.partial / name).write_text(text)
        hashes = {name: digest for own in everywhere for name, digest in own["hashes"].items()}
        fence = self._fence or _Open()
        commit(
            pending.partial, pending.final, hashes=hashes, facts={"step": pending.step, **pending.facts}, fence=fence
        )
        remove_old(self.folder, keep=self._keep, keep_every=self._keep_every)

    def _agree(self, action: Callable[[], None]) -> None:
        """Let rank 0 do something with the disk; raise on every rank what it raised, TakenOver or SaveFailed."""
        message: list[Any] = [None]
        if self.mesh.is_rank_0:
            try:
                action()
            except TakenOver as error:
                message = [error]
            except OSError as error:
                message = [SaveFailed(f"{type(error).__name__}: {error}")]
        dist.broadcast_object_list(message, src=0)
        if message[0] is not None:
            raise message[0]

    def _fail(self, error: SaveFailed, partial: Path) -> None:
        self.failed += 1
        if self.mesh.is_rank_0:
            shutil.rmtree(partial, ignore_errors=True)
            log.error("%s was not saved, older checkpoints are as they were: %s", partial.name, error)
        if self.failed >= MAX_FAILED_SAVES:
            raise SaveFailed(f"{self.failed} saves in a row failed, the last with: {error}") from error


class _Open:
    """The fence of a run that nobody else can write."""

    def check(self) -> None:
        """Pass."""


class _Strategy(TorchDistSaveShardedStrategy):
    """Plans a save as megatron-core does, and leaves writing and finishing to Saver."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: tuple, async_strategy: str) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


def _make_folder(partial: Path, final: Path) -> None:
    if final.exists():
        raise FileExistsError(f"{final} exists: a checkpoint is never overwritten")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write(buckets: list[tuple], transforms: Any, outcome: Any) -> None:
    """Write the shards of one rank and leave in `outcome` what became of it; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides
    done: dict[str, Any] = {"host": socket.gethostname(), "error": None, "results": [], "hashes": {}}
    try:
        for bucket in buckets:
            _, results = FileSystemWriterAsync.write_preloaded_data([transforms], 0, bucket, None, None, True)
            if isinstance(results, Exception):
                raise results
            done["results"] += results
            done["hashes"][bucket[1]] = hash_file(Path(bucket[0]))
    except Exception as error:
        done["error"] = _reason(error, [Path(bucket[0]) for bucket in buckets])
    pickle.dump(done, outcome)
    outcome.flush()
    os._exit(0)  # not the exit of the process that it was forked from


def _reason(error: BaseException, files: list[Path]) -> str:
    """Return why the shards in `files` could not be written: what the disk said, where torch's writer hides it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    free = shutil.disk_usage(files[0].parent).free if files else 0
    where = f", {free / 1e6:.0f} MB free in {files[0].parent}" if isinstance(cause, OSError) and files else ""
    return f"{type(cause or error).__name__}: {cause or error}{where}"


def _read_outcome(pending: _Pending) -> dict[str, Any]:
    with pending.outcome as file:
        file.seek(0)
        try:
            return pickle.load(file)
        except (EOFError, pickle.UnpicklingError):
            reason = f"the process that wrote its shards ended with {pending.process.exitcode}"
            return {"host": socket.gethostname(), "error": reason, "results": [], "hashes": {}}
