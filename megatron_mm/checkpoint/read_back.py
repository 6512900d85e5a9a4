"""Reading a checkpoint back from the disk, in the background, on another rank than wrote it.

What a rank reads where it has written is its own page cache: that the bytes are on the disk is seen from elsewhere.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mm.storage import hash_file

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 90.0
"""How long a file that cannot be read is tried again: NFS keeps for up to a minute that there was none."""


def readers(hosts: Sequence[str]) -> list[int]:
    """Return for each rank, by the hosts of all, which one reads back what it has written; each reads for one.

    It is a rank of another host unless one host has more than half of all ranks, and another rank unless there is none.
    """
    order = sorted(range(len(hosts)), key=lambda rank: (hosts[rank], rank))
    most = max(Counter(hosts).values())
    shift = most if most < len(hosts) else len(hosts) // 2
    found = [0] * len(hosts)
    for place, rank in enumerate(order):
        found[rank] = order[(place + shift) % len(hosts)]
    return found


def shares(written: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> list[Mapping[str, str]]:
    """Return what each rank reads back, by what each has written: SHA-256 by the name of the file."""
    found: list[Mapping[str, str]] = [{}] * len(hosts)
    for rank, reader in enumerate(readers(hosts)):
        found[reader] = written[rank]
    return found


@dataclass
class Problems:
    """What came of reading files back, a line for each that was not as it should be."""

    damaged: list[str] = field(default_factory=list)
    """These have other bytes than were written."""
    unread: list[str] = field(default_factory=list)
    """These may be whole: nobody could say."""


class ReadBack:
    """Compares files in `folder` with their SHA-256, by name, in a thread."""

    def __init__(self, folder: Path, hashes: Mapping[str, str]) -> None:
        self._folder, self._hashes, self._found = folder, hashes, Problems()
        self._thread = threading.Thread(target=self._read, name="read back", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            self._found.unread.append(f"{folder}: {error}")

    def is_busy(self) -> bool:
        """Return whether files are still being read."""
        return self._thread.is_alive()

    def result(self) -> Problems:
        """Wait until all files are read, and return what was found."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._found

    def _read(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        for name, expected in self._hashes.items():
            path = self._folder / name
            try:
                # Twice: a bit that flipped in this machine's memory is no damage of the disk's.
                if all(_hash_patiently(path, deadline) != expected for _ in range(2)):
                    self._found.damaged.append(f"{path} has other bytes on the disk than were written")
            except Exception as error:
                self._found.unread.append(f"{path} cannot be read back: {type(error).__name__}: {error}")


def _hash_patiently(path: Path, deadline: float) -> str:
    """Return the hash of a file on the disk, trying again until the deadline if it cannot be read."""
    seconds = 0.1
    while True:
        try:
            return hash_file(path, from_disk=True)
        except OSError:
            if time.monotonic() + seconds > deadline:
                raise
        time.sleep(seconds)
        seconds = min(2 * seconds, 10.0)
