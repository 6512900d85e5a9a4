"""A disk that keeps only what was synced: every state in which a power cut can leave a folder while something is done.

A file has the bytes of its last fsync, a folder the names of its own last fsync. What came after may be there or not,
each name by itself, each file whole, half or not at all. This is slow and obvious, and no file system is worse.
"""

import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

Tree = tuple[tuple[str, "bytes | Tree"], ...]
Place = tuple[int, str]
"""The inode of a folder, and a name in it."""
CHANGES = ("rename", "replace", "unlink", "mkdir", "rmdir", "link")
SYNCS = ("fsync", "fdatasync")


class Disk:
    """Follows what is done in the folder `root`, all of which is on the disk at first.

    Of the syncs, those numbered `ignored` do not reach the disk.
    """

    def __init__(self, root: Path, *, ignored: Collection[int] = ()) -> None:
        self._root, self._ignored = root, ignored
        self.syncs: list[str] = []
        """What was synced, by name."""
        self.states: dict[tuple[Tree, bool], None] = {}
        """What a power cut may leave, each once, and whether all was done by then."""
        self._held: dict[int, int] = {}  # keeps the number of a removed file from being given to another
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {}
        self._files, self._folders = self._look()

    def during(self, action: Callable[[], Any]) -> None:
        """Do something, with the power cut before each of its changes, and after the last."""
        watched = {name: self._changing(name) for name in CHANGES} | {name: self._syncing(name) for name in SYNCS}
        with mock.patch.multiple(os, **watched):
            action()
        self._cut(done=True)

    def _changing(self, name: str) -> Callable[..., Any]:
        change = getattr(os, name)

        def cut_and_change(*args: Any, **kwargs: Any) -> Any:
            self._cut(done=False)
            return change(*args, **kwargs)

        return cut_and_change

    def _syncing(self, name: str) -> Callable[[int], None]:
        def sync(descriptor: int) -> None:
            self._cut(done=False)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self.syncs.append(str(path.relative_to(self._root.parent)))
            if len(self.syncs) - 1 not in self._ignored:
                inode = os.fstat(descriptor).st_ino
                if path.is_dir():
                    self._folders[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
                else:
                    self._files[inode] = path.read_bytes()

        return sync

    def _look(self) -> tuple[dict[int, bytes], dict[int, dict[str, int]]]:
        """Return the bytes of each file and the names in each folder as they are now, synced or not."""
        files, folders = {}, {}
        for folder, _, names in os.walk(self._root):
            for path in (Path(folder), *(Path(folder, name) for name in names)):
                inode = path.stat().st_ino
                if inode not in self._held:
                    self._held[inode] = os.open(path, os.O_RDONLY)
                if path.is_dir():
                    folders[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
                else:
                    files[inode] = path.read_bytes()
        return files, folders

    def _cut(self, *, done: bool) -> None:
        files, folders = self._look()
        pending = sorted(
            (inode, name)
            for inode in folders.keys() | self._folders.keys()
            for name in folders.get(inode, {}).keys() | self._folders.get(inode, {}).keys()
            if folders.get(inode, {}).get(name) != self._folders.get(inode, {}).get(name)
        )
        for arrived in _choices(pending):
            names = {inode: dict(self._folders.get(inode, {})) for inode in folders.keys() | self._folders.keys()}
            for inode, name in arrived:
                if name in folders.get(inode, {}):
                    names[inode][name] = folders[inode][name]
                else:
                    names[inode].pop(name, None)
            for portion in (0.0, 0.5, 1.0) if arrived in ([], pending) else (0.0,):
                now = {inode: data[: int(portion * len(data))] for inode, data in files.items()} if portion else {}
                content = {inode: self._files.get(inode, b"") for inode in files.keys() | self._files.keys()} | now
                content |= {inode: data for inode, data in self._files.items() if files.get(inode, data) == data}
                tree = _tree(os.stat(self._root).st_ino, names, content)
                self.states[tree, done] = None


def _choices(pending: list[Place]) -> Iterator[list[Place]]:
    """Yield what may have arrived on the disk of what is pending: nothing, all, each alone, all but one, and some."""
    yield []
    yield pending
    for place in pending:
        yield [place]
        yield [other for other in pending if other != place]
    chance = random.Random(len(pending))
    for _ in range(2 * (len(pending) > 2)):
        yield [place for place in pending if chance.random() < 0.5]


def _tree(inode: int, names: dict[int, dict[str, int]], content: dict[int, bytes]) -> Tree:
    return tuple(
        (name, _tree(child, names, content) if child in names else content.get(child, b""))
        for name, child in sorted(names[inode].items())
    )


def make(tree: Tree, folder: Path) -> Path:
    """Make the files of `tree` in `folder`, which is emptied first, and return it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in tree:
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            make(content, folder / name)
    return folder


class Judge:
    """Makes states anew in the folder `scratch`, and asks of each once whether it is well."""

    def __init__(self, scratch: Path, is_well: Callable[[Path, bool], bool]) -> None:
        self._scratch, self._is_well = scratch, is_well
        self._known: dict[tuple[Tree, bool], bool] = {}

    def bad(self, disk: Disk) -> Iterator[Tree]:
        """Yield the states of `disk` that are not well."""
        for state in disk.states:
            tree, done = state
            if state not in self._known:
                self._known[state] = self._is_well(make(tree, self._scratch), done)
            if not self._known[state]:
                yield tree
