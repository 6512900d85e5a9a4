"""What is wrong with a checkpoint on disk, by its manifest; needs neither torch nor a process group."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from pydantic import ConfigDict

from megatron_mm.checkpoint.format import MANIFEST, read_manifest
from megatron_mm.errors import DataError
from megatron_mm.outside import file_name, read_json
from megatron_mm.settings import NonNegativeInt
from megatron_mm.storage import hash_file

EDGE_BYTES = 1 << 20
"""How many bytes at the beginning and the end of each file of an import its fingerprint counts."""


class Listed(TypedDict):
    """What the manifest says of any checkpoint, one that was imported too."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    step: NonNegativeInt
    bytes: dict[str, NonNegativeInt]


def find_damage(path: Path, *, share: int = 0, of: int = 1, names: Sequence[str] | None = None) -> list[str]:
    """Return what is wrong with a checkpoint, a line for each file; of the files' hashes, check the share-th part.

    Each of `of` readers hashes its own files; sizes are checked by the first alone. With `names`, only those files are
    looked at.
    """
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return [str(error)] if share == 0 else []
    problems = []
    looked_at = {name: size for name, size in manifest["bytes"].items() if names is None or name in names}
    for number, (name, size) in enumerate(sorted(looked_at.items())):
        file = path / name
        try:
            found = file.stat().st_size
            if found != size:
                problems += [f"{file} has {found} bytes, its manifest says {size}"] if share == 0 else []
            elif number % of == share and hash_file(file) != manifest["sha256"][name]:
                problems.append(f"{file} has other bytes than were written: its SHA-256 is not the manifest's")
        except OSError as error:
            problems += [f"{file} cannot be read: {error.strerror}"] if share == 0 or number % of == share else []
    return problems


def check_sizes(path: Path) -> int:
    """Return the step of a checkpoint. Raises DataError if it is not one, or a file has another size than it should."""
    try:
        manifest = read_json(path / MANIFEST, Listed)
        sizes, step = manifest["bytes"], manifest["step"]
    except (OSError, DataError) as error:
        inside = sorted(str(file.parent) for file in path.glob(f"**/step_*/{MANIFEST}"))
        hint = f" Did you mean {inside[-1]}?" if inside else ""
        reason = f"{MANIFEST}: {error.strerror}" if isinstance(error, OSError) else f"{MANIFEST} is damaged: {error}"
        raise DataError(
            f"{path} is not a checkpoint of this package ({reason}). A checkpoint is a folder "
            f"RUN_DIR/checkpoints/step_N.{hint}"
        ) from error
    for name, size in sizes.items():
        file_name(name, where=path / MANIFEST)
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes"
            raise DataError(f"{path / name} {what}, its manifest says {size}: the checkpoint is damaged.")
    return step


def fingerprint(path: Path) -> str:
    """Return a hash that identifies a checkpoint: of its manifest where that holds the files' own.

    An import's does not: of its files count names, sizes, and the first and last megabyte.
    """
    data = (path / MANIFEST).read_bytes()
    if b'"sha256"' in data:
        return hashlib.sha256(data).hexdigest()
    digest = hashlib.sha256(data)
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        with file.open("rb") as stream:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + stream.read(EDGE_BYTES))
            stream.seek(max(0, file.stat().st_size - EDGE_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()
