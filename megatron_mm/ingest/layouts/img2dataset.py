"""What img2dataset writes: tars, folders or Parquet files of images, and beside each a table of what was downloaded."""

import re
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megatron_mm.ingest.layouts.json_heads import read_object
from megatron_mm.ingest.layouts.tree import Tree

STATS = re.compile(r"(\d+)_stats\.json")
TABLE_COLUMNS = {"key", "status", "url"}


def arrange(tree: Tree) -> None:
    """Set aside the tables and statistics that lie beside the images: they name failed downloads too."""
    for folder in tree.folders():
        files = tree.files(folder)
        for file in files:
            found = STATS.fullmatch(file.name)
            if found is not None and _is_statistics(file):
                tree.set_aside(file, "img2dataset's statistics of a download")
            elif file.suffix == ".parquet" and _images_beside(tree, file) and _is_table(file):
                tree.set_aside(file, "img2dataset's table of a download")


def _images_beside(tree: Tree, table: Path) -> bool:
    return tree.has(table.with_suffix(".tar")) or bool(tree.files(table.with_suffix("")))


def _is_statistics(path: Path) -> bool:
    said = read_object(path)
    return said is not None and {"count", "successes"} <= said.keys()


def _is_table(path: Path) -> bool:
    try:
        with path.open("rb") as file:  # pyarrow opens no names that are not UTF-8
            return set(pyarrow.parquet.read_schema(file).names) >= TABLE_COLUMNS
    except (pyarrow.ArrowException, OSError):
        return False
