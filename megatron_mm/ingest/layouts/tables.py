"""Tables beside media: a column names images, recordings or videos, another holds their text.

LJSpeech's metadata.csv, the metadata.csv and .tsv of Hugging Face's imagefolder and audiofolder, file lists of speech
models and captions in CSV are all this; which column is which is told by what the cells name.
"""

import csv
import os.path
from collections import Counter
from dataclasses import replace
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest import kinds
from megatron_mm.ingest.fields import Fields, Part, built_in
from megatron_mm.ingest.layouts.naming import take_table
from megatron_mm.ingest.layouts.pairs import is_captioned
from megatron_mm.ingest.layouts.tree import Table, Tree, head
from megatron_mm.ingest.table_rows import read_rows

SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".psv", ".list", ".lst"})
LOOKED_AT = 64
"""Rows by which a table is told."""
LEAST_NAMED = 0.5
"""The part of them whose cell must name a file that is there."""
ANYWHERE = "*"
"""Stands for a suffix where names are those of files in several folders."""
NO_TEXT = "a list of media without their text"
"""What a table is that says where parts of recordings come from, or what class images are of, in numbers."""
HERE = Path(".")
"""The folder that paths are seen from which do not begin at the root."""
KIND_OF = {kinds.IMAGE: "image", kinds.AUDIO: "audio", kinds.VIDEO: "video"}
TEXTS = frozenset({*built_in()[-1].parts[-1].text, "comment"})
"""Columns of text; Flickr30k's captions are comments."""


def arrange(tree: Tree) -> None:
    """Take each table of a column of files that are there, in its folder or one beside it, and a column of text."""
    media = Media(tree)
    if not media:
        return
    for folder in tree.folders():
        for file in tree.files(folder):
            if file.suffix.lower() in SUFFIXES and not media.is_named_like(file):
                table = recognise(file, media)
                if table == NO_TEXT:
                    tree.set_aside(file, NO_TEXT)
                elif isinstance(table, str):
                    tree.refuse(file, table)
                elif table is not None:
                    take_table(tree, file, _beyond_its_first_rows(file, table, media))


class Media:
    """The media of a tree, by name."""

    def __init__(self, tree: Tree) -> None:
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        self._by_folder: dict[Path, set[str]] = {}
        for path in tree.all():
            if is_captioned(path):
                self._by_folder.setdefault(path.parent, set()).add(path.name)
                self._by_name.setdefault(path.name, []).append(path)
                self._by_stem.setdefault(path.stem, []).append(path)

    def __bool__(self) -> bool:
        return bool(self._by_name)

    def is_named_like(self, path: Path) -> bool:
        """Tell whether a medium beside a file has its name: then it is the text of that one."""
        return any(one.parent == path.parent for one in self._by_stem.get(path.stem, []))

    def named(self, cell: str) -> list[tuple[Path, Path, str]]:
        """Return the files that a cell may name: each, the folder that it is named from, and the suffix it lacks."""
        wanted = Path(cell)
        if wanted.is_absolute() or ".." in wanted.parts or not wanted.parts:
            return []
        whole = [(path, "") for path in self._by_name.get(wanted.name, [])]
        stems = [(path, path.suffix) for path in self._by_stem.get(wanted.name, [])]
        depth = len(wanted.parts)
        return [
            (path, path.parents[depth - 1], suffix)
            for path, suffix in whole or stems
            if path.parts[-depth:-1] == wanted.parts[:-1]
        ]

    def find(self, cells: list[str], folder: Path) -> tuple[Path, Path, str] | None:
        """Return the first file that a column of cells names, from which folder, and the suffix that cells lack.

        The folder lies below that of the table, or beside it. None if the column names too few files.
        """
        places = [self.named(cell) for cell in cells]
        votes: Counter[tuple[Path, str]] = Counter()
        for found in places:
            votes.update({(base, suffix) for _, base, suffix in found if base.is_relative_to(folder.parent)})
        if not votes:
            return None
        # Of folders that would do, the one nearest to the table.
        (base, suffix), number = max(votes.items(), key=lambda one: (one[1], one[0][0].is_relative_to(folder)))
        if number < LEAST_NAMED * len(cells):
            return None
        first = next(path for found in places for path, own, _ in found if own == base)
        return first, base, suffix

    def names_in(self, folder: Path) -> set[str]:
        """Return the names of the media in a folder."""
        return self._by_folder.get(folder, set())

    def is_in(self, folder: Path, cell: str) -> bool:
        """Tell whether a cell names a file from a folder."""
        return any(own == folder for _, own, _ in self.named(cell))

    def find_scattered(self, cells: list[str], folder: Path) -> tuple[Path, Path, str] | None:
        """Return the same of a column of names whose files lie in several folders, in or beside that of the table."""
        found = [path for cell in cells if (path := self.only(cell, folder)) is not None]
        if len(found) < LEAST_NAMED * len(cells) or len({path.parent for path in found}) < 2:
            return None
        is_inside = all(_is_below(path, folder) for path in found)
        return found[0], folder if is_inside else folder.parent, ANYWHERE

    def only(self, cell: str, folder: Path) -> Path | None:
        """Return the one file that has a name, or a stem, in or below the folder above that of a table."""
        files = [*self._by_name.get(cell, []), *(path for path in self._by_stem.get(cell, []) if path.name != cell)]
        below = [path for path in files if _is_below(path, folder.parent)]
        return below[0] if len(below) == 1 else None


def _is_below(path: Path, folder: Path) -> bool:
    """Tell whether a file lies in or below a folder, as is_relative_to does in ten times the time."""
    return folder == HERE or str(path).startswith(os.path.join(folder, ""))


def recognise(path: Path, media: Media) -> Table | str | None:
    """Return how to read a table of media, why it cannot be, or None for what is no such table."""
    text = head(path)
    first = text.partition("\n")[0]
    delimiter = next((one for one in ("\t", "|", ",") if one in first), None)
    if delimiter is None:
        return None
    lines = text.splitlines()[: LOOKED_AT + 1]
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    rows = [row for row in csv.reader(lines, delimiter=delimiter, quoting=quoting) if row]
    where = _find_column(rows, path.parent, media)
    if where is None:
        return None
    column, folder, suffix, kind = where
    if len(rows[0]) <= column:
        return None
    base = path.parent if folder.is_relative_to(path.parent) else path.parent.parent
    first = rows[0][column]
    has_header = not (media.only(first, path.parent) if suffix == ANYWHERE else media.is_in(folder, first))
    names = [name.strip() for name in rows[0]] if has_header else [f"column {number}" for number in range(len(rows[0]))]
    if has_header:
        texts = [name for name in names if name in TEXTS]
        if not texts:
            return (
                f"its column {names[column]!r} names files, and none of {names} is known to be their text. "
                "Say which with --fields"
            )
    else:
        texts = [names[number] for number in range(len(names)) if number != column and is_text(rows, number)][:1]
        if not texts:
            return NO_TEXT
    where_it_lies = {"folder": str(folder.relative_to(base)), "suffix": suffix} if suffix != ANYWHERE else {}
    part = Part.model_validate({kind: names[column], **where_it_lies})
    fields = Fields(name="table", parts=[part, Part(text=_by_preference(texts))])
    columns, anywhere = () if has_header else tuple(names), names[column] if suffix == ANYWHERE else ""
    joined_by, has_quotes = names[column], delimiter == ","
    return Table(fields, base, delimiter, columns, has_quotes, anywhere=anywhere, joined_by=joined_by)


def _beyond_its_first_rows(path: Path, table: Table, media: Media) -> Table:
    """Return how to read a table of names of which the first have files in one folder, and later ones in others."""
    part, column = table.fields.parts[0], table.joined_by
    if table.anywhere:
        return table
    try:
        names = {str(row.cells.get(column, "")) for row in read_rows(path, table)}
    except DataError:  # its reader will say so
        return table
    there = media.names_in(Path(os.path.normpath(table.base / part.folder)))
    missing = [name for name in names if "/" not in name and name + part.suffix not in there]
    if not any(media.only(name, path.parent) for name in missing):
        return table
    found = [place for name in names if (place := media.only(name, path.parent)) is not None]
    if len(found) <= len(names) - len(missing):
        return table
    kind = KIND_OF[kinds.by_suffix(found[0])]
    fields = Fields(name=table.fields.name, parts=[Part.model_validate({kind: column}), *table.fields.parts[1:]])
    is_inside = all(_is_below(place, path.parent) for place in found)
    base = path.parent if is_inside else path.parent.parent
    return replace(table, fields=fields, base=base, anywhere=column)


def _find_column(rows: list[list[str]], folder: Path, media: Media) -> tuple[int, Path, str, str] | None:
    """Return the column that names files, from which folder, what suffix it leaves out, and their kind."""
    body = rows[1:] or rows
    for column in range(max(map(len, rows))):
        cells = [row[column] for row in body if len(row) > column and row[column]]
        where = media.find_scattered(cells, folder) or media.find(cells, folder)
        if where is not None:
            path, base, suffix = where
            return column, base, suffix, KIND_OF[kinds.by_suffix(path)]
    return None


def is_text(rows: list[list[str]], column: int) -> bool:
    """Tell whether most cells of a column are words."""
    cells = [row[column] for row in rows if len(row) > column]
    return sum(" " in cell.strip() and any(map(str.isalpha, cell)) for cell in cells) * 2 > len(cells)


def _by_preference(names: list[str]) -> list[str]:
    order = built_in()[-1].parts[-1].text
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))
