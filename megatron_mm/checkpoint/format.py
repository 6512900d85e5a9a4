"""The files of a checkpoint on disk: written aside, listed with their hashes, committed last.

A checkpoint is a folder step_N. It is written as step_N.TOKEN.partial, where TOKEN is the life of the run that writes;
manifest.json lists every file with its size and SHA-256; COMMITTED, written last, holds the hash of the manifest; then
the folder is renamed. Only a folder named step_N with COMMITTED in it is a checkpoint, and nothing in it ever changes.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from pydantic import ConfigDict, Field

from megatron_mm.errors import DataError, TakenOver
from megatron_mm.outside import checked, file_name, load_json, parse_json
from megatron_mm.retry import retrying
from megatron_mm.settings import NonNegativeInt
from megatron_mm.storage import give_name, hash_file, make_folder, publish_folder, replacing

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
SEAL = "manifest_sha256"
"""What an import's manifest calls its own hash."""
OWNER = "OWNER"
REMOVED = "removed.partial"
"""Follows the name of what is no checkpoint any more, while its files go."""
TOKENIZER = "tokenizer.json"
"""That of the run's shards, beside the tensors: without it nobody can tell whether ids mean the same."""


class Facts(TypedDict):
    """What the manifest of a checkpoint says: its files, and what of the run stands in none of them."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    step: NonNegativeInt
    bytes: dict[str, NonNegativeInt]
    sha256: dict[str, str]
    run: NotRequired[str]
    batch_sizes: NotRequired[list[Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]]]
    left_out: NotRequired[list[Annotated[list[NonNegativeInt], Field(min_length=3, max_length=3)]]]
    changes: NotRequired[list[dict[str, Any]]]
    inputs: NotRequired[dict[str, Any] | None]


class Listed(TypedDict):
    """What the manifest says of any checkpoint, one that was imported too."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    step: NonNegativeInt
    bytes: dict[str, NonNegativeInt]
    sha256: NotRequired[dict[str, str]]


def whole_ones(folder: Path) -> list[Path]:
    """Return the committed checkpoints in `folder`, oldest first."""
    return [path for path in _listed(folder, r"step_\d+") if _is_there(path / COMMITTED)]


def unfinished_ones(folder: Path) -> list[Path]:
    """Return the folders that are called as checkpoints are but were never committed: copies that were cut short."""
    return [path for path in _listed(folder, r"step_\d+") if not _is_there(path / COMMITTED)]


def damaged_ones(folder: Path) -> list[Path]:
    """Return what was set aside as damaged: a run that has lost its checkpoints must not look like a new one."""
    return _listed(folder, r"step_\d+(\.\d+)?\.damaged")


def _listed(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in `folder` of this name, by their steps; none if there is no folder.

    A folder that is there and cannot be listed is no empty one: Path.glob says nothing of EACCES.
    """

    def names() -> list[str]:
        try:
            return os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []

    found = retrying(names, what=folder, ours=True)
    return sorted((folder / name for name in found if re.fullmatch(pattern, name)), key=step_of)


def _is_there(path: Path) -> bool:
    """Return whether there is a file; one that storage does not show for now may be there."""

    def look() -> bool:
        try:
            return bool(path.stat())
        except (FileNotFoundError, NotADirectoryError):
            return False

    return retrying(look, what=path, ours=True)


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step_").split(".")[0])


def commit(
    partial: Path, final: Path, *, hashes: dict[str, str], facts: dict[str, Any], fence: "Fence"
) -> dict[str, str]:
    """Make the files in `partial` the checkpoint `final`, and return the SHA-256 of all its files by their names.

    `hashes` are those of the files that their writers have hashed and brought to the disk. Raises TakenOver if another
    job owns the run by now, OSError if the disk refuses.
    """
    files = sorted(path for path in partial.iterdir())
    sizes = {path.name: path.stat().st_size for path in files}
    missing = hashes.keys() - sizes.keys()
    if missing:
        raise FileNotFoundError(f"{partial} has lost {', '.join(sorted(missing))}")
    listed = {path.name: hashes.get(path.name) or hash_file(path) for path in files}
    manifest = json.dumps({**facts, "bytes": sizes, "sha256": listed}, indent=1).encode()
    for name, content in ((MANIFEST, manifest), (COMMITTED, _sha256(manifest).encode() + b"\n")):
        (partial / name).write_bytes(content)
        listed[name] = _sha256(content)
    publish_folder(partial, final, synced=hashes.keys(), check=fence.check)
    return listed


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint.

    Raises DataError if it is damaged, or not the one that was committed; StorageFailed if storage does not give it.
    """
    manifest = _read_committed(path)
    if manifest["step"] != step_of(path):
        raise DataError(f"{path / MANIFEST} is of step {manifest['step']}")
    return manifest


def read_source_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint that weights are taken from: of any name, a run's or an import.

    Imports are not committed: their manifest holds its own hash, that of older versions none. Raises DataError.
    """
    if (path / COMMITTED).exists():
        return _read_committed(path)
    try:
        manifest = parse_json(_read(path / MANIFEST), Listed, where=str(path / MANIFEST))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"{path / MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if SEAL in manifest and manifest[SEAL] != seal_of(manifest):
        raise DataError(f"{path / MANIFEST} does not say what was written: it is damaged")
    return manifest


def seal_of(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all that a manifest says but its own hash."""
    rest = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_committed(path: Path) -> dict[str, Any]:
    try:
        data, committed = _read(path / MANIFEST), _read(path / COMMITTED).decode().strip()
        manifest = checked(load_json(data), Facts, where=MANIFEST)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        raise DataError(f"{path / MANIFEST} or {COMMITTED} cannot be read ({type(error).__name__}: {error})") from error
    if _sha256(data) != committed:
        raise DataError(f"{path / MANIFEST} is not the manifest that was committed: it is stale or damaged")
    for name in manifest["bytes"]:
        file_name(name, where=path / MANIFEST)
        if name not in manifest["sha256"]:
            raise DataError(f"{path / MANIFEST} has no sha256 of {name}")
    return manifest


def _read(path: Path) -> bytes:
    """Return the bytes of a small file of a checkpoint. Raises FileNotFoundError at once, for others to judge."""
    if not _is_there(path):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return retrying(path.read_bytes, what=path, ours=True)


def set_aside(path: Path, kind: str) -> Path:
    """Rename a checkpoint so that it is none any more, and return its new name: one that nothing has yet."""
    aside, number = path.with_name(f"{path.name}.{kind}"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{number}.{kind}")
    give_name(path, aside)
    return aside


def remove_old(folder: Path, *, keep: int, keep_every: int) -> list[str]:
    """Remove all checkpoints but the newest `keep` and those of every `keep_every`-th step (0: none of them).

    Returns what could not be removed, and why; the next call tries it again.
    """
    problems = []
    try:
        for path in whole_ones(folder)[:-keep]:
            if not (keep_every and step_of(path) % keep_every == 0):
                problems += _try(lambda path=path: set_aside(path, REMOVED))  # at once: a reader finds all or nothing
        for path in sorted(folder.glob(f"*.{REMOVED}")):
            problems += _try(lambda path=path: shutil.rmtree(path))
    except OSError as error:
        problems.append(f"{folder} cannot be listed: {error}")
    return problems


def _try(action: Callable[[], Any]) -> list[str]:
    """Return why an action was refused; nothing if it was not."""
    try:
        action()
    except OSError as error:
        return [f"{type(error).__name__}: {error}"]
    return []


class Fence:
    """Keeps a job that lives on from committing to a run which another job has taken over.

    A node that SLURM has given up may be alive, with access to the same files.
    """

    def __init__(self, folder: Path, token: str) -> None:
        self._path, self.token = folder / OWNER, token

    @classmethod
    def take(cls, folder: Path) -> "Fence":
        """Become the owner of the checkpoints in `folder`, and remove what other lives left half-written."""
        job = os.environ.get("SLURM_JOB_ID", "local")
        life = os.environ.get("SLURM_RESTART_COUNT", "0")
        named = re.sub(r"[^\w.-]+", "_", f"{job}.{life}.{socket.gethostname()}")  # it is a part of names of files
        fence = cls(folder, f"{named}.{uuid.uuid4().hex[:8]}")
        retrying(fence._write, what=folder / OWNER, ours=_may_be_there(folder / OWNER))
        for path in folder.glob("*.partial"):
            shutil.rmtree(path, ignore_errors=True)
        return fence

    def _write(self) -> None:
        make_folder(self._path.parent)
        with replacing(self._path, aside=f".{self.token}") as file:  # another job may write it at the same time
            file.write(self.token.encode())

    def holds(self, folder: Path) -> bool:
        """Return whether the checkpoints in `folder`, as this node sees it, are this job's. Raises OSError."""
        try:
            return (folder / OWNER).read_text(errors="replace").strip() == self.token
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Pass if this job still owns the run; raise TakenOver if not, StorageFailed if nobody can tell."""
        try:
            owner = _read(self._path).decode(errors="replace").strip()
        except FileNotFoundError:
            owner = "nobody"
        if not owner:
            log.warning("%s is empty, as no job leaves it: it names this one again", self._path)
            retrying(self._write, what=self._path, ours=True)
        elif owner != self.token:
            raise TakenOver(
                f"{self._path} names {owner}, this job is {self.token}: another job goes on with this run, so this one "
                "stops and commits nothing."
            )


def _may_be_there(path: Path) -> bool:
    """Return whether a file is there as far as storage says: only a clear answer says that it is not."""
    try:
        return bool(path.stat())
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR)
