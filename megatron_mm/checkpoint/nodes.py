"""The nodes that keep copies in memory: their names and addresses, whose share each keeps, and in which folder."""

import fcntl
import hashlib
import os
import socket
from pathlib import Path
from typing import IO

from megatron_mm.errors import ConfigError


def memory_folder(memory_dir: str, run_dir: str) -> Path:
    """Return where this node keeps copies of the run of `run_dir`: a folder that is this user's alone, made if missing.

    Raises ConfigError if it is somebody else's, open to others, or cannot be made.
    """
    run = hashlib.sha256(os.path.abspath(run_dir).encode()).hexdigest()[:16]
    own = Path(memory_dir, f"megatron_mm-{os.geteuid()}")
    for path in (own, own / run):
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            found = path.lstat()
        except OSError as error:
            raise ConfigError(
                f"checkpoint.memory_dir={memory_dir} cannot be written: {type(error).__name__}: {error}. Give a folder "
                "of a file system in memory, or checkpoint.memory_interval=0."
            ) from error
        if path.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise ConfigError(
                f"{path}, for copies of the run, is not a folder of this user alone (user {found.st_uid}, mode "
                f"{found.st_mode & 0o7777:o}). Remove it, or give another checkpoint.memory_dir."
            )
    return own / run


def partners(hosts: list[str], *, stride: int, dp_size: int) -> list[int]:
    """Return, of each rank, the rank whose node keeps its share a second time.

    That is the rank half of the data-parallel ranks away, which are `stride` ranks apart, if it is on another host;
    otherwise the one half of all ranks away, or the first of the next host.
    """
    size = len(hosts)
    along_dp = [rank + ((rank // stride + dp_size // 2) % dp_size - rank // stride % dp_size) * stride
                for rank in range(size)]  # fmt: skip
    shifts = [size // 2, hosts.count(hosts[0]) % size]
    choices = [along_dp, *([(rank + shift) % size for rank in range(size)] for shift in shifts)]
    return max(choices, key=lambda choice: sum(hosts[one] != hosts[other] for one, other in enumerate(choice)))


def host_name() -> str:
    """Return the name of this node: ranks of the same name lose their memory together."""
    return socket.gethostname()


def address() -> str:
    """Return where ranks on other nodes reach this one: its address on the way to rank 0's node."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))  # sends nothing
            own = probe.getsockname()[0]
        except OSError:
            own = "127.0.0.1"
    return master if own.startswith("127.") else own  # rank 0's node may know itself by a name that only it has


def lock_file(file: IO) -> bool:
    """Lock an open file for as long as it is open; return whether that could be had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
