"""The files under the inputs, by folder, and which of them a layout has taken."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mm.ingest.table_rows import Table

HEAD_BYTES = 64 * 2**10
"""Bytes of a file by which a layout may tell what it is."""


@dataclass(frozen=True)
class Found:
    """A file under an input, or something else that nobody reads."""

    path: Path
    refusal: str = ""
    """Why it is not opened."""


@dataclass(frozen=True)
class Entry:
    """A file to read, and the files that are read with it."""

    path: Path
    layout: str
    beside: tuple[Path, ...] = ()
    """Files that hold its text, or more of it."""
    table: Table | None = None
    refusal: str = ""
    """Why it is not opened."""
    more_bytes: int = 0
    """Bytes of the files that its rows name."""


@dataclass(frozen=True)
class SetAside:
    """A file that is no document of its own, and what it is."""

    path: Path
    what: str


@dataclass(frozen=True)
class Arranged:
    """What becomes of the files of a tree: each is one of these, once."""

    entries: Sequence[Entry]
    """What to read, in the order in which it was found."""
    aside: Sequence[SetAside]
    with_others: int
    """How many files are read with an entry: beside it, or named by it."""


class Tree:
    """Files by folder. What a layout takes, or sets aside, is gone for those after it."""

    def __init__(self, found: Sequence[Found], *, of_archive: bool = False) -> None:
        self.of_archive, self.layout = of_archive, ""
        self._order = {one.path: number for number, one in enumerate(found)}
        self._left: dict[Path, dict[str, Path]] = {}
        self._used: set[Path] = set()
        self._beside: set[Path] = set()
        self.aside: list[SetAside] = []
        self._entries: dict[int, Entry] = {}
        for one in found:
            if one.refusal:
                self._entries[self._order[one.path]] = Entry(one.path, "", refusal=one.refusal)
            else:
                self._left.setdefault(one.path.parent, {})[one.path.name] = one.path

    def folders(self) -> list[Path]:
        """Return the folders that still hold files, in the order in which they were found."""
        return [folder for folder, files in self._left.items() if files]

    def files(self, folder: Path) -> list[Path]:
        """Return the files of a folder that nobody has taken."""
        return list(self._left.get(folder, {}).values())

    def below(self, folder: Path) -> Iterator[Path]:
        """Yield the files in and below a folder that nobody has taken."""
        for other in self.folders():
            if other.is_relative_to(folder):
                yield from self.files(other)

    def all(self) -> list[Path]:
        """Return every file that nobody has taken, in order."""
        return [path for folder in self.folders() for path in self.files(folder)]

    def has(self, path: Path) -> bool:
        """Tell whether a file is there and nobody has taken it."""
        return path.name in self._left.get(path.parent, {})

    def take(self, path: Path, *, beside: Iterable[Path] = (), table: Table | None = None, more_bytes: int = 0) -> None:
        """Have a file read, and `beside` with it."""
        beside = tuple(beside)
        self._entries[self._order[path]] = Entry(path, self.layout, beside, table, more_bytes=more_bytes)
        self._beside.update(beside)
        for one in (path, *beside):
            self._forget(one)

    def refuse(self, path: Path, reason: str) -> None:
        """Have a file rejected."""
        self._entries[self._order[path]] = Entry(path, self.layout, refusal=reason)
        self._forget(path)

    def set_aside(self, path: Path, what: str) -> None:
        """Note that a file is no document of its own, but `what`: a few words."""
        self.aside.append(SetAside(path, what))
        self._forget(path)

    def use(self, path: Path) -> None:
        """Note that another file names a file and is read with it."""
        self._used.add(path)
        self._forget(path)

    def used(self) -> frozenset[Path]:
        """Return the files that others name."""
        return frozenset(self._used)

    def was_used(self, path: Path) -> bool:
        """Tell whether another file names a file."""
        return path in self._used

    def take_rest(self) -> None:
        """Have every file read that nobody has taken."""
        for path in self.all():
            self.take(path)

    def entries(self) -> list[Entry]:
        """Return what to read, in the order in which it was found."""
        return [entry for _, entry in sorted(self._entries.items())]

    def arranged(self) -> Arranged:
        """Return what becomes of every file. Raises AssertionError unless each is there once: a layout is wrong."""
        entries = self.entries()
        counts = Counter([*(one.path for one in entries), *(one.path for one in self.aside)])
        counts.update((self._used | self._beside) & self._order.keys())
        wrong = [f"{path}, {counts[path]} times" for path in self._order if counts[path] != 1]
        assert not wrong and len(counts) == len(self._order), f"layouts do not account for each file once: {wrong[:3]}"
        return Arranged(entries, self.aside, len(counts) - len(entries) - len(self.aside))

    def _forget(self, path: Path) -> None:
        self._left.get(path.parent, {}).pop(path.name, None)


def head(path: Path, num_bytes: int = HEAD_BYTES) -> str:
    """Return the first bytes of a file as text; what is not UTF-8 is replaced, for it is only looked at."""
    with path.open("rb") as file:
        return file.read(num_bytes).decode("utf-8-sig", "replace")
