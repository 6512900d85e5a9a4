"""Files that other files name: the images of pages, JSON lines and Parquet rows are no documents of their own."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import orjson
import pyarrow
import pyarrow.parquet

from megatron_mm.ingest import kinds
from megatron_mm.ingest.fields import FILE_NAMES, IMAGES, LISTS_OF_FILE_NAMES, MEDIA_NAMES
from megatron_mm.ingest.layouts.pairs import is_captioned
from megatron_mm.ingest.layouts.tree import Tree, head

IMAGE_OF_PAGE = re.compile(rb"""<img\b[^>]*?\bsrc\s*=\s*["']?([^"'>]+)""", re.IGNORECASE)
KEYS = MEDIA_NAMES | set(FILE_NAMES) | set(LISTS_OF_FILE_NAMES)
MEDIA_KEY = re.compile("|".join(f'"{name}"' for name in sorted(KEYS)))
LINES = re.compile(r"\{[^\n]*\}[ \t\r]*\n\s*\{")
"""How JSON lines begin, whatever they are named."""
LOOKED_AT = 20
"""Lines of a file by which it is told whether its records name files."""


def arrange(tree: Tree) -> None:
    """Leave the media to those that name them: they are read there, in their place."""
    if not any(is_captioned(path) for path in tree.all()):
        return
    for path in tree.all():
        is_page = kinds.by_suffix(path) == kinds.HTML
        folders = (path.parent,) if is_page else (path.parent, path.parent / IMAGES)
        for name in _names(path):
            name = unquote(name).partition("?")[0].removeprefix("./")
            target = next((folder / name for folder in folders if tree.has(folder / name)), path)
            if target != path and is_captioned(target):
                tree.use(target)


def _names(path: Path) -> Iterable[str]:
    """Return the names that a file may name others by."""
    kind = kinds.by_suffix(path)
    if kind == kinds.HTML:
        return [name.decode("utf-8", "replace") for name in IMAGE_OF_PAGE.findall(path.read_bytes())]
    if kind == kinds.JSONL:
        return _names_in_lines(path)
    if kind == kinds.PARQUET:
        return _names_in_rows(path)
    if path.suffix == ".json" and MEDIA_KEY.search(start := head(path).lstrip()):
        if start.startswith("["):
            return _names_in_array(path)
        if LINES.match(start):
            return _names_in_lines(path)
    return ()


def _names_in_array(path: Path) -> Iterator[str]:
    try:
        yield from _names_in(orjson.loads(path.read_bytes()))
    except orjson.JSONDecodeError:  # its reader will say so
        return


def _names_in_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        named = False
        for number, line in enumerate(file):
            if number == LOOKED_AT and not named:
                return
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            for name in _names_in(record):
                named = True
                yield name


def _names_in(record: Any) -> Iterator[str]:
    """Yield what the media fields of a record say, wherever they stand, however deep."""
    left = [record]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += reversed(one)
        elif isinstance(one, dict):
            for key, value in one.items():
                if key in KEYS:
                    yield from (
                        name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)
                    )
            left += [value for key, value in one.items() if key not in KEYS or isinstance(value, dict)]


def _names_in_rows(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as source, pyarrow.parquet.ParquetFile(source) as file:
            columns = [field.name for field in file.schema_arrow if field.name in KEYS and field.type in STRINGS]
            for batch in file.iter_batches(columns=columns) if columns else ():
                for column in batch.columns:
                    yield from (name for name in column.to_pylist() if name)
    except (pyarrow.ArrowException, OSError):  # its reader will say so
        return


STRINGS = (pyarrow.string(), pyarrow.large_string())
