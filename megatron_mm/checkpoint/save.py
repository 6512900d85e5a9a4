"""Saving in the background: every rank forks a process that writes its shards while training goes on.

Training stands still while the tensors are described and, on a GPU, copied to the host; a forked process sees the
memory of the moment it was forked, so what training changes afterwards does not reach it. (megatron-core 0.19.2's
persistent writer would: it shares CPU tensors.) Errors of any rank are known to all before anything is committed. What
is committed is read back from the disk by other ranks, in the background too, before older checkpoints may go.
"""

import contextlib
import logging
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mm.checkpoint.forked import Forked
from megatron_mm.checkpoint.format import Fence, TakenOver, commit, name_of, remove_old, set_aside
from megatron_mm.checkpoint.read_back import Problems, ReadBack, shares
from megatron_mm.engine import device, patches
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import RunStopped, StorageFailed
from megatron_mm.storage import PARTIAL, hash_file, make_folder, sync_file

log = logging.getLogger(__name__)

MAX_FAILED_SAVES = 3
"""Saves in a row that may fail before the run stops: what it computes from then on could be lost."""
REFUSALS = (OSError, MemoryError, RuntimeError, CheckpointException)
"""What a rank that the system refuses something may raise, torch's wrapping of them included."""


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
    read_back_seconds: float
    """Seconds from its commit until all of it was read back from the disk."""


@dataclass
class _Pending:
    step: int
    final: Path
    partial: Path
    facts: dict[str, Any]
    texts: dict[str, str]
    writing: Forked | str
    """What writes the shards of this rank, or why it cannot."""
    started: float
    stall_seconds: float
    committed: float | None = None
    read_back: ReadBack | None = None

    def is_busy(self) -> bool:
        """Return whether this rank writes its shards, or reads another one's back."""
        if self.read_back is not None:
            return self.read_back.is_busy()
        return isinstance(self.writing, Forked) and self.writing.is_alive()


class _PeerFailed(Exception):
    """Another rank could not plan the save."""


class Saver:
    """Writes checkpoints of one run, one at a time. Every method is collective over all ranks."""

    def __init__(self, folder: Path, mesh: Mesh, fence: Fence | None, *, keep: int, keep_every: int = 0) -> None:
        self.folder, self.mesh, self._keep, self._keep_every = folder, mesh, keep, keep_every
        self._fence: Fence | _Open = fence or _Open()
        self._forget_plans()
        self._pending: _Pending | None = None
        self._said: set[str] = set()
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
        partial = final.with_name(f"{final.name}.{self._fence.token}{PARTIAL}")
        try:
            self._agree(lambda: _make_folder(partial, final))
            self._plan(describe, partial, metadata)
        except SaveFailed as error:
            self._fail(error, partial)
            return before
        writing = self._start_writing()
        stall = time.perf_counter() - started
        self._pending = _Pending(step, final, partial, facts, texts, writing, started, stall)
        return before

    def poll(self) -> Saved | None:
        """Go on with the save under way as far as nobody waits for it; return it once older ones may go.

        It is committed when all ranks have written their shards, and is done with when all have read back those of
        another rank. Raises SaveFailed after MAX_FAILED_SAVES failures in a row.
        """
        if self._pending is None or self._on_any_rank(self._pending.is_busy()):
            return None
        return self._go_on()

    def finish(self) -> Saved | None:
        """Wait for the save under way, commit it and read it back; return it, None if there is none or if it failed."""
        saved = None
        while self._pending is not None:
            saved = self._go_on()
        return saved

    def check_last(self) -> None:
        """Raise SaveFailed if the last save failed: at the end of a run there is no next one."""
        if self.failed:
            raise SaveFailed("the last checkpoint of the run could not be written; the one before is whole")

    def _plan(self, describe: Callable[[], dict[str, Any]], partial: Path, metadata: dict[str, Any]) -> None:
        """Let the ranks agree on who writes what. Raises SaveFailed on all of them if one cannot.

        All ask one another before each exchange whether one has failed; one that has asks once, and leaves.
        """
        own = None
        try:
            with patches.for_save(self._check_peers):
                dist_checkpointing.save(
                    describe(),
                    str(partial),
                    self._spread,
                    async_sharded_save=True,
                    async_strategy="mcore",
                    content_metadata=metadata,
                )
            self._check_peers()
            return
        except _PeerFailed:
            pass
        except REFUSALS as error:
            own = f"rank {self.mesh.rank} on {socket.gethostname()}: {_reason(error, [])}"
            self._on_any_rank(True)
        self._forget_plans()
        everywhere: list[str | None] = [None] * self.mesh.world_size
        dist.all_gather_object(everywhere, own)
        raise SaveFailed("; ".join(error for error in everywhere if error is not None))

    def _check_peers(self) -> None:
        if self._on_any_rank(False):
            raise _PeerFailed

    def _on_any_rank(self, own: bool) -> bool:
        answer = torch.tensor(int(own), device=device.current())
        dist.all_reduce(answer)
        return bool(answer)

    def _forget_plans(self) -> None:
        """Plan the next save anew: what one rank remembers of a plan that failed, another may not."""
        self._strategy = _Strategy()
        self._spread = FullyParallelSaveStrategyWrapper(
            self._strategy, self.mesh.dp_cp_group, do_cache_distribution=True
        )

    def _start_writing(self) -> Forked | str:
        """Fork the process that writes the shards of this rank; return why there is none, which all learn later."""
        writer = self._strategy.writer
        try:
            buckets = FileSystemWriterAsync.preload_tensors(writer.write_buckets, non_blocking=False)
            return Forked(lambda: _write(buckets, writer.transforms))
        except REFUSALS as error:
            return _reason(error, [])
        finally:
            writer.write_buckets = []  # the other process has them

    def _go_on(self) -> Saved | None:
        """Wait for what the ranks do of the save under way, and take its next step; return it after the last."""
        assert self._pending is not None
        pending, began = self._pending, time.perf_counter()
        try:
            if pending.read_back is None:
                pending.read_back = self._commit(pending)
                pending.committed = time.perf_counter()
                pending.stall_seconds += pending.committed - began
                return None
            return self._settle(pending, began)
        except RunStopped as error:
            self._pending = None
            if not isinstance(error, SaveFailed):
                raise
            self._fail(error, pending.partial)
            return None

    def _commit(self, pending: _Pending) -> ReadBack:
        """Commit what all ranks have written, and start to read it back."""
        everywhere: list[Any] = [None] * self.mesh.world_size
        dist.gather_object(_outcome(pending.writing), everywhere if self.mesh.is_rank_0 else None)
        read_by = self._agree(lambda: self._publish(pending, everywhere))
        return ReadBack(pending.final, read_by[self.mesh.rank])

    def _publish(self, pending: _Pending, everywhere: list[dict[str, Any]]) -> list[Mapping[str, str]]:
        """Commit the save on rank 0, and return what each rank has to read back."""
        errors = [
            f"rank {rank} on {own['host']}: {own['error']}" for rank, own in enumerate(everywhere) if own["error"]
        ]
        if errors:
            raise OSError("; ".join(errors))
        self._strategy.writer.finish(self._strategy.metadata, [own["results"] for own in everywhere])
        save_config(CheckpointingConfig(self._strategy.backend, self._strategy.version), str(pending.partial))
        for name, text in pending.texts.items():
            (pending.partial / name).write_text(text)
        written = [own["hashes"] for own in everywhere]
        hashes = {name: digest for own in written for name, digest in own.items()}
        facts = {"step": pending.step, **pending.facts}
        listed = commit(pending.partial, pending.final, hashes=hashes, facts=facts, fence=self._fence)
        written[0] = {**written[0], **{name: listed[name] for name in listed.keys() - hashes.keys()}}
        return shares(written, [own["host"] for own in everywhere])

    def _settle(self, pending: _Pending, began: float) -> Saved:
        """Let older checkpoints go if the new one is on the disk as it was written."""
        assert pending.read_back is not None
        assert pending.committed is not None
        own = pending.read_back.result()
        everywhere: list[Any] = [None] * self.mesh.world_size
        dist.gather_object(asdict(own), everywhere if self.mesh.is_rank_0 else None)
        self._agree(lambda: self._judge(pending, [Problems(**problems) for problems in everywhere]))
        self._pending, self.failed, now = None, 0, time.perf_counter()
        stall = pending.stall_seconds + now - began
        times = pending.committed - pending.started, now - pending.committed
        return Saved(pending.step, pending.final, stall, *times)

    def _judge(self, pending: _Pending, everywhere: list[Problems]) -> None:
        damaged = [line for own in everywhere for line in own.damaged]
        unread = [line for own in everywhere for line in own.unread]
        self._fence.check()
        if damaged:
            aside = set_aside(pending.final, "damaged")
            raise OSError(f"{pending.final.name} is damaged and is now {aside.name}: {'; '.join(damaged)}")
        if unread:
            raise OSError(f"{pending.final.name} stays, but may be damaged: {'; '.join(unread)}")
        for problem in remove_old(self.folder, keep=self._keep, keep_every=self._keep_every):
            if problem not in self._said:
                self._said.add(problem)
                log.warning("an old checkpoint cannot be removed, which is tried again after each save: %s", problem)

    def _agree[T](self, action: Callable[[], T]) -> T:
        """Let rank 0 do something with the disk, and return on every rank what it returned.

        Raises on every rank what it raised, TakenOver or SaveFailed.
        """
        result: list[Any] = [None, None]
        if self.mesh.is_rank_0:
            try:
                result = [None, action()]
            except TakenOver as error:
                result = [error, None]
            except (*REFUSALS, StorageFailed) as error:
                result = [SaveFailed(f"{type(error).__name__}: {error}"), None]
        dist.broadcast_object_list(result, src=0)
        error, value = result
        if error is not None:
            raise error
        return value

    def _fail(self, error: SaveFailed, partial: Path) -> None:
        self.failed += 1
        if self.mesh.is_rank_0:
            shutil.rmtree(partial, ignore_errors=True)
            log.error("%s was not saved, older checkpoints are as they were: %s", partial.name, error)
        if self.failed >= MAX_FAILED_SAVES:
            raise SaveFailed(f"{self.failed} saves in a row failed, the last with: {error}") from error


class _Open:
    """The fence of a run that nobody else can write."""

    token = "alone"

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
    make_folder(partial.parent)
    partial.mkdir()


def _write(buckets: list[tuple], transforms: Any) -> dict[str, Any]:
    """Write the shards of one rank and return what became of it; runs in a process of its own."""
    done: dict[str, Any] = {"host": socket.gethostname(), "error": None, "results": [], "hashes": {}}
    try:
        for bucket in buckets:
            _, results = FileSystemWriterAsync.write_preloaded_data([transforms], 0, bucket, None, None, False)
            if isinstance(results, Exception):
                raise results
            path = Path(bucket[0])
            # megatron-core 0.19.2 would do it before the last kilobytes have left the file's buffer.
            sync_file(path)
            done["results"] += results
            done["hashes"][bucket[1]] = hash_file(path)
    except Exception as error:
        done["error"] = _reason(error, [Path(bucket[0]) for bucket in buckets])
    return done


def _reason(error: BaseException, files: list[Path]) -> str:
    """Return why the shards in `files` could not be written: what the disk said, where torch's writer hides it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    where = ""
    if isinstance(cause, OSError) and files:
        with contextlib.suppress(OSError):
            where = f", {shutil.disk_usage(files[0].parent).free / 1e6:.0f} MB free in {files[0].parent}"
    return f"{type(cause or error).__name__}: {cause or error}{where}"


def _outcome(writing: Forked | str) -> dict[str, Any]:
    """Wait for what this rank writes, and return what became of it."""
    try:
        if isinstance(writing, Forked):
            return writing.result()
        reason = writing
    except ChildProcessError as error:
        reason = str(error)
    return {"host": socket.gethostname(), "error": reason, "results": [], "hashes": {}}
