"""The files under the inputs, each once, and what is passed over."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest.layouts import Found
from megatron_mm.ingest.layouts.hub_cache import is_blob, is_name_of_blob

HIDDEN = "hidden files, and files in hidden folders"
OWN = "files that this tool writes, and its tokenizer"
NAMES = "other names of files that are read"


@dataclass
class Finding:
    """What there is under the inputs."""

    files: list[Found] = field(default_factory=list)
    """What is read, or refused, in a fixed order."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """How many files are not, by why."""


def find_files(
    inputs: Sequence[str], *, follow_links: bool = False, output_prefix: str = "", tokenizer: str = ""
) -> Finding:
    """Return what there is under `inputs` in a fixed order; a file that has several names, or is given twice, once.

    What an input names is read, whatever it is a link to. Below a folder, hidden files are passed over, and so are the
    tokenizer and what is written to `output_prefix`; links that lead out of it are refused, unless `follow_links` has
    those to files read, or they are the hub cache's own. Raises ConfigError for an input that does not exist, DataError
    if nothing is found.
    """
    found = Finding()
    seen: set[tuple[int, int]] = set()
    is_own = _own_files(output_prefix, tokenizer)
    for text in inputs:
        for one in _below(Path(text), found, follow_links=follow_links):
            if one.refusal:
                found.files.append(one)
                continue
            status = one.path.stat()
            inode = (status.st_dev, status.st_ino)
            if is_own(one.path):
                found.passed_over[OWN] += 1
            elif inode in seen:
                found.passed_over[NAMES] += 1
            else:
                if not is_blob(one.path):  # its name in snapshots/ says more
                    seen.add(inode)
                found.files.append(one)
    if not found.files:
        raise DataError(f"there are no files under {', '.join(inputs)}. Give --input files, or folders that hold some.")
    return found


def _below(path: Path, found: Finding, *, follow_links: bool) -> Iterator[Found]:
    if not path.exists():
        raise ConfigError(f"{path} does not exist: --input takes files and folders.")
    if path.is_file():
        yield Found(path)
        return
    if not path.is_dir():
        raise DataError(f"{path} is a pipe, a socket or a device: --input takes files and folders.")
    for inner in sorted(path.rglob("*")):
        refusal = _refuse(inner, path, follow_links=follow_links)
        if not refusal and not inner.is_file():
            continue
        if any(part.startswith(".") for part in inner.parts[len(path.parts) :]):
            found.passed_over[HIDDEN] += 1
        else:
            yield Found(inner, refusal)


def _own_files(output_prefix: str, tokenizer: str):
    """Return a function that tells the files that a run writes, and its tokenizer, from inputs."""
    if not output_prefix:
        return lambda path: False
    prefix, own_tokenizer = Path(output_prefix).resolve(), Path(tokenizer).resolve()
    names = re.compile(re.escape(prefix.name) + r"(-\d{5}-of-\d{5})?\.")

    def is_own(path: Path) -> bool:
        if names.match(path.name) is None and path.name != own_tokenizer.name and not path.is_symlink():
            return False
        resolved = path.resolve()
        return resolved == own_tokenizer or (
            resolved.parent == prefix.parent and names.match(resolved.name) is not None
        )

    return is_own


def _refuse(path: Path, folder: Path, *, follow_links: bool) -> str:
    """Return why what was found below an input folder is not opened; "" of a file that is, and of what holds nothing.

    A link within the folder is one more name of a file, and of a folder it adds nothing.
    """
    if path.is_symlink():
        if not path.exists():
            return "it is a link to nothing"
        target = path.resolve()
        is_outside = not target.is_relative_to(folder.resolve())
        if is_outside and path.is_dir():
            return f"it is a link to the folder {target}, outside of {folder}: give that to --input too"
        if is_outside and not follow_links and not is_name_of_blob(path):
            return (
                f"it is a link to {target}, outside of {folder}: read it with --follow-links, or give that to --input"
            )
    return "" if path.is_file() or path.is_dir() else "it is a pipe, a socket or a device, not a file"
