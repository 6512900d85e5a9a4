"""The newest step in the memory of the nodes: each rank's share on its own node, and once more on another one.

Each node keeps a folder step_N in the form of a checkpoint (`format`), in a file system that is memory. Every rank
forks a process that writes its share there and fetches a second one from a partner's over TCP, while training goes on.
After the loss of a node every share is still on one that lives, and a start in the same layout reads it there.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.checkpoint.forked import Forked
from megatron_mm.checkpoint.format import (
    COMMITTED,
    MANIFEST,
    Fence,
    TakenOver,
    commit,
    name_of,
    read_manifest,
    step_of,
    whole_ones,
)
from megatron_mm.checkpoint.nodes import address, host_name, lock_file, memory_folder, partners
from megatron_mm.checkpoint.shares import name_of_share, pull, serve, write_share
from megatron_mm.engine import device
from megatron_mm.engine.agreement import together
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.storage import PARTIAL, hash_file

log = logging.getLogger(__name__)

SMALL_FILES = (MANIFEST, COMMITTED, "config.yaml")
LOCK = "lock"


@dataclass(frozen=True)
class Copied:
    """What a copy cost."""

    step: int
    stall_seconds: float
    """How long training stood still for it, on this rank."""
    seconds: float
    """Seconds from its beginning until it could be used."""


@dataclass(frozen=True)
class Found:
    """A copy that a run can go on from."""

    path: Path
    """Its manifest and settings, as on every node."""
    share: Path
    """The share of this rank."""
    fetched: int
    """Ranks whose share came from another node."""


@dataclass
class _Pending:
    step: int
    partial: Path
    facts: dict[str, Any]
    writing: Forked | str
    """The process that writes, or why there is none."""
    started: float
    stall_seconds: float


class Copies:
    """Keeps the newest step of one run in the memory of its nodes. Every method is collective over all ranks."""

    def __init__(self, memory_dir: str, run_dir: str, mesh: Mesh, fence: Fence | None) -> None:
        self._mesh, self._fence = mesh, fence
        self.folder = together(lambda: memory_folder(memory_dir, run_dir))
        everywhere = _gather((host_name(), address()))
        self._hosts, self._addresses = [host for host, _ in everywhere], [place for _, place in everywhere]
        here = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[mesh.rank]]
        self._here, self._leads = here, here[0] == mesh.rank
        self._partners = partners(self._hosts, stride=mesh.tp_size * mesh.cp_size, dp_size=mesh.dp_size)
        self._pending: _Pending | None = None
        self._whole: Path | None = None
        alone = [rank for rank, other in enumerate(self._partners) if self._hosts[rank] == self._hosts[other]]
        if alone and mesh.is_rank_0:
            log.warning(
                "checkpoint.memory_interval: the second copies of %d of %d ranks are on the same host as the first: "
                "they do not outlive it",
                *(len(alone), mesh.world_size),
            )
        if self._leads:
            self._clear_up(run_dir)
        dist.barrier()

    def _clear_up(self, run_dir: str) -> None:
        """Remove what no living process of this user keeps in the memory of this node."""
        for lock in self.folder.parent.glob(f"*/{LOCK}"):
            file = lock.open("r+")
            if lock.parent != self.folder and lock_file(file):
                log.warning("%s has copies of %s, which no longer runs: removed", host_name(), lock.read_text().strip())
                shutil.rmtree(lock.parent, ignore_errors=True)
            file.close()
        for path in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
        self._lock = (self.folder / LOCK).open("w")
        self._lock.write(os.path.abspath(run_dir) + "\n")
        self._lock.flush()
        lock_file(self._lock)  # while this process lives; a former one of this run may still be ending

    def require_room(self, num_bytes: int) -> None:
        """Pass if every node has room for two copies of its ranks' shares and of those it keeps for others.

        `num_bytes` are those of this rank's share. Raises ConfigError.
        """
        sizes = _gather(num_bytes)
        kept = sum(sizes[rank] + sizes[self._partners.index(rank)] for rank in self._here)

        def check() -> None:
            held = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            free = min(shutil.disk_usage(self.folder).free, psutil.virtual_memory().available) + held
            if 2 * kept > free:
                raise ConfigError(
                    f"checkpoint.memory_interval keeps two copies of {kept / 1e9:.2f} GB in {self.folder} on "
                    f"{host_name()}, where {free / 1e9:.2f} GB are free. Give it more room, or use 0."
                )

        together(check)

    def begin(
        self, step: int, tensors: Mapping[str, Tensor], *, own: Any, facts: dict[str, Any], settings: str
    ) -> None:
        """Start to copy `tensors`, what this rank needs to go on; `own` is what it needs beside them.

        `facts` go into the manifest, `settings` is the run's config.yaml. The copy before stays until this is whole.
        Where that one is still being written, this one is left out.
        """
        if self._pending is not None:
            if self._mesh.is_rank_0:
                log.warning("step %d is not copied to memory: step %d still is", step, self._pending.step)
            return
        started = time.perf_counter()
        token = self._fence.token if self._fence is not None else "alone"
        partial = self.folder / f"{name_of(step)}.{token}{PARTIAL}"
        error = self._make_folder(partial, settings) if self._leads else None
        listener, key = socket.create_server(("", 0)), secrets.token_hex(16)
        everywhere = _gather((listener.getsockname()[1], key, error))
        host_tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        keeps = self._partners.index(self._mesh.rank)  # the rank whose share this one keeps beside its own
        port, its_key, _ = everywhere[keeps]
        source = None if keeps == self._mesh.rank else (keeps, self._addresses[keeps], port, its_key)
        writing = next((error for _, _, error in everywhere if error), None)
        try:
            writing = writing or Forked(
                lambda: _write(partial, self._mesh.rank, host_tensors, own, listener, key, source),
                keep=(listener.fileno(),),
            )
        except OSError as reason:
            writing = f"{type(reason).__name__}: {reason}"
        listener.close()
        self._pending = _Pending(step, partial, facts, writing, started, time.perf_counter() - started)

    def _make_folder(self, partial: Path, settings: str) -> str | None:
        """Make room for a copy, and its folder; return what is wrong if that fails."""
        try:
            self._remove(keep=self._whole)
            partial.mkdir(mode=0o700)
            (partial / "config.yaml").write_text(settings)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _remove(self, *, keep: Path | None) -> None:
        for path in self.folder.iterdir():
            if path.name != LOCK and path != keep:
                shutil.rmtree(path, ignore_errors=True)

    def poll(self) -> Copied | None:
        """Let the copy under way count if all ranks have written it, and return it; None if there is none yet.

        Raises TakenOver if another job owns the run by now.
        """
        if self._pending is None:
            return None
        writing = self._pending.writing
        busy = torch.tensor(int(isinstance(writing, Forked) and writing.is_alive()), device=device.current())
        dist.all_reduce(busy)
        return None if int(busy) else self._finish()

    def _finish(self) -> Copied | None:
        waited = time.perf_counter()
        assert self._pending is not None
        pending, self._pending = self._pending, None
        everywhere = _gather({**_outcome(pending.writing), **self._check_owner()})
        if taken := everywhere[0].get("taken"):
            raise TakenOver(taken)
        problems = [f"rank {rank} on {self._hosts[rank]}: {one['error']}"
                    for rank, one in enumerate(everywhere) if one["error"]]  # fmt: skip
        found = {(name, digest) for one in everywhere for name, digest in one["hashes"].items()}
        hashes = dict(found)
        if len(hashes) < len(found):
            problems.append("a share came to its second node with other bytes than were written")
        if not problems:
            problems = [error for error in _gather(self._commit(pending, hashes) if self._leads else None) if error]
        if problems:
            if self._leads:
                shutil.rmtree(pending.partial, ignore_errors=True)
            if self._mesh.is_rank_0:
                log.warning("step %d is not copied to memory: %s", pending.step, "; ".join(problems))
            return None
        self._whole = self.folder / name_of(pending.step)
        now = time.perf_counter()
        return Copied(pending.step, pending.stall_seconds + now - waited, now - pending.started)

    def _check_owner(self) -> dict[str, str]:
        """Return what keeps rank 0 from writing to this run, if anything does."""
        try:
            if self._mesh.is_rank_0 and self._fence is not None:
                self._fence.check()
        except TakenOver as error:
            return {"taken": str(error)}
        except OSError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    def _commit(self, pending: _Pending, hashes: Mapping[str, str]) -> str | None:
        """Let the copy count on this node; return what is wrong if that fails."""
        kept = {name_of_share(rank) for one in self._here for rank in (one, self._partners.index(one))}
        facts = {"step": pending.step, **pending.facts}
        try:
            own = {name: hashes[name] for name in kept}
            commit(pending.partial, self.folder / name_of(pending.step), hashes=own, facts=facts, fence=_Checked())
        except OSError as error:
            return f"{self._hosts[self._mesh.rank]}: {type(error).__name__}: {error}"
        return None

    def drop(self) -> None:
        """Forget all copies: the run goes back to before them, or has ended and needs them no more."""
        pending, self._pending = self._pending, None
        if pending is not None and isinstance(pending.writing, Forked):
            pending.writing.kill()
        dist.barrier()
        self._whole = None
        if self._leads:
            self._remove(keep=None)
        dist.barrier()

    def close(self) -> None:
        """Free the memory: the run has ended."""
        self.drop()
        if self._leads:
            self._lock.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def recover(self, refuse: Callable[[Path], str | None]) -> Found | None:
        """Return the newest copy of which every rank's share is whole on some node, wherever the ranks are now.

        Each rank that has none of its own gets it from another node. `refuse` says why a copy, by its folder, cannot be
        gone on from; every reason is logged. None if there is no such copy.
        """
        everywhere = _gather(self._survey(refuse) if self._leads else {})
        copies: dict[tuple[int, str], dict[int, dict[str, Any]]] = defaultdict(dict)
        for rank, held in enumerate(everywhere):
            for (step, facts), one in held.items():
                copies[step, facts][rank] = one
        for (step, _), holders in sorted(copies.items(), reverse=True):
            reasons = [f"on {self._hosts[rank]}: {one['refused']}" for rank, one in holders.items() if one["refused"]]
            found = None if reasons else self._fetch(step, holders, reasons)
            if found is not None:
                return found
            if self._mesh.is_rank_0:
                log.warning("the copy of step %d in memory is not used: %s", step, "; ".join(dict.fromkeys(reasons)))
        return None

    def _survey(self, refuse: Callable[[Path], str | None]) -> dict[tuple[int, str], dict[str, Any]]:
        """Return the copies of this node by step and what else their manifests say of the run."""
        held = {}
        for path in whole_ones(self.folder):
            facts, shares, small = "", {}, {}
            try:
                manifest = read_manifest(path)
                shares = {name: digest for name, digest in manifest["sha256"].items() if name.startswith("rank_")}
                small = {name: (path / name).read_bytes() for name in SMALL_FILES}
                said = {key: value for key, value in manifest.items() if key not in ("bytes", "sha256")}
                facts = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
                refused = refuse(path)
            except (OSError, DataError, ConfigError) as error:
                refused = str(error)
            held[step_of(path), facts] = {"refused": refused, "shares": shares, "small": small}
        return held

    def _fetch(self, step: int, holders: dict[int, dict[str, Any]], reasons: list[str]) -> Found | None:
        """Bring this rank's share of a copy to its node, or say in `reasons` why some rank has none that is whole."""
        path = self.folder / name_of(step)
        leader = self._here[0]
        files = sorted(holders[leader]["shares"].items()) if leader in holders else []
        mine = files[self._here.index(self._mesh.rank) :: len(self._here)]
        damage = [_damage(path / name, digest) for name, digest in mine]
        places: dict[str, list[int]] = defaultdict(list)  # the ranks that have read a whole share, by its name
        for rank, whole in enumerate(_gather([name for (name, _), bad in zip(mine, damage) if bad is None])):
            for name in whole:
                places[name].append(rank)
        reasons += [reason for found in _gather([bad for bad in damage if bad]) for reason in found]
        missing = [rank for rank in range(self._mesh.world_size) if not places[name_of_share(rank)]]
        if missing:
            reasons.append(f"the share of rank {', '.join(map(str, missing))} is whole on no node")
            return None
        for reason in reasons if self._mesh.is_rank_0 else []:
            log.warning("step %d in memory: %s; the share's other copy is taken", step, reason)
        sources = [
            _choose(places[name_of_share(rank)], self._hosts, self._hosts[rank])
            for rank in range(self._mesh.world_size)
        ]
        away = {rank: one for rank, one in enumerate(sources) if self._hosts[one] != self._hosts[rank]}
        own = self._exchange(path, away)
        errors = [error for error in _gather(own if isinstance(own, str) else None) if error]
        if errors or isinstance(own, str):
            reasons += errors
            return None
        self._whole = path
        if leader not in holders:  # a node that is new to the run: what is not a share is the same everywhere
            path = self._spare(step)
            for name, content in next(iter(holders.values()))["small"].items() if self._leads else ():
                (path / name).write_bytes(content)
        dist.barrier()
        return Found(path, own, len(away))

    def _spare(self, step: int) -> Path:
        return self.folder / f"fetched{PARTIAL}" / name_of(step)

    def _exchange(self, path: Path, away: Mapping[int, int]) -> Path | str:
        """Return this rank's share: of this node, or fetched from the rank that `away` names; what failed, as text."""
        rank, listener, key = self._mesh.rank, socket.create_server(("", 0)), secrets.token_hex(16)
        everywhere = _gather((listener.getsockname()[1], key))
        wanted = {name_of_share(one): path / name_of_share(one) for one, other in away.items() if other == rank}
        server = threading.Thread(target=serve, args=(listener, key, wanted), daemon=True)
        server.start()
        result: Path | str = path / name_of_share(rank)
        if rank in away:
            result = self._spare(step_of(path)) / name_of_share(rank)
            port, its_key = everywhere[away[rank]]
            try:
                result.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                pull(result, self._addresses[away[rank]], port, its_key)
            except OSError as error:
                result = f"rank {rank}: {type(error).__name__}: {error}"
        dist.barrier()  # all have what they asked for, or never will
        listener.close()
        return result


class _Checked:
    """The fence of what rank 0 has asked for already."""

    def check(self) -> None:
        """Pass."""


def _gather(own: Any) -> list[Any]:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    return everywhere


def _choose(ranks: list[int], hosts: list[str], host: str) -> int:
    """Return which of `ranks`, that can all read a share, gives it to a rank on `host`: one of the same host if any."""
    return next((rank for rank in ranks if hosts[rank] == host), ranks[0])


def _damage(path: Path, digest: str) -> str | None:
    """Return what is wrong with a share, None if it is whole."""
    try:
        if hash_file(path) == digest:
            return None
    except OSError as error:
        return f"{path} on {host_name()} cannot be read ({type(error).__name__}: {error})"
    return f"{path} on {host_name()} has other bytes than were written"


def _write(
    folder: Path,
    rank: int,
    tensors: Mapping[str, Tensor],
    own: Any,
    listener: socket.socket,
    key: str,
    source: tuple[int, str, int, str] | None,
) -> dict[str, Any]:
    """Write a rank's share and that of the rank that it keeps one for; return hashes, or what failed.

    It runs in a process of its own. `source` says which rank that is, where it listens, and its key.
    """
    done: dict[str, Any] = {"error": None, "hashes": {}}
    path = folder / name_of_share(rank)
    try:
        done["hashes"][path.name] = write_share(path, tensors, own=own)
    except Exception as error:
        done["error"] = f"{type(error).__name__}: {error}"
    if source is not None:
        written = {name: path for name in done["hashes"]}
        server = threading.Thread(target=serve, args=(listener, key, written, 1), daemon=True)
        server.start()
        try:
            done["hashes"][name_of_share(source[0])] = pull(folder / name_of_share(source[0]), *source[1:])
        except Exception as error:
            done["error"] = done["error"] or f"{type(error).__name__}: {error}"
        server.join()
    return done


def _outcome(writing: Forked | str) -> dict[str, Any]:
    """Return what a rank has written, or why it could not."""
    try:
        if isinstance(writing, Forked):
            return writing.result()
    except ChildProcessError as error:
        writing = str(error)
    return {"error": writing, "hashes": {}}
