"""Where the ranks of a run meet: one that has not come is named after a minute, and again every minute."""

import logging
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import DistNetworkError, DistStoreError, Store

from megatron_mm.errors import ConfigError, RunStopped

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
"""How long ranks may be missing before it is said; it is said again as often."""
POLL_SECONDS = 0.2
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
NAMED = 16
"""Ranks that a message names."""


class RanksMissing(RunStopped):
    """Some ranks of the run did not come: the message names them, and where the others are."""


def meet(world_size: int, *, timeout: timedelta) -> Store:
    """Return the store of a run once all of its ranks have come to it. Collective over all ranks, before any group is.

    The launcher says where: MASTER_ADDR, MASTER_PORT, RANK. Raises ConfigError if it does not, or if the port is taken;
    RanksMissing with the ranks that have not come within `timeout`.
    """
    missing = [name for name in NEEDED if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={world_size}, but {', '.join(missing)} is not set. Start the ranks with torchrun or srun "
            "(examples/launch.sh), which set all four, or unset WORLD_SIZE to run on one rank."
        )
    rank, place = own_rank(world_size), f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    with _complaining(f"rank {rank} on {socket.gethostname()} has not reached rank 0 at {place}"):
        store = _connect(rank, world_size, place=place, timeout=timeout)
    _arrive(store, rank, world_size, place=place)
    if rank == 0:
        _await_all(store, world_size, timeout=timeout)
        store.set("complete", "yes")
    else:
        try:
            store.wait(["complete"], timeout)
        except (DistStoreError, DistNetworkError) as error:
            raise RanksMissing(f"rank {rank} waited for all ranks at {place}: {_first_line(error)}") from error
    return store


def own_rank(world_size: int) -> int:
    """Return the rank of this process. Raises ConfigError if RANK or MASTER_PORT is no such number."""
    rank, port = os.environ["RANK"], os.environ["MASTER_PORT"]
    if not (rank.isdecimal() and len(rank) < 10 and int(rank) < world_size):
        raise ConfigError(f"RANK={rank} is none of the ranks 0 to {world_size - 1} of WORLD_SIZE={world_size}.")
    if not (port.isdecimal() and len(port) < 6 and 0 < int(port) < 65536):
        raise ConfigError(f"MASTER_PORT={port} is no port: give a number from 1 to 65535.")
    return int(rank)


def _arrive(store: Store, rank: int, world_size: int, *, place: str) -> None:
    """Say that this rank has come. Raises ConfigError if it was told of another number of ranks, or came before."""
    host, wrong = socket.gethostname(), None
    size = int(store.compare_set("world_size", "", str(world_size)).decode())
    number = store.add(f"arrivals/{rank}", 1)
    if size != world_size:
        wrong = (
            f"rank {rank} on {host} has WORLD_SIZE={world_size}, and a rank that came to {place} before has "
            f"WORLD_SIZE={size}. Start all ranks with the same, and other runs with another MASTER_PORT."
        )
    elif number > 1:
        wrong = (
            f"rank {rank} on {host} is process {number} that came to {place} with RANK={rank}; the first is on "
            f"{store.get(f'arrived/{rank}').decode()}. Give each process its own RANK."
        )
    if wrong is not None:
        store.set("refused", wrong)
        raise ConfigError(wrong)
    store.set(f"arrived/{rank}", host)


def _connect(rank: int, world_size: int, *, place: str, timeout: timedelta) -> Store:
    host, _, port = place.rpartition(":")
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun serves it
    try:
        store = dist.TCPStore(
            host, int(port), world_size, rank == 0 and not by_agent, timeout, wait_for_workers=False, multi_tenant=True
        )
    except (DistStoreError, DistNetworkError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise ConfigError(
                f"MASTER_PORT={port} is in use on {socket.gethostname()} by another program, or another run. Give "
                "another: torchrun --master-port N, or MASTER_PORT."
            ) from error
        raise RanksMissing(f"rank {rank} could not reach rank 0 at {place}: {_first_line(error)}") from error
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"megatron_mm/{life}", store)


def _await_all(store: Store, world_size: int, *, timeout: timedelta) -> None:
    """Return when every rank has come; say every PATIENCE_SECONDS who has and who has not.

    Raises ConfigError if a process came that does not belong to these ranks.
    """
    began = said = time.monotonic()
    absent = list(range(world_size))
    while absent := [rank for rank in absent if not store.check([f"arrived/{rank}"])]:
        if store.check(["refused"]):
            raise ConfigError(store.get("refused").decode())
        now = time.monotonic()
        if now - began > timeout.total_seconds():
            raise RanksMissing(f"after {now - began:.0f} s {_describe(store, absent, world_size)}")
        if now - said > PATIENCE_SECONDS:
            log.warning("waiting for ranks for %.0f s: %s", now - began, _describe(store, absent, world_size))
            said = now
        time.sleep(POLL_SECONDS)


def _describe(store: Store, absent: list[int], world_size: int) -> str:
    """Return which ranks have come, host by host, and which have not."""
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank in sorted(set(range(world_size)) - set(absent)):
        hosts[store.get(f"arrived/{rank}").decode()].append(rank)
    come = "; ".join(f"{_ranks(ranks)} on {host}" for host, ranks in hosts.items())
    return (
        f"{world_size - len(absent)} of {world_size} ranks have come ({come}); missing: {_ranks(absent)}. Look at "
        "their logs and nodes."
    )


def _ranks(ranks: list[int]) -> str:
    """Return ranks as ranges, shortened."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    names = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


@contextmanager
def _complaining(what: str) -> Iterator[None]:
    """Log `what` every PATIENCE_SECONDS while the body runs."""
    over, began = threading.Event(), time.monotonic()

    def complain() -> None:
        while not over.wait(PATIENCE_SECONDS):
            log.warning("%s for %.0f s", what, time.monotonic() - began)

    thread = threading.Thread(target=complain, name="rendezvous", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
