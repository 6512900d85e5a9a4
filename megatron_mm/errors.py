"""The three kinds of errors, and which of them the system's own are; what is none of them is a defect of ours.

The user's (ConfigError) and the data's (DataError) are final: the same command fails again until someone mends it. The
world's (RunStopped: storage, network, nodes, another rank) may be gone at the next try. `endings` gives each its exit
status.
"""

import errno


class ConfigError(ValueError):
    """A setting cannot be honoured: the message names the key as the user types it, and a value that works."""


class DataError(ValueError):
    """A file is not what it should be: the message names the path, the record, and what to do."""


class RunStopped(RuntimeError):
    """To go on would do harm: the message says why. Another try, from the last checkpoint, may go better."""


class TakenOver(RunStopped):
    """Another job has started to write this run: this one must not, and no other try of it may."""


class StorageFailed(RunStopped):
    """A file could not be read or written, for longer than it was tried: nothing says that the file is damaged."""


PASSING = frozenset(
    {
        *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR),
        *(errno.ENFILE, errno.EMFILE, errno.ENOMEM, errno.ENOLCK, errno.ENOSPC, errno.EDQUOT),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN),
        *(errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ESHUTDOWN),
    }
)
"""What a disk, a network or a full table says: no path or setting is wrong, and waiting helps."""
PASSING_FOR_OURS = PASSING | {errno.EACCES, errno.EPERM, errno.ENOENT}
"""Of a file that the run itself has written, or that other ranks see, these do not last either: a network's file system
says them while a server or a ticket is renewed, or a folder is cached."""


def is_passing(error: OSError, *, ours: bool = False) -> bool:
    """Tell whether what the system refused may pass by itself; `ours` if the file is known to be there."""
    return error.errno in (PASSING_FOR_OURS if ours else PASSING)


def of_system(error: OSError, *, where: str = "") -> ConfigError | StorageFailed:
    """Return which of our errors a refusal of the system is: the world's if it may pass, the user's if not.

    `where` is said of an error that names no file.
    """
    name = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else error.filename
    what = "writing failed" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO) else "the system refused"
    place = f"{what}{f' ({where})' if where else ''}" if name is None else f"{name}"
    reason = f"{place}: {error.strerror or error}."
    if is_passing(error):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = "Make room on its disk, and start again." if full else "Look at the storage, and start again."
        return StorageFailed(f"{reason} {todo}")
    return ConfigError(f"{reason} {TO_MEND.get(error.errno or 0, 'Give a path that exists.')}")


TO_MEND = {
    errno.EACCES: "Give a path that this user may use, or change its permissions.",
    errno.EPERM: "Give a path that this user may use, or change its permissions.",
    errno.EROFS: "Give a path on a disk that can be written.",
    errno.EISDIR: "It is a folder: give a file.",
    errno.ENOTDIR: "A part of the path is a file: give folders.",
    errno.EEXIST: "Remove it, or give another path.",
    errno.ENOTEMPTY: "Remove it, or give another path.",
}
"""What the user does about a path that the system refuses for good."""
