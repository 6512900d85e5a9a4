"""What is wrong with a checkpoint on disk, by its manifest; needs neither torch nor a process group."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_mm.checkpoint.format import COMMITTED, MANIFEST, read_manifest, read_source_manifest
from megatron_mm.errors import DataError
from megatron_mm.outside import file_name, load_json
from megatron_mm.retry import retrying
from megatron_mm.storage import hash_file

log = logging.getLogger(__name__)

HASHERS = 8
"""Threads that hash files of one checkpoint, where there are no ranks to share them."""
OUTLINE = ("config.yaml", ".metadata")
"""Files that say what a checkpoint holds: they are looked at before any tensor is."""
NOT_THERE = "not there"
"""What a rank sees of a checkpoint that others see and it does not."""
EDGE_BYTES = 1 << 20
"""How many bytes at the beginning and the end of each file of an import its fingerprint counts."""


def find_damage(
    path: Path, *, share: int = 0, of: int = 1, names: Sequence[str] | None = None, is_source: bool = False
) -> list[str]:
    """Return what is wrong with a checkpoint, a line for each file; of the files' hashes, check the share-th part.

    Each of `of` readers hashes its own files; sizes are checked by the first alone. With `names`, only those files are
    looked at. A checkpoint that `is_source` of weights may have any name, and, imported by an older version, no hashes.
    A file that storage does not give is no damaged one: StorageFailed is raised once it has been tried for long,
    OSError for what no waiting helps. One that is missing counts as damaged: whoever asks has made sure that the ranks
    see the same files.
    """
    try:
        manifest = read_source_manifest(path) if is_source else read_manifest(path)
        sizes, hashes = dict(manifest["bytes"]), manifest.get("sha256", {})
    except (DataError, KeyError, TypeError, ValueError) as error:
        return [str(error) if isinstance(error, DataError) else f"{path / MANIFEST} is damaged"] if share == 0 else []
    problems = []
    looked_at = {name: size for name, size in sizes.items() if names is None or name in names}
    for number, (name, size) in enumerate(sorted(looked_at.items())):
        file = path / name
        if share and number % of != share:
            continue  # a thousand readers would ask for the size of each of a thousand files
        found = retrying(lambda file=file: _size(file), what=file, ours=True)
        if found is None:
            problems += [f"{file} is missing"] if share == 0 else []
        elif found != size:
            problems += [f"{file} has {found} bytes, its manifest says {size}"] if share == 0 else []
        elif number % of == share and name in hashes and _hash(file) != hashes[name]:
            problems.append(f"{file} has other bytes than were written: its SHA-256 is not the manifest's")
    return problems


def _size(file: Path) -> int | None:
    """Return the bytes of a file, None if there is none."""
    try:
        return file.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _hash(file: Path) -> str:
    return retrying(lambda: hash_file(file), what=file, ours=True)


def view(path: Path) -> str:
    """Return what this rank sees of a checkpoint in a few words: the same if it sees the same files and commit.

    It is for ranks to compare: the directory cache of a network's file system shows a node what was there before.
    """
    try:
        names = sorted(os.listdir(path))
        commit = (path / COMMITTED).read_bytes() if COMMITTED in names else b""
    except FileNotFoundError:
        return NOT_THERE
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return hashlib.sha256(json.dumps(names).encode() + commit).hexdigest()


def has_hashes(path: Path) -> bool:
    """Tell whether a checkpoint says which bytes its files hold: imports of older versions say only how many."""
    return "sha256" in read_source_manifest(path)


def check_source(path: Path) -> None:
    """Pass if every file of a checkpoint that weights are taken from is as it was written. Raises DataError.

    Files are hashed by HASHERS threads; of a checkpoint without hashes, sizes are all that can be compared.
    """
    with ThreadPoolExecutor(HASHERS) as pool:
        shares = pool.map(lambda share: find_damage(path, share=share, of=HASHERS, is_source=True), range(HASHERS))
        problems = [line for lines in shares for line in lines]
    if problems:
        raise DataError(f"{path} is damaged:\n  " + "\n  ".join(problems))
    if not has_hashes(path):
        log.warning("%s records no hashes, as older imports do not: only the sizes of its files were compared", path)


def check_outline(path: Path) -> int:
    """Return the step of a checkpoint of any name, whose settings and index are as they were written.

    Raises DataError if it is no checkpoint, a file has another size than it should, or one of these has other bytes.
    """
    try:
        load_json((path / MANIFEST).read_bytes())  # says what is wrong with it more plainly
        manifest = read_source_manifest(path)
    except (DataError, OSError, ValueError) as error:
        inside = sorted(str(file.parent) for file in path.glob(f"**/step_*/{MANIFEST}"))
        hint = f" Did you mean {inside[-1]}?" if inside else ""
        reason = f"{MANIFEST}: {error.strerror}" if isinstance(error, OSError) else f"{MANIFEST} is damaged: {error}"
        raise DataError(
            f"{path} is not a checkpoint of this package ({reason}). A checkpoint is a folder "
            f"RUN_DIR/checkpoints/step_N.{hint}"
        ) from error
    for name, size in manifest["bytes"].items():
        file_name(name, where=path / MANIFEST)
        found = retrying(lambda file=path / name: _size(file), what=path / name)
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{path / name} {what}, its manifest says {size}: the checkpoint is damaged.")
    if problems := find_damage(path, names=OUTLINE, is_source=True):
        raise DataError("\n  ".join(problems) + ". The checkpoint is damaged.")
    return manifest["step"]


def fingerprint(path: Path) -> str:
    """Return a hash that identifies a checkpoint: of its manifest where that holds the files' own.

    An older import's does not: of its files count names, sizes, and the first and last megabyte.
    """
    data = retrying((path / MANIFEST).read_bytes, what=path / MANIFEST)
    if b'"sha256"' in data:
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256(data)
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + stream.read(EDGE_BYTES))
            stream.seek(max(0, file.stat().st_size - EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()
