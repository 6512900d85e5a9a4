"""Taking a table and the files that its rows name."""

import os.path
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest.fields import Part
from megatron_mm.ingest.layouts.tree import Tree
from megatron_mm.ingest.media_values import MEDIA
from megatron_mm.ingest.table_rows import Table, read_rows


def take_table(tree: Tree, path: Path, table: Table) -> bool:
    """Have a table read, its files with it; rows whose files others have are skipped. Return whether it was.

    A table whose files have all been taken by others before is set aside.
    """
    try:
        rows = read_rows(path, table)
    except DataError as error:
        tree.refuse(path, str(error))
        return True
    parts = [(part, name) for part in table.fields.parts for kind in MEDIA for name in getattr(part, kind)]
    skipped: set[int] = set()
    used: list[Path] = []
    for number, row in enumerate(rows):
        cells = row.cells
        named = [named_file(table.base, part, cells[name]) for part, name in parts if isinstance(cells.get(name), str)]
        if named and all(tree.was_used(file) for file in named):
            skipped.add(number)
        for file in named:
            tree.use(file)
            used.append(file)
    if len(skipped) == len(rows):
        tree.set_aside(path, "a table of files that another table has")
        return False
    sizes = sum(file.stat().st_size for file in set(used) if file.is_file())
    tree.take(path, table=table.counted(len(rows), frozenset(skipped)), more_bytes=sizes)
    return True


def named_file(base: Path, part: Part, name: str) -> Path:
    """Return the file that a cell names."""
    return Path(os.path.normpath(base / part.folder / (name + part.suffix)))
