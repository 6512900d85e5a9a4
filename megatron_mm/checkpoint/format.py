"""The files of a checkpoint on disk: written aside, listed with their hashes, committed last.

A checkpoint is a folder step_N. It is written as step_N.TOKEN.partial, where TOKEN is the life of the run that writes;
manifest.json lists every file with its size and SHA-256; COMMITTED, written last, holds the hash of the manifest; then
the folder is renamed. Only a folder named step_N with COMMITTED in it is a checkpoint, and nothing in it ever changes.
"""

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
from megatron_mm.outside import file_name, parse_json, read_json
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
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((path for path in found if (path / COMMITTED).exists()), key=step_of)


def unfinished_ones(folder: Path) -> list[Path]:
    """Return the folders that are called as checkpoints are but were never committed: copies that were cut short."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted((path for path in found if not (path / COMMITTED).exists()), key=step_of)


def name_of(step: int) -> str:
    """Return the name of the checkpoint of a step."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))


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
    """Return the manifest of a checkpoint. Raises DataError if it is damaged, or not the one that was committed."""
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
        manifest = read_json(path / MANIFEST, Listed)
    except OSError as error:
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
        data = (path / MANIFEST).read_bytes()
        manifest = parse_json(data, Facts, where=MANIFEST)
        committed = (path / COMMITTED).read_text().strip()
    except (OSError, ValueError) as error:
        raise DataError(f"{path / MANIFEST} or {COMMITTED} cannot be read ({type(error).__name__}: {error})") from error
    if _sha256(data) != committed:
        raise DataError(f"{path / MANIFEST} is not the manifest that was committed: it is stale or damaged")
    for name in manifest["bytes"]:
        file_name(name, where=path / MANIFEST)
        if name not in manifest["sha256"]:
            raise DataError(f"{path / MANIFEST} has no sha256 of {name}")
    return manifest


def set_aside(path: Path, kind: str) -> Path:
    """Rename a checkpoint so that it is none any more, and return its new name."""
    aside = path.with_name(f"{path.name}.{kind}")
    shutil.rmtree(aside, ignore_errors=True)
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
        token = f"{named}.{uuid.uuid4().hex[:8]}"
        make_folder(folder)
        with replacing(folder / OWNER, aside=f".{token}") as file:  # another job may write it at the same time
            file.write(token.encode())
        for path in folder.glob("*.partial"):
            shutil.rmtree(path, ignore_errors=True)
        return cls(folder, token)

    def holds(self, folder: Path) -> bool:
        """Return whether the checkpoints in `folder`, as this node sees it, are this job's."""
        try:
            return (folder / OWNER).read_text(errors="replace").strip() == self.token
        except OSError:
            return False

    def check(self) -> None:
        """Pass if this job still owns the run; raise TakenOver if not."""
        owner = self._path.read_text(errors="replace").strip() if self._path.exists() else "nobody"
        if owner != self.token:
            raise TakenOver(
                f"{self._path} names {owner}, this job is {self.token}: another job goes on with this run, so this one "
                "stops and commits nothing."
            )
